//! Which kernel computes a product with a weight, before it runs.

use std::fmt;

use burn::tensor::{DType, Device};
use prism_core::error::{PrismError, Result};
use serde::Serialize;

/// Rows from which Hopper's kernel computes a product: half of its tiles of 128 rows. With fewer, as in
/// decoding, more than half of every tile is padding.
pub const HOPPER_ROWS: usize = 64;

/// What computes a product with a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LinearKernel {
    /// The kernel of `prism_kernels::matmul` on Hopper's `wgmma` and TMA.
    Hopper,
    /// Burn's own linear layer, with what follows it in tensor ops.
    Burn,
}

impl fmt::Display for LinearKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hopper => "hopper matmul",
            Self::Burn => "Burn's matmul",
        })
    }
}

/// What a product with a weight will do and need.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LinearPlan {
    /// What will compute, for a weight that lies row by row or column by column; one whose lines aren't
    /// 16 bytes or multiples of that apart takes Burn's matmul.
    pub kernel: LinearKernel,
    /// Why it isn't Hopper's kernel: a limit and what the call or the device has.
    pub refused: Option<String>,
    /// Bytes of the result.
    pub bytes: u64,
    /// Floating-point operations of the product.
    pub flops: f64,
}

impl fmt::Display for LinearPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kernel)?;
        match &self.refused {
            Some(reason) => write!(f, " (not {}: {reason})", LinearKernel::Hopper),
            None => Ok(()),
        }
    }
}

/// Plans x·W of `[M, K, N]`: x has M rows (the product of all dims but the last) of K columns, the weight
/// is `[K, N]`. [`linear`](crate::linear()) takes the kernel that this says.
///
/// # Errors
/// K or N of 0.
pub fn plan_linear(shape: [usize; 3], dtype: DType, device: &Device) -> Result<LinearPlan> {
    plan(shape, shape[2], false, dtype, device)
}

/// Plans silu(x·gate) · (x·up) of `[M, K, F]`: as [`plan_linear`], both weights are `[K, F]`.
/// [`swiglu`](crate::swiglu()) takes the kernel that this says if its weights are interleaved, which
/// [`GateUp::new`](crate::GateUp::new) does where the kernel runs.
///
/// # Errors
/// K or F of 0.
pub fn plan_swiglu([m, k, f]: [usize; 3], dtype: DType, device: &Device) -> Result<LinearPlan> {
    plan([m, k, 2 * f], f, true, dtype, device)
}

fn plan(
    [m, k, n]: [usize; 3],
    columns: usize,
    swiglu: bool,
    dtype: DType,
    device: &Device,
) -> Result<LinearPlan> {
    for (name, len) in [("K", k), ("N", n)] {
        if len == 0 {
            return Err(PrismError::ZeroDim { name });
        }
    }
    let refused = refusal([m, k, n], swiglu, dtype, device);
    Ok(LinearPlan {
        kernel: if refused.is_none() { LinearKernel::Hopper } else { LinearKernel::Burn },
        refused,
        bytes: (m * columns * dtype.size()) as u64,
        flops: 2.0 * m as f64 * k as f64 * n as f64,
    })
}

/// Why Hopper's kernel doesn't compute a product `[M, K, N]`, N the columns of the weight; `None` if it
/// does.
fn refusal(shape: [usize; 3], swiglu: bool, dtype: DType, device: &Device) -> Option<String> {
    if let Err(reason) = check_kernel(shape, swiglu, dtype, device) {
        return Some(reason);
    }
    let [rows, ..] = shape;
    (rows < HOPPER_ROWS).then(|| format!("it pays from {HOPPER_ROWS} rows, got {rows}"))
}

/// Whether a device has the kernel, and the kernel takes the product.
///
/// # Errors
/// The limit and what the device or the product has.
pub(crate) fn check_kernel(
    shape: [usize; 3],
    swiglu: bool,
    dtype: DType,
    device: &Device,
) -> Result<(), String> {
    // Each is of use to some of the backends.
    let _ = (shape, swiglu, dtype);
    match device.clone().inner().as_dispatch() {
        #[cfg(any(feature = "cpu", feature = "cuda", feature = "rocm", feature = "wgpu"))]
        burn::backend::DispatchDevice::Cube(device) => {
            crate::backends::cube_linear::check(device, dtype, shape, swiglu)
        }
        #[allow(unreachable_patterns)] // Where there are no others.
        _ => Err("it is a CUDA kernel, got another backend".into()),
    }
}
