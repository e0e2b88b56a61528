//! Softmax masses in fixed point, as [`prism_core::select`] defines them: one subtraction and one
//! multiplication in f32, then 32-bit integers, so that every device gets the same bits from the
//! same scores.

use cubecl::prelude::*;
use prism_core::select::EXP2_COEFFICIENTS;

/// 2^(−x·log2 e) in Q30; 0 where that is less than 2^-30. `x` ≥ 0, or infinite.
#[cube]
pub(crate) fn weight(x: f32) -> u32 {
    let t = x * comptime!(std::f32::consts::LOG2_E);
    let small = t < 30.0f32;
    let fixed = u32::cast_from(select(small, t, 0.0f32) * 67_108_864.0f32);
    let whole = fixed >> 26u32;
    let fraction = (fixed & 0x03ff_ffffu32) << 6u32;
    let degree = comptime!(EXP2_COEFFICIENTS.len() - 1);
    let mut p = comptime!(EXP2_COEFFICIENTS[degree]).runtime();
    #[unroll]
    for i in 0..degree {
        p = comptime!(EXP2_COEFFICIENTS[degree - 1 - i]) - fraction.mul_hi(p);
    }
    select(small, p >> (whole + 1u32), 0u32)
}

/// Sum of weights as two limbs: Σ w = high · 2¹⁶ + low. Exact for up to 65536 weights.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Total {
    pub high: u32,
    pub low: u32,
}

/// What turns weights into masses that sum to 2³⁰.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Normaliser {
    pub reciprocal: u32,
    pub shift: u32,
}

#[cube]
impl Total {
    pub fn normaliser(&self) -> Normaliser {
        let high = self.high + (self.low >> 16u32);
        let low = self.low & 0xffffu32;
        // ⌊log2 total⌋ − 30; the heaviest weighs 2³⁰, so `high` ≥ 2¹⁴.
        let shift = 17u32 - high.max(16384u32).leading_zeros();
        let scaled = (high << (16u32 - shift)) | (low >> shift);
        // ⌊2⁶¹ / scaled⌋: twice from the remainder in f32, whose error leaves less than one, and then
        // exactly. The first quotient is off by less than 2¹⁰, so the second remainder fits 32 bits.
        let inverse = 1.0f32 / f32::cast_from(scaled);
        let first = u32::cast_from(inverse * 2_305_843_009_213_693_952.0f32);
        let low = 0u32 - first * scaled;
        let borrow = select(low == 0u32, 0u32, 1u32);
        let high = 0x2000_0000u32 - first.mul_hi(scaled) - borrow;
        let rest = f32::cast_from(i32::reinterpret(high)) * 4_294_967_296.0f32;
        let more = (rest + f32::cast_from(low)) * inverse;
        let more = i32::cast_from((more + 0.5f32).floor());
        let second = first + u32::reinterpret(more);
        let rest = low - u32::reinterpret(more) * scaled;
        let quotient = second - select(rest >= 0x8000_0000u32, 1u32, 0u32);
        Normaliser { reciprocal: quotient, shift }
    }
}

#[cube]
impl Normaliser {
    pub fn mass(&self, weight: u32) -> u32 {
        (weight << 1u32).mul_hi(self.reciprocal) >> self.shift
    }
}

/// A score as the softmax takes it: NaN counts as −∞, +∞ as the largest finite number.
#[cube]
pub(crate) fn usable(score: f32) -> f32 {
    let bits = u32::reinterpret(score);
    let magnitude = bits & 0x7fff_ffffu32;
    let nan = magnitude > 0x7f80_0000u32;
    let score = select(nan, f32::reinterpret(0xff80_0000u32), score);
    select(bits == 0x7f80_0000u32, f32::MAX, score)
}
