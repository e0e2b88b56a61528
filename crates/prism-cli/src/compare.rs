//! `prism compare`: a long text read both ways.

use anyhow::{Context, Result, bail};
use prism_models::{Llama, Predictions, Sampler, Tokenizer};
use serde::Serialize;

use crate::args::{AttentionArg, CompareArgs};
use crate::attention::Attention;
use crate::prefill::{Prefill, Stats};
use crate::{heatmap, model, output, prefill};

#[derive(Debug, Serialize)]
struct Way {
    #[serde(flatten)]
    stats: Stats,
    nll: f64,
    perplexity: f64,
    continuation: String,
}

#[derive(Debug, Serialize)]
struct Report {
    tokens: usize,
    /// Of all layers; `None` under a policy, which may give each its own.
    mass: Option<f64>,
    dense: Way,
    prism: Way,
    /// Prism over dense.
    prefill_ratio: f64,
    /// Prism over dense.
    attention_ratio: f64,
    density: f64,
    /// Share of positions with the same likeliest next token.
    top1_agreement: f64,
    heatmap: Option<String>,
}

pub fn run(args: &CompareArgs) -> Result<()> {
    let mut opened = model::open(&args.model)?;
    let ids = model::read_tokens(&opened.tokenizer, &args.file, args.tokens)?;
    let attention = Attention::new(AttentionArg::Prism, &args.settings, &opened.llama)?;
    let layer = args.layer.unwrap_or(opened.llama.config().layers / 2);
    if layer >= opened.llama.config().layers {
        bail!("there is no layer {layer}: the model has {}", opened.llama.config().layers);
    }
    let (llama, tokenizer) = (&mut opened.llama, &opened.tokenizer);

    let extra = args.continue_tokens;
    let pass = prefill::run(llama, &ids, &Attention::Dense, None, extra)?;
    let (dense, dense_predictions) = finish(llama, tokenizer, pass, &ids, extra)?;
    let pass = prefill::run(llama, &ids, &attention, None, extra)?;
    let drawn = match (&args.heatmap, &pass.selected[layer]) {
        (Some(path), Some(selected)) => {
            heatmap::write(path, &selected.to_host()?, selected.grids(), layer)
                .with_context(|| format!("can't write {}", path.display()))?;
            Some(path.display().to_string())
        }
        (Some(_), None) => bail!("no heat map: layer {layer} ran dense ({})", pass.stats.reason),
        (None, _) => None,
    };
    let (prism, prism_predictions) = finish(llama, tokenizer, pass, &ids, extra)?;

    let report = Report {
        tokens: ids.len(),
        mass: attention.mass(),
        prefill_ratio: prism.stats.seconds / dense.stats.seconds,
        attention_ratio: prism.stats.attention_seconds / dense.stats.attention_seconds,
        density: prism.stats.density(),
        top1_agreement: dense_predictions.top1_agreement(&prism_predictions),
        heatmap: drawn,
        dense,
        prism,
    };
    if args.model.json { output::json(&report) } else { print(&report) }
}

/// Scores the text and continues it.
fn finish(
    llama: &Llama,
    tokenizer: &Tokenizer,
    pass: Prefill,
    ids: &[u32],
    extra: usize,
) -> Result<(Way, Predictions)> {
    let predictions = llama.predictions(&pass.hidden, ids)?;
    let mut cache = pass.cache;
    let mut greedy = Sampler::greedy();
    let tokens = llama.generate(pass.logits, extra, &mut greedy, &mut cache, &mut |_| true)?;
    let way = Way {
        stats: pass.stats,
        nll: predictions.mean_nll(),
        perplexity: predictions.perplexity(),
        continuation: tokenizer.decode(&tokens, true)?,
    };
    Ok((way, predictions))
}

fn print(report: &Report) -> Result<()> {
    let (dense, prism) = (&report.dense, &report.prism);
    let mut table =
        output::table(&[&format!("{} tokens", report.tokens), "dense", "prism", "ratio"]);
    let mut row = |name: &str, dense: f64, prism: f64, digits: usize| {
        table.add_row([
            name.to_string(),
            format!("{dense:.digits$}"),
            format!("{prism:.digits$}"),
            format!("{:.3}", prism / dense),
        ]);
    };
    row("time to first token, s", dense.stats.seconds, prism.stats.seconds, 2);
    row("of it attention, s", dense.stats.attention_seconds, prism.stats.attention_seconds, 2);
    row("density", dense.stats.density(), prism.stats.density(), 3);
    row("perplexity", dense.perplexity, prism.perplexity, 3);
    println!("{table}");
    let by_layer = &prism.stats.density_by_layer;
    let min = by_layer.iter().copied().fold(f64::INFINITY, f64::min);
    let max = by_layer.iter().copied().fold(0.0, f64::max);
    println!("path: {} ({})", prism.stats.path, prism.stats.reason);
    let at = report.mass.map_or("under the policy".into(), |mass| format!("at mass {mass}"));
    println!("density by layer: min {min:.3}, mean {:.3}, max {max:.3} {at}", report.density);
    let shown: Vec<String> = by_layer.iter().map(|d| format!("{d:.2}")).collect();
    println!("  {}", shown.join(" "));
    println!("same likeliest next token at {:.1} % of positions", 100.0 * report.top1_agreement);
    println!("dense continues: {:?}", dense.continuation);
    println!("prism continues: {:?}", prism.continuation);
    if let Some(path) = &report.heatmap {
        println!("heat map of the selected blocks: {path}");
    }
    Ok(())
}
