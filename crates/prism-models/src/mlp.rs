//! The gated feed-forward network, SwiGLU.

use burn::module::Module;
use burn::tensor::Tensor;
use burn_nn::Linear;
use burn_prism::{GateUp, swiglu};
use prism_core::error::Result;

use crate::projection::project;

/// `residual + down(silu(gate(x)) · up(x))`.
#[derive(Module, Debug)]
pub struct Mlp {
    gate_up: GateUp,
    down_proj: Linear,
}

impl Mlp {
    /// From gate and up projections `[hidden, intermediate]` and one `[intermediate, hidden]`.
    pub fn new(gate_up: GateUp, down_proj: Linear) -> Self {
        Self { gate_up, down_proj }
    }

    /// Of `x` `[batch, n, hidden]` and a residual of its shape; same shape.
    ///
    /// # Errors
    /// Another hidden size than the weights'.
    pub fn forward(&self, x: Tensor<3>, residual: Tensor<3>) -> Result<Tensor<3>> {
        project(&self.down_proj, swiglu(x, &self.gate_up)?, Some(residual))
    }
}
