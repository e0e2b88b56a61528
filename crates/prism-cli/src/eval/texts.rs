//! Studies of how a model reads texts: perplexity, ablations, recall, spectrum.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use prism_eval::ablate::{self, Axis};
use prism_eval::perplexity::{self, Reading, Text};
use prism_eval::plots::curves;
use prism_eval::store::fingerprint;
use prism_eval::{recall as recalling, spectrum as energy};
use prism_models::Tokenizer;
use serde_json::{Value, json};

use super::{Bars, Sheet, show, store, ways};
use crate::args::{AblateArgs, EvalTextsArgs, PerplexityArgs, RecallArgs, SpectrumArgs};
use crate::model;

/// The first tokens of the text files.
fn texts(files: &[PathBuf], tokens: usize, tokenizer: &Tokenizer) -> Result<Vec<Text>> {
    let mut texts: Vec<Text> = Vec::new();
    for file in files {
        let ids = model::read_tokens(tokenizer, file, tokens)?;
        let name = file.file_name().context("a text must be a file")?.to_string_lossy();
        ensure!(
            texts.iter().all(|text| text.name != name),
            "two texts are called {name}: their results would be one"
        );
        let words = tokenizer.decode(&ids, true)?.split_whitespace().count();
        texts.push(Text { name: name.into(), ids, words });
    }
    Ok(texts)
}

/// What tells texts apart from others of their names.
fn contents(texts: &[Text]) -> Value {
    let of = |text: &Text| {
        let bytes: Vec<u8> = text.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        (text.name.clone(), Value::String(fingerprint(&bytes)))
    };
    Value::Object(texts.iter().map(of).collect())
}

/// The longest text.
fn longest(texts: &[Text]) -> usize {
    texts.iter().map(|text| text.ids.len()).max().unwrap_or(0)
}

fn reading(texts: &[Text], window: Option<usize>, bucket: usize, chunk: Option<usize>) -> Reading {
    Reading { window: window.unwrap_or_else(|| longest(texts)), bucket, chunk }
}

pub fn perplexity(args: &PerplexityArgs) -> Result<()> {
    let ways = ways(&args.ways)?;
    let mut opened = model::open(&args.common.model)?;
    let EvalTextsArgs { file, tokens } = &args.texts;
    let texts = texts(file, *tokens, &opened.tokenizer)?;
    let reading = reading(&texts, args.window, args.bucket, args.chunk.map(usize::from));
    let settings = json!({"texts": contents(&texts), "reading": reading});
    let mut store = store(&args.common, "perplexity", settings)?;
    let llama = &mut opened.llama;
    let bars = &mut Bars::default();
    let report = perplexity::measure(llama, &texts, &ways, &reading, &mut store, bars)?;
    if let Some(out) = &args.common.out {
        let caption = "what attention loses, nats a token, by position";
        let lines = report.lines();
        curves(&out.join("positions.svg"), caption, ["position", "loss"], &lines)?;
        let caption = "what selections lose, mean over texts";
        let axes = ["density", "loss, nats a token"];
        curves(&out.join("loss.svg"), caption, axes, &report.curves(&ways))?;
    }
    let sheets = [
        Sheet::new("scores", &report.scores)?,
        Sheet::new("positions", &report.buckets)?,
        Sheet::new("means", &report.means)?,
    ];
    show(&args.common, &report, &sheets)
}

pub fn ablate(args: &AblateArgs) -> Result<()> {
    let axes: Vec<Axis> = match args.vary.as_slice() {
        [] => Axis::ALL.to_vec(),
        vary => vary.iter().map(|name| name.parse()).collect::<Result<_, _>>()?,
    };
    let mut opened = model::open(&args.common.model)?;
    let EvalTextsArgs { file, tokens } = &args.texts;
    let texts = texts(file, *tokens, &opened.tokenizer)?;
    // One bucket: of a window as a whole.
    let reading = reading(&texts, args.window, usize::MAX, args.chunk.map(usize::from));
    let settings = json!({"texts": contents(&texts), "reading": reading});
    let mut store = store(&args.common, "ablate", settings)?;
    let points = ablate::measure(
        &mut opened.llama,
        &texts,
        (&axes, &args.mass),
        &reading,
        &mut store,
        &mut Bars::default(),
    )?;
    if let Some(out) = &args.common.out {
        for &axis in &axes {
            let lines = ablate::lines(&points, axis);
            let caption = format!("{}: what is lost at what density", axis.name());
            let file = out.join(format!("{}.svg", axis.name()));
            curves(&file, &caption, ["density", "loss, nats a token"], &lines)?;
        }
    }
    show(&args.common, &points, &[Sheet::new("points", &points)?])
}

pub fn recall(args: &RecallArgs) -> Result<()> {
    let ways = ways(&args.ways)?;
    let mut opened = model::open(&args.common.model)?;
    let EvalTextsArgs { file, tokens } = &args.texts;
    let texts = texts(file, *tokens, &opened.tokenizer)?;
    let mut store = store(&args.common, "recall", json!({"texts": contents(&texts)}))?;
    let layers = (!args.layers.is_empty()).then_some(args.layers.as_slice());
    let llama = &mut opened.llama;
    let bars = &mut Bars::default();
    let report = recalling::measure(llama, &texts, (&ways, layers), &mut store, bars)?;
    if let Some(out) = &args.common.out {
        let axes = ["density", "softmax mass lost"];
        curves(&out.join("pareto.svg"), "what selections lose", axes, &report.lines(&ways))?;
    }
    // Every head is in the report and its file; on the screen they would be too many.
    let heads = Sheet::new("heads", &report.heads)?;
    if let Some(out) = &args.common.out {
        super::write(&out.join("heads.csv"), heads.csv)?;
    }
    show(&args.common, &report, &[Sheet::new("pareto", &report.means)?])
}

pub fn spectrum(args: &SpectrumArgs) -> Result<()> {
    let mut opened = model::open(&args.common.model)?;
    let files: &[PathBuf] = std::slice::from_ref(&args.file);
    let texts = texts(files, args.tokens, &opened.tokenizer)?;
    let settings = json!({"texts": contents(&texts), "block": args.block});
    let mut store = store(&args.common, "spectrum", settings)?;
    let bars = &mut Bars::default();
    let ids = &texts[0].ids;
    let report = energy::measure(&mut opened.llama, ids, args.block, &mut store, bars)?;
    if let Some(out) = &args.common.out {
        draw(out, &report, opened.llama.config().layers, args.block)?;
    }
    let of_all = |layer: Option<usize>| layer.is_none();
    let pairs: Vec<_> = report.pairs.iter().filter(|pair| of_all(pair.layer)).collect();
    let sheets = [Sheet::new("zones", &report.zones)?, Sheet::new("pairs", &pairs)?];
    show(&args.common, &report, &sheets)
}

/// All layers together, the first, the middle and the last.
fn draw(out: &Path, report: &energy::Spectrum, layers: usize, block: usize) -> Result<()> {
    let mut some = vec![None, Some(0), Some(layers / 2), Some(layers - 1)];
    some.dedup();
    for layer in some {
        let (of, name) = match layer {
            None => ("all layers".into(), "spectrum.svg".into()),
            Some(layer) => (format!("layer {layer}"), format!("spectrum-{layer}.svg")),
        };
        let caption = format!("RMS of each RoPE pair, {of}, blocks of {block}");
        curves(&out.join(name), &caption, ["dim (2 × pair)", "RMS, λ"], &report.lines(layer))?;
    }
    Ok(())
}
