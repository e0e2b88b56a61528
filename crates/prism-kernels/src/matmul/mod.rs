//! Products of matrices in f16 and bf16 on Hopper's tensor cores, with what comes after them done
//! before anything is stored: a residual added, or SwiGLU applied.
//!
//! A cube stays on its multiprocessor and computes one tile of 128 rows and 256 columns after the other.
//! One thread, the producer, has tiles of X and W copied into a ring in shared memory by TMA; two
//! warpgroups, the consumers, own 64 rows each: they multiply by `wgmma`, keep f32 accumulators in
//! registers, and round and store them. Two cubes, one below the other, form a cluster: each fetches half
//! of the tile of W that both need, for both.
//!
//! Made for many rows. Few rows make few tiles, and leave most multiprocessors without work: a token at a
//! time, other kernels are quicker.
//!
//! Which products run is told by [`check()`]: callers fall back on others.

#[cfg(any(feature = "cuda-cpp", feature = "offline"))]
mod accumulators;
mod check;
#[cfg(any(feature = "cuda-cpp", feature = "offline"))]
mod consumer;
mod interleave;
#[cfg(any(feature = "cuda-cpp", feature = "offline"))]
mod kernel;
#[cfg(any(feature = "cuda-cpp", feature = "offline"))]
mod launch;
mod matrix;
#[cfg(any(feature = "cuda-cpp", feature = "offline"))]
mod producer;
#[cfg(any(feature = "cuda-cpp", feature = "offline"))]
mod raster;

use cubecl::prelude::*;
use cubecl::server::Handle;
use derive_new::new;

use crate::capabilities::Capabilities;

pub use check::{MatmulError, check, check_extents};
pub use interleave::{Half, INTERLEAVE, interleave, interleaved};
pub use matrix::Matrix;

/// What to compute.
#[derive(Debug, Clone, Copy, new)]
pub struct MatmulProblem<'a> {
    /// X, `[M, K]`, row-major; rows may lie apart.
    pub x: &'a Matrix,
    /// W, `[K, N]`, in the element type of X: row-major, or column-major, as the weights `[N, K]` of a
    /// linear layer are. Both are as quick.
    pub w: &'a Matrix,
    /// What becomes of the product.
    pub epilogue: Epilogue<'a>,
}

/// What becomes of X·W before it is rounded and stored.
#[derive(Debug, Clone, Copy)]
pub enum Epilogue<'a> {
    /// Nothing: the output is `[M, N]`.
    Plain,
    /// `[M, N]` is added, row-major, in the element type of X. May be the output itself.
    Residual(&'a Matrix),
    /// silu(gate) · up, `[M, N/2]`, of a gate and an up projection whose columns are [`interleaved`] in
    /// W, as [`interleave`] does.
    SwiGlu,
}

impl MatmulProblem<'_> {
    /// Shape of the output.
    pub fn out_shape(&self) -> [usize; 2] {
        let (m, n) = (self.x.shape[0], self.w.shape[1]);
        match self.epilogue {
            Epilogue::Plain | Epilogue::Residual(_) => [m, n],
            Epilogue::SwiGlu => [m, n / 2],
        }
    }
}

/// The product, row-major and without gaps, in the element type of X; accumulated in f32.
///
/// # Errors
/// What [`check()`] says.
pub fn matmul(
    client: &Client,
    capabilities: &Capabilities,
    problem: &MatmulProblem,
) -> Result<Handle, MatmulError> {
    check(capabilities, problem)?;
    let [rows, columns] = problem.out_shape();
    let handle = client.empty(rows * columns * problem.x.element.size());
    let out = Matrix::row_major(handle, [rows, columns], problem.x.element);
    matmul_into(client, capabilities, problem, &out)?;
    Ok(out.handle)
}

/// [`matmul`] into an existing row-major matrix of the shape of the output, whose rows may lie apart.
/// Every element of it is written, and nothing between its rows. It must not overlap X or W.
///
/// # Errors
/// What [`check()`] says, and likewise of the output.
pub fn matmul_into(
    client: &Client,
    capabilities: &Capabilities,
    problem: &MatmulProblem,
    out: &Matrix,
) -> Result<(), MatmulError> {
    check(capabilities, problem)?;
    check::check_out(problem, out)?;
    launch::launch(client, capabilities, problem, out);
    Ok(())
}

/// What stands for the kernel where no compiler takes its PTX.
#[cfg(not(any(feature = "cuda-cpp", feature = "offline")))]
mod launch {
    use super::{Capabilities, Client, MatmulError, MatmulProblem, Matrix};

    pub(super) fn check(_: &Capabilities) -> Result<(), MatmulError> {
        Err(MatmulError::NoHopper)
    }

    /// Never reached: [`check`] lets nothing pass.
    pub(super) fn launch(_: &Client, _: &Capabilities, _: &MatmulProblem, _: &Matrix) {}
}
