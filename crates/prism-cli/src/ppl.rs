//! `prism ppl`: perplexity of a text file.

use anyhow::Result;
use serde::Serialize;

use crate::args::PplArgs;
use crate::attention::{self, Attention};
use crate::{model, output, prefill};

#[derive(Debug, Serialize)]
struct Report {
    tokens: usize,
    /// Mean negative log-likelihood, nats a token.
    nll: f64,
    perplexity: f64,
    /// Mean over layers of selected over causal blocks.
    density: f64,
    /// To the logits of the last position.
    seconds: f64,
    attention_seconds: f64,
    path: String,
    reason: String,
    density_by_layer: Vec<f64>,
    load_seconds: f64,
}

pub fn run(args: &PplArgs) -> Result<()> {
    attention::check(args.attention, &args.settings)?;
    let mut opened = model::open(&args.model)?;
    let ids = model::read_tokens(&opened.tokenizer, &args.file, args.tokens)?;
    let attention = Attention::new(args.attention, &args.settings, &opened.llama)?;
    let pass = prefill::run(&mut opened.llama, &ids, &attention, args.chunk, 0)?;
    let predictions = opened.llama.predictions(&pass.hidden, &ids)?;
    let report = Report {
        tokens: ids.len(),
        nll: predictions.mean_nll(),
        perplexity: predictions.perplexity(),
        density: pass.stats.density(),
        seconds: pass.stats.seconds,
        attention_seconds: pass.stats.attention_seconds,
        path: pass.stats.path,
        reason: pass.stats.reason,
        density_by_layer: pass.stats.density_by_layer,
        load_seconds: opened.load_seconds,
    };
    if args.model.json {
        return output::json(&report);
    }
    let mut table = output::table(&["perplexity", ""]);
    table.add_row(["tokens".into(), report.tokens.to_string()]);
    table.add_row(["path".into(), format!("{} ({})", report.path, report.reason)]);
    table.add_row(["nll, nats a token".into(), format!("{:.4}", report.nll)]);
    table.add_row(["perplexity".into(), format!("{:.3}", report.perplexity)]);
    table.add_row(["density".into(), format!("{:.3}", report.density)]);
    table.add_row(["prefill, s".into(), format!("{:.2}", report.seconds)]);
    table.add_row(["of it attention, s".into(), format!("{:.2}", report.attention_seconds)]);
    println!("{table}");
    Ok(())
}
