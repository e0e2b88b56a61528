//! Products with a weight, for the projections around attention.
//!
//! Sparse attention leaves linear layers as most of the time of a prompt. Where the device is a Hopper
//! whose compiler takes its instructions (feature `cuda-cpp`), f16 and bf16 products of many rows run on
//! a kernel of `prism_kernels::matmul`, with a residual or SwiGLU in the same launch; anything else is
//! Burn's own linear layer. [`plan_linear`] says which before it runs.

use burn::backend::Dispatch;
use burn::tensor::{DType, Device, Tensor, module};
use prism_core::error::{PrismError, Result};

use crate::ops::PrismBackend;
use crate::plan_linear::{LinearKernel, plan_linear};

/// What is added to a product.
#[derive(Debug, Clone, Default)]
pub struct LinearOptions<const D: usize> {
    /// `[N]`, added to every row.
    pub bias: Option<Tensor<1>>,
    /// `[.., N]`, the shape of the output; on Hopper added before the product is rounded.
    pub residual: Option<Tensor<D>>,
}

impl<const D: usize> LinearOptions<D> {
    /// Adds a bias `[N]`.
    pub fn with_bias(mut self, bias: Tensor<1>) -> Self {
        self.bias = Some(bias);
        self
    }

    /// Adds a residual `[.., N]`.
    pub fn with_residual(mut self, residual: Tensor<D>) -> Self {
        self.residual = Some(residual);
        self
    }
}

/// x·W `[.., N]` of x `[.., K]` and W `[K, N]`, in the element type of x, accumulated in f32 or better.
///
/// A weight `[N, K]`, as PyTorch stores it, goes in as `weight.transpose()`: its strides are read where
/// it lies, nothing is copied, and it is as quick.
///
/// ```
/// use burn::tensor::{Device, Tensor};
///
/// let device = Device::flex();
/// let x = Tensor::<3>::ones([1, 5, 16], &device);
/// let weight = Tensor::<2>::ones([24, 16], &device);
/// let y = burn_prism::linear(x, weight.transpose())?;
/// assert_eq!(y.dims(), [1, 5, 24]);
/// # Ok::<(), burn_prism::PrismError>(())
/// ```
///
/// # Errors
/// A weight that doesn't fit x: its rows, its element type (a quantised one always fits), its device;
/// nothing has run then.
pub fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>) -> Result<Tensor<D>> {
    linear_with(x, weight, LinearOptions::default())
}

/// [`linear`] plus a bias, plus a residual.
///
/// # Errors
/// As [`linear`], and likewise of the bias and the residual.
pub fn linear_with<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    options: LinearOptions<D>,
) -> Result<Tensor<D>> {
    let LinearOptions { bias, residual } = options;
    let shape = check_product(&x, ("weight", &weight))?;
    let [_, _, n] = shape;
    if let Some(bias) = &bias {
        check_like(&x, ("bias", bias), [n])?;
    }
    if let Some(residual) = &residual {
        check_like(&x, ("residual", residual), with_columns(&x, n))?;
    }
    if x.dims().contains(&0) {
        return Ok(Tensor::zeros(with_columns(&x, n), (&x.device(), x.dtype())));
    }
    let plan = plan_linear(shape, product_dtype(&x, &weight), &x.device())?;
    if plan.kernel == LinearKernel::Burn {
        let product = module::linear(x, weight, bias);
        return Ok(match residual {
            Some(residual) => residual + product,
            None => product,
        });
    }
    let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
    let product: Tensor<D> = Tensor::from_dispatch(match residual {
        Some(residual) => {
            let residual = residual.into_dispatch();
            <Dispatch as PrismBackend>::prism_linear_residual(x, weight, residual)
        }
        None => <Dispatch as PrismBackend>::prism_linear(x, weight),
    });
    Ok(match bias {
        Some(bias) => product + bias.unsqueeze(),
        None => product,
    })
}

/// `[M, K, N]` of x `[.., K]` and a weight `[K, N]` that fits it.
pub(crate) fn check_product<const D: usize>(
    x: &Tensor<D>,
    (what, weight): (&'static str, &Tensor<2>),
) -> Result<[usize; 3]> {
    let [inner, n] = weight.dims();
    let (dims, k) = (x.dims(), x.dims()[D - 1]);
    for (name, len) in [("columns of x", k), ("columns of a weight", n)] {
        if len == 0 {
            return Err(PrismError::ZeroDim { name });
        }
    }
    if inner != k {
        let (expected, got) = (vec![k, n], vec![inner, n]);
        return Err(PrismError::Shape { what, expected, got });
    }
    if !x.dtype().is_float() {
        let got = format!("{:?}", x.dtype());
        return Err(PrismError::DType { what: "x", allowed: "a float", got });
    }
    // Burn multiplies by a quantised weight as it is.
    if !matches!(weight.dtype(), DType::QFloat(_)) {
        check_dtype(x, what, weight.dtype())?;
    }
    check_device(x, what, &weight.device())?;
    Ok([dims[..D - 1].iter().product(), k, n])
}

/// The dims of `x` with another last one.
pub(crate) fn with_columns<const D: usize>(x: &Tensor<D>, columns: usize) -> [usize; D] {
    let mut dims = x.dims();
    dims[D - 1] = columns;
    dims
}

/// What decides the kernel: the type of x, unless the weight is quantised.
fn product_dtype<const D: usize>(x: &Tensor<D>, weight: &Tensor<2>) -> DType {
    if weight.dtype().is_float() { x.dtype() } else { weight.dtype() }
}

/// Checks what is added to the product of `x`.
fn check_like<const D: usize, const E: usize>(
    x: &Tensor<D>,
    (what, tensor): (&'static str, &Tensor<E>),
    expected: [usize; E],
) -> Result<()> {
    if tensor.dims() != expected {
        let (expected, got) = (expected.to_vec(), tensor.dims().to_vec());
        return Err(PrismError::Shape { what, expected, got });
    }
    check_dtype(x, what, tensor.dtype())?;
    check_device(x, what, &tensor.device())
}

fn check_dtype<const D: usize>(x: &Tensor<D>, what: &'static str, got: DType) -> Result<()> {
    if got == x.dtype() {
        return Ok(());
    }
    Err(PrismError::DType { what, allowed: "that of x", got: format!("{got:?}") })
}

fn check_device<const D: usize>(x: &Tensor<D>, right: &'static str, got: &Device) -> Result<()> {
    if *got == x.device() { Ok(()) } else { Err(PrismError::Device { left: "x", right }) }
}
