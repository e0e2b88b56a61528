//! A plane a row. The cube scores a tile of rows together, each unit some of the keys, so that a
//! key is read once for all of them; masses lie in shared memory where they fit.

use cubecl::prelude::*;

use super::rule::{Row, RuleShape, score_bits, select_row, to_masses};
use super::write::{Line, write_row};
use super::{
    SelectNumbers, SelectProblem, SelectShape, Selection, buffers, masked, transposed, vector_size,
};
use crate::capabilities::Capabilities;
use crate::operand::buffer;
use crate::span::{Spans, span};
use crate::work::{cube_count, launch};

/// Planes a cube, and at most as many rows. Small cubes wait less at their barriers; eight rows
/// would read the keys half as often, but no less time was measured.
const PLANES: u32 = 4;
/// Cubes that shared memory has room for at once: what hides the latency of a row's search.
const CUBES: usize = 6;
/// Bytes of shared memory that a cube takes without regard to the others.
const LEAST: usize = 16 << 10;
/// Keys that a unit scores at once: each query that is read serves them all.
const KEYS: usize = 2;
/// Bytes of masses in memory, where shared memory doesn't hold those of one row.
const SCRATCH: usize = 32 << 20;

pub(super) fn launch(
    client: &Client,
    capabilities: &Capabilities,
    problem: &SelectProblem,
    selection: &Selection,
    lanes: u32,
) {
    let [q_heads, _, dim] = problem.heads;
    let key_blocks = prism_core::selection::extent(problem.grids).1;
    let heads = problem.grids.len() * q_heads;
    let bands = problem.bands.present().len();
    let planes = PLANES.min(capabilities.units / lanes).max(1);
    let units = planes * lanes;
    let budget = (capabilities.shared_memory / CUBES).max(LEAST).min(capabilities.shared_memory);
    let row_bytes = |rows: usize| rows * bands * (key_blocks + dim) * 4;
    let most = planes as usize;
    let shared = (0..).map(|i| most >> i).take_while(|&rows| rows > 0).find(|&rows| {
        row_bytes(rows) <= budget || (rows == 1 && row_bytes(1) <= capabilities.shared_memory)
    });
    let rows = shared.unwrap_or(most);
    let tiles = heads * selection.rows.div_ceil(rows);
    let cubes = match shared {
        Some(_) => tiles,
        None => (SCRATCH / (rows * bands * key_blocks * 4)).clamp(1, tiles),
    };
    let spans = Spans::new(client, problem.grids);
    let shape = SelectShape {
        block: problem.grids[0].block(),
        dim,
        bands: *problem.bands,
        rule: RuleShape::new(problem.rule, lanes, bands as u32, capabilities.copy_async),
        ragged: spans.ragged(),
        rows,
        units,
        shared: shared.is_some(),
        room: key_blocks,
    };
    let vector = vector_size(client, dim);
    let words = if shared.is_some() { 1 } else { cubes * rows * bands * key_blocks };
    let scratch = client.empty(words * 4);
    let [_, kv_heads, _] = problem.heads;
    let k_shape = [problem.grids.len() * kv_heads, key_blocks, dim];
    let keys = transposed(client, problem.k_means, k_shape, vector);
    let [q, k, factors, bits, counts, lengths] =
        buffers(&SelectProblem { k_means: &keys, ..problem.clone() }, &spans, selection, vector);
    // SAFETY: tiles beyond the rows write nothing, and each cube has its own scratch.
    unsafe {
        launch!(
            select_plane,
            client,
            cube_count(client, cubes),
            CubeDim::new_2d(lanes, planes),
            vector,
            q,
            k,
            factors,
            bits,
            counts,
            lengths,
            buffer(&scratch, words),
            problem.numbers(&spans, selection),
            tiles,
            cubes,
            1usize,
            shape,
        );
    }
}

#[cube(launch_unchecked, create_dummy_kernel)]
fn select_plane<N: Size>(
    q_means: &[Vector<f32, N>],
    keys: &[Vector<f32, N>],
    factors: &[f32],
    words: &mut [u32],
    counts: &mut [u32],
    lengths: &[u32],
    scratch: &mut [u32],
    numbers: SelectNumbers,
    tiles: usize,
    cubes: usize,
    step: usize,
    #[comptime] shape: SelectShape,
) {
    let cube = CUBE_POS;
    if cube >= cubes {
        terminate!();
    }
    let per_row = comptime!(shape.rule.bands as usize * shape.room);
    if comptime!(shape.shared) {
        let mut masses = Shared::<[u32]>::new_slice(comptime!(shape.rows * per_row));
        tile_of_rows::<N>(
            q_means,
            keys,
            factors,
            words,
            counts,
            lengths,
            &mut masses,
            &numbers,
            cube,
            0usize,
            step,
            shape,
        );
    } else {
        let mut tile = cube;
        while tile < tiles {
            let start = cube * comptime!(shape.rows * per_row);
            tile_of_rows::<N>(
                q_means, keys, factors, words, counts, lengths, scratch, &numbers, tile, start,
                step, shape,
            );
            sync_cube();
            tile += cubes;
        }
    }
}

/// Rows `tile · R ..` of one head.
#[cube]
fn tile_of_rows<N: Size>(
    q_means: &[Vector<f32, N>],
    keys: &[Vector<f32, N>],
    factors: &[f32],
    words: &mut [u32],
    counts: &mut [u32],
    lengths: &[u32],
    scratch: &mut [u32],
    numbers: &SelectNumbers,
    tile: usize,
    start: usize,
    step: usize,
    #[comptime] shape: SelectShape,
) {
    let block = comptime!(shape.block);
    let bands = comptime!(shape.rule.bands as usize);
    let rows = comptime!(shape.rows);
    let room = comptime!(shape.room);
    let width = N::value();
    let chunks = comptime!(shape.dim / width);
    let tiles = numbers.rows.div_ceil(rows);
    let head = tile / tiles;
    let first_row = (tile % tiles) * rows;
    let batch = head / numbers.q_heads;
    let span = span(lengths, batch, numbers.q_len, numbers.kv_len, comptime!(shape.ragged));
    let unit = UNIT_POS as usize;
    let units = comptime!(shape.units as usize);

    // The queries of the tile, one copy a band with the other dims zeroed.
    let mut queries = Shared::<[Vector<f32, N>]>::new_slice(comptime!(bands * rows * chunks));
    #[unroll]
    for i in 0..bands {
        let z = comptime!(shape.bands.present()[i]);
        let mut at = unit;
        while at < rows * chunks {
            let row = (first_row + at / chunks).min(numbers.rows - 1);
            let line = head * numbers.rows + row;
            let chunk = at % chunks;
            let x = q_means[line * chunks + chunk];
            let factor = factors[line * 2 + z];
            queries[i * rows * chunks + at] =
                masked::<N>(x, factor, chunk * width, comptime!(shape.bands), z);
            at += units;
        }
    }
    sync_cube();

    // Scores of every row of the tile for the keys that its last row sees.
    let last_row = (first_row + rows - 1).min(numbers.rows - 1);
    let reach = (span.first_block(block) + last_row + 1).min(span.key_blocks(block));
    let k_base = (head / numbers.group) * chunks;
    let keys_a_unit = comptime!(KEYS);
    let mut v = unit;
    while v < reach {
        let mut dots = Array::<f32>::new(comptime!(bands * rows * KEYS));
        #[unroll]
        for i in 0..bands * rows * keys_a_unit {
            dots[i] = 0.0f32;
        }
        let segments = comptime!(shape.bands.segments(shape.dim, width));
        #[unroll]
        for s in 0..comptime!(segments.len()) {
            let (from, to, touches) = comptime!(segments[s]);
            let mut c = from.runtime();
            while c < to {
                let line = (k_base + c) * numbers.key_blocks;
                let mut near = Array::<Vector<f32, N>>::new(keys_a_unit);
                #[unroll]
                for i in 0..keys_a_unit {
                    near[i] = keys[line + (v + i * units).min(reach - 1)];
                }
                #[unroll]
                for i in 0..bands {
                    if comptime!(touches[shape.bands.present()[i]]) {
                        #[unroll]
                        for r in 0..rows {
                            let query = queries[(i * rows + r) * chunks + c];
                            #[unroll]
                            for n in 0..keys_a_unit {
                                let at = (i * rows + r) * keys_a_unit + n;
                                #[unroll]
                                for e in 0..width {
                                    dots[at] = fma(query.extract(e), near[n].extract(e), dots[at]);
                                }
                            }
                        }
                    }
                }
                c += step;
            }
        }
        #[unroll]
        for n in 0..keys_a_unit {
            if v + n * units < reach {
                #[unroll]
                for i in 0..bands {
                    #[unroll]
                    for r in 0..rows {
                        let place = start + (r * bands + i) * room + v + n * units;
                        let dot = dots[(i * rows + r) * keys_a_unit + n];
                        scratch[place] = score_bits(dot);
                    }
                }
            }
        }
        v += keys_a_unit * units;
    }
    sync_cube();

    // Each plane its own row.
    let lane = UNIT_POS_X as usize;
    let own = UNIT_POS_Y as usize;
    let row = first_row + own;
    let there = own < rows && row < numbers.rows;
    let causal = select(there, span.causal_blocks(row, block), 0usize);
    let dense = numbers.dense(&span, row, block);
    let place = Row {
        start: start + select(there, own, 0usize) * bands * room,
        stride: room.runtime(),
        causal: select(dense, 0usize, causal),
        lane,
    };
    let masses = scratch.as_vectorized_mut();
    let most = to_masses::<Const<1>>(masses, &place, bands, comptime!(shape.rule));
    let rule = numbers.rule();
    let selected = select_row::<Const<1>>(masses, &place, &rule, most, comptime!(shape.rule));
    // Lanes read each other's masses from here on.
    sync_cube();
    if there {
        let line = Line {
            index: head * numbers.rows + row,
            words_per_row: numbers.words_per_row,
            causal,
            dense,
        };
        let shape = comptime!(shape.rule);
        write_row::<Const<1>>(words, counts, masses, &line, &place, &rule, &selected, shape);
    }
}
