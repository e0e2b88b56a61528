//! Online softmax over lanes, in powers of two.

use pulp::Simd;

use super::matmul::Lanes;

/// Running softmax of one panel.
///
/// Scores come unscaled and only their distance from the maximum is scaled: for large scores that
/// keeps the bits which a product with the scale would round away.
#[derive(Debug, Clone, Copy)]
pub(super) struct Running<S: Simd, const N: usize> {
    /// Largest score so far, −∞ before the first key.
    pub(super) max: Lanes<S, N>,
    /// Sum of `2^(scale · (score − max))` so far.
    pub(super) sum: Lanes<S, N>,
    /// Factor on the scores, in units of log₂; above 0.
    scale: S::f32s,
}

impl<S: Simd, const N: usize> Running<S, N> {
    /// Before the first key.
    #[inline(always)]
    pub(super) fn new(simd: S, scale: f32) -> Self {
        let (max, sum) = (simd.splat_f32s(f32::NEG_INFINITY), simd.splat_f32s(0.0));
        Self { max: [max; N], sum: [sum; N], scale: simd.splat_f32s(scale) }
    }

    /// Takes in the scores of some keys, `[keys]`, and turns them into weights
    /// `2^(scale · (score − max))`. Returns the factor that brings what was summed before to the new
    /// maximum.
    #[inline(always)]
    pub(super) fn update(&mut self, simd: S, scores: &mut [Lanes<S, N>]) -> Lanes<S, N> {
        let zero = simd.splat_f32s(0.0);
        let lowest = simd.splat_f32s(f32::NEG_INFINITY);
        let mut max = self.max;
        for score in scores.iter() {
            for n in 0..N {
                max[n] = simd.max_f32s(score[n], max[n]);
            }
        }
        // A lane without any finite score keeps weights of 2^(−∞ − 0) = 0 instead of 2^(∞ − ∞).
        let mut base = max;
        let mut rescale = [zero; N];
        for n in 0..N {
            base[n] = simd.select_f32s(simd.equal_f32s(max[n], lowest), zero, max[n]);
            let distance = simd.sub_f32s(self.max[n], base[n]);
            rescale[n] = exp2(simd, simd.mul_f32s(distance, self.scale));
        }
        let mut sum = [zero; N];
        for score in scores {
            for n in 0..N {
                let distance = simd.sub_f32s(score[n], base[n]);
                score[n] = exp2(simd, simd.mul_f32s(distance, self.scale));
                sum[n] = simd.add_f32s(sum[n], score[n]);
            }
        }
        for n in 0..N {
            self.sum[n] = simd.mul_add_e_f32s(self.sum[n], rescale[n], sum[n]);
        }
        self.max = max;
        rescale
    }
}

/// Lane numbers, as many as any panel has.
const LANE: [f32; 64] = {
    let mut lane = [0.0; 64];
    let mut i = 0;
    while i < lane.len() {
        lane[i] = i as f32;
        i += 1;
    }
    lane
};

/// Sets the scores of keys that a lane doesn't see to −∞: lane `l` sees key `i` of `scores` if
/// `i + ahead < l`.
#[inline(always)]
pub(super) fn mask<S: Simd, const N: usize>(simd: S, scores: &mut [Lanes<S, N>], ahead: usize) {
    let lowest = simd.splat_f32s(f32::NEG_INFINITY);
    let lanes = S::as_simd_f32s(&LANE).0;
    for (i, score) in scores.iter_mut().enumerate() {
        let key = simd.splat_f32s((i + ahead) as f32);
        for n in 0..N {
            let seen = simd.less_than_f32s(key, lanes[n]);
            score[n] = simd.select_f32s(seen, score[n], lowest);
        }
    }
}

/// `2^x` for `x ≤ 0` to a relative error of 2e-7: 1 at 0, 0 below −126.5, NaN for NaN.
#[inline(always)]
pub(super) fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    /// 2^f on −½..½, minimax in the relative error (9.2e-8) among polynomials that are 1 at 0.
    const POLYNOMIAL: [f32; 6] =
        [1.326_473_7e-3, 9.671_517e-3, 5.550_734e-2, 0.240_222_42, 0.693_146_94, 1.0];
    /// Adding 1.5·2²³ leaves the nearest integer in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    // The scale of −127 is zero. A vector maximum keeps a NaN on its right, a plain one drops it.
    let low = simd.splat_f32s(-127.0);
    let x = if S::IS_SCALAR {
        simd.select_f32s(simd.less_than_f32s(x, low), low, x)
    } else {
        simd.max_f32s(low, x)
    };
    let rounded = simd.add_f32s(x, simd.splat_f32s(ROUND));
    let fraction = simd.sub_f32s(x, simd.sub_f32s(rounded, simd.splat_f32s(ROUND)));
    let mut power = simd.splat_f32s(POLYNOMIAL[0]);
    for &coefficient in &POLYNOMIAL[1..] {
        power = simd.mul_add_e_f32s(power, fraction, simd.splat_f32s(coefficient));
    }
    // The integer, biased, as an exponent: the constant bits of `ROUND` are shifted out.
    let exponent = simd.add_u32s(simd.transmute_u32s_f32s(rounded), simd.splat_u32s(127));
    let scale = simd.wrapping_dyn_shl_u32s(exponent, simd.splat_u32s(23));
    simd.mul_f32s(power, simd.transmute_f32s_u32s(scale))
}

#[cfg(test)]
mod tests {
    use pulp::{Arch, Scalar, WithSimd};

    use super::*;

    struct Exp2<'a>(&'a mut [f32]);

    impl WithSimd for Exp2<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            for x in S::as_mut_simd_f32s(self.0).0 {
                *x = exp2(simd, *x);
            }
        }
    }

    #[test]
    fn exp2_is_accurate_and_right_at_the_edges() {
        for scalar in [false, true] {
            let run = |values: &mut [f32]| {
                if scalar {
                    Scalar.vectorize(Exp2(values))
                } else {
                    Arch::new().dispatch(Exp2(values))
                }
            };
            let xs: Vec<f32> = (0..1 << 20).map(|i| i as f32 * -1.2e-4).collect();
            let mut ys = xs.clone();
            run(&mut ys);
            for (&x, &y) in xs.iter().zip(&ys) {
                let expected = f64::from(x).exp2();
                let error = (f64::from(y) / expected - 1.0).abs();
                assert!(error < 2e-7 || (x < -126.0 && y < 1e-37), "2^{x} = {y}");
            }
            let mut edges = [0.0; 64];
            edges[..5].copy_from_slice(&[0.0, -126.0, -127.0, f32::NEG_INFINITY, f32::NAN]);
            run(&mut edges);
            assert_eq!(edges[..4], [1.0, f32::MIN_POSITIVE, 0.0, 0.0]);
            assert!(edges[4].is_nan());
        }
    }
}
