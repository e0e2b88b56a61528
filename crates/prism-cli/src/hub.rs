//! Models by Hugging Face id.
//!
//! The hub's own client does the work: where the hub is (`HF_ENDPOINT`), the token (`HF_TOKEN`) and the
//! cache (`HF_HOME`) are found as by every other program. What it leaves open is decided here: which files
//! a model needs, and whether what was fetched is what the hub lists.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use hf_hub::progress::{DownloadEvent, FileStatus, ProgressEvent, ProgressHandler};
use hf_hub::repository::RepoTreeEntry;
use hf_hub::{HFClient, HFClientSync, HFError};
use indicatif::{ProgressBar, ProgressStyle};

/// What a model directory may hold for us, beside the shards of an index.
const FILES: [&str; 7] = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
];

/// Fetches the files of `owner/name` into the hub's cache, with a bar on standard error, and returns their
/// directory. Files that the cache has are not fetched again.
pub fn fetch(id: &str) -> Result<PathBuf> {
    let Some((owner, name)) = id
        .split_once('/')
        .filter(|(owner, name)| !owner.is_empty() && !name.is_empty() && !name.contains('/'))
    else {
        bail!("{id:?} is neither a file, nor a directory, nor an id of the form owner/name");
    };
    let client = HFClient::new().context("can't set up the hub's client")?;
    let endpoint = client.endpoint().to_string();
    let client = HFClientSync::from_inner(client).context("can't set up the hub's client")?;
    let model = client.model(owner, name);
    let failed = |error: HFError| {
        let why = explain(&error, &endpoint);
        anyhow::Error::new(error).context(format!("can't fetch {id}: {why}"))
    };
    let listed = model.list_tree().send().map_err(failed)?;
    let sizes: HashMap<String, u64> = listed.into_iter().filter_map(needed).collect();
    ensure!(
        sizes.keys().any(|file| file.ends_with(".safetensors")),
        "can't fetch {id}: it holds no safetensors"
    );
    let bar = bar(sizes.values().sum());
    let fetched = Fetched { bar: bar.clone(), sizes: sizes.clone(), done: Mutex::default() };
    let folder = model
        .snapshot_download()
        .allow_patterns(sizes.keys().cloned().collect())
        .progress(fetched)
        .send();
    bar.finish_and_clear();
    let folder = folder.map_err(failed)?;
    sizes.iter().try_for_each(|(file, &size)| check(&folder, file, size, id))?;
    Ok(folder)
}

/// A file of a model, and its bytes. A name that passes has no folder and no character of a pattern.
fn needed(entry: RepoTreeEntry) -> Option<(String, u64)> {
    let RepoTreeEntry::File { path, size, .. } = entry else { return None };
    (FILES.contains(&path.as_str()) || is_shard(&path)).then_some((path, size))
}

/// Whether a file is called like `model-00001-of-00004.safetensors`.
fn is_shard(file: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let name = file.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors"));
    let numbers = name.and_then(|name| name.split_once("-of-"));
    numbers.is_some_and(|(shard, of)| number(shard) && number(of))
}

/// Checks that a file is there and whole: the client skips what the hub lists and doesn't have, and takes
/// whatever answer comes for the file.
fn check(folder: &Path, file: &str, size: u64, id: &str) -> Result<()> {
    let path = folder.join(file);
    let Ok(path) = path.canonicalize() else {
        bail!("can't fetch {id}: the hub lists {file} and doesn't hand it out");
    };
    let got = path.metadata().with_context(|| format!("can't read {}", path.display()))?.len();
    ensure!(
        got == size,
        "can't fetch {id}: {file} should have {size} bytes, got {got}; delete {} and try again",
        path.display()
    );
    Ok(())
}

/// What an error means to whoever gave an id.
fn explain(error: &HFError, endpoint: &str) -> String {
    let status = match error {
        HFError::Http { context } => context.status.as_u16(),
        HFError::AuthRequired { .. } => 401,
        HFError::Forbidden { .. } => 403,
        HFError::RepoNotFound { .. } | HFError::RevisionNotFound { .. } => 404,
        HFError::Request { source, .. } if source.is_connect() => {
            return format!("no connection to {endpoint}");
        }
        _ => return format!("{endpoint} failed"),
    };
    match status {
        // The hub says so, too, of what it doesn't have, lest strangers learn of private models.
        401 | 403 => format!("{endpoint} wants a token that may read it, in HF_TOKEN"),
        404 => {
            format!("{endpoint} has no such model, nor is there a file or directory of that name")
        }
        _ => format!("{endpoint} failed"),
    }
}

fn bar(bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(bytes).with_message("fetching");
    if let Ok(style) = ProgressStyle::with_template(
        "{msg:12} {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {elapsed}",
    ) {
        bar.set_style(style);
    }
    bar
}

/// Moves the bar.
struct Fetched {
    bar: ProgressBar,
    /// Bytes of each file.
    sizes: HashMap<String, u64>,
    /// Bytes so far, by file.
    done: Mutex<HashMap<String, u64>>,
}

impl ProgressHandler for Fetched {
    fn on_progress(&self, event: &ProgressEvent) {
        // Totals of a part of the download, which others tell, are not those of the bar.
        let ProgressEvent::Download(DownloadEvent::Progress { files }) = event else { return };
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        for file in files {
            // Of a file that the cache had, no bytes are reported.
            let size =
                self.sizes.get(&file.filename).filter(|_| file.status == FileStatus::Complete);
            done.insert(file.filename.clone(), size.copied().unwrap_or(file.bytes_completed));
        }
        self.bar.set_position(done.values().sum());
    }
}

#[cfg(test)]
mod tests {
    use hf_hub::progress::FileProgress;

    use super::*;

    #[test]
    fn which_files_are_shards() {
        assert!(is_shard("model-00001-of-00004.safetensors"));
        for other in [
            "model.safetensors",
            "model-00001-of-00004.safetensors.bin",
            "model-a-of-b.safetensors",
            "model--of-.safetensors",
            "model-1-of-../../2.safetensors",
            "original/model-00001-of-00004.safetensors",
            "consolidated-00001-of-00004.safetensors",
        ] {
            assert!(!is_shard(other), "{other}");
        }
    }

    /// Each file announces itself with a total of its own, and reports what is done of it alone.
    #[test]
    fn the_bar_counts_all_files_together() {
        let sizes = HashMap::from([("a".to_string(), 100), ("b".to_string(), 10)]);
        let bar = ProgressBar::hidden();
        bar.set_length(110);
        let fetched = Fetched { bar: bar.clone(), sizes, done: Mutex::default() };
        let tell = |event: DownloadEvent| fetched.on_progress(&ProgressEvent::Download(event));
        let progress = |file: &str, bytes_completed, status| DownloadEvent::Progress {
            files: vec![FileProgress {
                filename: file.into(),
                bytes_completed,
                total_bytes: 0,
                status,
            }],
        };
        tell(progress("b", 0, FileStatus::Complete));
        assert_eq!(bar.position(), 10);
        tell(DownloadEvent::Start { total_files: 1, total_bytes: 100 });
        tell(progress("a", 40, FileStatus::InProgress));
        tell(progress("a", 70, FileStatus::InProgress));
        assert_eq!((bar.position(), bar.length()), (80, Some(110)));
        tell(progress("a", 100, FileStatus::Complete));
        assert_eq!(bar.position(), 110);
    }
}
