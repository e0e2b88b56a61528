//! `runner`: the kernels on a CUDA device, checked against the definition and timed.

mod check;
mod check_matmul;
mod check_rotate;
mod check_select;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};
use cubecl::Device;
use gpu::Gpu;
use gpu::matmul::time_products;
use gpu::report::Run;
use gpu::time::{self, Budget, Shape};
use prism_kernels::Element;

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
        /// Only the matrix product.
        #[arg(long)]
        matmul: bool,
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
        /// Only these rungs, as in `hopper,mma`.
        #[arg(long, value_delimiter = ',')]
        rungs: Vec<String>,
        /// Densities of sparse attention.
        #[arg(long, value_delimiter = ',', default_value = "0.1")]
        densities: Vec<f64>,
        /// Longest prompt, in tokens.
        #[arg(long, default_value_t = 1 << 20)]
        longest: usize,
    },
    /// Times the matrix product.
    Matmul {
        /// Seconds in all.
        #[arg(long, default_value_t = 120.0)]
        seconds: f64,
        /// Where the result goes.
        #[arg(long)]
        out: PathBuf,
    },
}

fn main() -> Result<()> {
    let task = Arguments::parse().task;
    let gpu = Gpu::new(Device::Cuda(Default::default()).client());
    println!("{:?}", gpu.capabilities);
    let mut run = Run {
        gpu: std::env::var("PRISM_GPU").unwrap_or_else(|_| "CUDA".into()),
        command: std::env::args().collect::<Vec<_>>().join(" "),
        ..Run::default()
    };
    match task {
        Task::Check { small, matmul, shard, shards, out } => {
            check::check(&gpu, small, matmul, (shard, shards), &mut run);
            write(&run, &out)?;
            let failed = run.checks.iter().filter(|check| !check.passed).count();
            println!("{} checks, {failed} failed", run.checks.len());
            anyhow::ensure!(failed == 0, "{failed} checks failed");
        }
        Task::Time { seconds, out, million, only, rungs, densities, longest } => {
            let budget = Budget { seconds, million, only, rungs, densities, ..Budget::default() };
            let bf16 = |(k, dim): (usize, usize)| Shape::new(32, 8, k * 1024, dim, Element::BF16);
            let mut shapes = [(32, 128), (128, 128), (8, 128), (32, 64)].map(bf16).to_vec();
            shapes.push(Shape::new(32, 8, 4096, 128, Element::F32));
            shapes.retain(|shape| shape.len <= longest);
            time::time(&gpu, &shapes, &budget, &[], &mut run, &mut |run| write(run, &out))?;
        }
        Task::Matmul { seconds, out } => {
            time_products(&gpu, seconds, &mut run, &mut |run| write(run, &out))?;
        }
    }
    Ok(())
}

fn write(run: &Run, path: &std::path::Path) -> Result<()> {
    std::fs::write(path, serde_json::to_string_pretty(run)?)?;
    Ok(())
}
