//! `runner`: the kernels on a CUDA device, checked against the definition and timed.

mod check;
mod data;
mod time;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};
use cubecl::Device;
use cubecl::prelude::*;
use gpu::report::Run;
use prism_kernels::Capabilities;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Checks every rung against the oracle, on sampled rows.
    Check {
        /// Small shapes only.
        #[arg(long)]
        small: bool,
        /// This part of the cases, of `--shards`: compiling them is most of the time, and goes on
        /// in as many processes as there are.
        #[arg(long, default_value_t = 0)]
        shard: usize,
        /// Parts in all.
        #[arg(long, default_value_t = 1)]
        shards: usize,
        /// Where the result goes.
        #[arg(long)]
        out: PathBuf,
    },
    /// Times pool, select and attend.
    Time {
        /// Seconds in all.
        #[arg(long, default_value_t = 120.0)]
        seconds: f64,
        /// Where the result goes.
        #[arg(long)]
        out: PathBuf,
        /// Also a prompt of a million tokens.
        #[arg(long)]
        million: bool,
        /// Only these steps, as in `pool,select`: pool, calibrate, score, select, schedule, dense,
        /// attend.
        #[arg(long, value_delimiter = ',')]
        only: Vec<String>,
        /// Longest prompt, in tokens.
        #[arg(long, default_value_t = 1 << 20)]
        longest: usize,
    },
}

/// The device and what is known of it.
pub struct Gpu {
    /// Where kernels are launched.
    pub client: Client,
    /// What the kernels are chosen by.
    pub capabilities: Capabilities,
}

fn main() -> Result<()> {
    let task = Arguments::parse().task;
    let client = Device::Cuda(Default::default()).client();
    let capabilities = Capabilities::of(&client);
    println!("{capabilities:?}");
    let gpu = Gpu { client, capabilities };
    let mut run = Run {
        gpu: std::env::var("PRISM_GPU").unwrap_or_else(|_| "CUDA".into()),
        command: std::env::args().collect::<Vec<_>>().join(" "),
        ..Run::default()
    };
    match task {
        Task::Check { small, shard, shards, out } => {
            check::check(&gpu, small, (shard, shards), &mut run);
            write(&run, &out)?;
            let failed = run.checks.iter().filter(|check| !check.passed).count();
            println!("{} checks, {failed} failed", run.checks.len());
            anyhow::ensure!(failed == 0, "{failed} checks failed");
        }
        Task::Time { seconds, out, million, only, longest } => {
            let budget = time::Budget { seconds, million, only, longest };
            time::time(&gpu, &budget, &mut run, |run| write(run, &out))?;
        }
    }
    Ok(())
}

fn write(run: &Run, path: &std::path::Path) -> Result<()> {
    std::fs::write(path, serde_json::to_string_pretty(run)?)?;
    Ok(())
}
