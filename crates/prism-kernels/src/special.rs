//! Functions of a GPU's special function unit: approximate, and by inline PTX where that is there.

use cubecl::prelude::*;

/// 2^x.
#[cube]
pub(crate) fn exp2(x: f32, #[comptime] ptx: bool) -> f32 {
    if comptime!(ptx) {
        let y: f32;
        gpu_asm!("ex2.approx.ftz.f32 {y}, {x};", y = out(_) y, x = in(_) x + 0.0f32, options(pure, nomem));
        y
    } else {
        (x * comptime!(std::f32::consts::LN_2)).exp()
    }
}

/// log2 x for x > 0.
#[cube]
pub(crate) fn log2(x: f32, #[comptime] ptx: bool) -> f32 {
    if comptime!(ptx) {
        let y: f32;
        gpu_asm!("lg2.approx.ftz.f32 {y}, {x};", y = out(_) y, x = in(_) x + 0.0f32, options(pure, nomem));
        y
    } else {
        x.ln() * comptime!(std::f32::consts::LOG2_E)
    }
}

/// √x for x ≥ 0.
#[cube]
pub(crate) fn root(x: f32, #[comptime] ptx: bool) -> f32 {
    if comptime!(ptx) {
        let y: f32;
        gpu_asm!("sqrt.approx.ftz.f32 {y}, {x};", y = out(_) y, x = in(_) x + 0.0f32, options(pure, nomem));
        y
    } else {
        x.sqrt()
    }
}
