//! Debian packages that the tests need, installed where that is possible.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Once;

use anyhow::{Context, Result, bail};

static UPDATE: Once = Once::new();

/// Installs those of `packages` that are missing; returns whether any was. `purpose` opens the
/// error of a machine on which that can't be done.
pub fn install(packages: &[&str], purpose: &str) -> Result<bool> {
    if packages.iter().all(|package| is_installed(package)) {
        return Ok(false);
    }
    let by_hand = packages.join(" ");
    let Some(apt_get) = apt_get() else {
        bail!(
            "{purpose}; apt-get can't be run here (no Debian, or neither root nor sudo without a \
             password). Install by hand: {by_hand}"
        );
    };
    // A source out of reach that holds none of these packages does no harm.
    UPDATE.call_once(|| {
        let _ = apt_get().args(["update", "--quiet"]).stdout(Stdio::null()).status();
    });
    eprintln!("installing {by_hand}");
    let status = apt_get()
        .args(["install", "--yes", "--quiet", "--no-install-recommends"])
        .args(packages)
        .stdout(Stdio::null())
        .status()
        .context("can't start apt-get")?;
    if !status.success() {
        bail!("{purpose}, and apt-get failed. Install by hand: {by_hand}");
    }
    Ok(true)
}

fn is_installed(package: &str) -> bool {
    let query = Command::new("dpkg-query").args(["-W", "-f=${Status}", package]).output();
    query.is_ok_and(|output| output.stdout.ends_with(b" installed"))
}

/// How to start apt-get with the rights that installing takes.
fn apt_get() -> Option<fn() -> Command> {
    // Another installation may hold the lock for a while.
    const ARGS: [&str; 4] =
        ["DEBIAN_FRONTEND=noninteractive", "apt-get", "-o", "DPkg::Lock::Timeout=300"];
    if !Path::new("/usr/bin/apt-get").is_file() {
        return None;
    }
    if std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0) {
        return Some(|| with(Command::new("env"), &ARGS));
    }
    let sudo = Command::new("sudo").args(["-n", "true"]).stderr(Stdio::null()).status();
    let allowed = sudo.is_ok_and(|status| status.success());
    allowed.then_some(|| with(with(Command::new("sudo"), &["-n", "env"]), &ARGS))
}

fn with(mut command: Command, args: &[&str]) -> Command {
    command.args(args);
    command
}
