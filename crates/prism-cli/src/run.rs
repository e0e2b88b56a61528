//! `prism run`: generate text from a prompt.

use std::io::Write;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use prism_models::{Message, Sampler};
use serde::Serialize;

use crate::args::{AttentionArg, RunArgs};
use crate::model::{self, Opened};
use crate::output;

#[derive(Debug, Serialize)]
struct Report {
    prompt_tokens: usize,
    tokens: usize,
    text: String,
    load_seconds: f64,
    /// Of the prompt, to the logits of its last position.
    prefill_seconds: f64,
    attention_seconds: f64,
    decode_seconds: f64,
    path: String,
    reason: String,
    density: f64,
}

pub fn run(args: &RunArgs) -> Result<()> {
    let mut sampler = Sampler::new(args.temperature, args.top_p, args.seed)?;
    let mut opened = model::open(&args.model)?;
    let ids = prompt_ids(args, &opened)?;
    let config = args.prism.apply(opened.llama.prism_config())?;
    let prism = (args.attention == AttentionArg::Prism).then_some(&config);
    opened.llama.set_attention(prism)?;
    let (llama, tokenizer) = (&opened.llama, &opened.tokenizer);
    let limit = llama.config().max_positions;
    if ids.len() + args.max_tokens > limit {
        eprintln!(
            "prism: {} prompt tokens and {} to generate go past the {limit} that the model was \
             trained for",
            ids.len(),
            args.max_tokens
        );
    }
    let mut cache = llama.cache(ids.len() + args.max_tokens, config.block)?;

    let chunks = ids.len().div_ceil(args.chunk.unwrap_or(ids.len()).max(1));
    let bar = model::bar("prefill", llama.config().layers * chunks);
    let mut traces = Vec::new();
    let start = Instant::now();
    let logits = llama.prefill(
        &ids,
        args.chunk,
        &mut cache,
        Some(&mut |trace| {
            bar.inc(1);
            traces.push(trace);
        }),
    )?;
    let prefill_seconds = start.elapsed().as_secs_f64();
    bar.finish_and_clear();

    let start = Instant::now();
    let mut stream = tokenizer.stream(true);
    let mut text = String::new();
    let mut failed = None;
    let tokens = llama.generate(
        logits,
        args.max_tokens,
        &mut sampler,
        &mut cache,
        &mut |token| match stream.push(token) {
            Ok(piece) => {
                if !args.model.json {
                    print!("{piece}");
                    let _ = std::io::stdout().flush();
                }
                text += &piece;
                true
            }
            Err(error) => {
                failed = Some(error);
                false
            }
        },
    )?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    let rest = stream.finish();
    text += &rest;
    let decode_seconds = start.elapsed().as_secs_f64();

    // The last chunk saw the whole prompt: its path and density speak for the call.
    let layers = llama.config().layers;
    let last = &traces[traces.len() - layers..];
    let densities = last.iter().map(|t| t.report.density()).collect::<Result<Vec<_>, _>>()?;
    let report = Report {
        prompt_tokens: ids.len(),
        tokens: tokens.len(),
        text,
        load_seconds: opened.load_seconds,
        prefill_seconds,
        attention_seconds: traces.iter().map(|trace| trace.seconds).sum(),
        decode_seconds,
        path: last[0].report.path.to_string(),
        reason: last[0].report.reason.to_string(),
        density: densities.iter().sum::<f64>() / layers as f64,
    };
    if args.model.json {
        return output::json(&report);
    }
    println!("{rest}");
    eprintln!(
        "{} prompt tokens in {:.2} s (attention {:.2} s), {}: {}; density {:.3}; {} tokens in {:.2} s",
        report.prompt_tokens,
        report.prefill_seconds,
        report.attention_seconds,
        report.path,
        report.reason,
        report.density,
        report.tokens,
        report.decode_seconds,
    );
    Ok(())
}

fn prompt_ids(args: &RunArgs, opened: &Opened) -> Result<Vec<u32>> {
    let prompt = match (&args.prompt, &args.file) {
        (Some(prompt), _) => prompt.clone(),
        (None, Some(file)) => model::read_text(file)?,
        (None, None) => bail!("give --prompt or --file"),
    };
    let template = if args.raw { None } else { opened.checkpoint.chat_template()? };
    let ids = match template {
        Some(template) => {
            let config = opened.llama.config();
            let token = |ids: &[u32]| match ids.first() {
                Some(&id) => opened.tokenizer.token(id),
                None => Ok(String::new()),
            };
            let (bos, eos) = (token(&config.bos_ids)?, token(&config.eos_ids)?);
            let text = template
                .render(&[Message::new("user", prompt)], true, &bos, &eos)
                .context("the chat template failed; --raw goes without it")?;
            opened.tokenizer.encode(&text, false)?
        }
        None => opened.tokenizer.encode(&prompt, true)?,
    };
    if ids.is_empty() {
        bail!("the prompt is empty");
    }
    Ok(ids)
}
