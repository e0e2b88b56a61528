//! Products with a weight.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Shape, TensorMetadata};

use super::tensor::Float;
use crate::swiglu::INTERLEAVE;

/// x·W `[.., N]` of x `[.., K]` and W `[K, N]`, as Burn computes it.
pub fn linear<B: Backend>(x: FloatTensor<B>, weight: FloatTensor<B>) -> FloatTensor<B> {
    B::linear(x, weight, None)
}

/// [`linear`] plus a residual `[.., N]`.
pub fn linear_residual<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    residual: FloatTensor<B>,
) -> FloatTensor<B> {
    B::float_add(residual, B::linear(x, weight, None))
}

/// silu(x·gate) · (x·up) `[.., F]` of x `[.., K]` and both weights in one, `[K, 2F]`, their columns
/// alternating in groups of [`INTERLEAVE`].
pub fn swiglu<B: Backend>(x: FloatTensor<B>, weight: FloatTensor<B>) -> FloatTensor<B> {
    let mut shape = x.shape().to_vec();
    let columns = weight.shape()[1] / 2;
    if let Some(last) = shape.last_mut() {
        *last = columns;
    }
    let rows: usize = shape[..shape.len() - 1].iter().product();
    let both = Float::<B>(B::linear(x, weight, None));
    let both = both.reshape([rows, columns / INTERLEAVE, 2, INTERLEAVE]);
    let gate = both.clone().slice(2, 0..1);
    let silu = Float(B::sigmoid(gate.0.clone())) * gate;
    let out = silu * both.slice(2, 1..2);
    B::float_reshape(out.0, Shape::from(shape))
}
