//! `cargo xtask gpu-bundle`: the program of a GPU machine and what it reads, in one archive of
//! `.gpu/`, for machines on which nothing can be built. `gpu/run.sh` unpacks and runs it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::{apt, cargo, llvm, model, python, root, run};

/// The largest archive made, in bytes: what is carried to a machine is limited.
const LIMIT: u64 = 40_000_000;
const COMPRESS: &str = "xz --threads=1 --lzma2=preset=6,dict=256MiB";
const PEERS: [&str; 1] = ["fa3-fwd==0.0.3"];

/// The task's part of the usage text.
pub const USAGE: &str = "  gpu-bundle      pack the program of a GPU machine, and what it reads, into .gpu/bundle.tar.xz:
                  --features cuda-cpp        of the build: cuda for CubeCL's LLVM compiler
                  --profile release          of the build
                  --program whole            or runner: kernels only, built in a tenth of the time
                  --bare                     without the fixtures: run.sh takes the checkout's
                  --model                    with the model of the demo
                  --peers                    and FlashAttention-3 into .gpu/peers.tar.xz";

/// What can be carried: the name of a target of the package `gpu`, its kind, and features of its own.
/// LLVM is most of each, so that all is in one: `whole` is the tests and the runner, which is also the
/// benchmark of the kernels and the program `prism`.
const PROGRAMS: [(&str, &str, &str); 2] = [("whole", "test", "gpu/whole,"), ("runner", "bin", "")];

struct Options {
    features: String,
    profile: String,
    program: String,
    bare: bool,
    model: bool,
    peers: bool,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let mut options = Self {
            features: "cuda-cpp".into(),
            profile: "release".into(),
            program: "whole".into(),
            bare: false,
            model: false,
            peers: false,
        };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--features" => options.features = value()?.clone(),
                "--profile" => options.profile = value()?.clone(),
                "--program" => options.program = value()?.clone(),
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
        for fixtures in ["fixtures/kernels", "fixtures/models", "fixtures/smollm2"] {
            copy(&root.join(fixtures), &staged.path().join(fixtures))?;
        }
    }
    if options.model {
        copy(&model::fetch()?, &staged.path().join("model.gguf"))?;
    }
    pack(staged.path(), &folder.join("bundle.tar.xz"))
}

/// Puts the program into `folder`.
fn build(options: &Options, folder: &Path) -> Result<()> {
    let Options { features, profile, program, .. } = options;
    let Some((name, kind, own)) = PROGRAMS.into_iter().find(|known| known.0 == program) else {
        bail!("no program {program:?}; there are {}", PROGRAMS.map(|(name, ..)| name).join(", "));
    };
    eprintln!("LLVM: {}", llvm::set_up()?);
    let mut command = cargo();
    command.args(["build", "--message-format", "json-render-diagnostics", "--profile", profile]);
    command.args(["--package", "gpu", &format!("--{kind}"), name]);
    let features: Vec<_> = features.split(',').map(|feature| format!("gpu/{feature}")).collect();
    command.args(["--features", &format!("{own}{}", features.join(","))]);
    eprintln!("$ {command:?}");
    let output = command.current_dir(root()?).stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        bail!("the program can't be built: {}", output.status);
    }
    // The name of a test's file ends in a hash that only cargo knows.
    let built = executable(&output.stdout, name, kind)
        .with_context(|| format!("cargo says nothing of a program {name}"))?;
    let place = folder.join(name);
    copy(&built, &place)?;
    // Not the profile's `strip`: that would build everything again.
    run(Command::new("strip").arg(&place))
}

/// The file of a target, from cargo's messages.
fn executable(messages: &[u8], name: &str, kind: &str) -> Option<PathBuf> {
    let messages = messages.split(|&byte| byte == b'\n');
    messages.filter_map(|line| serde_json::from_slice::<Value>(line).ok()).find_map(|message| {
        let target = &message["target"];
        let found = target["name"] == name && target["kind"][0] == kind;
        message["executable"].as_str().filter(|_| found).map(PathBuf::from)
    })
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
    run(Command::new("tar")
        .args(["--use-compress-program", COMPRESS])
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
