//! One timed pass over a prompt, with what every layer did.

use std::num::NonZeroUsize;
use std::time::Instant;

use anyhow::Result;
use burn::tensor::Tensor;
use burn_prism::{AttentionOptions, Path, SelectedBlocks};
use prism_models::{LayerTrace, Llama, LlamaCache};
use serde::Serialize;

use crate::attention::Attention;
use crate::density;
use crate::model::bar;

/// A pass over a whole prompt.
pub struct Prefill {
    /// Final hidden states `[1, n, hidden]`.
    pub hidden: Tensor<3>,
    /// Logits after the last token.
    pub logits: Vec<f32>,
    pub cache: LlamaCache,
    pub stats: Stats,
    /// What each layer read, chunk after chunk; `None` where it read everything.
    pub selected: Vec<Option<SelectedBlocks>>,
}

/// What a pass took and read.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stats {
    /// Seconds to the logits of the last position: the time to the first token.
    pub seconds: f64,
    /// Of those, in attention: pooling, selection and attention itself.
    pub attention_seconds: f64,
    /// `dense`, `sparse`, or `mixed` where layers or chunks differ.
    pub path: String,
    /// Why the first layer took its path, of the first chunk.
    pub reason: String,
    /// Selected over causal blocks of each layer.
    pub density_by_layer: Vec<f64>,
}

impl Stats {
    /// Mean over layers.
    pub fn density(&self) -> f64 {
        self.density_by_layer.iter().sum::<f64>() / self.density_by_layer.len().max(1) as f64
    }
}

/// Runs `ids` in one go, or in chunks of so many tokens, attending as `attention` says, with room for `extra`
/// tokens after them.
pub fn run(
    llama: &mut Llama,
    ids: &[u32],
    attention: &Attention,
    chunk: Option<NonZeroUsize>,
    extra: usize,
) -> Result<Prefill> {
    attention.set(llama)?;
    let chunk = chunk.map_or(ids.len().max(1), usize::from);
    let mut cache = llama.cache(ids.len() + extra, attention.block())?;
    let layers = llama.config().layers;
    let bar = bar(attention.name(), layers * ids.len().div_ceil(chunk));
    let mut traces: Vec<LayerTrace> = Vec::new();
    let mut hidden = Vec::new();
    let start = Instant::now();
    for part in ids.chunks(chunk) {
        let more_follows = cache.len() + part.len() < ids.len();
        let options = AttentionOptions::default().with_more_follows(more_follows);
        hidden.push(llama.hidden(
            part,
            &mut cache,
            &options,
            Some(&mut |trace| {
                bar.inc(1);
                traces.push(trace);
            }),
        )?);
    }
    let hidden = Tensor::cat(hidden, 1);
    let logits = llama.last_logits(&hidden)?;
    let seconds = start.elapsed().as_secs_f64();
    bar.finish_and_clear();
    let by_head = density::by_head(llama, &traces, 0..ids.len(), chunk, attention.block())?;
    let mean = |heads: &Vec<f64>| heads.iter().sum::<f64>() / heads.len() as f64;
    let stats = Stats {
        seconds,
        attention_seconds: traces.iter().map(|trace| trace.seconds).sum(),
        path: path(&traces).into(),
        reason: traces.first().map_or(String::new(), |trace| trace.report.reason.to_string()),
        density_by_layer: by_head.iter().map(mean).collect(),
    };
    let selected = traces.into_iter().map(|trace| trace.report.selected).collect();
    Ok(Prefill { hidden, logits, cache, stats, selected })
}

/// `dense`, `sparse`, or `mixed` where layers or chunks differ.
pub fn path(traces: &[LayerTrace]) -> &'static str {
    match traces.iter().filter(|trace| trace.report.path == Path::Sparse).count() {
        0 => "dense",
        all if all == traces.len() => "sparse",
        _ => "mixed",
    }
}
