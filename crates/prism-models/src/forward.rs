//! Tokens through the layers.
//!
//! On the CPU, threads take runs of rows through what is done row by row. Elsewhere rows stay
//! together, and attention gets Q and K before their rotary embedding, which it applies where it pools
//! them. The rows may be of several sequences, end to end; each attends over its own cache.
//! Who studies attention is given the Q, K and V of each layer.

use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_prism::{AttentionOptions, PrismCache, Report, RopeLayout, RotaryTable};
use prism_core::error::Result;

use crate::batch::{BatchTrace, Sequence};
use crate::llama::{DecoderLayer, Llama, LlamaCache};
use crate::model_error::ModelError;
use crate::rope::Rotation;
use crate::rows;
use crate::self_attention::LayerTrace;
use crate::stopwatch::{PartSeconds, Stopwatch};

/// What the attention of one layer reads, after normalisation and rotary embedding.
#[derive(Debug, Clone)]
pub struct LayerInputs {
    /// Index of the layer.
    pub layer: usize,
    /// Queries of the tokens that were run, `[1, q_heads, n, head_dim]`.
    pub q: Tensor<4>,
    /// Keys of all the cache holds, those tokens' own last, `[1, kv_heads, kv_len, head_dim]`.
    pub k: Tensor<4>,
    /// Values, as the keys.
    pub v: Tensor<4>,
}

/// Who hears of each layer.
struct Listeners<'a, E> {
    trace: Option<&'a mut dyn FnMut(BatchTrace)>,
    /// Only of a sequence by itself.
    inputs: Option<&'a mut dyn FnMut(LayerInputs) -> Result<(), E>>,
}

impl Llama {
    /// Runs the tokens that follow those in the cache and returns their final hidden states
    /// `[1, n, hidden]`. `trace` hears from every layer as it ends, and makes its parts be timed.
    ///
    /// # Errors
    /// No tokens, ids past the vocabulary, more than the cache has room for: the cache is unchanged
    /// then. A cache made for blocks of another size than a layer's: reset it then.
    pub fn hidden(
        &self,
        ids: &[u32],
        cache: &mut LlamaCache,
        options: &AttentionOptions,
        trace: Option<&mut dyn FnMut(LayerTrace)>,
    ) -> Result<Tensor<3>, ModelError> {
        self.check(ids, cache)?;
        let mut trace = trace.map(single);
        let only = Sequence { prompt: 0, ids, cache, options: options.clone() };
        self.pass(vec![only], trace.as_mut().map(|trace| trace as _))
    }

    /// As [`hidden`](Self::hidden), and `visit` gets the Q, K and V of every layer when the layer has run,
    /// however it attends.
    ///
    /// # Errors
    /// As [`hidden`](Self::hidden), and the first that `visit` returns: the layers after that one have not
    /// run then, and the cache is good for nothing until it is reset.
    pub fn hidden_with_inputs<E: From<ModelError>>(
        &self,
        ids: &[u32],
        cache: &mut LlamaCache,
        options: &AttentionOptions,
        visit: &mut dyn FnMut(LayerInputs) -> Result<(), E>,
    ) -> Result<Tensor<3>, E> {
        self.check(ids, cache)?;
        let only = Sequence { prompt: 0, ids, cache, options: options.clone() };
        self.pass_to(vec![only], Listeners { trace: None, inputs: Some(visit) })
    }

    /// The final hidden states `[1, n, hidden]` of checked sequences, end to end.
    pub(crate) fn pass(
        &self,
        sequences: Vec<Sequence<'_>>,
        trace: Option<&mut dyn FnMut(BatchTrace)>,
    ) -> Result<Tensor<3>, ModelError> {
        self.pass_to(sequences, Listeners { trace, inputs: None })
    }

    fn pass_to<E: From<ModelError>>(
        &self,
        mut sequences: Vec<Sequence<'_>>,
        mut listeners: Listeners<'_, E>,
    ) -> Result<Tensor<3>, E> {
        let device = self.device();
        let tokens: Vec<i32> =
            sequences.iter().flat_map(|one| one.ids).map(|&id| id as i32).collect();
        let n = tokens.len();
        let tokens =
            Tensor::<1, Int>::from_data(TensorData::new(tokens, [n]), (&device, DType::I32));
        let x = self.embedding.val().select(0, tokens).unsqueeze_dim::<3>(0);
        let mut watch = Stopwatch::start(&device, listeners.trace.is_some());
        let observed = listeners.inputs.is_some();
        if rows::cut(&device) {
            let runs = rows::runs(n);
            let rotation = self.rotation(&sequences)?;
            let rotations: Vec<_> = runs.iter().map(|run| rotation.part(run.clone())).collect();
            let mut x: Vec<_> =
                runs.iter().map(|run| x.clone().slice_dim(1, run.clone())).collect();
            for (index, layer) in self.layers.iter().enumerate() {
                let done = layer
                    .in_runs(index, x, &rotations, &mut sequences, (&mut watch, observed))
                    .map_err(ModelError::from)?;
                x = listeners.tell(index, done, &sequences)?;
            }
            return Ok(Tensor::cat(x, 1));
        }
        let tables = self.angles(&mut sequences)?;
        let mut x = x;
        for (index, layer) in self.layers.iter().enumerate() {
            let done = layer
                .whole(index, x, &tables, &mut sequences, (&mut watch, observed))
                .map_err(ModelError::from)?;
            x = listeners.tell(index, done, &sequences)?;
        }
        Ok(x)
    }

    /// The rotation of all rows, each sequence's from where its cache ends.
    fn rotation(&self, sequences: &[Sequence<'_>]) -> Result<Rotation, ModelError> {
        let of = |one: &Sequence<'_>| -> Result<Rotation, ModelError> {
            Ok(Rotation::new(
                &self.inv_freq_in(one.cache)?,
                self.config.rope.attention_factor(),
                one.cache.len(),
                one.ids.len(),
                (self.dtype(), &self.device()),
            ))
        };
        Ok(Rotation::join(sequences.iter().map(of).collect::<Result<_, _>>()?))
    }

    /// The angles of all positions of each cache. They are made when a cache is first used, and caches
    /// with the same frequencies share them.
    fn angles(&self, sequences: &mut [Sequence<'_>]) -> Result<Vec<RotaryTable>, ModelError> {
        let longest = sequences.iter().map(|one| one.cache.capacity()).max().unwrap_or(0);
        let mut made: Option<(Vec<f64>, RotaryTable)> = None;
        let mut tables = Vec::with_capacity(sequences.len());
        for Sequence { cache, .. } in sequences {
            let inv_freq = self.inv_freq_in(cache)?;
            let fits = |held: &&(Vec<f64>, RotaryTable)| held.0 == *inv_freq;
            if let Some((_, table)) = cache.angles.as_ref().filter(fits) {
                tables.push(table.clone());
                continue;
            }
            let held = made.take().filter(|held| fits(&held));
            let (inv_freq, table) = held.unwrap_or_else(|| {
                let factor = self.config.rope.attention_factor();
                let layout = RopeLayout::RotateHalf;
                let device = self.device();
                let table = RotaryTable::from_inv_freq(&inv_freq, factor, layout, longest, &device);
                (inv_freq.into_owned(), table)
            });
            tables.push(table.clone());
            cache.angles = Some((inv_freq.clone(), table.clone()));
            made = Some((inv_freq, table));
        }
        Ok(tables)
    }
}

/// What came of a layer.
struct Done<X> {
    /// Hidden states after it.
    x: X,
    /// What its attention did to each sequence.
    reports: Vec<(usize, Report)>,
    /// Where the time went.
    parts: PartSeconds,
    /// The rotated queries of a sequence by itself, if they are asked for.
    q: Option<Tensor<4>>,
}

impl<E> Listeners<'_, E> {
    /// Tells of a layer that has run, and returns its hidden states.
    fn tell<X>(&mut self, layer: usize, done: Done<X>, sequences: &[Sequence<'_>]) -> Result<X, E> {
        let Done { x, reports, parts, q } = done;
        if let Some(trace) = &mut self.trace {
            trace(BatchTrace { layer, reports, parts });
        }
        if let (Some(visit), Some(q), [only]) = (&mut self.inputs, q, sequences) {
            let cache = &only.cache.layers[layer];
            visit(LayerInputs { layer, q, k: cache.keys(), v: cache.values() })?;
        }
        Ok(x)
    }
}

impl DecoderLayer {
    /// Of all rows `[1, n, hidden]` at once.
    fn whole(
        &self,
        index: usize,
        x: Tensor<3>,
        tables: &[RotaryTable],
        sequences: &mut [Sequence<'_>],
        (watch, observed): (&mut Stopwatch, bool),
    ) -> Result<Done<Tensor<3>>> {
        let mut parts = PartSeconds::default();
        let normed = self.input_norm.forward(x.clone());
        parts.rest += watch.lap();
        let projected = self.attention.project(normed)?;
        parts.linear += watch.lap();
        let q = match (observed, tables, &*sequences) {
            (true, [table], [only]) => {
                Some(table.rotate(projected[0].clone(), only.cache.layers[index].len())?)
            }
            _ => None,
        };
        let (attended, reports) = each(projected, index, sequences, |at, qkv, cache, options| {
            self.attention.attend_with_rope(qkv, &tables[at], cache, options)
        })?;
        parts.attention += watch.lap();
        let x = self.attention.output(attended, x)?;
        parts.linear += watch.lap();
        let normed = self.post_norm.forward(x.clone());
        parts.rest += watch.lap();
        let x = self.mlp.forward(normed, x)?;
        parts.linear += watch.lap();
        Ok(Done { x, reports, parts, q })
    }

    /// Of runs of rows `[1, n, hidden]`, in parallel.
    fn in_runs(
        &self,
        index: usize,
        x: Vec<Tensor<3>>,
        rotations: &[Rotation],
        sequences: &mut [Sequence<'_>],
        (watch, observed): (&mut Stopwatch, bool),
    ) -> Result<Done<Vec<Tensor<3>>>> {
        let mut parts = PartSeconds::default();
        let projected = rows::map(x.iter().zip(rotations).collect(), |(x, rotation)| {
            let [q, k, v] = self.attention.project(self.input_norm.forward(x.clone()))?;
            Ok([rotation.apply(q), rotation.apply(k), v])
        });
        let projected = join(projected.into_iter().collect::<Result<_>>()?);
        parts.linear += watch.lap();
        let q = observed.then(|| projected[0].clone());
        let (attended, reports) = each(projected, index, sequences, |_, qkv, cache, options| {
            self.attention.attend(qkv, cache, options)
        })?;
        parts.attention += watch.lap();
        let mut first = 0;
        let starts = x.into_iter().map(|x| {
            let n = x.dims()[1];
            first += n;
            (x, first - n..first)
        });
        let added = rows::map(starts.collect(), |(x, run)| {
            let x = self.attention.output(attended.clone().slice_dim(2, run), x)?;
            self.mlp.forward(self.post_norm.forward(x.clone()), x)
        });
        let x = added.into_iter().collect::<Result<_>>()?;
        parts.linear += watch.lap();
        Ok(Done { x, reports, parts, q })
    }
}

/// Attention of each sequence in layer `index`, of queries, keys and values that are end to end;
/// `attend` also gets the sequence's place among the others.
fn each(
    qkv: [Tensor<4>; 3],
    index: usize,
    sequences: &mut [Sequence<'_>],
    attend: impl Fn(
        usize,
        [Tensor<4>; 3],
        &mut PrismCache,
        &AttentionOptions,
    ) -> Result<(Tensor<4>, Report)>,
) -> Result<(Tensor<4>, Vec<(usize, Report)>)> {
    if let [Sequence { prompt, cache, options, .. }] = sequences {
        let (attended, report) = attend(0, qkv, &mut cache.layers[index], options)?;
        return Ok((attended, vec![(*prompt, report)]));
    }
    let (mut outputs, mut reports) = (Vec::new(), Vec::new());
    let mut first = 0;
    for (at, Sequence { prompt, ids, cache, options }) in sequences.iter_mut().enumerate() {
        let rows = first..first + ids.len();
        first = rows.end;
        let own = qkv.each_ref().map(|x| x.clone().slice_dim(2, rows.clone()));
        let (attended, report) = attend(at, own, &mut cache.layers[index], options)?;
        outputs.push(attended);
        reports.push((*prompt, report));
    }
    Ok((Tensor::cat(outputs, 2), reports))
}

/// The trace of a batch whose one prompt is told of.
pub(crate) fn single(trace: &mut dyn FnMut(LayerTrace)) -> impl FnMut(BatchTrace) {
    |BatchTrace { layer, reports, parts }| {
        for (_, report) in reports {
            trace(LayerTrace { layer, report, seconds: parts.attention, parts });
        }
    }
}

/// Queries, keys and values of consecutive rows, each joined along the rows.
fn join(parts: Vec<[Tensor<4>; 3]>) -> [Tensor<4>; 3] {
    let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
    for [q_part, k_part, v_part] in parts {
        q.push(q_part);
        k.push(k_part);
        v.push(v_part);
    }
    [q, k, v].map(|parts| Tensor::cat(parts, 2))
}
