//! Tokens through the layers.
//!
//! On the CPU, threads take runs of rows through what is done row by row. Elsewhere a prompt stays whole, and
//! attention gets Q and K before their rotary embedding, which it applies where it pools them.

use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_prism::{AttentionOptions, PrismCache, Report, RopeLayout, RotaryTable};
use prism_core::error::Result;

use crate::llama::{DecoderLayer, Llama, LlamaCache};
use crate::model_error::ModelError;
use crate::rope::Rotation;
use crate::rows;
use crate::self_attention::LayerTrace;
use crate::stopwatch::{PartSeconds, Stopwatch};

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
        mut trace: Option<&mut dyn FnMut(LayerTrace)>,
    ) -> Result<Tensor<3>, ModelError> {
        let n = ids.len();
        self.check(ids, cache)?;
        let device = self.device();
        let tokens: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        let tokens =
            Tensor::<1, Int>::from_data(TensorData::new(tokens, [n]), (&device, DType::I32));
        let x = self.embedding.val().select(0, tokens).unsqueeze_dim::<3>(0);
        let mut watch = Stopwatch::start(&device, trace.is_some());
        if rows::cut(&device) {
            let runs = rows::runs(n);
            let rotation = Rotation::new(
                &self.inv_freq_in(cache)?,
                self.config.rope.attention_factor(),
                cache.len(),
                n,
                (self.dtype(), &device),
            );
            let rotations: Vec<_> = runs.iter().map(|run| rotation.part(run.clone())).collect();
            let mut x: Vec<_> =
                runs.iter().map(|run| x.clone().slice_dim(1, run.clone())).collect();
            for (index, (layer, cache)) in self.layers.iter().zip(&mut cache.layers).enumerate() {
                let (next, report, parts) =
                    layer.in_runs(x, &rotations, cache, options, &mut watch)?;
                x = next;
                tell(&mut trace, index, report, parts);
            }
            return Ok(Tensor::cat(x, 1));
        }
        let table = self.angles(cache)?;
        let mut x = x;
        for (index, (layer, cache)) in self.layers.iter().zip(&mut cache.layers).enumerate() {
            let (next, report, parts) = layer.whole(x, &table, cache, options, &mut watch)?;
            x = next;
            tell(&mut trace, index, report, parts);
        }
        Ok(x)
    }

    /// The angles of all positions of a cache, made when it is first used.
    fn angles(&self, cache: &mut LlamaCache) -> Result<RotaryTable, ModelError> {
        let inv_freq = self.inv_freq_in(cache)?;
        if let Some((_, table)) = cache.angles.as_ref().filter(|held| held.0 == *inv_freq) {
            return Ok(table.clone());
        }
        let table = RotaryTable::from_inv_freq(
            &inv_freq,
            self.config.rope.attention_factor(),
            RopeLayout::RotateHalf,
            cache.capacity(),
            &self.device(),
        );
        cache.angles = Some((inv_freq.into_owned(), table.clone()));
        Ok(table)
    }
}

/// Hidden states after a layer, what its attention did, and where the time went.
type Done<X> = (X, Report, PartSeconds);

impl DecoderLayer {
    /// Of all rows `[1, n, hidden]` at once.
    fn whole(
        &self,
        x: Tensor<3>,
        table: &RotaryTable,
        cache: &mut PrismCache,
        options: &AttentionOptions,
        watch: &mut Stopwatch,
    ) -> Result<Done<Tensor<3>>> {
        let mut parts = PartSeconds::default();
        let normed = self.input_norm.forward(x.clone());
        parts.rest += watch.lap();
        let projected = self.attention.project(normed)?;
        parts.linear += watch.lap();
        let (attended, report) =
            self.attention.attend_with_rope(projected, table, cache, options)?;
        parts.attention += watch.lap();
        let x = self.attention.output(attended, x)?;
        parts.linear += watch.lap();
        let normed = self.post_norm.forward(x.clone());
        parts.rest += watch.lap();
        let x = self.mlp.forward(normed, x)?;
        parts.linear += watch.lap();
        Ok((x, report, parts))
    }

    /// Of runs of rows `[1, n, hidden]`, in parallel.
    fn in_runs(
        &self,
        x: Vec<Tensor<3>>,
        rotations: &[Rotation],
        cache: &mut PrismCache,
        options: &AttentionOptions,
        watch: &mut Stopwatch,
    ) -> Result<Done<Vec<Tensor<3>>>> {
        let mut parts = PartSeconds::default();
        let projected = rows::map(x.iter().zip(rotations).collect(), |(x, rotation)| {
            let [q, k, v] = self.attention.project(self.input_norm.forward(x.clone()))?;
            Ok([rotation.apply(q), rotation.apply(k), v])
        });
        let projected = join(projected.into_iter().collect::<Result<_>>()?);
        parts.linear += watch.lap();
        let (attended, report) = self.attention.attend(projected, cache, options)?;
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
        Ok((x, report, parts))
    }
}

fn tell(
    trace: &mut Option<&mut dyn FnMut(LayerTrace)>,
    layer: usize,
    report: Report,
    parts: PartSeconds,
) {
    if let Some(trace) = trace {
        trace(LayerTrace { layer, report, seconds: parts.attention, parts });
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
