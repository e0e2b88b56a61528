//! How much of the true attention a selection keeps, per layer and head: mass, output, density.

mod masses;

use std::collections::HashMap;

use burn::tensor::{DType, Tensor};
use burn_prism::{
    AttentionOptions, PrismConfig, block_sparse_attention, dense_attention, select_blocks,
};
use prism_core::{BlockGrid, BlockSelection};
use prism_models::{LayerInputs, Llama, ModelError};
use serde::{Deserialize, Serialize};

pub use masses::TrueMasses;

use crate::attend::Attend;
use crate::error::{EvalError, Result};
use crate::pareto;
use crate::perplexity::Text;
use crate::plots::{Line, extend};
use crate::progress::Progress;
use crate::store::Store;

/// What one head of one layer keeps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    /// Selected over causal blocks.
    pub density: f64,
    /// True softmax mass outside the selected blocks, mean over query blocks.
    pub lost: f64,
    /// ‖sparse − exact‖ over ‖exact‖ of the head's outputs.
    pub error: f64,
}

/// What one head of one layer keeps of one text, attending one way.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Head {
    /// The text.
    pub text: String,
    /// How blocks were selected.
    pub attend: String,
    /// Index of the layer.
    pub layer: usize,
    /// Index of the query head.
    pub head: usize,
    /// Selected over causal blocks.
    pub density: f64,
    /// True softmax mass outside the selected blocks, mean over query blocks.
    pub lost: f64,
    /// ‖sparse − exact‖ over ‖exact‖ of the head's outputs.
    pub error: f64,
}

/// One way to attend: means over texts, layers and heads.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Mean {
    /// How blocks were selected.
    pub attend: String,
    /// Selected over causal blocks.
    pub density: f64,
    /// True softmax mass kept.
    pub kept: f64,
    /// True softmax mass lost.
    pub lost: f64,
    /// Relative error of the output.
    pub error: f64,
    /// Whether none is both as sparse and loses as little.
    pub front: bool,
}

/// Everything measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Report {
    /// The Pareto table, in the order of the ways.
    pub means: Vec<Mean>,
    /// Every head.
    pub heads: Vec<Head>,
}

/// Selects by every way from the Q and K of every layer, or of `layers`, of a model that attends exactly,
/// and measures what the selections keep.
///
/// # Errors
/// A layer past the last, a way without a selection, settings that don't fit the model, a failing model or
/// store.
pub fn measure(
    llama: &mut Llama,
    texts: &[Text],
    (ways, layers): (&[Attend], Option<&[usize]>),
    store: &mut Store,
    progress: &mut dyn Progress,
) -> Result<Report> {
    let count = llama.config().layers;
    if let Some(&past) = layers.and_then(|layers| layers.iter().find(|&&layer| layer >= count)) {
        return Err(EvalError::argument("layer", format!("below {count}"), past));
    }
    if let Some(dense) = ways.iter().find(|attend| attend.is_dense()) {
        let reason = "exact attention selects nothing and loses nothing".into();
        return Err(EvalError::Attend { spec: dense.name().into(), reason });
    }
    let layers: Vec<usize> = layers.map_or_else(|| (0..count).collect(), <[usize]>::to_vec);
    let settings: Vec<_> =
        ways.iter().map(|attend| attend.layers(llama.config())).collect::<Result<_>>()?;
    progress.start("recall", texts.len() * layers.len());
    let mut report = Report::default();
    for text in texts {
        let found = text_heads(llama, text, (ways, &settings, &layers), store, progress)?;
        report.heads.extend(found);
    }
    progress.finish();
    report.means = means(ways, &report.heads);
    Ok(report)
}

type Settings = Vec<Option<PrismConfig>>;

fn text_heads(
    llama: &mut Llama,
    text: &Text,
    (ways, settings, layers): (&[Attend], &[Settings], &[usize]),
    store: &mut Store,
    progress: &mut dyn Progress,
) -> Result<Vec<Head>> {
    let key = |attend: &Attend, layer: usize| format!("{}|{}|{layer}", text.name, attend.name());
    let whole = |store: &Store, layer| ways.iter().all(|attend| store.has(&key(attend, layer)));
    // Layers after the last that is wanted needn't run.
    let wanted = layers.iter().filter(|&&layer| !whole(store, layer)).max();
    if let Some(&last) = wanted {
        llama.set_attention(None)?;
        let mut cache = llama.cache(text.ids.len(), crate::attend::BLOCK)?;
        let options = AttentionOptions::default();
        let run = llama.hidden_with_inputs(&text.ids, &mut cache, &options, &mut |inputs| {
            let layer = inputs.layer;
            if layers.contains(&layer) && !whole(store, layer) {
                let mut study = Study::new(inputs)?;
                for (attend, settings) in ways.iter().zip(settings) {
                    store.get_or(&key(attend, layer), || study.kept(settings[layer].as_ref()))?;
                }
            }
            if layers.contains(&layer) {
                progress.step();
            }
            if layer == last { Err(Stop::Done) } else { Ok(()) }
        });
        match run {
            Ok(_) | Err(Stop::Done) => {}
            Err(Stop::Failed(error)) => return Err(error),
        }
    }
    let mut heads = Vec::new();
    for attend in ways {
        for &layer in layers {
            let held = || -> Result<Vec<Kept>> {
                let reason = format!("layer {layer} of {} was not measured", text.name);
                Err(EvalError::Results { reason })
            };
            let kept = store.get_or(&key(attend, layer), held)?;
            heads.extend(kept.into_iter().enumerate().map(|(head, kept)| Head {
                text: text.name.clone(),
                attend: attend.name().into(),
                layer,
                head,
                density: kept.density,
                lost: kept.lost,
                error: kept.error,
            }));
        }
    }
    Ok(heads)
}

/// Why a pass ended early.
enum Stop {
    /// No more layers are wanted.
    Done,
    Failed(EvalError),
}

impl From<EvalError> for Stop {
    fn from(error: EvalError) -> Self {
        Self::Failed(error)
    }
}

impl From<ModelError> for Stop {
    fn from(error: ModelError) -> Self {
        Self::Failed(error.into())
    }
}

/// One layer of one text.
struct Study {
    inputs: LayerInputs,
    exact: Tensor<4>,
    /// By block size.
    masses: HashMap<usize, TrueMasses>,
}

impl Study {
    fn new(inputs: LayerInputs) -> Result<Self> {
        let LayerInputs { q, k, v, .. } = inputs.clone();
        let exact = dense_attention(q, k, v, &AttentionOptions::default())?.output;
        Ok(Self { inputs, exact, masses: HashMap::new() })
    }

    /// What each head keeps; everything where the layer attends exactly.
    fn kept(&mut self, config: Option<&PrismConfig>) -> Result<Vec<Kept>> {
        let LayerInputs { q, k, v, .. } = self.inputs.clone();
        let heads = q.dims()[1];
        let Some(config) = config else {
            return Ok(vec![Kept { density: 1.0, lost: 0.0, error: 0.0 }; heads]);
        };
        let options = AttentionOptions::default();
        let selected = select_blocks(q.clone(), k.clone(), config, &options)?;
        let grid = selected.grids()[0];
        let masses = match self.masses.remove(&config.block) {
            Some(masses) => masses,
            None => TrueMasses::new(&q, &k, &grid)?,
        };
        let selection = selected.to_host()?;
        let density = selection.density_by_head(selected.grids());
        let sparse = block_sparse_attention(q, k, v, &selected, &options)?.output;
        let errors = errors(sparse, self.exact.clone())?;
        let kept = density.into_iter().zip(errors).enumerate().map(|(head, (density, error))| {
            Kept { density, lost: lost(&masses, &selection, &grid, head), error }
        });
        let kept = kept.collect();
        self.masses.insert(config.block, masses);
        Ok(kept)
    }
}

/// True mass outside the selected blocks, mean over the rows of a head.
fn lost(masses: &TrueMasses, selection: &BlockSelection, grid: &BlockGrid, head: usize) -> f64 {
    let outside = |row: usize| -> f64 {
        let masses = masses.row(head, row);
        let causal = 0..grid.causal_blocks(row);
        let left_out = causal.filter(|&v| !selection.contains(0, head, row, v));
        left_out.map(|v| f64::from(masses[v])).sum()
    };
    (0..grid.rows()).map(outside).sum::<f64>() / grid.rows().max(1) as f64
}

/// ‖a − b‖ / ‖b‖ of every head of `[1, heads, n, head_dim]`.
fn errors(a: Tensor<4>, b: Tensor<4>) -> Result<Vec<f64>> {
    let [_, heads, n, dim] = b.dims();
    let norms = |x: Tensor<4>| {
        masses::read(x.cast(DType::F32).reshape([heads, n * dim]).square().sum_dim(1))
    };
    let (differences, norms) = (norms(a - b.clone())?, norms(b)?);
    let ratio = |(d, n): (f32, f32)| (f64::from(d) / f64::from(n).max(f64::MIN_POSITIVE)).sqrt();
    Ok(differences.into_iter().zip(norms).map(ratio).collect())
}

fn means(ways: &[Attend], heads: &[Head]) -> Vec<Mean> {
    let mut means: Vec<Mean> = Vec::new();
    for attend in ways {
        let of: Vec<&Head> = heads.iter().filter(|head| head.attend == attend.name()).collect();
        let mean = |pick: fn(&Head) -> f64| {
            of.iter().map(|head| pick(head)).sum::<f64>() / of.len().max(1) as f64
        };
        let lost = mean(|head| head.lost);
        means.push(Mean {
            attend: attend.name().into(),
            density: mean(|head| head.density),
            kept: 1.0 - lost,
            lost,
            error: mean(|head| head.error),
            front: false,
        });
    }
    let points: Vec<_> = means.iter().map(|mean| (mean.density, mean.lost)).collect();
    for (mean, front) in means.iter_mut().zip(pareto::front(&points)) {
        mean.front = front;
    }
    means
}

impl Report {
    /// A curve of each selector over its masses: what is lost against density.
    pub fn lines(&self, ways: &[Attend]) -> Vec<Line> {
        let mut lines: Vec<Line> = Vec::new();
        for (attend, mean) in ways.iter().zip(&self.means) {
            extend(&mut lines, attend.family(), (mean.density, mean.lost));
        }
        lines
    }
}
