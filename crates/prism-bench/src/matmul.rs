//! Timings of the matrix product, by default in the shapes of a Llama layer's projections and a few more.

use anyhow::{Context, Result};
use prism_kernels::Element;
use prism_kernels::matmul::{Epilogue, MatmulProblem, Matrix, check, matmul_into};

use crate::clock::{Budget, Clock, Time};
use crate::device::{Gpu, name};
use crate::inputs::tensor;
use crate::report::{Log, MATMUL, Record};

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

/// What of a product is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The product alone, W `[N, K]` in memory as linear layers keep it.
    Plain,
    /// The product alone, W `[K, N]` in memory.
    RowMajor,
    /// A residual added.
    Residual,
    /// SwiGLU of the interleaved columns.
    SwiGlu,
}

impl Way {
    /// Every way, what is asked for most first.
    pub const ALL: [Self; 4] = [Self::Plain, Self::RowMajor, Self::Residual, Self::SwiGlu];

    /// What records call it, and its rung.
    fn names(self) -> (String, &'static str) {
        match self {
            Self::Plain => (MATMUL.into(), "hopper"),
            Self::RowMajor => (MATMUL.into(), "hopper, W row-major"),
            Self::Residual => (format!("{MATMUL} + residual"), "hopper"),
            Self::SwiGlu => (format!("{MATMUL} + swiglu"), "hopper"),
        }
    }
}

/// Times every shape in every way, the first way of all shapes first.
///
/// # Errors
/// A shape or a type that the kernel doesn't take, or a device that it doesn't run on, before anything
/// runs; a device that fails.
pub fn time(
    gpu: &Gpu,
    shapes: &[[usize; 3]],
    ways: &[Way],
    element: Element,
    budget: &Budget,
    log: &mut Log,
) -> Result<()> {
    budget.check(&[], &[])?;
    let each = || ways.iter().flat_map(|&way| shapes.iter().map(move |&shape| (way, shape)));
    for (way, shape) in each() {
        can(gpu, way, shape, element)?;
    }
    let clock = Clock::new(gpu, budget);
    for (way, shape @ [m, n, k]) in each() {
        let (what, rung) = way.names();
        let measured =
            product(&clock, way, shape, element).with_context(|| format!("{what} {m}×{n}×{k}"))?;
        match measured {
            Some(time) => log.record(record(way, shape, element, time))?,
            None => log.note(format!("skipped: {what} {rung}, {m}×{n}×{k}: no time"))?,
        }
    }
    Ok(())
}

/// Whether the kernel computes a product here, before memory for it is taken.
fn can(gpu: &Gpu, way: Way, shape: [usize; 3], element: Element) -> Result<()> {
    let nothing = || gpu.client.empty(16);
    let [m, n, k] = shape;
    with_problem(way, shape, element, [nothing(), nothing(), nothing()], |problem| {
        check(&gpu.capabilities, problem)
            .with_context(|| format!("the product {m}×{n}×{k} can't run here"))
    })
}

fn product(clock: &Clock, way: Way, shape: [usize; 3], element: Element) -> Result<Option<Time>> {
    // Inputs take time too.
    if clock.over() {
        return Ok(None);
    }
    let (Gpu { client, capabilities }, [m, n, k]) = (clock.gpu, shape);
    let operand = |seed, [rows, columns]: [usize; 2]| {
        tensor(clock.gpu, seed, [1, 1, rows, columns], element).handle
    };
    let residual = if way == Way::Residual { operand(3, [m, n]) } else { client.empty(16) };
    with_problem(
        way,
        shape,
        element,
        [operand(1, [m, k]), operand(2, [n, k]), residual],
        |problem| {
            let [rows, columns] = problem.out_shape();
            let out = client.empty(rows * columns * element.size());
            let out = Matrix::row_major(out, [rows, columns], element);
            let (what, rung) = way.names();
            clock.time(&what, rung, &|| Ok(matmul_into(client, capabilities, problem, &out)?))
        },
    )
}

/// The problem of X, W and a residual.
fn with_problem<T>(
    way: Way,
    [m, n, k]: [usize; 3],
    element: Element,
    [x, w, residual]: [cubecl::server::Handle; 3],
    then: impl FnOnce(&MatmulProblem) -> T,
) -> T {
    let x = Matrix::row_major(x, [m, k], element);
    let w = match way {
        Way::RowMajor => Matrix::row_major(w, [k, n], element),
        _ => Matrix::column_major(w, [k, n], element),
    };
    let residual = Matrix::row_major(residual, [m, n], element);
    let epilogue = match way {
        Way::Plain | Way::RowMajor => Epilogue::Plain,
        Way::Residual => Epilogue::Residual(&residual),
        Way::SwiGlu => Epilogue::SwiGlu,
    };
    then(&MatmulProblem::new(&x, &w, epilogue))
}

fn record(way: Way, [m, n, k]: [usize; 3], element: Element, time: Time) -> Record {
    let (what, rung) = way.names();
    Record {
        what,
        rung: rung.into(),
        dtype: name(element).into(),
        batch: 1,
        q_heads: 1,
        kv_heads: 1,
        q_len: m,
        kv_len: n,
        head_dim: k,
        density: 1.0,
        ms: time.sustained,
        ms_burst: Some(time.burst),
        // 10¹² operations a second.
        tflops: Some(2.0 * m as f64 * n as f64 * k as f64 / time.sustained / 1e9),
        gbps: None,
        peer: false,
        note: String::new(),
    }
}
