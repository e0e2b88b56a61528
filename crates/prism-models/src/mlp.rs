//! The gated feed-forward network, SwiGLU.

use burn::module::Module;
use burn::tensor::{Tensor, activation::silu};
use burn_nn::Linear;

/// `down(silu(gate(x)) · up(x))`.
#[derive(Module, Debug)]
pub struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Mlp {
    /// From projections `[hidden, intermediate]` (two) and `[intermediate, hidden]`.
    pub fn new(gate_proj: Linear, up_proj: Linear, down_proj: Linear) -> Self {
        Self { gate_proj, up_proj, down_proj }
    }

    /// Of `x` `[batch, n, hidden]`, same shape.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = silu(self.gate_proj.forward(x.clone()));
        self.down_proj.forward(gate * self.up_proj.forward(x))
    }
}
