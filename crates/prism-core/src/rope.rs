//! Rotary position embedding as far as block selection must know it: which dims form a pair, how
//! fast each pair turns, and what context extension did to that.

use std::f64::consts::PI;

use derive_new::new;
use serde::{Deserialize, Serialize};

use crate::error::{PrismError, Result};

/// Which two dims of a head form rotary pair `j` of `rotary_dim / 2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeLayout {
    /// Pair `j` is `(j, j + rotary_dim/2)`: Hugging Face checkpoints.
    #[default]
    RotateHalf,
    /// Pair `j` is `(2j, 2j + 1)`: Meta's original Llama, GPT-J, `burn::nn::RotaryEncoding`.
    Interleaved,
}

impl RopeLayout {
    /// The two dims of pair `j`.
    pub fn pair(self, j: usize, rotary_dim: usize) -> [usize; 2] {
        match self {
            Self::RotateHalf => [j, j + rotary_dim / 2],
            Self::Interleaved => [2 * j, 2 * j + 1],
        }
    }
}

/// How a model's inverse frequencies were changed to extend its context.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    None,
    /// Position interpolation: every frequency divided by `factor`.
    Linear {
        /// Divisor, ≥ 1.
        factor: f64,
    },
    /// Dynamic NTK: beyond the original context θ grows with the length of the sequence. The
    /// frequencies are those of one `length`: keys that were rotated stay as they are, so all of a
    /// sequence must be rotated alike, and whoever knows its length sets it
    /// ([`Rope::for_length`]). Up to the original context nothing is scaled.
    Dynamic {
        /// How fast θ grows, ≥ 1.
        factor: f64,
        /// Context length up to which nothing is scaled.
        original_max_positions: usize,
        /// Positions of the sequence that the frequencies are for.
        length: usize,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// Divisor of the long wavelengths, ≥ 1.
        factor: f64,
        /// Wavelengths over `original_max_positions / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths under `original_max_positions / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before the extension.
        original_max_positions: usize,
    },
    /// YaRN (arXiv 2309.00071): NTK by parts, plus a factor on cos and sin.
    Yarn {
        /// Context extension, ≥ 1.
        factor: f64,
        /// Rotations over the original context above which a pair is kept (32).
        beta_fast: f64,
        /// Rotations below which a pair is fully interpolated (1).
        beta_slow: f64,
        /// Context length before the extension.
        original_max_positions: usize,
        /// Factor on cos and sin; `0.1 ln(factor) + 1` unless given.
        attention_factor: Option<f64>,
    },
}

/// The rotary embedding of a model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, new)]
#[serde(deny_unknown_fields)]
pub struct Rope {
    /// Base of the geometric series of frequencies, e.g. 500 000 for Llama 3.
    pub theta: f64,
    /// Which dims form a pair.
    #[new(default)]
    #[serde(default)]
    pub layout: RopeLayout,
    /// Leading dims that are rotated; all of the head unless given, 0 for layers without RoPE.
    #[new(default)]
    #[serde(default)]
    pub rotary_dim: Option<usize>,
    /// Context extension.
    #[new(default)]
    #[serde(default)]
    pub scaling: RopeScaling,
}

impl Rope {
    /// The embedding of a sequence of `length` positions: the same one, but for
    /// [dynamic](RopeScaling::Dynamic) scaling.
    pub fn for_length(mut self, positions: usize) -> Self {
        if let RopeScaling::Dynamic { length, .. } = &mut self.scaling {
            *length = positions;
        }
        self
    }

    /// The number of rotated dims of a head.
    ///
    /// # Errors
    /// An odd number, or more than the head has.
    pub fn rotary_dim(&self, head_dim: usize) -> Result<usize> {
        let rotary = self.rotary_dim.unwrap_or(head_dim);
        if rotary > head_dim || !rotary.is_multiple_of(2) {
            let reason =
                format!("rotary_dim must be even and at most head_dim ({head_dim}), got {rotary}");
            return Err(PrismError::Rope { reason });
        }
        Ok(rotary)
    }

    /// The two dims of pair `j`.
    pub fn pair(&self, j: usize, rotary_dim: usize) -> [usize; 2] {
        self.layout.pair(j, rotary_dim)
    }

    /// Inverse frequency of each pair, radians a position, after scaling; `rotary_dim / 2` of them.
    ///
    /// # Errors
    /// A rotary dim that doesn't fit, θ or a scaling setting out of range.
    pub fn inv_freq(&self, head_dim: usize) -> Result<Vec<f64>> {
        let rotary = self.rotary_dim(head_dim)?;
        in_range("rope theta", "finite and greater than 1", self.theta, self.theta > 1.0)?;
        let base =
            (0..rotary / 2).map(|j| self.theta.powf(-2.0 * j as f64 / rotary as f64)).collect();
        self.scaling.apply(base, self.theta, rotary)
    }

    /// Factor that the model multiplies cos and sin with (1 but for YaRN).
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { factor, attention_factor, .. } => {
                attention_factor.unwrap_or(if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 })
            }
            _ => 1.0,
        }
    }
}

impl RopeScaling {
    fn apply(&self, mut inv_freq: Vec<f64>, theta: f64, rotary: usize) -> Result<Vec<f64>> {
        let at_least_one =
            |factor: f64| in_range("rope factor", "finite and at least 1", factor, factor >= 1.0);
        let positions = |n: usize| {
            in_range("rope original_max_positions", "at least 1", n as f64, n >= 1)
                .map(|()| n as f64)
        };
        match *self {
            Self::None => {}
            Self::Linear { factor } => {
                at_least_one(factor)?;
                inv_freq.iter_mut().for_each(|f| *f /= factor);
            }
            Self::Dynamic { factor, original_max_positions, length } => {
                at_least_one(factor)?;
                let original = positions(original_max_positions)?;
                let stretch = factor * (length as f64 / original).max(1.0) - (factor - 1.0);
                // θ·stretch^(d/(d−2)) in place of θ; the first pair turns as before whatever θ is.
                for (j, f) in inv_freq.iter_mut().enumerate().skip(1) {
                    *f *= stretch.powf(-2.0 * j as f64 / (rotary as f64 - 2.0));
                }
            }
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                at_least_one(factor)?;
                let original = positions(original_max_positions)?;
                in_range(
                    "rope low_freq_factor",
                    "above 0",
                    low_freq_factor,
                    low_freq_factor > 0.0,
                )?;
                in_range(
                    "rope high_freq_factor",
                    "above low_freq_factor",
                    high_freq_factor,
                    high_freq_factor > low_freq_factor,
                )?;
                for f in &mut inv_freq {
                    let rotations = original * *f / (2.0 * PI);
                    let keep = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let keep = keep.clamp(0.0, 1.0);
                    *f *= keep + (1.0 - keep) / factor;
                }
            }
            Self::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original_max_positions,
                attention_factor,
            } => {
                at_least_one(factor)?;
                let original = positions(original_max_positions)?;
                in_range("rope beta_slow", "above 0", beta_slow, beta_slow > 0.0)?;
                in_range("rope beta_fast", "above beta_slow", beta_fast, beta_fast > beta_slow)?;
                if let Some(f) = attention_factor {
                    in_range("rope attention_factor", "above 0", f, f > 0.0)?;
                }
                // Pair index (not rounded) that turns `rotations` times over the original context.
                let pair_at = |rotations: f64| {
                    rotary as f64 * (original / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln())
                };
                let low = pair_at(beta_fast).floor().max(0.0);
                let mut high = pair_at(beta_slow).ceil().min(rotary as f64 - 1.0);
                if high <= low {
                    high = low + 0.001;
                }
                for (j, f) in inv_freq.iter_mut().enumerate() {
                    let interpolate = ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    *f *= (1.0 - interpolate) + interpolate / factor;
                }
            }
        }
        Ok(inv_freq)
    }
}

fn in_range(name: &'static str, allowed: &'static str, got: f64, ok: bool) -> Result<()> {
    if ok && got.is_finite() { Ok(()) } else { Err(PrismError::OutOfRange { name, allowed, got }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_short_wavelengths_and_divides_long_ones() {
        let mut rope = Rope::new(5e5);
        let plain = rope.inv_freq(128).unwrap();
        rope.scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_positions: 8192,
        };
        let scaled = rope.inv_freq(128).unwrap();
        for (before, after) in plain.iter().zip(&scaled) {
            let wavelength = 2.0 * PI / before;
            if wavelength < 2048.0 {
                assert_eq!(before, after);
            } else if wavelength > 8192.0 {
                assert!((before / after - 8.0).abs() < 1e-9);
            } else {
                assert!(after < before && *after > before / 8.0);
            }
        }
    }

    #[test]
    fn yarn_agrees_with_hand_computed_values() {
        let mut rope = Rope::new(1e6);
        rope.scaling = RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_max_positions: 32768,
            attention_factor: None,
        };
        let plain = Rope::new(1e6).inv_freq(128).unwrap();
        let scaled = rope.inv_freq(128).unwrap();
        // 64·ln(32768/(32·2π))/ln(1e6) = 23.6 and 64·ln(32768/2π)/ln(1e6) = 39.6.
        assert_eq!(plain[23], scaled[23]);
        assert!((plain[40] / scaled[40] - 4.0).abs() < 1e-9);
        let expected = plain[31] * (1.0 - 8.0 / 17.0 * 0.75);
        assert!((scaled[31] - expected).abs() < 1e-12);
        assert!((rope.attention_factor() - 1.138629).abs() < 1e-6);
    }

    #[test]
    fn dynamic_ntk_is_a_larger_theta_for_longer_sequences_only() {
        let plain = Rope::new(1e4);
        let scaling =
            RopeScaling::Dynamic { factor: 2.0, original_max_positions: 4096, length: 4096 };
        let rope = Rope { scaling, ..plain };
        for short in [0, 1, 4096] {
            assert_eq!(rope.for_length(short).inv_freq(128), plain.inv_freq(128));
        }
        // Three times the original context: θ times (2·3 − 1)^(128/126).
        let grown = Rope::new(1e4 * 5f64.powf(128.0 / 126.0)).inv_freq(128).unwrap();
        let scaled = rope.for_length(3 * 4096).inv_freq(128).unwrap();
        for (a, b) in scaled.iter().zip(grown) {
            assert!((a / b - 1.0).abs() < 1e-12);
        }
        assert_eq!(rope.for_length(1 << 20).inv_freq(2), plain.inv_freq(2));
        assert_eq!(plain.for_length(9), plain);
    }

    #[test]
    fn bad_settings_are_refused() {
        assert!(Rope::new(f64::NAN).inv_freq(64).is_err());
        assert!(Rope { rotary_dim: Some(65), ..Rope::new(1e4) }.inv_freq(64).is_err());
        assert!(Rope { rotary_dim: Some(31), ..Rope::new(1e4) }.inv_freq(64).is_err());
        for scaling in [
            RopeScaling::Linear { factor: 0.0 },
            RopeScaling::Dynamic { factor: 0.5, original_max_positions: 64, length: 64 },
            RopeScaling::Dynamic { factor: 2.0, original_max_positions: 0, length: 64 },
        ] {
            assert!(Rope { scaling, ..Rope::new(1e4) }.inv_freq(64).is_err());
        }
    }
}
