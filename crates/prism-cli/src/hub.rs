//! Models by Hugging Face id.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use hf_hub::HFClientSync;
use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use indicatif::{ProgressBar, ProgressStyle};

/// What a model directory may hold for us: one safetensors file, or shards with their index.
const FILES: [&str; 8] = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
];

/// Fetches the files of `owner/name` into the hub's own cache, with a bar on standard error, and
/// returns their directory.
pub fn fetch(id: &str) -> Result<PathBuf> {
    let Some((owner, name)) = id.split_once('/').filter(|(_, name)| !name.contains('/')) else {
        bail!("{id:?} is neither a file, nor a directory, nor an id of the form owner/name");
    };
    let bar = ProgressBar::no_length().with_message("fetching");
    if let Ok(style) = ProgressStyle::with_template(
        "{msg:12} {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {elapsed}",
    ) {
        bar.set_style(style);
    }
    let folder = HFClientSync::new()
        .context("can't reach the hub")?
        .model(owner, name)
        .snapshot_download()
        .allow_patterns(FILES.map(String::from).to_vec())
        .progress(Fetched { bar: bar.clone(), files: Mutex::default() })
        .send()
        .with_context(|| format!("can't fetch {id}"));
    bar.finish_and_clear();
    folder
}

/// Bytes so far, by file.
struct Fetched {
    bar: ProgressBar,
    files: Mutex<HashMap<String, u64>>,
}

impl ProgressHandler for Fetched {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        let done = match event {
            DownloadEvent::Start { total_bytes, .. } => {
                self.bar.set_length(*total_bytes);
                return;
            }
            // Some files report one by one, some together: whichever is further.
            DownloadEvent::Progress { files } => {
                let mut known = self.files.lock().unwrap_or_else(PoisonError::into_inner);
                for file in files {
                    known.insert(file.filename.clone(), file.bytes_completed);
                }
                known.values().sum()
            }
            DownloadEvent::AggregateProgress { bytes_completed, .. } => *bytes_completed,
            DownloadEvent::Complete => return,
        };
        self.bar.set_position(self.bar.position().max(done));
    }
}
