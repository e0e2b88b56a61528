//! A unit a row: any runtime, CPUs above all. Masses lie in memory, a slot a unit.

use cubecl::prelude::*;

use super::rule::{Row, score_bits, select_row, to_masses};
use super::write::{Line, write_row};
use super::{SelectNumbers, SelectProblem, SelectShape, Selection, buffers, masked, vector_size};
use crate::band_mask::BandMask;
use crate::capabilities::Capabilities;
use crate::operand::buffer;
use crate::span::{Spans, span};
use crate::work::launch;

/// Units on a GPU: enough to fill a small one; their slots bound the scratch memory.
const GPU_UNITS: usize = 2048;

pub(super) fn launch(
    client: &Client,
    capabilities: &Capabilities,
    problem: &SelectProblem,
    selection: &Selection,
) {
    let [q_heads, _, dim] = problem.heads;
    let key_blocks = prism_core::selection::extent(problem.grids).1;
    let lines = problem.grids.len() * q_heads * selection.rows;
    let (cubes, units) = match capabilities.cores {
        Some(cores) => (1, cores),
        None => (GPU_UNITS.div_ceil(64).min(lines.div_ceil(64)), 64u32.min(capabilities.units)),
    };
    let bands = problem.bands.present().len() as u32;
    let spans = Spans::new(client, problem.grids);
    let rows = cubes * units as usize;
    let shape = SelectShape {
        block: problem.grids[0].block(),
        dim,
        bands: *problem.bands,
        rule: super::rule::RuleShape::new(problem.rule, 1, bands, false),
        ragged: spans.ragged(),
        rows,
        units,
        shared: false,
        room: key_blocks,
    };
    let vector = vector_size(client, dim);
    let words = rows * key_blocks * bands as usize;
    let scratch = client.empty(words * 4);
    let [q, k, factors, bits, counts, lengths] = buffers(problem, &spans, selection, vector);
    // SAFETY: every row lies within the buffers, and each unit has its own slot of the scratch.
    unsafe {
        launch!(
            select_unit,
            client,
            CubeCount::Static(cubes as u32, 1, 1),
            CubeDim::new_1d(units),
            vector,
            q,
            k,
            factors,
            bits,
            counts,
            lengths,
            buffer(&scratch, words),
            problem.numbers(&spans, selection),
            shape,
        );
    }
}

#[cube(launch_unchecked, create_dummy_kernel)]
fn select_unit<N: Size>(
    q_means: &[Vector<f32, N>],
    k_means: &[Vector<f32, N>],
    factors: &[f32],
    words: &mut [u32],
    counts: &mut [u32],
    lengths: &[u32],
    scratch: &mut [u32],
    numbers: SelectNumbers,
    #[comptime] shape: SelectShape,
) {
    let slot = ABSOLUTE_POS;
    let mut line = slot;
    while line < numbers.lines {
        one_row::<N>(
            q_means, k_means, factors, words, counts, lengths, scratch, &numbers, line, slot, shape,
        );
        line += comptime!(shape.rows);
    }
}

#[cube]
fn one_row<N: Size>(
    q_means: &[Vector<f32, N>],
    k_means: &[Vector<f32, N>],
    factors: &[f32],
    words: &mut [u32],
    counts: &mut [u32],
    lengths: &[u32],
    scratch: &mut [u32],
    numbers: &SelectNumbers,
    line: usize,
    slot: usize,
    #[comptime] shape: SelectShape,
) {
    let block = comptime!(shape.block);
    let bands = comptime!(shape.rule.bands as usize);
    let room = comptime!(shape.room);
    let head = line / numbers.rows;
    let row = line % numbers.rows;
    let batch = head / numbers.q_heads;
    let span = span(lengths, batch, numbers.q_len, numbers.kv_len, comptime!(shape.ragged));
    let causal = span.causal_blocks(row, block);
    let dense = numbers.dense(&span, row, block);
    let start = slot * bands * room;
    if !dense && causal > 0 {
        let k_base = (head / numbers.group) * numbers.key_blocks;
        #[unroll]
        for i in 0..bands {
            let z = comptime!(shape.bands.present()[i]);
            let factor = factors[line * 2 + z];
            let q = band_of::<N>(
                q_means,
                line,
                factor,
                comptime!(shape.bands),
                z,
                comptime!(shape.dim),
            );
            let width = N::value();
            let chunks = comptime!(shape.dim / width);
            for v in 0..causal {
                let mut dot = Vector::<f32, N>::new(0.0f32);
                #[unroll]
                for c in 0..chunks {
                    if comptime!(shape.bands.touches(z, c * width, width)) {
                        dot += q[c] * k_means[(k_base + v) * chunks + c];
                    }
                }
                scratch[start + i * room + v] = score_bits(total::<N>(dot));
            }
        }
    }
    let rule = numbers.rule();
    // Dense and empty rows take the same way, with nothing to search.
    let searched =
        Row { start, stride: room.runtime(), causal: select(dense, 0usize, causal), lane: 0usize };
    let masses = scratch.as_vectorized_mut();
    let most = to_masses::<Const<1>>(masses, &searched, bands, comptime!(shape.rule));
    let selected = select_row::<Const<1>>(masses, &searched, &rule, most, comptime!(shape.rule));
    let line = Line { index: line, words_per_row: numbers.words_per_row, causal, dense };
    write_row::<Const<1>>(
        words,
        counts,
        masses,
        &line,
        &searched,
        &rule,
        &selected,
        comptime!(shape.rule),
    );
}

/// The dims of band `z` of a pooled query times `factor`, 0 elsewhere, in vectors.
#[cube]
fn band_of<N: Size>(
    means: &[Vector<f32, N>],
    line: usize,
    factor: f32,
    #[comptime] bands: BandMask,
    #[comptime] z: usize,
    #[comptime] dim: usize,
) -> Array<Vector<f32, N>> {
    let width = N::value();
    let chunks = comptime!(dim / width);
    let mut out = Array::<Vector<f32, N>>::new(chunks);
    #[unroll]
    for c in 0..chunks {
        out[c] = masked::<N>(means[line * chunks + c], factor, c * width, bands, z);
    }
    out
}

/// Sum of a vector's elements, in order.
#[cube]
fn total<N: Size>(x: Vector<f32, N>) -> f32 {
    let mut sum = x.extract(0usize);
    let width = N::value();
    #[unroll]
    for i in 1..width {
        sum += x.extract(i);
    }
    sum
}
