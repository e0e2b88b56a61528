//! Repository tasks: `cargo xtask test`, `setup`, `sass`, `gpu-bundle`, `demo`, `fetch`, `bless`, `hub`.

mod apt;
mod bundle;
mod llvm;
mod model;
mod python;
mod sass;
mod vulkan;

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use vulkan::Vulkan;

const USAGE: &str = "\
cargo xtask TASK

  test            set up, then format check, clippy, doc tests, the ONNX example, the CUDA kernels without a GPU,
                  all tests
  setup           only make sure that the machine has what the tests need
  sass [KERNEL]   compile the CUDA kernels without a GPU: registers, spills, instructions; of KERNEL
                  also the main loop's machine code, into target/sass
  demo            fetch the model, build, and read an 8K-token document dense and with Prism
  fetch           fetch the model of the tests and the demo, and print its path
  hub             test fetching models by Hugging Face id: not part of `test`, because the hub's client
                  brings 150 crates that nothing else needs
  bless           rewrite what the documentation generates from code: --help texts, the support table";

/// What is checked and how: the kernels, and Burn on them, on CubeCL's CPU runtime and on WebGPU, which
/// need no GPU. The same features everywhere, so that nothing is built twice.
const CHECKED: [&str; 3] =
    ["--workspace", "--features", "tests/cube,prism-cli/cpu,prism-cli/wgpu,gpu/emit"];

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map_or("", String::as_str) {
        "test" => test(),
        "setup" => set_up().map(|_| ()),
        "sass" => sass::show(args.get(1).map(String::as_str)),
        "gpu-bundle" => bundle::make(&args[1..]),
        "demo" => demo(),
        "fetch" => {
            println!("{}", model::fetch()?.display());
            Ok(())
        }
        "bless" => bless(),
        "hub" => hub(),
        "" | "help" | "--help" | "-h" => {
            println!("{USAGE}\n{}", bundle::USAGE);
            Ok(())
        }
        other => bail!("there is no task {other:?}\n\n{USAGE}\n{}", bundle::USAGE),
    }
}

/// What the tests need of a machine beyond Rust and a C compiler.
struct Machine {
    model: PathBuf,
    vulkan: Vulkan,
}

fn set_up() -> Result<Machine> {
    let model = model::fetch()?;
    eprintln!("model: {}", model.display());
    eprintln!("LLVM: {}", llvm::set_up()?);
    let vulkan = Vulkan::set_up()?;
    eprintln!("Vulkan: {}", vulkan.describe());
    eprintln!("NVRTC: {}", sass::set_up()?.display());
    Ok(Machine { model, vulkan })
}

fn test() -> Result<()> {
    let start = Instant::now();
    let machine = set_up()?;
    let tests = |args: &[&str]| {
        let mut command = cargo();
        command.args(args).args(CHECKED).env("PRISM_MODEL", &machine.model);
        machine.vulkan.apply(&mut command);
        command
    };
    run(cargo().args(["fmt", "--all", "--check"]))?;
    lock_files()?;
    run(cargo().arg("clippy").args(CHECKED).args(["--all-targets", "--", "-D", "warnings"]))?;
    run(&mut tests(&["test", "--doc"]))?;
    onnx_import()?;
    sass::check()?;
    // Last, so that the runner's own closing line ends the output.
    if has_nextest() {
        run(&mut tests(&["nextest", "run"]))?;
    } else {
        eprintln!("cargo-nextest is not installed: cargo test runs the tests instead");
        run(&mut tests(&["test", "--lib", "--bins", "--tests", "--examples"]))?;
    }
    eprintln!("all green after {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Fails where a lock file doesn't fit its manifests, before anything long is built.
fn lock_files() -> Result<()> {
    for manifest in ["Cargo.toml", "examples/onnx_import/Cargo.toml"] {
        run(cargo().args(["fetch", "--locked", "--manifest-path", manifest]))?;
    }
    Ok(())
}

/// Tests the example with a workspace of its own. Without clippy, which would check all of Burn once more.
fn onnx_import() -> Result<()> {
    let manifest = root()?.join("examples/onnx_import/Cargo.toml");
    let built = target()?.join("onnx_import");
    let on = |task: &[&str]| {
        let mut command = cargo();
        command.args(task).arg("--manifest-path").arg(&manifest);
        command
    };
    run(on(&["fmt"]).arg("--check"))?;
    run(on(&["test", "--locked"]).arg("--target-dir").arg(&built))
}

fn has_nextest() -> bool {
    let probe = cargo().args(["nextest", "--version"]).output();
    probe.is_ok_and(|output| output.status.success())
}

fn demo() -> Result<()> {
    let model = model::fetch()?;
    run(cargo().args(["build", "--release", "--package", "prism-cli"]))?;
    let target = target()?;
    let heatmap = target.join("selected-blocks.svg");
    run(Command::new(target.join("release/prism"))
        .arg("compare")
        .arg("--model")
        .arg(model)
        .arg("--file")
        .arg(root()?.join("fixtures/smollm2/jargon.txt"))
        .arg("--heatmap")
        .arg(heatmap))
}

fn bless() -> Result<()> {
    run(cargo().arg("test").args(CHECKED).arg("bless_").env("PRISM_BLESS", "1"))
}

/// Tests the feature `hub` on Flex alone, so that little else is built.
fn hub() -> Result<()> {
    let on = ["--package", "prism-cli", "--no-default-features", "--features", "flex,hub"];
    run(cargo().arg("clippy").args(on).args(["--all-targets", "--", "-D", "warnings"]))?;
    run(cargo().arg("test").args(on).args(["--lib", "--test", "hub"]))
}

/// The root of the repository: as `cargo run` says it, because clones that share a folder of built
/// programs share this one, too.
fn root() -> Result<PathBuf> {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    Ok(manifest.parent().context("xtask lies at the root of the disk")?.to_path_buf())
}

/// Cargo's folder of what it builds.
fn target() -> Result<PathBuf> {
    let set = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    Ok(root()?.join(set.unwrap_or_else(|| "target".into())))
}

fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // What `cargo run` says of this package: build scripts that read it would find it changed each time,
    // and everything after them would be built again.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            cargo.env_remove(&name);
        }
    }
    cargo
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
