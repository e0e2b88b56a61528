//! Inputs made on the device from a hash of the index, so that the host can tell any element of a
//! tensor of any size without holding it.

use anyhow::Result;
use cubecl::prelude::*;
use half::{bf16, f16};
use prism_core::selection::extent;
use prism_core::{BlockGrid, BlockSelection};
use prism_kernels::select::Selection;
use prism_kernels::{Element, Operand};
use rayon::prelude::*;

use crate::Gpu;

/// `[batch, q_heads, kv_heads, q_len, kv_len, head_dim]`.
pub type Dims = [usize; 6];

/// About normal, of standard deviation 1.15.
pub fn value(seed: u32, index: usize, element: Element) -> f64 {
    let h = hash(seed, index);
    let sum = (h & 255) + (h >> 8 & 255) + (h >> 16 & 255) + (h >> 24);
    let x = (sum as f32 - 510.0) / 128.0;
    match element {
        Element::F32 => x.into(),
        Element::F16 => f16::from_f32(x).to_f64(),
        Element::BF16 => bf16::from_f32(x).to_f64(),
    }
}

/// 32 bits, all alike.
fn hash(seed: u32, index: usize) -> u32 {
    let mut h = (index as u32).wrapping_mul(0x9e37_79b9) ^ ((index >> 32) as u32) ^ seed;
    h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
    h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
    h ^ (h >> 16)
}

/// Elements that the host makes: more would take it long, and not every device has the integers of
/// 64 bits that telling them apart takes.
const BY_HOST: usize = 1 << 26;

/// A contiguous tensor of such values.
pub fn tensor(gpu: &Gpu, seed: u32, shape: [usize; 4], element: Element) -> Operand {
    scaled_tensor(gpu, seed, shape, element, 1.0)
}

/// A contiguous tensor of such values times `factor`.
pub fn scaled_tensor(
    gpu: &Gpu,
    seed: u32,
    shape: [usize; 4],
    element: Element,
    factor: f32,
) -> Operand {
    let len = shape.iter().product::<usize>();
    if len <= BY_HOST {
        let values = (0..len).into_par_iter().map(|i| value(seed, i, element) as f32 * factor);
        return upload_values(gpu, &values.collect::<Vec<_>>(), shape, element);
    }
    let handle = gpu.client.empty(len * element.size());
    let cubes = len.div_ceil(256).min(1 << 16);
    // SAFETY: indices stay below `len`.
    unsafe {
        fill::launch_unchecked(
            &gpu.client,
            CubeCount::Static(cubes as u32, 1, 1),
            CubeDim::new_1d(256),
            cubecl::ir::AddressType::U64,
            BufferArg::from_raw_parts(handle.clone(), len),
            len,
            seed,
            factor,
            element.elem_type(),
        );
    }
    Operand::contiguous(handle, shape, element)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn fill<E: Float>(
    out: &mut [E],
    len: usize,
    seed: u32,
    factor: f32,
    #[define(E)] _element: ElemType,
) {
    let mut i = ABSOLUTE_POS;
    let step = CUBE_COUNT * CUBE_DIM as usize;
    while i < len {
        let high = u64::cast_from(i) >> 32u64;
        let low = u32::cast_from(i);
        let h = (low * 0x9e37_79b9u32) ^ u32::cast_from(high) ^ seed;
        let h = (h ^ (h >> 16u32)) * 0x85eb_ca6bu32;
        let h = (h ^ (h >> 13u32)) * 0xc2b2_ae35u32;
        let h = h ^ (h >> 16u32);
        let sum = (h & 255u32) + ((h >> 8u32) & 255u32) + ((h >> 16u32) & 255u32) + (h >> 24u32);
        out[i] = E::cast_from((f32::cast_from(sum) - 510.0f32) / 128.0f32 * factor);
        i += step;
    }
}

/// A contiguous tensor of given values.
pub fn upload_values(gpu: &Gpu, values: &[f32], shape: [usize; 4], element: Element) -> Operand {
    let values = values.par_iter().copied();
    let bytes: Vec<u8> = match element {
        Element::F32 => values.flat_map_iter(f32::to_ne_bytes).collect(),
        Element::F16 => values.flat_map_iter(|x| f16::from_f32(x).to_ne_bytes()).collect(),
        Element::BF16 => values.flat_map_iter(|x| bf16::from_f32(x).to_ne_bytes()).collect(),
    };
    Operand::contiguous(gpu.client.create_from_slice(&bytes), shape, element)
}

/// Values of a device buffer.
///
/// # Errors
/// A kernel launched before failed.
pub fn read(gpu: &Gpu, handle: &cubecl::server::Handle, element: Element) -> Result<Vec<f32>> {
    let bytes = gpu.client.read_one(handle.clone())?;
    Ok(match element {
        Element::F32 => bytemuck::cast_slice(&bytes).to_vec(),
        Element::F16 => bytemuck::cast_slice::<_, f16>(&bytes).iter().map(|x| x.to_f32()).collect(),
        Element::BF16 => {
            bytemuck::cast_slice::<_, bf16>(&bytes).iter().map(|x| x.to_f32()).collect()
        }
    })
}

/// A buffer full of NaN, to tell what a kernel leaves unwritten.
pub fn poisoned(gpu: &Gpu, len: usize, element: Element) -> cubecl::server::Handle {
    gpu.client.create_from_slice(&vec![0xff; (len * element.size()).max(4)])
}

/// Every causal block with probability `density`, the first and the diagonal always.
///
/// # Errors
/// More heads or blocks than a selection has words for.
pub fn random_selection(grids: &[BlockGrid], heads: usize, density: f64) -> Result<BlockSelection> {
    alike_selection(grids, heads, density, Alike::default())
}

/// Neighbours that draw the same blocks, as those of real prompts nearly do.
#[derive(Debug, Clone, Copy)]
pub struct Alike {
    /// Heads in a row; at least 1.
    pub heads: usize,
    /// Rows of a head; at least 1.
    pub rows: usize,
}

impl Default for Alike {
    /// Nobody draws as its neighbour does.
    fn default() -> Self {
        Self { heads: 1, rows: 1 }
    }
}

/// [`random_selection`] with neighbours that draw alike.
///
/// # Errors
/// As there.
pub fn alike_selection(
    grids: &[BlockGrid],
    heads: usize,
    density: f64,
    alike: Alike,
) -> Result<BlockSelection> {
    let (rows, key_blocks) = extent(grids);
    let width = key_blocks.div_ceil(32);
    let mut words = vec![0u32; grids.len() * heads * rows * width];
    words.par_chunks_mut(width.max(1)).enumerate().for_each(|(line, words)| {
        let (grid, row) = (&grids[line / rows / heads], line % rows);
        let head = line / rows;
        let drawn = (head - head % alike.heads) * rows + row - row % alike.rows;
        if row < grid.rows() {
            let causal = grid.causal_blocks(row);
            for v in 0..causal {
                let kept = f64::from(hash(77, drawn * key_blocks + v)) < density * 2f64.powi(32);
                if v == 0 || v + 1 == causal || kept {
                    words[v / 32] |= 1 << (v % 32);
                }
            }
        }
    });
    let counts =
        words.chunks(width.max(1)).map(|row| row.iter().map(|w| w.count_ones()).sum()).collect();
    Ok(BlockSelection::from_words([grids.len(), heads, rows, key_blocks], words, counts)?)
}

/// A selection on the device.
pub fn upload(gpu: &Gpu, selection: &BlockSelection) -> Selection {
    let bytes = |x: &[u32]| -> Vec<u8> {
        if x.is_empty() { vec![0; 4] } else { bytemuck::cast_slice(x).to_vec() }
    };
    Selection {
        words: gpu.client.create_from_slice(&bytes(selection.words())),
        counts: gpu.client.create_from_slice(&bytes(selection.counts())),
        rows: selection.shape()[2],
        words_per_row: selection.words_per_row(),
    }
}

/// Output and LSE of one query in f64.
pub fn exact(
    [_, q_heads, kv_heads, q_len, _, dim]: Dims,
    room: usize,
    grids: &[BlockGrid],
    selection: Option<&BlockSelection>,
    (b, h, i): (usize, usize, usize),
    scale: f64,
    element: Element,
) -> (Vec<f64>, f64) {
    let grid = &grids[b];
    let visible = if i < grid.q_len() { grid.visible_keys(i) } else { 0 };
    let kv_base = (b * kv_heads + h * kv_heads / q_heads) * room;
    let q_base = ((b * q_heads + h) * q_len + i) * dim;
    let q: Vec<f64> = (0..dim).map(|c| value(1, q_base + c, element)).collect();
    let row = visible.checked_sub(1).map(|position| position / grid.block() - grid.first_block());
    let reads = |j: usize| match (selection, row) {
        (Some(selection), Some(row)) => selection.contains(b, h, row, j / grid.block()),
        _ => true,
    };
    let keys: Vec<usize> = (0..visible).filter(|&j| reads(j)).collect();
    let scores: Vec<f64> = keys
        .iter()
        .map(|&j| {
            let base = (kv_base + j) * dim;
            scale * (0..dim).map(|c| q[c] * value(2, base + c, element)).sum::<f64>()
        })
        .collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    let mut out = vec![0.0; dim];
    for (&j, score) in keys.iter().zip(&scores) {
        let weight = (score - max).exp() / total;
        let base = (kv_base + j) * dim;
        out.iter_mut().enumerate().for_each(|(c, o)| *o += weight * value(3, base + c, element));
    }
    (out, if keys.is_empty() { f64::NEG_INFINITY } else { max + total.ln() })
}
