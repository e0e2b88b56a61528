//! Attention over the selected blocks: online softmax, f32 accumulation, K and V read in place
//! and never repeated for the heads of a group. Dense attention is the selection of every causal
//! block.
//!
//! Four rungs compute the same: [`unit`] on any runtime, [`plane`] with subgroups, [`mma`] with
//! tensor cores, `hopper` with those of Hopper and its copy engine.

mod copies;
mod guard;
#[cfg(any(feature = "cuda-cpp", feature = "offline"))]
mod hopper;
mod mma;
mod plane;
pub(crate) mod softmax;
mod unit;
mod walk;

use cubecl::prelude::*;
use cubecl::server::Handle;
use derive_new::new;
use prism_core::BlockGrid;
use prism_core::selection::extent;
use serde::Serialize;
use thiserror::Error;

use crate::capabilities::Capabilities;
use crate::operand::{Element, Operand, buffer};
use crate::select::Selection;
use crate::span::Spans;
use crate::work::{cube_count, launch};

pub use mma::MmaShape;

/// What to compute.
#[derive(Debug, Clone, new)]
pub struct AttendProblem<'a> {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub q: &'a Operand,
    /// `[batch, kv_heads, kv_len, head_dim]`, in the element type of `q`.
    pub k: &'a Operand,
    /// `[batch, kv_heads, kv_len, head_dim]`, in the element type of `q`.
    pub v: &'a Operand,
    /// Block grid of each sequence.
    pub grids: &'a [BlockGrid],
    /// The blocks that each row reads; `None` for every causal block.
    pub selection: Option<&'a Selection>,
    /// Order in which rows are worked, of [`schedule`](crate::schedule).
    pub order: Option<&'a Handle>,
    /// Factor on the scores.
    pub scale: f64,
    /// Whether to return the LSE.
    pub lse: bool,
    /// Whether Q was multiplied by `scale` · log2 e before it was rounded, as
    /// [`rotate_and_pool`](crate::rotate::rotate_and_pool) does it. Then nothing is left of `scale`:
    /// products are scores in log2 units, and `hopper` needs an instruction less for each.
    #[new(default)]
    pub prescaled: bool,
}

impl AttendProblem<'_> {
    /// Factor from products of Q and K to scores in natural units.
    fn factor(&self) -> f64 {
        if self.prescaled { std::f64::consts::LN_2 } else { self.scale }
    }
}

/// What attention returns.
#[derive(Debug, Clone)]
pub struct Attended {
    /// `[batch, q_heads, q_len, head_dim]` in the element type of Q; 0 for queries without keys.
    pub out: Handle,
    /// `[batch, q_heads, q_len]` f32, natural log; −∞ for queries without keys.
    pub lse: Option<Handle>,
}

/// A kernel that computes attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AttendRung {
    /// A unit for a few queries: any runtime.
    Unit,
    /// A plane for a few queries, keys and values in shared memory.
    Plane,
    /// Tensor cores through `mma.sync`: f16 and bf16.
    Mma,
    /// Hopper's tensor cores through `wgmma`, copies by TMA: f16 and bf16, blocks of 128 and its
    /// multiples.
    Hopper,
}

impl std::fmt::Display for AttendRung {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Unit => "unit",
            Self::Plane => "plane",
            Self::Mma => "mma",
            Self::Hopper => "hopper",
        })
    }
}

/// Why a rung can't run a shape on a device.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum RungError {
    /// The device has no planes of a fixed size.
    #[error("the device has no planes (subgroups) of a fixed size that add and compare")]
    NoPlanes,
    /// The device has no such matrix instruction.
    #[error("the device has no m16n8k16 tensor-core instruction for {0:?}")]
    NoTensorCores(Element),
    /// The device is no Hopper, or its compiler takes no inline PTX.
    #[error("no wgmma and TMA: the device is not of sm_90, or feature `cuda-cpp` is off")]
    NoHopper,
    /// The head_dim has no tile in Hopper's layout.
    #[error("wgmma tiles are laid out for head_dim 64, 80, 96 and 128, got {0}")]
    TileDim(usize),
    /// The blocks of the selection don't consist of whole tiles.
    #[error("wgmma tiles have 128 keys: blocks must be multiples of that, got {0}")]
    Block(usize),
    /// The head_dim doesn't fit the instruction.
    #[error("tensor cores take head_dim in multiples of 16 up to 256, got {0}")]
    HeadDim(usize),
    /// The layout of a tensor doesn't allow reads of 16 bytes, nor its copy in whole tiles.
    #[error("rows of {0} can't be read 16 bytes at a time")]
    Layout(&'static str),
    /// Shared memory is short.
    #[error("needs {needs} bytes of shared memory, the device has {has}")]
    SharedMemory {
        /// Bytes needed.
        needs: usize,
        /// Bytes there are.
        has: usize,
    },
}

impl AttendRung {
    /// Every rung, the quickest first.
    pub const LADDER: [Self; 4] = [Self::Hopper, Self::Mma, Self::Plane, Self::Unit];

    /// Whether the rung can run the problem.
    ///
    /// # Errors
    /// What stands in the way.
    pub fn check(
        self,
        capabilities: &Capabilities,
        problem: &AttendProblem,
    ) -> Result<(), RungError> {
        let layout = [("q", problem.q), ("k", problem.k), ("v", problem.v)];
        match self {
            Self::Unit => Ok(()),
            Self::Plane => plane::check(capabilities, problem.q.shape[3]),
            Self::Mma => {
                mma::check(capabilities, problem.q.element, problem.q.shape[3])?;
                let narrow = layout.into_iter().find(|(_, x)| x.vector_size(16) != 8);
                narrow.map_or(Ok(()), |(name, _)| Err(RungError::Layout(name)))
            }
            Self::Hopper => {
                let block = problem.grids.first().map_or(1, BlockGrid::block);
                hopper::check(capabilities, problem.q.element, problem.q.shape[3], block)?;
                hopper::check_problem(problem)
            }
        }
    }

    /// The quickest rung for the problem.
    pub fn best(capabilities: &Capabilities, problem: &AttendProblem) -> Self {
        let runs = |rung: &Self| rung.check(capabilities, problem).is_ok();
        Self::LADDER.into_iter().find(runs).unwrap_or(Self::Unit)
    }

    /// The quickest rung for contiguous tensors and blocks of 128, and why quicker ones don't run.
    pub fn plan(
        capabilities: &Capabilities,
        element: Element,
        dim: usize,
        block: usize,
    ) -> (Self, Vec<(Self, RungError)>) {
        let mut refused = Vec::new();
        for (rung, checked) in [
            (Self::Hopper, hopper::check(capabilities, element, dim, block)),
            (Self::Mma, mma::check(capabilities, element, dim)),
            (Self::Plane, plane::check(capabilities, dim)),
        ] {
            match checked {
                Ok(()) => return (rung, refused),
                Err(error) => refused.push((rung, error)),
            }
        }
        (Self::Unit, refused)
    }
}

/// Attention on the quickest rung.
pub fn attend(client: &Client, capabilities: &Capabilities, problem: &AttendProblem) -> Attended {
    attend_on(client, capabilities, problem, AttendRung::best(capabilities, problem))
}

/// Attention on a given rung, which must have passed [`AttendRung::check`].
pub fn attend_on(
    client: &Client,
    capabilities: &Capabilities,
    problem: &AttendProblem,
    rung: AttendRung,
) -> Attended {
    let [batch, heads, q_len, dim] = problem.q.shape;
    let lines = batch * heads * q_len;
    let size = problem.q.element.size();
    let attended = Attended {
        out: client.empty((lines * dim * size).max(size)),
        lse: problem.lse.then(|| client.empty((lines * 4).max(4))),
    };
    attend_into(client, capabilities, problem, &attended, rung);
    attended
}

/// [`attend_on`] into existing outputs, contiguous and of the right size; every element is
/// written.
pub fn attend_into(
    client: &Client,
    capabilities: &Capabilities,
    problem: &AttendProblem,
    attended: &Attended,
    rung: AttendRung,
) {
    let [batch, heads, q_len, dim] = problem.q.shape;
    if batch * heads * q_len * dim == 0 {
        return;
    }
    let full = |grid: &BlockGrid| grid.q_len() == q_len && grid.blind_queries() == 0;
    if !problem.grids.iter().all(full) {
        clear(client, problem, attended, batch * heads * q_len);
    }
    if extent(problem.grids).0 > 0 {
        match rung {
            AttendRung::Unit => unit::launch(client, capabilities, problem, attended),
            AttendRung::Plane => plane::launch(client, capabilities, problem, attended),
            AttendRung::Mma => mma::launch(client, capabilities, problem, attended),
            AttendRung::Hopper => hopper::launch(client, capabilities, problem, attended),
        }
    }
}

/// Writes what queries without keys get.
fn clear(client: &Client, problem: &AttendProblem, attended: &Attended, lines: usize) {
    let elements = lines * problem.q.shape[3];
    let units = 64u32.min(client.properties().hardware.max_units_per_cube);
    // SAFETY: units past the end return.
    unsafe {
        launch!(
            clear_kernel,
            client,
            cube_count(client, elements.div_ceil(units as usize)),
            CubeDim::new_1d(units),
            problem.q.address_type(),
            buffer(&attended.out, elements),
            buffer(
                attended.lse.as_ref().unwrap_or(&attended.out),
                if problem.lse { lines } else { 1 }
            ),
            elements,
            if problem.lse { lines } else { 0 },
            problem.q.element.elem_type(),
        );
    }
}

#[cube(launch_unchecked, create_dummy_kernel, address_type = "dynamic")]
fn clear_kernel<E: Float>(
    out: &mut [E],
    lse: &mut [f32],
    elements: usize,
    lines: usize,
    #[define(E)] _element: ElemType,
) {
    if ABSOLUTE_POS < elements {
        out[ABSOLUTE_POS] = E::from_int(0);
    }
    if ABSOLUTE_POS < lines {
        lse[ABSOLUTE_POS] = f32::reinterpret(0xff80_0000u32);
    }
}

/// What stands for the rung where no compiler takes its PTX.
#[cfg(not(any(feature = "cuda-cpp", feature = "offline")))]
mod hopper {
    use super::{AttendProblem, Attended, Capabilities, Client, Element, RungError};

    pub(super) fn check(_: &Capabilities, _: Element, _: usize, _: usize) -> Result<(), RungError> {
        Err(RungError::NoHopper)
    }

    pub(super) fn check_problem(_: &AttendProblem) -> Result<(), RungError> {
        Err(RungError::NoHopper)
    }

    /// Never reached: [`check`] lets nothing pass.
    pub(super) fn launch(_: &Client, _: &Capabilities, _: &AttendProblem, _: &Attended) {}
}

/// Numbers that every rung takes.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct AttendNumbers {
    q_len: usize,
    kv_len: usize,
    /// Queries of the tensor.
    tensor_q_len: usize,
    q_heads: usize,
    group: usize,
    rows: usize,
    words_per_row: usize,
    /// Pieces of work.
    items: usize,
    /// Factor from products to scores: [`AttendProblem::factor`].
    scale: f32,
}

fn numbers(problem: &AttendProblem, spans: &Spans, items: usize) -> AttendNumbersLaunch {
    let [_, q_heads, q_len, _] = problem.q.shape;
    let rows = extent(problem.grids).0;
    let words_per_row = problem.selection.map_or(0, |selection| selection.words_per_row);
    AttendNumbersLaunch::new(
        spans.uniform.0,
        spans.uniform.1,
        q_len,
        q_heads,
        q_heads / problem.k.shape[1],
        rows,
        words_per_row,
        items,
        problem.factor() as f32,
    )
}

/// The buffers of a launch: words, order, lengths, LSE.
fn buffers(problem: &AttendProblem, spans: &Spans, attended: &Attended) -> [BufferArg; 4] {
    let [batch, heads, q_len, _] = problem.q.shape;
    let lines = batch * heads * extent(problem.grids).0;
    let unused = &problem.q.handle;
    [
        match problem.selection {
            Some(selection) => buffer(&selection.words, lines * selection.words_per_row),
            None => buffer(unused, 1),
        },
        problem.order.map_or_else(|| buffer(unused, 1), |order| buffer(order, lines)),
        spans.arg(unused),
        match &attended.lse {
            Some(lse) => buffer(lse, batch * heads * q_len),
            None => buffer(&attended.out, 1),
        },
    ]
}
