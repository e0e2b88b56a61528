//! Recognising the Llama 3 scaling in a GGUF file, which stores it as the tensor
//! `rope_freqs.weight`: one divisor for each rotary frequency instead of the four parameters.

use std::f64::consts::TAU;

use crate::error::ConfigError;
use prism_core::{Rope, RopeScaling};

// All Llama 3 models share these; they differ in the factor only.
const LOW_FREQ_FACTOR: f64 = 1.0;
const HIGH_FREQ_FACTOR: f64 = 4.0;
const ORIGINAL_MAX_POSITIONS: usize = 8192;

/// The divisors are stored in 32 bits.
const TOLERANCE: f64 = 1e-4;

/// The scaling whose divisors are `stored`.
///
/// # Errors
///
/// No Llama 3 scaling has these divisors.
pub(crate) fn recognise(
    stored: &[f32],
    rope: &Rope,
    head_dim: usize,
) -> Result<RopeScaling, ConfigError> {
    let largest = stored.iter().copied().fold(1.0f32, f32::max);
    let factor = f64::from(largest);
    let expected = divisors(factor, rope.theta, head_dim);
    let close = |(&stored, expected): (&f32, f64)| {
        (f64::from(stored) - expected).abs() <= TOLERANCE * expected
    };
    let same_length = stored.len() == head_dim / 2;
    if !(factor.is_finite() && same_length && stored.iter().zip(expected).all(close)) {
        return Err(ConfigError::Unsupported {
            field: "rope_freqs.weight",
            got: format!("{} divisors up to {largest}", stored.len()),
            supported: "the divisors of Llama 3",
        });
    }
    Ok(RopeScaling::Llama3 {
        factor,
        low_freq_factor: LOW_FREQ_FACTOR,
        high_freq_factor: HIGH_FREQ_FACTOR,
        original_max_positions: ORIGINAL_MAX_POSITIONS,
    })
}

/// The divisor of each frequency: 1 for the high ones, `factor` for the low ones, and between
/// them the inverse of a straight line from `1 / factor` to 1.
fn divisors(factor: f64, theta: f64, dim: usize) -> impl Iterator<Item = f64> {
    (0..dim / 2).map(move |i| {
        let wavelength = TAU * theta.powf(2.0 * i as f64 / dim as f64);
        let rotations = ORIGINAL_MAX_POSITIONS as f64 / wavelength;
        let ramp = (rotations - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR);
        let ramp = ramp.clamp(0.0, 1.0);
        1.0 / ((1.0 - ramp) / factor + ramp)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_the_factor_found_again_and_a_foreign_tensor_refused() {
        let rope = Rope::new(5e5);
        let mut stored = divisors(8.0, rope.theta, 128).map(|x| x as f32).collect::<Vec<_>>();
        assert_eq!((stored[0], stored[63]), (1.0, 8.0));
        let scaling = recognise(&stored, &rope, 128).unwrap();
        assert!(matches!(scaling, RopeScaling::Llama3 { factor: 8.0, .. }));
        stored[0] = 2.0;
        assert!(matches!(recognise(&stored, &rope, 128), Err(ConfigError::Unsupported { .. })));
        assert!(recognise(&[], &rope, 128).is_err());
        assert!(recognise(&[f32::NAN; 64], &rope, 128).is_err());
    }
}
