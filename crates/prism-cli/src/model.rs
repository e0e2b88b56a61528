//! Opening models, with progress.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use indicatif::{ProgressBar, ProgressStyle};
use prism_models::{Checkpoint, Llama, Tokenizer};

use crate::args::ModelArgs;
use crate::device;

/// A model, ready to run.
pub struct Opened {
    pub tokenizer: Tokenizer,
    pub llama: Llama,
    pub load_seconds: f64,
}

/// Opens the model that the arguments name.
pub fn open(args: &ModelArgs) -> Result<Opened> {
    let checkpoint = checkpoint(&args.model)?;
    let tokenizer = checkpoint.tokenizer()?;
    load(args, checkpoint, tokenizer)
}

/// Loads the weights of a model whose files are open.
pub fn load(args: &ModelArgs, checkpoint: Checkpoint, tokenizer: Tokenizer) -> Result<Opened> {
    let start = Instant::now();
    let device = device::open(&args.device)?;
    let bar = bar("loading", checkpoint.expected_tensors().len());
    let llama = Llama::load(&checkpoint, DType::F32, &device, &mut |done, _| {
        bar.set_position(done as u64);
    })
    .with_context(|| format!("can't load {}", args.model.display()))?;
    bar.finish_and_clear();
    Ok(Opened { tokenizer, llama, load_seconds: start.elapsed().as_secs_f64() })
}

/// Opens the files of a model, fetching them first where a Hugging Face id is given.
pub fn checkpoint(path: &Path) -> Result<Checkpoint> {
    let files = if path.exists() { path.to_path_buf() } else { fetch(path)? };
    Checkpoint::open(&files).with_context(|| format!("can't open {}", path.display()))
}

#[cfg(feature = "hub")]
fn fetch(id: &Path) -> Result<PathBuf> {
    crate::hub::fetch(&id.to_string_lossy())
}

#[cfg(not(feature = "hub"))]
fn fetch(path: &Path) -> Result<PathBuf> {
    bail!(
        "there is no file or directory {} (a build with `--features hub` takes Hugging Face ids too)",
        path.display()
    )
}

/// The first `limit` token ids of a text file.
pub fn read_tokens(tokenizer: &Tokenizer, file: &Path, limit: usize) -> Result<Vec<u32>> {
    let text = read_text(file)?;
    let mut ids = tokenizer.encode(&text, false)?;
    ids.truncate(limit);
    if ids.len() < 2 {
        bail!("{} holds {} tokens, at least 2 are needed", file.display(), ids.len());
    }
    Ok(ids)
}

/// A text file, whole.
pub fn read_text(file: &Path) -> Result<String> {
    let kind = std::fs::metadata(file).with_context(|| format!("can't read {}", file.display()))?;
    if !kind.is_file() {
        bail!("{} is not a regular file", file.display());
    }
    std::fs::read_to_string(file).with_context(|| format!("can't read {}", file.display()))
}

/// A progress bar on standard error; invisible where that is no terminal.
pub fn bar(what: &'static str, steps: usize) -> ProgressBar {
    let bar = ProgressBar::new(steps as u64).with_message(what);
    if let Ok(style) = ProgressStyle::with_template("{msg:12} {bar:40} {pos}/{len} {elapsed}") {
        bar.set_style(style);
    }
    bar
}
