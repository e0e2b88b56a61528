//! `prism bench`: what the kernels take on a device.
//!
//! They are those of CubeCL's runtimes; `cargo bench` times the native ones of Burn's Flex backend.

use anyhow::{Result, bail};

use crate::device;

#[cfg(any(feature = "cpu", feature = "cuda", feature = "rocm", feature = "wgpu"))]
mod prefill;
#[cfg(any(feature = "cpu", feature = "cuda", feature = "rocm", feature = "wgpu"))]
mod selectors;

#[cfg(any(feature = "cpu", feature = "cuda", feature = "rocm", feature = "wgpu"))]
pub use on_devices::run;

/// Kinds of device that have none of these kernels.
const OTHERS: [&str; 2] = ["flex", "ndarray"];

/// Whether a device can be timed at all.
fn check(name: &str) -> Result<()> {
    let (kind, _) = device::parse(name);
    if OTHERS.contains(&kind) {
        let built = match device::built(|kind| !OTHERS.contains(&kind)) {
            none if none.is_empty() => "none of those".into(),
            built => format!("of those: {built}"),
        };
        bail!("{kind} has no kernels of CubeCL, and only these are timed; this build has {built}");
    }
    // Says what is missing.
    device::open(name).map(drop)
}

/// A build without CubeCL's kernels times nothing.
#[cfg(not(any(feature = "cpu", feature = "cuda", feature = "rocm", feature = "wgpu")))]
pub fn run(what: &crate::args::BenchCommand) -> Result<()> {
    use crate::args::BenchCommand::{Attention, Matmul, Prefill, Selectors};

    let device = match what {
        Attention(args) => &args.common.device,
        Matmul(args) => &args.common.device,
        Selectors(_) | Prefill(_) => {
            bail!("a build with a feature for a device of CubeCL's has this, on any device")
        }
    };
    check(device)?;
    bail!("this build has no kernels of CubeCL: a feature for {device} adds them")
}

#[cfg(any(feature = "cpu", feature = "cuda", feature = "rocm", feature = "wgpu"))]
mod on_devices {
    use std::path::Path;

    use anyhow::{Context, Result, ensure};
    use prism_bench::attention::{self, Draw, Shape};
    use prism_bench::matmul::{self, SHAPES, Way};
    use prism_bench::report::{Whole, digits};
    use prism_bench::{Budget, Gpu, Log, Record, Run, a_million, device::element};
    use serde::Serialize;

    use super::{check, prefill, selectors};
    use crate::args::{
        BenchAttentionArgs, BenchCommand, BenchCommonArgs, BenchMatmulArgs, EpilogueArg,
    };
    use crate::{device, output};

    #[derive(Serialize)]
    struct Report<'a> {
        #[serde(flatten)]
        run: &'a Run,
        /// Sparse calls of all their parts.
        wholes: Vec<Whole>,
    }

    pub fn run(what: &BenchCommand) -> Result<()> {
        match what {
            BenchCommand::Attention(args) => time(&args.common, |gpu, log| attend(args, gpu, log)),
            BenchCommand::Matmul(args) => time(&args.common, |gpu, log| multiply(args, gpu, log)),
            BenchCommand::Prefill(args) => {
                let output =
                    Output { device: &args.device, out: args.out.as_deref(), json: args.json };
                report(output, |log| prefill::time(args, log))
            }
            BenchCommand::Selectors(args) => {
                let BenchCommonArgs { device, out, json, .. } = &args.common;
                let output = Output { device, out: out.as_deref(), json: *json };
                report(output, |log| selectors::time(args, log))
            }
        }
    }

    fn attend(args: &BenchAttentionArgs, gpu: &Gpu, log: &mut Log) -> Result<()> {
        ensure!(!args.lengths.is_empty(), "--lengths must name at least one");
        let element = element(&args.common.dtype)?;
        let shape =
            |&len: &usize| Shape::new(args.q_heads, args.kv_heads, len, args.head_dim, element);
        let shapes: Vec<Shape> = args.lengths.iter().map(shape).collect();
        let budget = Budget {
            seconds: args.common.seconds,
            window: args.common.window,
            only: args.only.clone(),
            rungs: args.rungs.clone(),
            ..Budget::default()
        };
        attention::time(gpu, &shapes, &Draw::new(&args.densities), &budget, &[], log)?;
        if args.million { a_million(gpu, log) } else { Ok(()) }
    }

    fn multiply(args: &BenchMatmulArgs, gpu: &Gpu, log: &mut Log) -> Result<()> {
        let element = element(&args.common.dtype)?;
        let shapes = match args.shapes.as_slice() {
            [] => SHAPES.to_vec(),
            shapes => shapes.iter().map(|shape| product(shape)).collect::<Result<_>>()?,
        };
        let mut ways: Vec<Way> = Vec::new();
        for epilogue in &args.epilogue {
            ways.push(match epilogue {
                EpilogueArg::Plain => Way::Plain,
                EpilogueArg::Residual => Way::Residual,
                EpilogueArg::Swiglu => Way::SwiGlu,
            });
        }
        ways.extend(args.row_major.then_some(Way::RowMajor));
        let BenchCommonArgs { seconds, window, .. } = args.common;
        let budget = Budget { seconds, window, ..Budget::default() };
        matmul::time(gpu, &shapes, &ways, element, &budget, log)
    }

    /// M, N and K.
    fn product(text: &str) -> Result<[usize; 3]> {
        let extents: Result<Vec<usize>, _> = text.split('x').map(str::parse).collect();
        let extents = extents.ok().and_then(|extents| extents.try_into().ok());
        extents.with_context(|| format!("a product is MxNxK, as in 4096x4096x4096, got {text:?}"))
    }

    fn time(
        args: &BenchCommonArgs,
        measure: impl FnOnce(&Gpu, &mut Log) -> Result<()>,
    ) -> Result<()> {
        check(&args.device)?;
        element(&args.dtype)?;
        let (kind, index) = device::parse(&args.device);
        let gpu = Gpu::open(kind, index.map(str::parse).transpose()?)?;
        let BenchCommonArgs { device, out, json, .. } = args;
        let output = Output { device, out: out.as_deref(), json: *json };
        report(output, |log| measure(&gpu, log))
    }

    /// What was timed on, and where the report goes.
    struct Output<'a> {
        device: &'a str,
        out: Option<&'a Path>,
        json: bool,
    }

    /// Measures, and reports.
    fn report(output: Output, measure: impl FnOnce(&mut Log) -> Result<()>) -> Result<()> {
        let Output { device, out, json } = output;
        let mut run = Run {
            gpu: std::env::var("PRISM_GPU").unwrap_or_else(|_| device.into()),
            command: std::env::args().collect::<Vec<_>>().join(" "),
            ..Run::default()
        };
        let mut tell = |run: &Run, line: &str| {
            eprintln!("{line}");
            match out {
                Some(out) => run.write(out),
                None => Ok(()),
            }
        };
        measure(&mut Log::new(&mut run, &mut tell))?;
        if let Some(out) = out {
            run.write(out)?;
        }
        if json {
            output::json(&Report { wholes: run.wholes(), run: &run })?;
        } else {
            print(&run);
            if let Some(out) = out {
                println!("run.json, table.md, records.csv and plots are in {}", out.display());
            }
        }
        let failed = run.checks.iter().filter(|check| !check.passed).count();
        ensure!(failed == 0, "{failed} of {} checks failed", run.checks.len());
        Ok(())
    }

    fn print(run: &Run) {
        let header = ["phase", "by", "of", "density", "ms sustained", "(burst)", "rate", "note"];
        let mut table = output::table(&header);
        for record in run.sorted() {
            table.add_row(row(record));
        }
        println!("{table}");
        for whole in run.wholes() {
            println!("{whole}");
        }
        for check in &run.checks {
            let passed = if check.passed { "passed" } else { "FAILED" };
            println!("{passed} {}: {}", check.name, check.detail);
        }
        for note in &run.notes {
            println!("{note}");
        }
    }

    fn row(record: &Record) -> [String; 8] {
        let rate = match (record.tflops, record.gbps) {
            (Some(rate), _) => format!("{} TFLOP/s", digits(rate)),
            (None, Some(rate)) => format!("{} GB/s", digits(rate)),
            (None, None) => String::new(),
        };
        [
            record.what.clone(),
            record.rung.clone(),
            record.size(),
            if record.density == 1.0 { "all".into() } else { digits(record.density) },
            digits(record.ms),
            record.ms_burst.map_or_else(String::new, |ms| format!("({})", digits(ms))),
            rate,
            record.note.clone(),
        ]
    }
}
