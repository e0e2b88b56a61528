//! What will run, before it runs.

use std::fmt;

#[allow(unused_imports)] // Of use to builds with a backend that has kernels.
use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device};
use prism_core::error::Result;
use prism_core::{AttentionShape, Cost, SequenceLengths};
use serde::Serialize;

use crate::attention::DENSE_BLOCK;
use crate::check;
use crate::config::PrismConfig;
use crate::report::{Path, Reason};
use crate::{plan_selectors, selectors};

/// What computes on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kernel {
    /// Native CPU kernels of the Flex backend.
    Flex,
    /// CubeCL kernels: a unit for a few queries, on any runtime.
    CubeUnit,
    /// CubeCL kernels on planes (subgroups, warps).
    CubePlane,
    /// CubeCL kernels on tensor cores through `mma.sync`, for f16 and bf16; on planes for f32.
    CubeMma,
    /// CubeCL kernels with Hopper's `wgmma` and TMA, for f16 and bf16.
    CubeHopper,
    /// Burn tensor ops: right on any backend, but every causal key is read whatever the selection.
    TensorOps,
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Flex => "native CPU kernels",
            Self::CubeUnit => "CubeCL kernels, a unit for a few queries",
            Self::CubePlane => "CubeCL kernels on planes",
            Self::CubeMma => "CubeCL kernels on tensor cores",
            Self::CubeHopper => "CubeCL kernels on Hopper's tensor cores",
            Self::TensorOps => "tensor ops",
        })
    }
}

impl Kernel {
    /// Whether it is one of `prism_kernels`.
    pub(crate) fn is_cube(self) -> bool {
        matches!(self, Self::CubeUnit | Self::CubePlane | Self::CubeMma | Self::CubeHopper)
    }

    /// Keys from which Prism at mass .95 beats dense attention, where it was measured
    /// (`docs/performance.md`); `None` where it never does.
    pub fn crossover(self) -> Option<usize> {
        match self {
            Self::Flex => Some(FLEX_CROSSOVER),
            Self::CubeUnit | Self::CubePlane => Some(CUBE_CROSSOVER),
            Self::CubeMma | Self::CubeHopper => Some(CUBE_MMA_CROSSOVER),
            Self::TensorOps => None,
        }
    }
}

/// A quicker kernel that can't run a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refused {
    /// The kernel.
    pub kernel: Kernel,
    /// What stands in its way: a limit and what the call or the device has.
    pub reason: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kernel, self.reason)
    }
}

/// A step of a call, one operation on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The rotary embedding of Q and K.
    Rotate,
    /// Means of the blocks of Q and K.
    Pool,
    /// Both, reading Q and K once.
    RotateAndPool,
    /// Which blocks each row reads; once for all heads of the same settings, where some have their own
    /// ([`PrismConfig::heads`]).
    Select,
    /// Attention.
    Attend,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rotate => "rotate",
            Self::Pool => "pool",
            Self::RotateAndPool => "rotate+pool",
            Self::Select => "select",
            Self::Attend => "attend",
        })
    }
}

/// What a call will do and need.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The path that will run.
    pub path: Path,
    /// Why.
    pub reason: Reason,
    /// What will be done, in order.
    pub steps: Vec<Step>,
    /// The method that chooses blocks, on the sparse path.
    pub selector: Option<&'static str>,
    /// What it runs as, for tensors in plain layout as of `kernel`: methods without kernels of their own are
    /// tensor ops on the device. None reads anything back to the host.
    pub selects_by: Option<Kernel>,
    /// What will compute, for tensors in plain layout; a view with rows that can't be read 16 bytes
    /// at a time takes the next kernel.
    pub kernel: Kernel,
    /// Quicker kernels of the backend that can't run the call, and why.
    pub refused: Vec<Refused>,
    /// Bytes of results and scratch, inputs not counted.
    pub bytes: u64,
    /// Floating-point operations of exact causal attention.
    pub dense_flops: f64,
}

/// Keys from which Prism at mass .95 beats dense attention with the Flex kernels: measured, see
/// `docs/performance.md`.
pub const FLEX_CROSSOVER: usize = 1024;

/// The same with the CubeCL kernels on tensor cores, whose dense attention is quick enough for pooling
/// and selecting to count.
pub const CUBE_MMA_CROSSOVER: usize = 4096;

/// The same with the other CubeCL kernels.
pub const CUBE_CROSSOVER: usize = 2048;

/// Plans a call of [`prism_attention`](crate::prism_attention) of `shape` on `device` without
/// running anything. It takes the path that the call itself would take.
///
/// # Errors
/// Settings, lengths or an element type that the call would refuse, with the same error.
pub fn plan(
    config: &PrismConfig,
    shape: &AttentionShape,
    lengths: Option<&SequenceLengths>,
    dtype: DType,
    device: &Device,
) -> Result<Plan> {
    check::element("q", dtype)?;
    check::supported(dtype, device)?;
    config.validate_for(shape.q_heads, shape.head_dim)?;
    let grids = check::grids(config.block, shape, lengths)?;
    let lengths = SequenceLengths::resolve(lengths, shape)?;
    let (kernel, refused) = choose_kernel(device, dtype, shape.head_dim, config.block);
    let (path, reason) = choose_path(config, &lengths, kernel);
    // Dense attention has blocks of its own.
    let (kernel, refused) = match path {
        Path::Dense => choose_kernel(device, dtype, shape.head_dim, DENSE_BLOCK),
        Path::Sparse => (kernel, refused),
    };
    let place = plan_selectors::Place { shape, dtype, device, attention: kernel };
    let cost = Cost::estimate(shape, &grids, 1.0, dtype.size());
    let cost = cost.with_scoring(shape, &grids, config.scoring);
    let groups = config.head_groups(shape.q_heads).len();
    let scratch = match path {
        Path::Dense => 0,
        Path::Sparse => {
            check::selectable(config, lengths.iter().map(|&(_, kv)| kv).max().unwrap_or(0))?;
            let copies = if groups > 1 {
                // Pooled vectors in the order of the groups, those of K for every query head.
                let each = AttentionShape { kv_heads: shape.q_heads, ..*shape };
                let cost = Cost::estimate(&each, &grids, 1.0, dtype.size());
                let cost = cost.with_scoring(&each, &grids, config.scoring);
                cost.pooled_bytes + cost.selection_bytes
            } else {
                0
            };
            let own = plan_selectors::scratch_bytes(config, place);
            cost.pooled_bytes + cost.selection_bytes + copies + own
        }
    };
    let steps = match path {
        Path::Dense => vec![Step::Attend],
        Path::Sparse => {
            let pools = config.selector.as_ref().is_none_or(selectors::pools);
            let pool = pools.then_some(Step::Pool);
            let selects = std::iter::repeat_n(Step::Select, groups);
            pool.into_iter().chain(selects).chain([Step::Attend]).collect()
        }
    };
    let selects_by = match plan_selectors::has_kernels(config, place) {
        true => kernel,
        false => Kernel::TensorOps,
    };
    let sparse = path == Path::Sparse;
    Ok(Plan {
        path,
        reason,
        steps,
        selector: sparse.then(|| selectors::name(config)),
        selects_by: sparse.then_some(selects_by),
        kernel,
        refused,
        bytes: cost.output_bytes + scratch,
        dense_flops: cost.dense_flops,
    })
}

/// Plans a call of [`rotate_and_pool`](crate::rotate_and_pool) and
/// [`prism_attention_rotated`](crate::prism_attention_rotated): [`plan`], but Q and K come without their
/// rotary embedding. [`Step::RotateAndPool`] says that they are read once for both.
///
/// # Errors
/// As [`plan`].
pub fn plan_rotated(
    config: &PrismConfig,
    shape: &AttentionShape,
    lengths: Option<&SequenceLengths>,
    dtype: DType,
    device: &Device,
) -> Result<Plan> {
    let mut plan = plan(config, shape, lengths, dtype, device)?;
    // Second-order scores are of sub-blocks, which are pooled by themselves, and other methods don't pool
    // or pool less.
    if plan.kernel.is_cube() && config.is_banded() {
        plan.steps.retain(|&step| step != Step::Pool);
        plan.steps.insert(0, Step::RotateAndPool);
    } else {
        plan.steps.insert(0, Step::Rotate);
    }
    let group = [shape.q_heads * shape.q_len, shape.kv_heads * shape.kv_len];
    let elements = (shape.batch * group.iter().sum::<usize>() * shape.head_dim) as u64;
    plan.bytes += elements * dtype.size() as u64;
    Ok(plan)
}

/// What computes on `device` for most models: bf16 heads of 128 in blocks of 128, or f32 where that is
/// all it has.
pub fn kernel(device: &Device) -> Kernel {
    let dtype = if device.supports_dtype(DType::BF16) { DType::BF16 } else { DType::F32 };
    choose_kernel(device, dtype, 128, 128).0
}

/// What computes for heads of a type and width in blocks of a size, and which quicker kernels can't.
pub(crate) fn choose_kernel(
    device: &Device,
    dtype: DType,
    head_dim: usize,
    block: usize,
) -> (Kernel, Vec<Refused>) {
    // Each is of use to some of the backends.
    let _ = (dtype, head_dim, block);
    match device.clone().inner().as_dispatch() {
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => (Kernel::Flex, Vec::new()),
        #[cfg(any(feature = "cpu", feature = "cuda", feature = "rocm", feature = "wgpu"))]
        DispatchDevice::Cube(device) => {
            crate::backends::cube::kernel(device, dtype, head_dim, block)
        }
        #[allow(unreachable_patterns)] // Where Flex is the only backend.
        _ => (Kernel::TensorOps, Vec::new()),
    }
}

/// The path of a call with sequences of the given `(q_len, kv_len)`.
pub(crate) fn choose_path(
    config: &PrismConfig,
    lengths: &[(usize, usize)],
    kernel: Kernel,
) -> (Path, Reason) {
    let queries = lengths.iter().map(|&(q, _)| q).max().unwrap_or(0);
    let keys = lengths.iter().map(|&(_, kv)| kv).max().unwrap_or(0);
    if queries == 0 || keys == 0 {
        return (Path::Dense, Reason::Empty);
    }
    if queries == 1 {
        return (Path::Dense, Reason::Decode);
    }
    let Some(crossover) = config.dense_below.or(kernel.crossover()) else {
        return (Path::Dense, Reason::NoSparseKernel);
    };
    if keys < crossover {
        (Path::Dense, Reason::ShortPrompt { keys, crossover })
    } else {
        (Path::Sparse, Reason::LongPrompt { keys, crossover })
    }
}

/// The support table of the README in Markdown, one line a device: what [`plan`] answers for a
/// prompt of 8192 tokens in each element type and for every head_dim from 32 to 256.
pub fn support_table(devices: &[(&str, Device)]) -> String {
    let mut table = String::from(
        "| device | f32 | f16 | bf16 | head_dim | query heads a kv head | computed by | unless set otherwise |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    for (name, device) in devices {
        let answer = |dtype: DType, head_dim: usize, group: usize| {
            let kv = [1, 1, 8192, head_dim];
            let shape = AttentionShape::new([1, group, 8192, head_dim], kv, kv)?;
            plan(&PrismConfig::llama3(), &shape, None, dtype, device)
        };
        let works = |dtype| {
            let every = (32..=256).step_by(2).all(|d| answer(dtype, d, 4).is_ok());
            if every { "yes" } else { "no" }
        };
        let groups = (1..=32).all(|group| answer(DType::F32, 128, group).is_ok());
        let (kernel, path) = match answer(DType::F32, 128, 4) {
            Ok(plan) => (
                plan.kernel.to_string(),
                match plan.reason {
                    Reason::LongPrompt { crossover, .. } => format!("sparse from {crossover} keys"),
                    reason => format!("{} ({reason})", plan.path),
                },
            ),
            Err(error) => ("nothing".into(), error.to_string()),
        };
        table += &format!(
            "| {name} | {} | {} | {} | 32 … 256 | {} | {kernel} | {path} |\n",
            works(DType::F32),
            works(DType::F16),
            works(DType::BF16),
            if groups { "any" } else { "1" },
        );
    }
    table
}
