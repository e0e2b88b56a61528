//! What is done to Q and K before attention, reading them once: rotary embedding, the scale of
//! attention folded into Q, and the pooling of both.
//!
//! Every element is rounded once, to the element type, after all of it. Means and energies are those
//! that [`pool`](crate::pool::pool) finds in the rotated tensors: of values rounded to the element type,
//! and of Q without the scale. So the selection doesn't depend on which way it was made.

mod kernel;
mod rows;
mod table;

use cubecl::prelude::*;
use derive_new::new;
use prism_core::selection::extent;
use prism_core::{BlockGrid, RopeLayout};
use thiserror::Error;

use self::kernel::{RotateNumbersLaunch, RotateShape, rotate_kernel};
use crate::band_mask::BandMask;
use crate::capabilities::Capabilities;
use crate::operand::{Element, Operand, buffer};
use crate::pool::Pooled;
use crate::span::Spans;
use crate::work::{cube_count, launch, widest};

pub use table::RotaryTable;

/// Units a cube on GPUs, unless a row needs more.
const UNITS: usize = 128;
/// Heads a cube takes at once: the table is read once for all of them.
const HEADS: usize = 4;
/// Bytes of shared memory a cube may take, so that several fit.
const SHARED_MEMORY: usize = 32 << 10;

/// What to rotate and to pool.
#[derive(Debug, Clone, new)]
pub struct RotateProblem<'a> {
    /// `[batch, q_heads, q_len, head_dim]`, head_dim at most 256.
    pub q: &'a Operand,
    /// `[batch, kv_heads, len, head_dim]` in the element type of `q`. Without a cache all keys of each
    /// sequence, from position 0 on; with one the keys of the queries, of the same length as `q`.
    pub k: &'a Operand,
    /// Angles of all positions of the grids.
    pub table: &'a RotaryTable,
    /// Block grid of each sequence: query `i` sits at position `kv_len − q_len + i`.
    pub grids: &'a [BlockGrid],
    /// Bands whose energies are taken.
    pub bands: &'a BandMask,
    /// The scale of attention: Q is written times `scale` · log2 e, as
    /// [`AttendProblem::prescaled`](crate::attend::AttendProblem::prescaled) wants it.
    #[new(default)]
    pub prescale: Option<f64>,
    /// Where rotated keys go, by position: `[batch, kv_heads, ≥ kv_len, head_dim]` of any strides but
    /// without overlap. Keys before the first query's position are there already and are only
    /// pooled.
    #[new(default)]
    pub cache: Option<&'a Operand>,
}

/// Rotated queries and keys, pooled.
#[derive(Debug, Clone)]
pub struct Rotated {
    /// Shape and element type of Q, contiguous. 0 for queries outside of their sequence, or before
    /// position 0.
    pub q: Operand,
    /// The cache if there is one. Otherwise shape and element type of K, contiguous; 0 for keys past
    /// the end of their sequence.
    pub k: Operand,
    /// Of query blocks, without the scale.
    pub pooled_q: Pooled,
    /// Of key blocks, those that were in the cache included.
    pub pooled_k: Pooled,
}

/// Why a problem can't be rotated.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RotateError {
    /// Tensors that don't go together.
    #[error("{name} is {got:?}, which doesn't go with Q of {q:?} and the grids")]
    Shape {
        /// Which tensor.
        name: &'static str,
        /// Its shape.
        got: [usize; 4],
        /// The shape of Q.
        q: [usize; 4],
    },
    /// Tensors of more than one element type.
    #[error("{name} holds {got:?}, Q holds {q:?}")]
    Element {
        /// Which tensor.
        name: &'static str,
        /// Its element type.
        got: Element,
        /// That of Q.
        q: Element,
    },
    /// Grids that don't go with Q: not one a sequence, of several block sizes, or with more queries
    /// than there are.
    #[error("the grids don't go with Q of {0:?}")]
    Grids([usize; 4]),
    /// A table for other heads.
    #[error("rotary_dim must be even and at most head_dim ({head_dim} of at most 256), got {got}")]
    RotaryDim {
        /// That of Q.
        head_dim: usize,
        /// That of the table.
        got: usize,
    },
    /// A table that ends too early.
    #[error("the rotary table has {has} positions, the longest sequence {needs}")]
    Positions {
        /// Positions of the longest sequence.
        needs: usize,
        /// Positions of the table.
        has: usize,
    },
}

/// Rotates Q and K, folds the scale into Q, and pools both, in one launch.
///
/// # Errors
/// Tensors, grids and a table that don't go together.
pub fn rotate_and_pool(
    client: &Client,
    capabilities: &Capabilities,
    problem: &RotateProblem,
) -> Result<Rotated, RotateError> {
    let [new_q, new_k] = outputs(client, problem)?;
    let RotateProblem { q, k, grids, .. } = *problem;
    let (rows, key_blocks) = extent(grids);
    let pooled = |heads: usize, blocks: usize| {
        let lines = q.shape[0] * heads * blocks;
        Pooled {
            means: client.empty((lines * q.shape[3] * 4).max(4)),
            energy: client.empty((lines * 16).max(16)),
            blocks,
        }
    };
    let rotated = Rotated {
        q: new_q,
        k: new_k,
        pooled_q: pooled(q.shape[1], rows),
        pooled_k: pooled(k.shape[1], key_blocks),
    };
    launch(client, capabilities, problem, &rotated, true);
    Ok(rotated)
}

/// Rotates Q and K and folds the scale into Q, for attention that selects nothing: Q and K as of
/// [`rotate_and_pool`].
///
/// # Errors
/// As of [`rotate_and_pool`].
pub fn rotate(
    client: &Client,
    capabilities: &Capabilities,
    problem: &RotateProblem,
) -> Result<[Operand; 2], RotateError> {
    let [q, k] = outputs(client, problem)?;
    let (rows, key_blocks) = extent(problem.grids);
    let unused = |blocks| Pooled { means: client.empty(4), energy: client.empty(16), blocks };
    let (pooled_q, pooled_k) = (unused(rows), unused(key_blocks));
    let rotated = Rotated { q, k, pooled_q, pooled_k };
    launch(client, capabilities, problem, &rotated, false);
    Ok([rotated.q, rotated.k])
}

/// What rotated Q and K are written to.
fn outputs(client: &Client, problem: &RotateProblem) -> Result<[Operand; 2], RotateError> {
    check(problem)?;
    let (rows, key_blocks) = extent(problem.grids);
    // Where no cube writes, all is outside of the sequences.
    let new = |x: &Operand, blocks: usize| {
        let bytes = (x.shape.iter().product::<usize>() * x.element.size()).max(4);
        let handle = match blocks {
            0 => client.create_from_slice(&vec![0; bytes]),
            _ => client.empty(bytes),
        };
        Operand::contiguous(handle, x.shape, x.element)
    };
    let k = problem.cache.cloned().unwrap_or_else(|| new(problem.k, key_blocks));
    Ok([new(problem.q, rows), k])
}

fn check(problem: &RotateProblem) -> Result<(), RotateError> {
    let RotateProblem { q, k, table, grids, cache, .. } = *problem;
    let [batch, _, q_len, head_dim] = q.shape;
    let keys = grids.iter().map(BlockGrid::kv_len).max().unwrap_or(0);
    let fits = |grid: &BlockGrid| grid.q_len() <= q_len && grid.block() == grids[0].block();
    if grids.len() != batch || !grids.iter().all(fits) {
        return Err(RotateError::Grids(q.shape));
    }
    let got = table.rotary_dim;
    if head_dim > 256 || got > head_dim || got % 2 != 0 {
        return Err(RotateError::RotaryDim { head_dim, got });
    }
    if got > 0 && table.positions < keys {
        return Err(RotateError::Positions { needs: keys, has: table.positions });
    }
    // With a cache, new keys go with queries.
    let goes = |x: &Operand, len: bool| [x.shape[0], x.shape[3]] == [batch, head_dim] && len;
    let tensors = match cache {
        Some(cache) => {
            let goes_cache = goes(cache, cache.shape[2] >= keys && cache.shape[1] == k.shape[1]);
            [("K", k, goes(k, k.shape[2] == q_len)), ("the cache", cache, goes_cache)]
        }
        None => [("K", k, goes(k, k.shape[2] >= keys)); 2],
    };
    for (name, x, goes) in tensors {
        if !goes {
            return Err(RotateError::Shape { name, got: x.shape, q: q.shape });
        }
        if x.element != q.element {
            return Err(RotateError::Element { name, got: x.element, q: q.element });
        }
    }
    Ok(())
}

/// Elements a vector: what divides both halves of the rotated dims, the rest, and every row.
fn width(
    client: &Client,
    capabilities: &Capabilities,
    tensors: [&Operand; 4],
    half: usize,
) -> usize {
    let bytes = if capabilities.cores.is_some() { 64 } else { 16 };
    let rest = tensors[0].shape[3] - 2 * half;
    let width = tensors.map(|x| {
        let mut width = widest(client, x.vector_size(bytes));
        let start = x.handle.offset_start.unwrap_or(0) as usize;
        while width > 1 && start % (width * x.element.size()) != 0 {
            width /= 2;
        }
        width
    });
    let mut width = width.into_iter().min().unwrap_or(1);
    while half % width != 0 || rest % width != 0 {
        width /= 2;
    }
    width
}

fn launch(
    client: &Client,
    capabilities: &Capabilities,
    problem: &RotateProblem,
    Rotated { q: new_q, k: new_k, pooled_q, pooled_k }: &Rotated,
    pools: bool,
) {
    let RotateProblem { q, k, table, grids, bands, .. } = *problem;
    let Some(block) = grids.first().map(BlockGrid::block) else { return };
    let [batch, q_heads, _, dim] = q.shape;
    let (kv_heads, rows, key_blocks) = (k.shape[1], pooled_q.blocks, pooled_k.blocks);
    let half = table.rotary_dim / 2;
    let tensors = [q, k, new_q, new_k];
    let vector = width(client, capabilities, tensors, half);
    let turning = half / vector;
    let lanes = turning + (dim - 2 * half) / vector;
    let alone = capabilities.cores.is_some();
    let (mut heads, mut groups) = (HEADS.min(q_heads.max(kv_heads)), 1);
    let mut units = capabilities.cores.unwrap_or(1);
    if alone {
        heads = 1;
    } else {
        groups = (UNITS / lanes.max(1)).clamp(1, block);
        units = (lanes * groups) as u32;
        while heads > 1 && heads * groups * dim * 4 > SHARED_MEMORY.min(capabilities.shared_memory)
        {
            heads /= 2;
        }
    }
    let teams = q_heads.div_ceil(heads.max(1)) + kv_heads.div_ceil(heads.max(1));
    let lines = batch * key_blocks * teams;
    if lines * lanes == 0 {
        return;
    }
    let spans = Spans::new(client, grids);
    let per_cube = if alone { units as usize } else { 1 };
    let address = tensors.map(Operand::address_type).into_iter().max();
    let [q_lines, k_lines] = match pools {
        true => [batch * q_heads * rows, batch * kv_heads * key_blocks],
        false => [0; 2],
    };
    // Where nothing turns, the table may be smaller than the vector that stands for it.
    let (cos, sin, angles) = match turning {
        0 => (client.empty(64), client.empty(64), 1),
        _ => (table.cos.clone(), table.sin.clone(), table.positions * turning),
    };
    let factor = problem.prescale.unwrap_or(1.0) * std::f64::consts::LOG2_E;
    let shape = RotateShape {
        block,
        dim,
        units,
        groups,
        heads,
        turning,
        interleaved: table.layout == RopeLayout::Interleaved,
        scaled: problem.prescale.is_some(),
        pools,
        cached: problem.cache.is_some(),
        alone,
        plane: capabilities.plane.filter(|&plane| !alone && units >= plane),
        ragged: spans.ragged(),
        dense: tensors.iter().all(|x| x.strides[3] == 1),
        bands: *bands,
    };
    // SAFETY: units beyond `lines` return at once; each line reads and writes rows of its block, which
    // lie in the tensors and the table, and its own means and energies.
    unsafe {
        launch!(
            rotate_kernel,
            client,
            cube_count(client, lines.div_ceil(per_cube)),
            CubeDim::new_1d(units),
            address.unwrap_or_else(|| q.address_type()),
            vector,
            q.arg(),
            k.arg(),
            buffer(&cos, angles),
            buffer(&sin, angles),
            spans.arg(&table.cos),
            new_q.arg(),
            new_k.arg(),
            buffer(&pooled_q.means, (q_lines * dim).max(1)),
            buffer(&pooled_k.means, (k_lines * dim).max(1)),
            buffer(&pooled_q.energy, (q_lines * 4).max(1)),
            buffer(&pooled_k.energy, (k_lines * 4).max(1)),
            RotateNumbersLaunch::new(
                spans.uniform.0,
                spans.uniform.1,
                q_heads,
                kv_heads,
                rows,
                key_blocks,
                lines,
                factor as f32,
            ),
            shape,
            q.element.elem_type(),
        );
    }
}
