//! 2^x on the pipes of multiplications and additions, for a share of the weights: `ex2` alone has a
//! sixteenth of their throughput, and narrow heads wait for it.
//!
//! x is split into the nearest integer n, found by an addition that rounds it into the last bits, and
//! the rest f, −½ to ½. 2^f is a polynomial of the third degree (Cody and Waite, *Software Manual for
//! the Elementary Functions*, 1980, ch. 6), and n is added to its exponent. The coefficients are the
//! minimax of the relative error among those with p(0) = 1, so that 2^0 is 1: it stays below 2⁻¹³, where
//! weights are rounded to 8 or 11 bits next.
//!
//! Below −127 comes 0, as `ex2.ftz` flushes; from 128 on comes ∞, and for NaN, too: the sum over the tile
//! exceeds all bounds then, and the weights are computed again by `ex2`, which keeps NaN.

use std::fmt::Write;

/// Coefficients of f, f² and f³.
const COEFFICIENTS: [f32; 3] = [0.693_282_9, 0.242_211, 0.055_008_93];
/// 1.5 · 2²³: what is added to it is rounded to an integer.
const ROUND: f32 = 12_582_912.0;

/// Declarations of what [`power`] uses.
pub(super) const DECLARE: &str = ".reg .f32 whole, rest, p; .reg .b32 bits, exact;\n";

/// Source of `to` = 2^`from`; overwrites `from`.
pub(super) fn power(s: &mut String, to: &str, from: &str) {
    let [a, b, c] = COEFFICIENTS.map(hex);
    let (one, round, less) = (hex(1.0), hex(ROUND), hex(-ROUND));
    let (low, high) = (hex(-127.0), hex(128.0));
    // The minimum of NaN and a number is the number.
    let _ = writeln!(
        s,
        "min.f32 {from}, {from}, {high}; max.f32 {from}, {from}, {low};\n\
         add.rn.f32 whole, {from}, {round}; shl.b32 bits, whole, 23;\n\
         add.rn.f32 rest, whole, {less}; sub.rn.f32 rest, {from}, rest;\n\
         fma.rn.f32 p, rest, {c}, {b}; fma.rn.f32 p, p, rest, {a}; fma.rn.f32 p, p, rest, {one};\n\
         mov.b32 exact, p; add.s32 bits, bits, exact; mov.b32 {to}, bits;"
    );
}

/// A number as PTX writes it.
fn hex(x: f32) -> String {
    format!("0f{:08X}", x.to_bits())
}

#[cfg(test)]
mod tests {
    use super::{COEFFICIENTS, ROUND};

    /// What the source of [`power`](super::power) computes.
    fn power(x: f32) -> f32 {
        let x = x.min(128.0).max(-127.0);
        let whole = x + ROUND;
        let rest = x - (whole - ROUND);
        let [a, b, c] = COEFFICIENTS;
        let p = rest.mul_add(c, b).mul_add(rest, a).mul_add(rest, 1.0);
        f32::from_bits(p.to_bits().wrapping_add(whole.to_bits() << 23))
    }

    #[test]
    fn the_polynomial_is_exact_to_13_bits() {
        let mut worst = 0.0f64;
        // Every fraction down to 2⁻¹⁶, in every binade that weights may have.
        for step in -126 * 65536..=60 * 65536 {
            let x = step as f32 / 65536.0;
            let exact = f64::from(x).exp2();
            worst = worst.max((f64::from(power(x)) / exact - 1.0).abs());
        }
        assert!(worst < 2f64.powi(-13), "relative error {worst:e}");
        println!("largest relative error 2^{:.2}", worst.log2());
    }

    #[test]
    fn the_ends_are_exact() {
        assert_eq!(power(0.0), 1.0);
        for nothing in [f32::NEG_INFINITY, f32::MIN, -1e6, -127.0] {
            assert_eq!(power(nothing).to_bits(), 0);
        }
        for much in [128.0, 3e38, f32::INFINITY, f32::NAN] {
            assert_eq!(power(much), f32::INFINITY);
        }
        assert!(power(-126.7) < 1e-37 && power(-126.7) >= 0.0);
        assert!(power(127.9) > 2f32.powi(127));
    }
}
