//! Block means of Q and K and the energy of their bands, in one launch that reads each tensor once.
//!
//! Means run over the tokens actually present and are accumulated in f32 (paper §3.1).

use cubecl::prelude::*;
use cubecl::server::Handle;
use prism_core::BlockGrid;
use prism_core::selection::extent;

use crate::band_mask::BandMask;
use crate::capabilities::Capabilities;
use crate::operand::{Operand, buffer};
use crate::span::{Spans, span};
use crate::work::{cube_count, launch, widest};

/// Block means and band energies of one tensor.
#[derive(Debug, Clone)]
pub struct Pooled {
    /// `[batch, heads, blocks, head_dim]` f32; 0 for blocks that a shorter sequence lacks.
    pub means: Handle,
    /// `[batch, heads, blocks, 4]` f32: sums of squares over the high band, the low band and all
    /// dims, and 1 if the block exists and its mean is finite. As
    /// [`BandEnergy`](prism_core::scores::BandEnergy), of one block.
    pub energy: Handle,
    /// Blocks of the longest sequence.
    pub blocks: usize,
}

/// Pools the query blocks of `q` and the key blocks of `k`. `bands` decides the energies; without
/// it only their total and count mean anything.
pub fn pool(
    client: &Client,
    capabilities: &Capabilities,
    q: &Operand,
    k: &Operand,
    grids: &[BlockGrid],
    bands: &BandMask,
) -> (Pooled, Pooled) {
    let (rows, key_blocks) = extent(grids);
    let outputs = [(q, rows), (k, key_blocks)].map(|(x, blocks)| {
        let lines = x.shape[0] * x.shape[1] * blocks;
        Pooled {
            means: client.empty((lines * x.shape[3] * 4).max(4)),
            energy: client.empty((lines * 16).max(16)),
            blocks,
        }
    });
    let [pooled_q, pooled_k] = outputs;
    launch(client, capabilities, [(q, &pooled_q), (k, &pooled_k)], grids, bands);
    (pooled_q, pooled_k)
}

/// Pools the query or the key blocks of one tensor.
pub fn pool_one(
    client: &Client,
    capabilities: &Capabilities,
    x: &Operand,
    grids: &[BlockGrid],
    side: prism_core::Side,
) -> Pooled {
    let empty = Operand { shape: [x.shape[0], 0, x.shape[2], x.shape[3]], ..x.clone() };
    let bands = BandMask::default();
    match side {
        prism_core::Side::Queries => pool(client, capabilities, x, &empty, grids, &bands).0,
        prism_core::Side::Keys => pool(client, capabilities, &empty, x, grids, &bands).1,
    }
}

fn launch(
    client: &Client,
    capabilities: &Capabilities,
    [(q, pooled_q), (k, pooled_k)]: [(&Operand, &Pooled); 2],
    grids: &[BlockGrid],
    bands: &BandMask,
) {
    let Some(block) = grids.first().map(BlockGrid::block) else { return };
    let [batch, q_heads, _, dim] = q.shape;
    let kv_heads = k.shape[1];
    let q_lines = batch * q_heads * pooled_q.blocks;
    let k_lines = batch * kv_heads * pooled_k.blocks;
    let lines = q_lines + k_lines;
    if lines == 0 {
        return;
    }
    let spans = Spans::new(client, grids);
    let bytes = if capabilities.cores.is_some() { 64 } else { 16 };
    let vector = widest(client, q.vector_size(bytes).min(k.vector_size(bytes)));
    let lanes = dim / vector;
    let (groups, per_cube) = match capabilities.cores {
        Some(cores) => (1, cores),
        None => (((256 / lanes) as u32).clamp(1, block as u32), 1),
    };
    let (units, plane) = match capabilities.cores {
        Some(cores) => (cores, None),
        None => (lanes as u32 * groups, capabilities.plane.filter(|&p| lanes as u32 * groups >= p)),
    };
    let count = cube_count(client, lines.div_ceil(per_cube as usize));
    let address = q.address_type().max(k.address_type());
    let args = (
        buffer(&pooled_q.means, (q_lines * dim).max(1)),
        buffer(&pooled_k.means, (k_lines * dim).max(1)),
        buffer(&pooled_q.energy, (q_lines * 4).max(1)),
        buffer(&pooled_k.energy, (k_lines * 4).max(1)),
    );
    let shape = PoolShape {
        block,
        dim,
        units,
        groups,
        alone: capabilities.cores.is_some(),
        plane,
        ragged: spans.ragged(),
        dense: q.strides[3] == 1 && k.strides[3] == 1,
        bands: *bands,
    };
    // SAFETY: units beyond `lines` return at once, and each line stays within its block, whose
    // rows lie in its tensor, and writes its own mean and energy.
    unsafe {
        launch!(
            pool_kernel,
            client,
            count,
            CubeDim::new_1d(units),
            address,
            vector,
            q.arg(),
            k.arg(),
            args.0,
            args.1,
            args.2,
            args.3,
            spans.arg(&pooled_q.energy),
            spans.uniform.0,
            spans.uniform.1,
            q_heads.max(1),
            kv_heads.max(1),
            pooled_q.blocks.max(1),
            pooled_k.blocks.max(1),
            q_lines,
            lines,
            shape,
            q.element.elem_type(),
        );
    }
}

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct PoolShape {
    block: usize,
    dim: usize,
    /// Units a cube.
    units: u32,
    /// Rows of a block that are read at once.
    groups: u32,
    /// Whether each unit pools blocks of its own, as on a CPU.
    alone: bool,
    plane: Option<u32>,
    ragged: bool,
    /// Whether the last dim has no gaps.
    dense: bool,
    bands: BandMask,
}

#[cube(launch_unchecked, create_dummy_kernel, address_type = "dynamic")]
fn pool_kernel<E: Float, N: Size>(
    q: &Tensor<Vector<E, N>>,
    k: &Tensor<Vector<E, N>>,
    q_means: &mut [f32],
    k_means: &mut [f32],
    q_energy: &mut [f32],
    k_energy: &mut [f32],
    lengths: &[u32],
    q_len: usize,
    kv_len: usize,
    q_heads: usize,
    kv_heads: usize,
    rows: usize,
    key_blocks: usize,
    q_lines: usize,
    lines: usize,
    #[comptime] shape: PoolShape,
    #[define(E)] _element: ElemType,
) {
    let mut line = CUBE_POS;
    if comptime!(shape.alone) {
        line = CUBE_POS * comptime!(shape.units as usize) + UNIT_POS as usize;
    }
    if line >= lines {
        terminate!();
    }
    let ragged = comptime!(shape.ragged);
    let block = comptime!(shape.block);
    if line < q_lines {
        let row = line % rows;
        let head = line / rows;
        let span = span(lengths, head / q_heads, q_len, kv_len, ragged);
        let position = span.first_position();
        let start = (span.first_block(block) + row) * block;
        let end = (start + block).min(span.kv_len).max(position);
        let start = start.max(position).min(end);
        let shift = span.blind;
        let base = (head / q_heads) * q.stride(0) + (head % q_heads) * q.stride(1);
        let first = start - position + shift;
        pool_block::<E, N>(q, q_means, q_energy, line, base, first, end - start, shape);
    } else {
        let line = line - q_lines;
        let head = line / key_blocks;
        let span = span(lengths, head / kv_heads, q_len, kv_len, ragged);
        let start = ((line % key_blocks) * block).min(span.kv_len);
        let end = (start + block).min(span.kv_len);
        let base = (head / kv_heads) * k.stride(0) + (head % kv_heads) * k.stride(1);
        pool_block::<E, N>(k, k_means, k_energy, line, base, start, end - start, shape);
    }
}

/// Mean and energy of `count` rows from `first` on of the head whose elements begin at `base`.
#[cube]
fn pool_block<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    means: &mut [f32],
    energy: &mut [f32],
    line: usize,
    base: usize,
    first: usize,
    count: usize,
    #[comptime] shape: PoolShape,
) {
    let dim = comptime!(shape.dim);
    let width = N::value();
    let lanes = comptime!(dim / width);
    let row_stride = x.stride(2) / width;
    let base = base / width;
    let share = 1.0 / f32::cast_from(count.max(1));
    if comptime!(shape.alone) {
        for lane in 0..lanes {
            let mut sum = Vector::<f32, N>::new(0.0);
            let mut column = lane;
            if comptime!(!shape.dense) {
                column = lane * x.stride(3);
            }
            for row in first..first + count {
                sum += Vector::cast_from(x[base + row * row_stride + column]);
            }
            #[unroll]
            for i in 0..width {
                means[line * dim + lane * width + i] = sum.extract(i) * share;
            }
        }
        let mut sums = Array::<f32>::new(3usize);
        for c in 0..dim {
            let square = means[line * dim + c] * means[line * dim + c];
            add_energy(&mut sums, c, square, comptime!(shape.bands));
        }
        write_energy(energy, line, sums[0], sums[1], sums[2], count);
    } else {
        let groups = comptime!(shape.groups as usize);
        let unit = UNIT_POS as usize;
        let lane = unit % lanes;
        let group = unit / lanes;
        let mut column = lane;
        if comptime!(!shape.dense) {
            column = lane * x.stride(3);
        }
        let mut sum = Vector::<f32, N>::new(0.0);
        let start = base + column + first * row_stride;
        let mut row = group;
        // Four independent loads in flight.
        while row + 3 * groups < count {
            let a = x[start + row * row_stride];
            let b = x[start + (row + groups) * row_stride];
            let c = x[start + (row + 2 * groups) * row_stride];
            let d = x[start + (row + 3 * groups) * row_stride];
            sum += Vector::cast_from(a);
            sum += Vector::cast_from(b);
            sum += Vector::cast_from(c);
            sum += Vector::cast_from(d);
            row += 4 * groups;
        }
        while row < count {
            sum += Vector::cast_from(x[start + row * row_stride]);
            row += groups;
        }
        let mut partial = Shared::<[f32]>::new_slice(comptime!(dim * groups));
        #[unroll]
        for i in 0..width {
            partial[group * dim + lane * width + i] = sum.extract(i);
        }
        sync_cube();
        let units = comptime!(shape.units as usize);
        let mut c = unit;
        while c < dim {
            let mut total = 0.0f32;
            for group in 0..groups {
                total += partial[group * dim + c];
            }
            let mean = total * share;
            means[line * dim + c] = mean;
            // Only this unit reads or writes column c of the first partial row from here on.
            partial[c] = mean * mean;
            c += units;
        }
        sync_cube();
        if comptime!(shape.plane.is_some()) {
            let plane = comptime!(shape.plane.unwrap_or(1) as usize);
            if unit < plane {
                let mut sums = Array::<f32>::new(3usize);
                let mut c = unit;
                while c < dim {
                    add_energy(&mut sums, c, partial[c], comptime!(shape.bands));
                    c += plane;
                }
                let high = plane_sum(sums[0]);
                let low = plane_sum(sums[1]);
                let all = plane_sum(sums[2]);
                if unit == 0 {
                    write_energy(energy, line, high, low, all, count);
                }
            }
        } else if unit == 0 {
            let mut sums = Array::<f32>::new(3usize);
            for c in 0..dim {
                add_energy(&mut sums, c, partial[c], comptime!(shape.bands));
            }
            write_energy(energy, line, sums[0], sums[1], sums[2], count);
        }
    }
}

#[cube]
pub(crate) fn add_energy(
    sums: &mut Array<f32>,
    c: usize,
    square: f32,
    #[comptime] bands: BandMask,
) {
    #[unroll]
    for z in 0..2usize {
        if in_band(c, bands, z) {
            sums[z] += square;
        }
    }
    sums[2] += square;
}

/// Whether band `z` holds dim `c`.
#[cube]
pub(crate) fn in_band(c: usize, #[comptime] bands: BandMask, #[comptime] z: usize) -> bool {
    let mut word = 0u32;
    #[unroll]
    for i in 0..8usize {
        let bits = comptime!(bands.band(z)[i]);
        if comptime!(bits != 0) {
            word = select(c / 32 == i, bits, word);
        }
    }
    (word >> (c % 32) as u32) & 1 == 1
}

/// A block whose mean isn't finite counts nothing, so that a NaN stays with the rows that read it.
#[cube]
pub(crate) fn write_energy(
    energy: &mut [f32],
    line: usize,
    high: f32,
    low: f32,
    all: f32,
    count: usize,
) {
    let finite = u32::reinterpret(all) < 0x7f80_0000u32;
    let counts = finite && count > 0;
    energy[line * 4] = select(counts, high, 0.0);
    energy[line * 4 + 1] = select(counts, low, 0.0);
    energy[line * 4 + 2] = select(counts, all, 0.0);
    energy[line * 4 + 3] = select(counts, 1.0, 0.0);
}

/// Energies of means that are there already, `[lines, head_dim]` f32: as [`Pooled::energy`], but
/// that blocks which a shorter sequence lacks count too; [`calibrate`](crate::calibrate) passes
/// over them.
pub fn energies(
    client: &Client,
    means: &Handle,
    [lines, dim]: [usize; 2],
    bands: &BandMask,
) -> Handle {
    let energy = client.empty((lines * 16).max(16));
    if lines > 0 {
        let units = 64u32.min(client.properties().hardware.max_units_per_cube);
        // SAFETY: units past the last line return.
        unsafe {
            launch!(
                energy_kernel,
                client,
                cube_count(client, lines.div_ceil(units as usize)),
                CubeDim::new_1d(units),
                buffer(means, lines * dim),
                buffer(&energy, lines * 4),
                lines,
                dim,
                *bands,
            );
        }
    }
    energy
}

#[cube(launch_unchecked, create_dummy_kernel)]
fn energy_kernel(
    means: &[f32],
    energy: &mut [f32],
    lines: usize,
    #[comptime] dim: usize,
    #[comptime] bands: BandMask,
) {
    let line = ABSOLUTE_POS;
    if line >= lines {
        terminate!();
    }
    let mut sums = Array::<f32>::new(3usize);
    for c in 0..dim {
        let x = means[line * dim + c];
        add_energy(&mut sums, c, x * x, bands);
    }
    write_energy(energy, line, sums[0], sums[1], sums[2], 1usize.runtime());
}
