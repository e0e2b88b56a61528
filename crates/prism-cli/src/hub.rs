//! Models by Hugging Face id.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use hf_hub::HFClientSync;

/// What a model directory may hold for us: one safetensors file, no shards.
const FILES: [&str; 6] = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
];

/// Fetches the files of `owner/name` into the hub's own cache and returns their directory.
pub fn fetch(id: &str) -> Result<PathBuf> {
    let Some((owner, name)) = id.split_once('/').filter(|(_, name)| !name.contains('/')) else {
        bail!("{id:?} is neither a file, nor a directory, nor an id of the form owner/name");
    };
    HFClientSync::new()
        .context("can't reach the hub")?
        .model(owner, name)
        .snapshot_download()
        .allow_patterns(FILES.map(String::from).to_vec())
        .send()
        .with_context(|| format!("can't fetch {id}"))
}
