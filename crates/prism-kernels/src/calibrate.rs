//! Temperature calibration: from band energies to the factor on each row's scores.
//!
//! τ_z = √(d_z/d) · (RMS q̄_z / RMS q̄) · (RMS k̄_z / RMS k̄) (paper §3.3), and the factor is
//! 1 / (√d_z · τ_z). Sums run in a fixed order, so the same input gives the same bits.

use cubecl::prelude::*;
use cubecl::server::Handle;
use prism_core::scores::SILENT_RMS;
use prism_core::{BlockGrid, Calibration};

use crate::band_mask::BandMask;
use crate::capabilities::Capabilities;
use crate::operand::buffer;
use crate::pool::Pooled;
use crate::span::{Spans, span};
use crate::work::{cube_count, launch};

/// Units a head: each sums a stretch of blocks, then their sums are added in order.
const STRETCHES: u32 = 64;

/// Factors on the scores, `[batch, q_heads, rows, 2]` f32: high band, low band.
///
/// `history` is the energy of earlier query blocks of the same prompt, `[batch, q_heads, 4]` f32.
#[allow(clippy::too_many_arguments)]
pub fn calibrate(
    client: &Client,
    capabilities: &Capabilities,
    pooled_q: &Pooled,
    pooled_k: &Pooled,
    history: Option<&Handle>,
    grids: &[BlockGrid],
    [q_heads, kv_heads, dim]: [usize; 3],
    bands: &BandMask,
    calibration: Calibration,
) -> Handle {
    let (batch, rows, key_blocks) = (grids.len(), pooled_q.blocks, pooled_k.blocks);
    let lines = batch * q_heads * rows;
    let factors = client.empty((lines * 8).max(8));
    let Some(block) = grids.first().map(BlockGrid::block).filter(|_| lines > 0) else {
        return factors;
    };
    let spans = Spans::new(client, grids);
    let stretches =
        if capabilities.cores.is_some() { 1 } else { STRETCHES.min(capabilities.units) };
    let shape = CalibrateShape {
        block,
        dim: dim as u32,
        widths: [bands.width(0), bands.width(1)],
        mode: calibration,
        history: history.is_some(),
        stretches,
        ragged: spans.ragged(),
    };
    // SAFETY: each cube reads the energies of its own head and writes its own factors.
    unsafe {
        launch!(
            calibrate_kernel,
            client,
            cube_count(client, batch * q_heads),
            CubeDim::new_1d(stretches),
            buffer(&pooled_q.energy, lines),
            buffer(&pooled_k.energy, (batch * kv_heads * key_blocks).max(1)),
            match history {
                Some(history) => buffer(history, batch * q_heads),
                None => buffer(&pooled_q.energy, 1),
            },
            buffer(&factors, lines * 2),
            spans.arg(&pooled_q.energy),
            spans.uniform.0,
            spans.uniform.1,
            q_heads,
            q_heads / kv_heads.max(1),
            batch * q_heads,
            rows,
            key_blocks,
            shape,
        );
    }
    factors
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct CalibrateShape {
    block: usize,
    dim: u32,
    widths: [u32; 2],
    mode: Calibration,
    history: bool,
    stretches: u32,
    ragged: bool,
}

/// Sums of squares within the high band, the low band and all dims, and blocks counted.
type Energy = Vector<f32, Const<4>>;

/// RMS of band `z` over RMS of all dims.
#[cube]
fn ratio(
    energy: Energy,
    #[comptime] z: usize,
    #[comptime] width: u32,
    #[comptime] dim: u32,
) -> f32 {
    let blocks = energy.extract(3usize);
    let band = energy.extract(z) / (blocks * comptime!(width as f32)).max(1.0);
    let all = energy.extract(2usize) / (blocks * comptime!(dim as f32)).max(1.0);
    band.sqrt() / all.sqrt().max(comptime!(SILENT_RMS as f32))
}

#[cube(launch_unchecked, create_dummy_kernel)]
fn calibrate_kernel(
    q_energy: &[Energy],
    k_energy: &[Energy],
    history: &[Energy],
    factors: &mut [f32],
    lengths: &[u32],
    q_len: usize,
    kv_len: usize,
    q_heads: usize,
    group: usize,
    heads: usize,
    rows: usize,
    key_blocks: usize,
    #[comptime] shape: CalibrateShape,
) {
    let head = CUBE_POS;
    if head >= heads {
        terminate!();
    }
    let block = comptime!(shape.block);
    let span = span(lengths, head / q_heads, q_len, kv_len, comptime!(shape.ragged));
    let first_block = span.first_block(block);
    let blocks = select(span.seeing == 0, 0usize, span.key_blocks(block));
    let q_base = head * rows;
    let k_base = (head / group) * key_blocks;

    // A stretch of blocks each, on the grid of the keys; query blocks lie on its end.
    let stretches = comptime!(shape.stretches as usize);
    let unit = UNIT_POS as usize;
    let per_unit = blocks.div_ceil(stretches);
    let start = (unit * per_unit).min(blocks);
    let end = (start + per_unit).min(blocks);
    let mut q_sum = Energy::new(0.0f32);
    let mut k_sum = Energy::new(0.0f32);
    for v in start..end {
        k_sum += k_energy[k_base + v];
        if v >= first_block {
            q_sum += q_energy[q_base + v - first_block];
        }
    }
    let mut sums = Shared::<[Energy]>::new_slice(comptime!(stretches * 2));
    sums[unit * 2] = q_sum;
    sums[unit * 2 + 1] = k_sum;
    sync_cube();

    let mut q_now = Energy::new(0.0f32);
    if comptime!(shape.history) {
        q_now = history[head];
    }
    let mut k_now = Energy::new(0.0f32);
    let running = comptime!(shape.mode == Calibration::Causal);
    let before = if comptime!(running) { unit } else { stretches.runtime() };
    for i in 0..before {
        q_now += sums[i * 2];
        k_now += sums[i * 2 + 1];
    }
    for v in start..end {
        if comptime!(running) {
            k_now += k_energy[k_base + v];
        }
        if v >= first_block {
            let line = q_base + v - first_block;
            if comptime!(running) {
                q_now += q_energy[line];
            }
            #[unroll]
            for z in 0..2usize {
                let width = comptime!(shape.widths[z]);
                if comptime!(width > 0) {
                    let mut factor = comptime!(1.0 / (width as f32).sqrt()).runtime();
                    if comptime!(shape.mode != Calibration::Off) {
                        let share = comptime!((width as f32 / shape.dim as f32).sqrt());
                        let tau = ratio(q_now, z, width, comptime!(shape.dim))
                            * ratio(k_now, z, width, comptime!(shape.dim))
                            * share;
                        // A silent band's scores are 0 anyway.
                        factor /= select(tau > 0.0, tau, 1.0f32);
                    }
                    factors[line * 2 + z] = factor;
                }
            }
        }
    }
}
