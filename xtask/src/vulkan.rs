//! A Vulkan driver for the tests of the WebGPU runtime: Mesa's lavapipe, which needs no GPU.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::apt;

const FOLDERS: [&str; 2] = ["/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d"];

/// What a process that tests on Vulkan runs with.
pub struct Vulkan {
    /// Mesa wants a folder of its own; it goes with this value.
    runtime: TempDir,
    driver: Option<PathBuf>,
}

impl Vulkan {
    /// Makes sure that there is a driver; a machine that has one keeps it.
    pub fn set_up() -> Result<Self> {
        let chosen = std::env::var_os("VK_DRIVER_FILES").is_some_and(|files| !files.is_empty());
        if !chosen && drivers().is_empty() {
            apt::install(
                &["mesa-vulkan-drivers", "libvulkan1"],
                "the WebGPU tests need a Vulkan driver",
            )?;
        }
        let runtime = TempDir::new().context("can't make a temporary folder")?;
        // Lavapipe where it is: the same results on every machine.
        let driver = drivers().into_iter().find(|path| is_lavapipe(path)).filter(|_| !chosen);
        Ok(Self { runtime, driver })
    }

    /// Gives a command the driver.
    pub fn apply(&self, command: &mut Command) {
        command.env("XDG_RUNTIME_DIR", self.runtime.path());
        if let Some(driver) = &self.driver {
            command.env("VK_DRIVER_FILES", driver);
        }
    }

    /// What `apply` gives.
    pub fn describe(&self) -> String {
        match &self.driver {
            Some(driver) => driver.display().to_string(),
            None => "the machine's own driver".into(),
        }
    }
}

fn drivers() -> Vec<PathBuf> {
    let entries = FOLDERS.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten();
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths.filter(|path| path.extension().is_some_and(|ending| ending == "json")).collect()
}

fn is_lavapipe(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("lvp_icd"))
}
