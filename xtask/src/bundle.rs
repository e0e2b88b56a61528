//! `cargo xtask gpu-bundle`: the programs of a GPU machine and what they read, in one archive of
//! `.gpu/`, for machines on which nothing can be built. `gpu/run.sh` unpacks and runs it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::{apt, cargo, llvm, model, python, root, run, target};

/// The largest archive made, in bytes: what is carried to a machine is limited.
const LIMIT: u64 = 40_000_000;
const PEERS: [&str; 1] = ["fa3-fwd==0.0.3"];

/// The task's part of the usage text.
pub const USAGE: &str = "  gpu-bundle      pack the programs of a GPU machine, and what they read, into .gpu/bundle.tar.xz:
                  --features cuda,cuda-cpp   of the build
                  --programs runner,prism    which, both unless set
                  --bare                     without the fixtures: run.sh takes the checkout's
                  --model                    with the model of the demo
                  --peers                    and FlashAttention-3 into .gpu/peers.tar.xz";

struct Options {
    features: String,
    programs: Vec<String>,
    bare: bool,
    model: bool,
    peers: bool,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let mut options = Self {
            features: "cuda,cuda-cpp".into(),
            programs: vec!["runner".into(), "prism".into()],
            bare: false,
            model: false,
            peers: false,
        };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--features" => options.features = value()?.clone(),
                "--programs" => {
                    options.programs = value()?.split(',').map(str::to_string).collect();
                }
                "--bare" => options.bare = true,
                "--model" => options.model = true,
                "--peers" => options.peers = true,
                other => bail!("gpu-bundle has no option {other:?}\n\n{USAGE}"),
            }
        }
        Ok(options)
    }
}

/// Builds and packs.
pub fn make(args: &[String]) -> Result<()> {
    let options = Options::parse(args)?;
    let root = root()?;
    let folder = root.join(".gpu");
    fs::create_dir_all(&folder).with_context(|| format!("can't create {}", folder.display()))?;
    if options.peers {
        let packages = python::packages("peers", &PEERS)?;
        let staged = TempDir::new()?;
        copy(&packages, &staged.path().join("peers"))?;
        pack(staged.path(), &folder.join("peers.tar.xz"))?;
    }
    let staged = TempDir::new()?;
    build(&options, &staged.path().join("bin"))?;
    if !options.bare {
        for fixtures in ["fixtures/kernels", "fixtures/smollm2"] {
            copy(&root.join(fixtures), &staged.path().join(fixtures))?;
        }
    }
    if options.model {
        copy(&model::fetch()?, &staged.path().join("model.gguf"))?;
    }
    pack(staged.path(), &folder.join("bundle.tar.xz"))
}

/// Puts the programs, and the program that makes the report, into `folder`.
fn build(options: &Options, folder: &Path) -> Result<()> {
    let mut programs = vec!["report"];
    programs.extend(options.programs.iter().map(String::as_str));
    eprintln!("LLVM: {}", llvm::set_up()?);
    let mut command = cargo();
    command.args(["build", "--release", "--features", &options.features]);
    for program in &programs {
        let package = if *program == "prism" { "prism-cli" } else { "gpu" };
        command.args(["--package", package, "--bin", program]);
    }
    run(&mut command)?;
    for program in programs {
        let place = folder.join(program);
        copy(&target()?.join("release").join(program), &place)?;
        // Not the profile's `strip`: that would build everything again.
        run(Command::new("strip").arg(&place))?;
    }
    Ok(())
}

/// Copies a file or a folder, making the folders above it.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let above = to.parent().context("nothing is copied to the root")?;
    fs::create_dir_all(above).with_context(|| format!("can't create {}", above.display()))?;
    run(Command::new("cp").args(["-r", "--"]).arg(from).arg(to))
}

/// Packs all of `folder`; an archive over the limit is removed again.
fn pack(folder: &Path, archive: &Path) -> Result<()> {
    apt::install(&["xz-utils"], "packing needs xz")?;
    // A window as large as the whole: programs that link the same libraries share them.
    run(Command::new("tar")
        .args(["--use-compress-program", "xz --threads=1 --lzma2=preset=6,dict=256MiB"])
        .arg("--create")
        .arg("--file")
        .arg(archive)
        .arg("--directory")
        .arg(folder)
        .arg("."))?;
    let size = fs::metadata(archive)?.len();
    let said = format!("{} of {:.1} MB, unpacked:", archive.display(), size as f64 / 1e6);
    let contents = contents(folder)?;
    if size > LIMIT {
        fs::remove_file(archive)?;
        bail!("no more than {} MB are carried: {said}\n{contents}", LIMIT / 1_000_000);
    }
    println!("{said}\n{contents}");
    Ok(())
}

/// The files of a folder, largest first.
fn contents(folder: &Path) -> Result<String> {
    let mut files: Vec<(u64, PathBuf)> = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push((path.metadata()?.len(), path.strip_prefix(folder)?.to_path_buf()));
            }
        }
    }
    files.sort_by(|a, b| b.cmp(a));
    let line = |(size, path): &(u64, PathBuf)| {
        format!("{:9.1} MB  {}", *size as f64 / 1e6, path.display())
    };
    Ok(files.iter().map(line).collect::<Vec<_>>().join("\n"))
}
