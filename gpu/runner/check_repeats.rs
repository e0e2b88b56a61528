//! The same bits from the same input, however the cubes of a launch happen to take turns.

use cubecl::server::Handle;
use prism_bench::Gpu;
use prism_bench::inputs::{poisoned, random_selection, tensor, upload};
use prism_bench::report::Run;
use prism_core::bands::{BandRule, Bands};
use prism_core::selection::extent;
use prism_core::{BlockGrid, Calibration, Rope, SelectionRule};
use prism_kernels::attend::{AttendProblem, AttendRung, Attended, attend_into};
use prism_kernels::band_mask::BandMask;
use prism_kernels::calibrate::calibrate;
use prism_kernels::matmul::{Epilogue, MatmulProblem, matmul_into};
use prism_kernels::pool::pool;
use prism_kernels::schedule::schedule;
use prism_kernels::select::{SelectProblem, SelectRung, select_blocks_on};
use prism_kernels::{Element, Matrix};

use crate::check_attention::push;

/// How often each is done.
const REPEATS: usize = 1000;
const ELEMENT: Element = Element::BF16;

/// Attention on the rungs of tensor cores, a selection with all that comes before it, a product.
pub fn repeats(gpu: &Gpu, run: &mut Run) {
    for dim in [64, 128] {
        attention(gpu, dim, run);
    }
    selection(gpu, run);
    product(gpu, run);
}

/// Whether all repeats give what the first one gave.
fn same(gpu: &Gpu, name: &str, run: &mut Run, mut repeat: impl FnMut() -> Vec<Handle>) {
    let mut bits = || -> Vec<Vec<u8>> {
        let read = |handle| gpu.client.read_one(handle).expect("the kernels ran").to_vec();
        repeat().into_iter().map(read).collect()
    };
    let first = bits();
    let differs = (1..REPEATS).find(|_| bits() != first);
    let result = match differs {
        Some(i) => Err(format!("repeat {i} differs")),
        None => Ok(format!("{REPEATS} times")),
    };
    push(run, format!("the same bits: {name}"), result);
}

fn attention(gpu: &Gpu, dim: usize, run: &mut Run) {
    // More pieces of work than multiprocessors, rows of unequal length.
    let (q_heads, kv_heads, len) = (16, 4, 1500);
    let input = |seed, heads| tensor(gpu, seed, [1, heads, len, dim], ELEMENT);
    let (q, k, v) = (input(1, q_heads), input(2, kv_heads), input(3, kv_heads));
    let grids = [BlockGrid::new(128, len, len).expect("a grid")];
    let selection = upload(gpu, &random_selection(&grids, q_heads, 0.3).expect("a selection"));
    let (heads, blocks) = ([1, q_heads, kv_heads], extent(&grids).1);
    let order = schedule(&gpu.client, &gpu.capabilities, &selection, heads, blocks);
    let scale = 1.0 / (dim as f64).sqrt();
    for rung in [AttendRung::Hopper, AttendRung::Mma] {
        for sparse in [false, true] {
            let chosen = sparse.then_some(&selection);
            let ordered = sparse.then_some(&order);
            let problem = AttendProblem::new(&q, &k, &v, &grids, chosen, ordered, scale, true);
            if rung.check(&gpu.capabilities, &problem).is_err() {
                continue;
            }
            let name = format!("attend {rung} d{dim} {}", if sparse { "sparse" } else { "dense" });
            same(gpu, &name, run, || {
                let out = poisoned(gpu, q_heads * len * dim, ELEMENT);
                let lse = poisoned(gpu, q_heads * len, Element::F32);
                let attended = Attended { out: out.clone(), lse: Some(lse.clone()) };
                attend_into(&gpu.client, &gpu.capabilities, &problem, &attended, rung);
                vec![out, lse]
            });
        }
    }
}

fn selection(gpu: &Gpu, run: &mut Run) {
    let Gpu { client, capabilities } = gpu;
    let (q_heads, kv_heads, len, dim) = (4, 2, 10_000, 128);
    let q = tensor(gpu, 1, [1, q_heads, len, dim], ELEMENT);
    let k = tensor(gpu, 2, [1, kv_heads, len, dim], ELEMENT);
    let grids = [BlockGrid::new(128, len, len).expect("a grid")];
    let bands = Bands::new(BandRule::Auto, Some(&Rope::new(5e5)), dim, 128).expect("bands");
    let (mask, heads) = (BandMask::new(&bands), [q_heads, kv_heads, dim]);
    let rule = SelectionRule::default();
    for rung in [SelectRung::Mma, SelectRung::Plane] {
        same(gpu, &format!("select {rung}"), run, || {
            let (q, k) = pool(client, capabilities, &q, &k, &grids, &mask);
            let mode = Calibration::Global;
            let factors = calibrate(client, capabilities, &q, &k, None, &grids, heads, &mask, mode);
            let problem = SelectProblem::new(
                &q.means, &k.means, &factors, heads, &grids, &mask, &rule, false,
            );
            if !rung.runs(capabilities, &problem) {
                return Vec::new();
            }
            let selected = select_blocks_on(client, capabilities, &problem, rung);
            vec![selected.words, selected.counts]
        });
    }
}

fn product(gpu: &Gpu, run: &mut Run) {
    let [m, n, k] = [1000, 1032, 520];
    let operand = |seed, [rows, columns]: [usize; 2]| {
        tensor(gpu, seed, [1, 1, rows, columns], ELEMENT).handle
    };
    let x = Matrix::row_major(operand(1, [m, k]), [m, k], ELEMENT);
    let w = Matrix::column_major(operand(2, [n, k]), [k, n], ELEMENT);
    let problem = MatmulProblem::new(&x, &w, Epilogue::Plain);
    if prism_kernels::matmul::check(&gpu.capabilities, &problem).is_err() {
        return;
    }
    same(gpu, "matmul", run, || {
        let out = poisoned(gpu, m * n, ELEMENT);
        let matrix = Matrix::row_major(out.clone(), [m, n], ELEMENT);
        matmul_into(&gpu.client, &gpu.capabilities, &problem, &matrix).expect("it was checked");
        vec![out]
    });
}
