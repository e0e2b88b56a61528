//! LLVM for CubeCL's CPU runtime.
//!
//! The build script of `tracel-llvm-bundler` takes LLVM from a folder of the user, and fills that
//! folder from GitHub where it lacks a marker file. Where GitHub is out of reach the folder is made
//! here, from Debian's LLVM 22.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::{apt, python};

/// The version of `tracel-llvm-bundler`, which names the folder and the download.
const VERSION: &str = "23.1.0-4";
const MARKER: &str = ".tracel-llvm-installed";
const DEBIAN: &str = "/usr/lib/llvm-22";
const PACKAGES: [&str; 7] = [
    "llvm-22-dev",
    "libpolly-22-dev",
    "libz3-dev",
    "libzstd-dev",
    "zlib1g-dev",
    "libxml2-dev",
    // LLVM is C++; Rust's own images bring a C compiler alone.
    "g++",
];

/// Makes sure that a build with the CPU runtime finds LLVM; says what was done.
pub fn set_up() -> Result<String> {
    if !cfg!(target_os = "linux") {
        return Ok("the build fetches it".into());
    }
    let prefix = prefix()?;
    if is_sound(&prefix) {
        if is_debian(&prefix) {
            apt::install(&PACKAGES, "LLVM's libraries are incomplete")?;
        }
        return Ok(format!("found at {}", prefix.display()));
    }
    if fs::symlink_metadata(&prefix).is_ok() {
        eprintln!("{} is incomplete: making it again", prefix.display());
        fs::remove_dir_all(&prefix)
            .with_context(|| format!("can't remove {}", prefix.display()))?;
    }
    if download_is_reachable() {
        return Ok("the build fetches it".into());
    }
    let purpose = "the CPU runtime needs LLVM, and its download from github.com is out of reach";
    apt::install(&PACKAGES, purpose)?;
    link_debian(&prefix)?;
    ensure!(is_sound(&prefix), "{}/bin/llvm-config doesn't work", prefix.display());
    Ok(format!("Debian's LLVM 22, linked at {}", prefix.display()))
}

/// Where `tracel-llvm-bundler` looks: the `dirs` crate's local data folder.
fn prefix() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let data = set("XDG_DATA_HOME").or_else(|| Some(set("HOME")?.join(".local/share")));
    let data = data.context("set HOME: the build looks for LLVM in a folder of it")?;
    Ok(data.join("tracel").join(format!("tracel-llvm-{VERSION}")))
}

/// Whether the bundler takes this folder as it is and the link will succeed.
fn is_sound(prefix: &Path) -> bool {
    let config = |what: &str| {
        let output =
            Command::new(prefix.join("bin/llvm-config")).args(["--link-static", what]).output();
        output.ok().filter(|output| output.status.success())
    };
    // The bundler makes `-llibz3` of a path, which no linker finds.
    let names = |output: std::process::Output| !output.stdout.contains(&b'/');
    prefix.join(MARKER).is_file()
        && prefix.join("lib").is_dir()
        && prefix.join("include/llvm-c").is_dir()
        && config("--libs").is_some()
        && config("--system-libs").is_some_and(names)
}

fn is_debian(prefix: &Path) -> bool {
    fs::read_link(prefix.join("lib")).is_ok_and(|target| target.starts_with(DEBIAN))
}

/// Asks for the small file that the bundler fetches first. A name that resolves or a port that
/// opens says too little behind a proxy.
fn download_is_reachable() -> bool {
    const ASK: &str = "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=10).read()";
    let platform = if cfg!(target_arch = "aarch64") { "linux-AArch64" } else { "linux-x64" };
    let url = format!(
        "https://github.com/tracel-ai/tracel-llvm/releases/download/v{VERSION}/\
         {platform}.checksums.json"
    );
    let Ok(python) = python::python() else { return false };
    let asked = Command::new(python).args(["-c", ASK, &url]).output();
    asked.is_ok_and(|output| output.status.success())
}

/// A prefix as the bundler's, of links into Debian's LLVM.
fn link_debian(prefix: &Path) -> Result<()> {
    let debian = Path::new(DEBIAN);
    if !debian.join("bin/llvm-config").is_file() {
        bail!("{DEBIAN}/bin/llvm-config is missing although llvm-22-dev is installed");
    }
    let make = || -> std::io::Result<()> {
        fs::create_dir_all(prefix.join("bin"))?;
        symlink(debian.join("lib"), prefix.join("lib"))?;
        symlink(debian.join("include"), prefix.join("include"))?;
        let config = prefix.join("bin/llvm-config");
        // Debian names Z3 by its path: see `is_sound`.
        let wrapper = format!(
            "#!/bin/sh\nset -e\nout=$({DEBIAN}/bin/llvm-config \"$@\")\n\
             printf '%s\\n' \"$out\" | sed 's#/[^ ]*/libz3\\.so#-lz3#g'\n"
        );
        fs::write(&config, wrapper)?;
        fs::set_permissions(&config, fs::Permissions::from_mode(0o755))?;
        // Last: the bundler believes it.
        fs::write(prefix.join(MARKER), "")
    };
    make().with_context(|| format!("can't make {}", prefix.display()))
}
