//! The CUDA kernels, compiled and read without a GPU: see `gpu/assemble.py`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{CHECKED, cargo, python, root, run, target};

/// NVRTC of the CUDA version whose driver the kernels are timed with; any newer disassembler
/// reads its code.
const PACKAGES: [&str; 4] = [
    "nvidia-cuda-nvrtc==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-nvdisasm==13.2.86",
];

/// Where the compiler and the disassembler are, fetched first where they aren't there.
pub fn set_up() -> Result<PathBuf> {
    python::packages("nvrtc", &PACKAGES)
}

/// Emits and assembles `kernel`, or all of them.
pub fn show(kernel: Option<&str>) -> Result<()> {
    let folder = emit()?;
    let mut command = assemble(&folder)?;
    if let Some(kernel) = kernel {
        command.args(["--kernel", kernel]);
    }
    run(&mut command)
}

/// Emits and assembles all kernels; one that spills registers fails.
pub fn check() -> Result<()> {
    let folder = emit()?;
    run(assemble(&folder)?.arg("--strict"))
}

/// Writes the CUDA source of every kernel into `target/sass`.
fn emit() -> Result<PathBuf> {
    let folder = target()?.join("sass");
    if folder.exists() {
        // A kernel renamed would be judged under both names.
        fs::remove_dir_all(&folder).with_context(|| format!("can't clear {}", folder.display()))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("can't create {}", folder.display()))?;
    // With the features of the tests: the dependencies are then built already. `--package` would
    // choose other ones.
    let features = CHECKED.iter().filter(|&&flag| flag != "--workspace");
    run(cargo()
        .args(["run", "--quiet"])
        .args(features)
        .args(["--bin", "emit", "--"])
        .arg(&folder))?;
    Ok(folder)
}

fn assemble(folder: &Path) -> Result<Command> {
    let mut command = Command::new(python::python()?);
    command.env("PYTHONPATH", set_up()?).arg(root()?.join("gpu/assemble.py")).arg(folder);
    Ok(command)
}
