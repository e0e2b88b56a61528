//! Timings of the matrix product, in the shapes of a Llama layer's projections and a few more.
//!
//! Sustained and burst as in [`time`](crate::time); at its power limit a card does a tenth less.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use prism_kernels::Element;
use prism_kernels::matmul::{Epilogue, MatmulProblem, Matrix, check, matmul_into};

use crate::Gpu;
use crate::data::tensor;
use crate::report::{MATMUL, Record, Run};

/// Milliseconds of a window, of a burst, and of idling before a burst.
const WINDOW: f64 = 350.0;
const BURST: f64 = 15.0;
const IDLE: f64 = 700.0;
const WINDOWS: usize = 3;
const BURST_CALLS: usize = 10;

/// M, N, K: projections of Llama-3.1-8B, Q with K and V, output, gate with up, down, for a long prompt
/// and a short one; a square.
pub const SHAPES: [[usize; 3]; 9] = [
    [131_072, 6144, 4096],
    [131_072, 4096, 4096],
    [131_072, 28_672, 4096],
    [131_072, 4096, 14_336],
    [4096, 6144, 4096],
    [4096, 4096, 4096],
    [4096, 28_672, 4096],
    [4096, 4096, 14_336],
    [8192, 8192, 8192],
];

/// What of a product is timed: what it is called, whether W is row-major, and the epilogue.
#[derive(Clone, Copy)]
struct Way {
    what: &'static str,
    rung: &'static str,
    row_major: bool,
    residual: bool,
    swiglu: bool,
}

const WAYS: [Way; 4] = {
    let plain =
        Way { what: MATMUL, rung: "hopper", row_major: false, residual: false, swiglu: false };
    [
        plain,
        Way { rung: "hopper, W row-major", row_major: true, ..plain },
        Way { what: "matmul + residual", residual: true, ..plain },
        Way { what: "matmul + swiglu", swiglu: true, ..plain },
    ]
};

/// Times every shape in every way for about `seconds`; `write` gets the run after each record, so that
/// one cut short keeps what it has.
pub fn time_products(
    gpu: &Gpu,
    seconds: f64,
    run: &mut Run,
    write: &mut dyn FnMut(&Run) -> Result<()>,
) -> Result<()> {
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    // Most of what is asked for first: plain products of every shape.
    for way in WAYS {
        for [m, n, k] in SHAPES {
            if Instant::now() > end {
                let note = format!("skipped: {} {}, {m}×{n}×{k}: no time", way.what, way.rung);
                run.notes.push(note);
                continue;
            }
            let record = product(gpu, way, [m, n, k])
                .with_context(|| format!("{} {m}×{n}×{k}", way.what))?;
            println!(
                "{} by {} {m}×{n}×{k}: {:.4} ms (burst {:.4}), {:.0} TFLOP/s (burst {:.0})",
                record.what,
                record.rung,
                record.ms,
                record.ms_burst.unwrap_or(0.0),
                record.tflops.unwrap_or(0.0),
                rate([m, n, k], record.ms_burst.unwrap_or(f64::INFINITY)),
            );
            run.records.push(record);
            write(run)?;
        }
    }
    Ok(())
}

/// 10¹² operations a second.
fn rate([m, n, k]: [usize; 3], ms: f64) -> f64 {
    2.0 * m as f64 * n as f64 * k as f64 / ms / 1e9
}

fn product(gpu: &Gpu, way: Way, [m, n, k]: [usize; 3]) -> Result<Record> {
    let element = Element::BF16;
    let operand = |seed, shape: [usize; 2]| {
        let [rows, columns] = shape;
        tensor(gpu, seed, [1, 1, rows, columns], element).handle
    };
    let x = Matrix::row_major(operand(1, [m, k]), [m, k], element);
    let w = operand(2, [n, k]);
    let w = if way.row_major {
        Matrix::row_major(w, [k, n], element)
    } else {
        Matrix::column_major(w, [k, n], element)
    };
    let residual = way.residual.then(|| Matrix::row_major(operand(3, [m, n]), [m, n], element));
    let epilogue = match &residual {
        Some(residual) => Epilogue::Residual(residual),
        None if way.swiglu => Epilogue::SwiGlu,
        None => Epilogue::Plain,
    };
    let problem = MatmulProblem::new(&x, &w, epilogue);
    check(&gpu.capabilities, &problem)?;
    let [rows, columns] = problem.out_shape();
    let out = gpu.client.empty(rows * columns * element.size());
    let out = Matrix::row_major(out, [rows, columns], element);
    let call = || matmul_into(&gpu.client, &gpu.capabilities, &problem, &out);
    let (ms, burst) = measure(gpu, &call)?;
    Ok(Record {
        what: way.what.into(),
        rung: way.rung.into(),
        dtype: "bf16".into(),
        batch: 1,
        q_heads: 1,
        kv_heads: 1,
        q_len: m,
        kv_len: n,
        head_dim: k,
        density: 1.0,
        ms,
        ms_burst: Some(burst),
        tflops: Some(rate([m, n, k], ms)),
        gbps: None,
        peer: false,
        note: String::new(),
    })
}

/// Milliseconds of a call, sustained and in a burst.
fn measure<E>(gpu: &Gpu, call: &dyn Fn() -> Result<(), E>) -> Result<(f64, f64)>
where
    E: std::error::Error + Send + Sync + 'static,
{
    let batch = |calls: usize| -> Result<f64> {
        let window = gpu.client.profile_start()?;
        for _ in 0..calls {
            call()?;
        }
        let ticks = gpu.client.profile_end(window)?.into_future();
        let ticks = cubecl::future::block_on(ticks).context("the device measured no time")?;
        Ok(ticks.duration().as_secs_f64() * 1e3 / calls as f64)
    };
    let calls = |ms: f64, once: f64| ((ms / once) as usize + 1).min(20_000);
    call()?;
    cubecl::future::block_on(gpu.client.sync())?;
    let once = batch(2)?.max(1e-3);
    // The clock settles during the first window.
    let settled = batch(calls(WINDOW, once))?.max(1e-3);
    let mut windows = Vec::new();
    for _ in 0..WINDOWS {
        windows.push(batch(calls(1.03 * WINDOW, settled))?);
    }
    windows.sort_by(f64::total_cmp);
    let sustained = windows[WINDOWS / 2];
    std::thread::sleep(Duration::from_secs_f64(IDLE / 1e3));
    let burst = batch(((BURST / sustained).round() as usize).clamp(1, BURST_CALLS))?;
    Ok((sustained, burst))
}
