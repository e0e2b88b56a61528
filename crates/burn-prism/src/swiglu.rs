//! The gate of a feed-forward network, SwiGLU: silu(x·gate) · (x·up).

use burn::backend::Dispatch;
use burn::module::{Module, Param};
use burn::tensor::{Tensor, activation::silu, module};
use prism_core::error::{PrismError, Result};

use crate::fallback;
use crate::linear::{check_product, with_columns};
use crate::ops::PrismBackend;
use crate::plan_linear::{LinearKernel, check_kernel, plan_swiglu};

/// Neighbouring columns of one projection in an interleaved weight: what a lane of the kernel holds of
/// both at the same place.
pub const INTERLEAVE: usize = 8;

/// Gate and up projections `[K, F]` of a SwiGLU, in the order that the device wants.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_prism::{GateUp, swiglu};
///
/// let device = Device::flex();
/// let weight = || Tensor::<2>::random([16, 24], Distribution::Default, &device);
/// let gate_up = GateUp::new(weight(), weight())?;
/// assert_eq!(swiglu(Tensor::<3>::ones([1, 5, 16], &device), &gate_up)?.dims(), [1, 5, 24]);
/// # Ok::<(), burn_prism::PrismError>(())
/// ```
#[derive(Module, Debug)]
pub struct GateUp {
    weights: Weights,
}

#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // One a layer.
enum Weights {
    /// `[K, 2F]`, from [`interleave`].
    Interleaved(Param<Tensor<2>>),
    /// Gate and up, each `[K, F]`.
    Separate((Param<Tensor<2>>, Param<Tensor<2>>)),
}

impl GateUp {
    /// Of gate and up projections `[K, F]`, each maybe a transposed view of `[F, K]`: in one weight where
    /// their device runs the fused kernel for them, else as they are.
    ///
    /// # Errors
    /// Weights of different shapes, element types or devices.
    pub fn new(gate: Tensor<2>, up: Tensor<2>) -> Result<Self> {
        let ([k, f], dtype) = (gate.dims(), gate.dtype());
        // Rows differ from call to call; a full tile stands for them.
        if check_kernel([128, k, 2 * f], true, dtype, &gate.device()).is_ok() {
            return Self::interleaved(gate, up);
        }
        check_pair(&gate, &up)?;
        let pair = (Param::from_tensor(gate), Param::from_tensor(up));
        Ok(Self { weights: Weights::Separate(pair) })
    }

    /// [`new`](Self::new), but in one weight on any device.
    ///
    /// # Errors
    /// As [`interleave`].
    pub fn interleaved(gate: Tensor<2>, up: Tensor<2>) -> Result<Self> {
        let weight = Param::from_tensor(interleave(gate, up)?);
        Ok(Self { weights: Weights::Interleaved(weight) })
    }

    /// Whether both are in one weight.
    pub fn is_interleaved(&self) -> bool {
        matches!(self.weights, Weights::Interleaved(_))
    }
}

/// silu(x·gate) · (x·up) `[.., F]` of x `[.., K]`, in the element type of x. On Hopper one launch, which
/// rounds once at the end.
///
/// # Errors
/// Weights that don't fit x, as of [`linear`](crate::linear()).
pub fn swiglu<const D: usize>(x: Tensor<D>, weights: &GateUp) -> Result<Tensor<D>> {
    match &weights.weights {
        Weights::Separate((gate, up)) => {
            let (gate, up) = (gate.val(), up.val());
            let [_, _, f] = check_product(&x, ("gate", &gate))?;
            check_product(&x, ("up", &up))?;
            if x.dims().contains(&0) {
                return Ok(Tensor::zeros(with_columns(&x, f), (&x.device(), x.dtype())));
            }
            let gate = silu(module::linear(x.clone(), gate, None));
            Ok(gate * module::linear(x, up, None))
        }
        Weights::Interleaved(weight) => {
            let weight = weight.val();
            let [m, k, n] = check_product(&x, ("gate and up", &weight))?;
            if x.dims().contains(&0) {
                return Ok(Tensor::zeros(with_columns(&x, n / 2), (&x.device(), x.dtype())));
            }
            let plan = plan_swiglu([m, k, n / 2], x.dtype(), &x.device())?;
            let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
            Ok(Tensor::from_dispatch(match plan.kernel {
                LinearKernel::Hopper => <Dispatch as PrismBackend>::prism_swiglu(x, weight),
                LinearKernel::Burn => fallback::swiglu::<Dispatch>(x, weight),
            }))
        }
    }
}

/// One weight `[K, 2F]` of gate and up projections `[K, F]`: groups of [`INTERLEAVE`] columns of each
/// alternate, the gate first. Lies in memory as `[2F, K]`.
///
/// # Errors
/// Weights of different shapes, element types or devices, or an F that isn't a multiple of
/// [`INTERLEAVE`].
pub fn interleave(gate: Tensor<2>, up: Tensor<2>) -> Result<Tensor<2>> {
    check_pair(&gate, &up)?;
    let [k, f] = gate.dims();
    if f % INTERLEAVE != 0 {
        return Err(PrismError::Multiple { name: "F", multiple: INTERLEAVE, got: f });
    }
    let groups = |weight: Tensor<2>| weight.transpose().reshape([f / INTERLEAVE, 1, INTERLEAVE, k]);
    let both = Tensor::cat(vec![groups(gate), groups(up)], 1);
    Ok(both.reshape([2 * f, k]).transpose())
}

fn check_pair(gate: &Tensor<2>, up: &Tensor<2>) -> Result<()> {
    for (name, len) in [("K", gate.dims()[0]), ("F", gate.dims()[1])] {
        if len == 0 {
            return Err(PrismError::ZeroDim { name });
        }
    }
    if up.dims() != gate.dims() {
        let (expected, got) = (gate.dims().to_vec(), up.dims().to_vec());
        return Err(PrismError::Shape { what: "up", expected, got });
    }
    if up.dtype() != gate.dtype() {
        let got = format!("{:?}", up.dtype());
        return Err(PrismError::DType { what: "up", allowed: "that of gate", got });
    }
    if up.device() != gate.device() {
        return Err(PrismError::Device { left: "gate", right: "up" });
    }
    Ok(())
}
