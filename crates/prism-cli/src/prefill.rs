//! One timed pass over a prompt, with what every layer did.

use std::time::Instant;

use anyhow::Result;
use burn::tensor::Tensor;
use burn_prism::{AttentionOptions, Path, SelectedBlocks};
use prism_models::{LayerTrace, Llama, LlamaCache};
use serde::Serialize;

use crate::attention::Attention;
use crate::model::bar;

/// A pass over a whole prompt.
pub struct Prefill {
    /// Final hidden states `[1, n, hidden]`.
    pub hidden: Tensor<3>,
    /// Logits after the last token.
    pub logits: Vec<f32>,
    pub cache: LlamaCache,
    pub stats: Stats,
    /// What each layer read; `None` where it read everything.
    pub selected: Vec<Option<SelectedBlocks>>,
}

/// What a pass took and read.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stats {
    /// Seconds to the logits of the last position: the time to the first token.
    pub seconds: f64,
    /// Of those, in attention: pooling, selection and attention itself.
    pub attention_seconds: f64,
    /// `dense`, `sparse`, or `mixed` where layers differ.
    pub path: String,
    /// Why the first layer took its path.
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

/// Runs `ids` in one go, attending as `attention` says, with room for `extra` tokens after them.
pub fn run(llama: &mut Llama, ids: &[u32], attention: &Attention, extra: usize) -> Result<Prefill> {
    attention.set(llama)?;
    let mut cache = llama.cache(ids.len() + extra, attention.block())?;
    let bar = bar(attention.name(), llama.config().layers);
    let mut traces: Vec<LayerTrace> = Vec::new();
    let start = Instant::now();
    let hidden = llama.hidden(
        ids,
        &mut cache,
        &AttentionOptions::default(),
        Some(&mut |trace| {
            bar.inc(1);
            traces.push(trace);
        }),
    )?;
    let logits = llama.last_logits(&hidden)?;
    let seconds = start.elapsed().as_secs_f64();
    bar.finish_and_clear();
    let stats = stats(&traces, seconds)?;
    let selected = traces.into_iter().map(|trace| trace.report.selected).collect();
    Ok(Prefill { hidden, logits, cache, stats, selected })
}

fn stats(traces: &[LayerTrace], seconds: f64) -> Result<Stats> {
    let sparse = traces.iter().filter(|trace| trace.report.path == Path::Sparse).count();
    let path = match sparse {
        0 => "dense",
        all if all == traces.len() => "sparse",
        _ => "mixed",
    };
    let density_by_layer =
        traces.iter().map(|trace| trace.report.density()).collect::<Result<_, _>>()?;
    Ok(Stats {
        seconds,
        attention_seconds: traces.iter().map(|trace| trace.seconds).sum(),
        path: path.into(),
        reason: traces.first().map_or(String::new(), |trace| trace.report.reason.to_string()),
        density_by_layer,
    })
}
