//! All that is done on a GPU machine, behind one command line.
#![cfg(feature = "cuda")]

mod check;
mod check_antidiagonal;
mod check_attention;
mod check_matmul;
mod check_outliers;
mod check_pool;
mod check_prefix;
mod check_repeats;
mod check_rotate;
mod check_select;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser};
use prism_bench::attention::{self, Draw, Shape};
use prism_bench::inputs::Alike;
use prism_bench::matmul::{self, SHAPES, Way};
use prism_bench::report::Check;
use prism_bench::{Budget, Gpu, Log, Run, a_million};
use prism_kernels::Element;

/// What is timed unless asked otherwise.
const SHAPES_BF16: [&str; 5] = ["32768x128", "131072x128", "8192x128", "32768x64", "131072x64"];

/// All that is done on a GPU machine.
#[derive(Parser)]
#[command(name = "runner")]
enum Task {
    /// Checks every rung against the oracle, on sampled rows.
    Check(CheckArgs),
    /// Times every step of attention in a few shapes.
    Time(TimeArgs),
    /// Times the matrix product.
    Matmul {
        /// Seconds in all.
        #[arg(long, default_value_t = 120.0)]
        seconds: f64,
        /// Where the result goes.
        #[arg(long)]
        out: PathBuf,
    },
    /// Merges runs of one card into OUT: run.json, table.md, records.csv and plots.
    Merge {
        /// The folder to write to.
        out: PathBuf,
        /// JSON files of this program and of peers.py.
        #[arg(required = true)]
        runs: Vec<PathBuf>,
    },
    /// Does what `cargo bench --bench kernels` does: every rung beside Burn's attention.
    #[cfg(feature = "whole")]
    #[command(disable_help_flag = true)]
    Bench(Rest),
    /// Is the program `prism`.
    #[cfg(feature = "whole")]
    #[command(disable_help_flag = true)]
    Prism(Rest),
}

#[derive(Args)]
struct CheckArgs {
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
}

#[derive(Args)]
struct TimeArgs {
    /// Seconds in all.
    #[arg(long, default_value_t = 120.0)]
    seconds: f64,
    /// Where the result goes.
    #[arg(long)]
    out: PathBuf,
    /// Also a prompt of a million tokens.
    #[arg(long)]
    million: bool,
    /// Only these steps, as in `pool,select`: rotate, pool, calibrate, score, select, schedule,
    /// dense, attend.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only these rungs, as in `hopper,mma`.
    #[arg(long, value_delimiter = ',')]
    rungs: Vec<String>,
    /// Densities of sparse attention.
    #[arg(long, value_delimiter = ',', default_value = "0.1")]
    densities: Vec<f64>,
    /// Heads, and rows of a head, that draw the same blocks as their neighbours, as in `4,1`.
    #[arg(long, value_delimiter = ',', num_args = 1, default_values_t = [1, 1])]
    alike: Vec<usize>,
    /// Shapes in bf16, as TOKENSxHEAD_DIM.
    #[arg(long, value_delimiter = ',', value_parser = shape, default_values = SHAPES_BF16)]
    shapes: Vec<(usize, usize)>,
    /// Milliseconds of a window of back-to-back calls.
    #[arg(long, default_value_t = Budget::default().window)]
    window: f64,
}

/// The arguments of another program.
#[cfg(feature = "whole")]
#[derive(Args)]
struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

#[cfg(feature = "whole")]
impl Rest {
    fn named(self, name: &str) -> Vec<OsString> {
        std::iter::once(name.into()).chain(self.args).collect()
    }
}

/// Does what the arguments ask for, the first of which is the program's name.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let command = args.iter().map(|arg| arg.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let done = match Task::parse_from(args) {
        #[cfg(feature = "whole")]
        Task::Prism(rest) => return prism_cli::run(rest.named("prism")),
        #[cfg(feature = "whole")]
        Task::Bench(rest) => benches::run(rest.named("bench")),
        Task::Check(args) => check(command, &args),
        Task::Time(args) => time(command, args),
        Task::Matmul { seconds, out } => measure(command, &out, |gpu, log| {
            let budget = Budget { seconds, ..Budget::default() };
            matmul::time(gpu, &SHAPES, &Way::ALL, Element::BF16, &budget, log)
        }),
        Task::Merge { out, runs } => merge(&out, &runs),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("runner: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn check(command: String, args: &CheckArgs) -> Result<()> {
    let CheckArgs { small, matmul, shard, shards, ref out } = *args;
    ensure!(shard < shards, "shard must be below the {shards} shards, got {shard}");
    let (gpu, mut run) = open(command)?;
    check::check(&gpu, small, matmul, (shard, shards), &mut run);
    write(&run, out)?;
    let failed = run.checks.iter().filter(|check: &&Check| !check.passed).count();
    println!("{} checks, {failed} failed", run.checks.len());
    ensure!(failed == 0, "{failed} checks failed");
    Ok(())
}

/// Tokens and head_dim of `TOKENSxHEAD_DIM`.
fn shape(text: &str) -> Result<(usize, usize)> {
    let parts = text.split_once('x').with_context(|| format!("{text:?} isn't TOKENSxHEAD_DIM"))?;
    let number = |text: &str| text.parse().with_context(|| format!("{text:?} is no number"));
    Ok((number(parts.0)?, number(parts.1)?))
}

fn time(command: String, args: TimeArgs) -> Result<()> {
    let TimeArgs { seconds, out, million, only, rungs, densities, alike, shapes, window } = args;
    let [heads, rows] = alike[..] else { bail!("--alike takes two numbers, got {alike:?}") };
    let alike = Alike { heads, rows };
    let bf16 = |&(len, dim): &(usize, usize)| Shape::new(32, 8, len, dim, Element::BF16);
    let mut shapes: Vec<Shape> = shapes.iter().map(bf16).collect();
    shapes.push(Shape::new(32, 8, 4096, 128, Element::F32));
    let budget = Budget { seconds, only, rungs, window, ..Budget::default() };
    measure(command, &out, |gpu, log| {
        attention::time(gpu, &shapes, &Draw { densities: &densities, alike }, &budget, &[], log)?;
        if million { a_million(gpu, log) } else { Ok(()) }
    })
}

fn merge(out: &Path, runs: &[PathBuf]) -> Result<()> {
    let runs = runs.iter().map(|path| Run::read(path)).collect::<Result<Vec<_>>>()?;
    let run = Run::merge(runs)?;
    run.write(out)?;
    println!("{}", run.markdown());
    Ok(())
}

/// The device, and a run that says so.
fn open(command: String) -> Result<(Gpu, Run)> {
    let gpu = Gpu::open("cuda", None)?;
    println!("{:?}", gpu.capabilities);
    let run = Run {
        gpu: std::env::var("PRISM_GPU").unwrap_or_else(|_| "CUDA".into()),
        command,
        ..Run::default()
    };
    Ok((gpu, run))
}

/// Takes timings, each of which is in the file as soon as it is taken.
fn measure(
    command: String,
    out: &Path,
    take: impl FnOnce(&Gpu, &mut Log) -> Result<()>,
) -> Result<()> {
    let (gpu, mut run) = open(command)?;
    let mut tell = |run: &Run, line: &str| {
        println!("{line}");
        write(run, out)
    };
    take(&gpu, &mut Log::new(&mut run, &mut tell))
}

fn write(run: &Run, path: &Path) -> Result<()> {
    std::fs::write(path, serde_json::to_string_pretty(run)?)
        .with_context(|| format!("can't write {}", path.display()))
}
