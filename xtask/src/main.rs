//! Repository tasks: `cargo xtask test`, `demo`, `fetch`, `help-text`, `support`.

mod model;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

const USAGE: &str = "\
cargo xtask TASK

  test    format check, clippy, all tests and doc tests; what follows goes to cargo, as in
          `cargo xtask test --features tests/cube` for CubeCL's CPU runtime and wgpu too
  demo    fetch the model, build, and read an 8K-token document dense and with Prism
  fetch   fetch the model of the tests and the demo, and print its path
  bless   rewrite what the documentation generates from code: --help texts, the support table";

fn main() -> Result<()> {
    let task = std::env::args().nth(1).unwrap_or_default();
    match task.as_str() {
        "test" => test(),
        "demo" => demo(),
        "fetch" => {
            println!("{}", model::fetch()?.display());
            Ok(())
        }
        "bless" => bless(),
        "" | "help" | "--help" | "-h" => {
            println!("{USAGE}");
            Ok(())
        }
        other => bail!("there is no task {other:?}\n\n{USAGE}"),
    }
}

fn test() -> Result<()> {
    let start = Instant::now();
    let model = model::fetch()?;
    let more: Vec<String> = std::env::args().skip(2).collect();
    run(cargo().args(["fmt", "--all", "--check"]))?;
    let clippy = ["clippy", "--workspace", "--all-targets"];
    run(cargo().args(clippy).args(&more).args(["--", "-D", "warnings"]))?;
    run(cargo().args(["test", "--workspace", "--doc"]).args(&more))?;
    // Last, so that the runner's own closing line ends the output.
    if has_nextest() {
        run(cargo()
            .args(["nextest", "run", "--workspace"])
            .args(&more)
            .env("PRISM_MODEL", &model))?;
    } else {
        eprintln!("cargo-nextest is not installed: cargo test runs the tests instead");
        let args = ["test", "--workspace", "--lib", "--bins", "--tests", "--examples"];
        run(cargo().args(args).args(&more).env("PRISM_MODEL", &model))?;
    }
    eprintln!("all green after {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

fn has_nextest() -> bool {
    let probe = cargo().args(["nextest", "--version"]).output();
    probe.is_ok_and(|output| output.status.success())
}

fn demo() -> Result<()> {
    let model = model::fetch()?;
    run(cargo().args(["build", "--release", "--package", "prism-cli"]))?;
    let root = root()?;
    let heatmap = root.join("target/selected-blocks.svg");
    run(Command::new(root.join("target/release/prism"))
        .arg("compare")
        .arg("--model")
        .arg(model)
        .arg("--file")
        .arg(root.join("fixtures/smollm2/jargon.txt"))
        .arg("--heatmap")
        .arg(heatmap))
}

fn bless() -> Result<()> {
    let tests = ["--package", "prism-cli", "--package", "tests"];
    run(cargo().arg("test").args(tests).args(["bless_"]).env("PRISM_BLESS", "1"))
}

/// The root of the repository.
fn root() -> Result<PathBuf> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    Ok(manifest.parent().context("xtask lies at the root of the disk")?.to_path_buf())
}

fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Runs a command in the root of the repository.
fn run(command: &mut Command) -> Result<()> {
    let shown = format!("{command:?}").replace('"', "");
    eprintln!("$ {shown}");
    let status =
        command.current_dir(root()?).status().with_context(|| format!("can't start {shown}"))?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    Ok(())
}
