//! Softmax in fixed point: from f32 scores to integer masses that are the same bit for bit on
//! every device.
//!
//! A float softmax differs from device to device, because exponentials and the order of summation
//! do. Here floats end early: one subtraction, one multiplication, one exact scaling by a power of
//! two and one truncation, all of which IEEE 754 fixes; the rest is 32-bit integer arithmetic,
//! which any order of summation leaves alone. With x = max − score and t = x · log₂e:
//! - [`weight`]: 2⁻ᵗ in Q30, the integer part of t a shift, its fraction a polynomial; 0 from t = 30.
//! - [`normaliser`]: the reciprocal of a row's total, as a 32-bit factor and a shift.
//! - [`mass`]: weight over total in Q30, rounded down.

use crate::error::{PrismError, Result};

/// Integer mass of probability 1.
pub const MASS_ONE: u32 = 1 << 30;

/// Most blocks a row: a total of weights then fits two 32-bit sums, of their upper and of their
/// lower 16 bits, for devices without 64-bit integers.
pub const MAX_ROW_BLOCKS: usize = 1 << 16;

/// 2⁻ᶠ for 0 ≤ f ≤ 1 as Σ (−1)ⁱ cᵢ fⁱ, in Q31: exact at both ends, and off by 2⁻²⁸·⁷ of its value
/// at most in between (Lawson's reweighted least squares).
pub const EXP2_COEFFICIENTS: [u32; 7] =
    [2_147_483_648, 1_488_521_968, 515_877_632, 119_164_179, 20_568_337, 2_734_809, 233_163];

/// Bits of the fraction of t that count.
const FRACTION_BITS: u32 = 26;

/// Checks that a row of `blocks` has masses.
///
/// # Errors
/// More than [`MAX_ROW_BLOCKS`].
pub fn check_row(blocks: usize) -> Result<()> {
    if blocks <= MAX_ROW_BLOCKS {
        Ok(())
    } else {
        Err(PrismError::RowBlocks { limit: MAX_ROW_BLOCKS, got: blocks })
    }
}

/// A score as the softmax takes it: a NaN is −∞, hence has mass 0, and an infinite one counts as
/// the largest finite number.
pub fn usable(score: f32) -> f32 {
    if score.is_nan() { f32::NEG_INFINITY } else { score.min(f32::MAX) }
}

/// e⁻ˣ in Q30 for x ≥ 0 (infinity included): 2³⁰ at 0, never increasing, 0 from x = 30 · ln 2.
///
/// The fraction of t = x · log₂e is cut to 26 bits, which loses up to 2⁻²⁶ of the weight where
/// t < 1/8 and nothing above; the polynomial and its rounding are off by less than 2⁻²⁸.
pub fn weight(x: f32) -> u32 {
    let t = x * std::f32::consts::LOG2_E;
    if t.is_nan() || t >= 30.0 {
        return 0;
    }
    let fixed = (t * (1u32 << FRACTION_BITS) as f32) as u32;
    let fraction = fixed << (32 - FRACTION_BITS);
    let [rest @ .., last] = EXP2_COEFFICIENTS;
    let power = rest.iter().rev().fold(last, |sum, c| c - mul_hi(fraction, sum));
    power >> ((fixed >> FRACTION_BITS) + 1)
}

/// Factor and shift that [`mass`] needs, for a row's total of weights: at least 2³⁰, which the
/// maximum has (a smaller one counts as that), and at most 2⁴⁶.
pub fn normaliser(total: u64) -> (u32, u32) {
    let total = total.max(u64::from(MASS_ONE));
    let shift = total.ilog2() - 30;
    (((1u64 << 61) / (total >> shift)) as u32, shift)
}

/// A block's mass in Q30 from its weight and the row's [`normaliser`]. A block alone has
/// [`MASS_ONE`]; n blocks together are at most n below it and at most 1 above.
pub fn mass(weight: u32, factor: u32, shift: u32) -> u32 {
    mul_hi(weight << 1, factor) >> shift
}

/// Softmax of a row of at most [`MAX_ROW_BLOCKS`] scores as integer masses, written over `masses`.
///
/// Bad numbers neither spread nor hang ([`usable`]). A row without any usable score has masses 0:
/// the mass rule then keeps every block.
pub fn integer_masses(scores: &[f32], masses: &mut Vec<u32>) {
    let max = scores.iter().fold(f32::NEG_INFINITY, |max, &score| max.max(usable(score)));
    masses.clear();
    if max == f32::NEG_INFINITY {
        masses.resize(scores.len(), 0);
        return;
    }
    masses.extend(scores.iter().map(|&score| weight(max - usable(score))));
    let (factor, shift) = normaliser(masses.iter().map(|&weight| u64::from(weight)).sum());
    masses.iter_mut().for_each(|value| *value = mass(*value, factor, shift));
}

/// Upper half of a product.
fn mul_hi(a: u32, b: u32) -> u32 {
    ((u64::from(a) * u64::from(b)) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// t as the device sees it.
    fn t(x: f32) -> f64 {
        f64::from(x * std::f32::consts::LOG2_E)
    }

    fn off(x: f32, t: f64) -> f64 {
        (f64::from(weight(x)) / f64::from(MASS_ONE) - (-t).exp2()).abs()
    }

    fn check(x: f32) {
        let cut = (t(x) * 2f64.powi(26)).floor() / 2f64.powi(26);
        assert!(off(x, cut) < 2f64.powi(-28), "{x:e}: {:e} from the polynomial", off(x, cut));
        let allowed = if t(x) < 0.125 { -26 } else { -27 };
        assert!(off(x, t(x)) < 2f64.powi(allowed), "{x:e}: {:e}", off(x, t(x)));
        let next = x.next_up();
        assert!(weight(x) >= weight(next), "{x:e} weighs less than {next:e}");
    }

    #[test]
    fn weights_are_exponentials() {
        assert_eq!(weight(0.0), MASS_ONE);
        assert_eq!(weight(f32::MIN_POSITIVE / 2.0), MASS_ONE);
        assert_eq!([weight(20.8), weight(1e30), weight(f32::INFINITY)], [0; 3]);
        assert!(weight(20.79) > 0);
        (0..2_500_000).for_each(|i| check(i as f32 * 1e-5));
        // Where the shift changes.
        for n in 1..=30 {
            let mut x = n as f32 * std::f32::consts::LN_2;
            (0..20).for_each(|_| x = x.next_down());
            for _ in 0..40 {
                check(x);
                x = x.next_up();
            }
        }
    }

    /// Every fraction, so every value of the polynomial.
    #[test]
    fn weights_never_increase() {
        let mut last = u32::MAX;
        for fixed in 0..1 << FRACTION_BITS {
            let fraction = fixed << (32 - FRACTION_BITS);
            let [rest @ .., tail] = EXP2_COEFFICIENTS;
            let power = rest.iter().rev().fold(tail, |sum, c| c - mul_hi(fraction, sum));
            assert!(power < last, "2^-({fixed} / 2^26)");
            last = power;
        }
        assert!(last >= MASS_ONE);
    }

    proptest! {
        #[test]
        fn of_two_scores_the_larger_weighs_more(a in 0.0f32..25.0, b in 0.0f32..25.0) {
            prop_assert!(weight(a.min(b)) >= weight(a.max(b)));
        }

        #[test]
        fn masses_add_up_to_one(scores in prop::collection::vec(-50.0f32..50.0, 1..500)) {
            let mut masses = Vec::new();
            integer_masses(&scores, &mut masses);
            let total: i64 = masses.iter().map(|&m| i64::from(m)).sum();
            prop_assert!((total - i64::from(MASS_ONE)).abs() <= scores.len() as i64);
        }

        #[test]
        fn masses_are_probabilities(scores in prop::collection::vec(-12.0f32..12.0, 1..300)) {
            let mut masses = Vec::new();
            integer_masses(&scores, &mut masses);
            let total: f64 = scores.iter().map(|&s| f64::from(s).exp()).sum();
            for (&score, &mass) in scores.iter().zip(&masses) {
                let p = f64::from(score).exp() / total;
                prop_assert!((f64::from(mass) / f64::from(MASS_ONE) - p).abs() < 2e-7);
            }
        }
    }

    #[test]
    fn a_block_alone_has_all_the_mass() {
        for score in [0.0, -3.25, 1e30, f32::INFINITY] {
            let mut masses = Vec::new();
            integer_masses(&[score], &mut masses);
            assert_eq!(masses, [MASS_ONE]);
        }
    }

    #[test]
    fn the_longest_row_is_exact() {
        let mut masses = Vec::new();
        integer_masses(&vec![0.5; MAX_ROW_BLOCKS], &mut masses);
        assert!(masses.iter().all(|&mass| mass == MASS_ONE / MAX_ROW_BLOCKS as u32));
        assert!(check_row(MAX_ROW_BLOCKS).is_ok());
        let error = check_row(MAX_ROW_BLOCKS + 1).unwrap_err();
        assert!(error.to_string().contains("65536") && error.to_string().contains("65537"));
    }

    #[test]
    fn bad_scores_neither_spread_nor_hang() {
        let mut masses = Vec::new();
        integer_masses(&[f32::NAN, 1.0, f32::INFINITY, f32::NEG_INFINITY], &mut masses);
        assert_eq!(masses, [0, 0, MASS_ONE, 0]);
        integer_masses(&[f32::NAN, f32::NEG_INFINITY], &mut masses);
        assert_eq!(masses, [0, 0]);
        integer_masses(&[], &mut masses);
        assert!(masses.is_empty());
    }
}
