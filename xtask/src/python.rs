//! Python and the packages of its index that the tasks use.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt;

/// A Python with pip; on Debian it is installed.
pub fn python() -> Result<&'static str> {
    if !has_pip() {
        apt::install(&["python3-pip"], "this task needs python3 with pip")?;
    }
    if !has_pip() {
        bail!("this task needs python3 with pip; install it");
    }
    Ok("python3")
}

fn has_pip() -> bool {
    let probe = Command::new("python3").args(["-m", "pip", "--version"]).output();
    probe.is_ok_and(|output| output.status.success())
}

/// Runs a command of `python()`; its error output becomes the error.
pub fn run(command: &mut Command) -> Result<()> {
    let output = command.output().context("can't start python3")?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// A folder of the cache that holds `packages`, to be named in `PYTHONPATH`; filled once.
pub fn packages(name: &str, packages: &[&str]) -> Result<PathBuf> {
    let folder = cache_folder()?.join(name);
    let list = folder.join("packages.txt");
    let wanted = packages.join("\n");
    if std::fs::read_to_string(&list).is_ok_and(|got| got == wanted) {
        return Ok(folder);
    }
    remove(&folder)?;
    eprintln!("fetching {} into {}", packages.join(", "), folder.display());
    // A target folder and no virtual environment: Debian's Python has no venv by itself.
    run(Command::new(python()?)
        .args(["-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target"])
        .arg(&folder)
        .args(packages))?;
    // Written last, so that a broken fetch is repeated.
    std::fs::write(&list, wanted).with_context(|| format!("can't write {}", list.display()))?;
    Ok(folder)
}

/// Where what is fetched once is kept.
pub fn cache_folder() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(folder) = set("PRISM_CACHE") {
        return Ok(folder);
    }
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
    Ok(cache.context("set PRISM_CACHE or HOME: what is fetched needs a folder")?.join("burn-prism"))
}

fn remove(folder: &Path) -> Result<()> {
    if folder.exists() {
        std::fs::remove_dir_all(folder)
            .with_context(|| format!("can't remove {}", folder.display()))?;
    }
    Ok(())
}
