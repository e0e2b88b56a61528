//! A linear layer, by whatever computes it quickest.

use burn::tensor::Tensor;
use burn_nn::Linear;
use burn_prism::{LinearOptions, linear_with};
use prism_core::error::Result;

/// `layer` of x `[batch, n, inputs]`, plus a residual `[batch, n, outputs]`.
pub(crate) fn project(
    layer: &Linear,
    x: Tensor<3>,
    residual: Option<Tensor<3>>,
) -> Result<Tensor<3>> {
    let bias = layer.bias.as_ref().map(|bias| bias.val());
    linear_with(x, layer.weight.val(), LinearOptions { bias, residual })
}
