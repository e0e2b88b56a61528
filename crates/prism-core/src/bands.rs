//! Spectral bands: which dims of a head survive mean pooling, and which don't (paper §3.2).
//!
//! Pooling a block of B positions shrinks RoPE pair `j` by λ_j = |sin(Bθ_j/2) / (B sin(θ_j/2))|.
//! Fast pairs cancel out, slow ones pass. The *low* band holds the slow pairs; the *high* band
//! holds the fast ones and overlaps it, because what is left there is noise unless the transition
//! zone is part of it (paper, appendix F).

use serde::{Deserialize, Serialize};

use crate::error::{PrismError, Result};
use crate::rope::{Rope, RopeLayout};

/// How much mean pooling over `block` positions leaves of a pair that turns `inv_freq` radians a
/// position: 1 for a still pair, 0 for one that cancels out.
pub fn attenuation(inv_freq: f64, block: usize) -> f64 {
    let block = block as f64;
    let half = (inv_freq / 2.0).sin();
    if half == 0.0 { 1.0 } else { ((block * inv_freq / 2.0).sin() / (block * half)).abs() }
}

/// How dims are shared out between the bands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum BandRule {
    /// From the attenuation: the low band starts at the first pair that keeps more than half
    /// (λ > 0.5), rounded to 16 dims; the high band is twice what lies before. For head_dim 128,
    /// θ = 5e5 or 1e6 and blocks of 128 this gives 64 high and 96 low dims, the paper's.
    #[default]
    Auto,
    /// Fixed widths in dims, as the paper counts them: the fastest `high` and the slowest `low`.
    Dims {
        /// Dims of the high band; 0 for none.
        high: usize,
        /// Dims of the low band, un-rotated dims included; 0 for none.
        low: usize,
    },
}

/// The dims of a head that belong to each band, increasing; a band may be empty, not both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bands {
    head_dim: usize,
    high: Vec<usize>,
    low: Vec<usize>,
}

impl Bands {
    /// Shares out the dims of a head. `rope` is `None` for layers without position embedding,
    /// where pooling loses nothing to rotation and one band holds every dim.
    ///
    /// # Errors
    /// Widths that are odd, don't fit the head, or are both 0; RoPE settings out of range.
    pub fn new(rule: BandRule, rope: Option<&Rope>, head_dim: usize, block: usize) -> Result<Self> {
        let Some(rope) = rope else {
            return Ok(Self::whole(head_dim));
        };
        match rule {
            BandRule::Auto => {
                Self::of_pairs(rule, &rope.inv_freq(head_dim)?, rope.layout, head_dim, block)
            }
            // Fixed widths don't need the frequencies, only their number.
            BandRule::Dims { .. } => {
                let still = vec![0.0; rope.rotary_dim(head_dim)? / 2];
                Self::of_pairs(rule, &still, rope.layout, head_dim, block)
            }
        }
    }

    /// One band of all dims.
    pub fn whole(head_dim: usize) -> Self {
        Self { head_dim, high: Vec::new(), low: (0..head_dim).collect() }
    }

    /// Shares out the dims of a head whose leading pairs turn by `inv_freq`, radians a position,
    /// fastest first.
    ///
    /// # Errors
    /// More pairs than fit the head; widths that are odd, don't fit, or are both 0.
    pub fn of_pairs(
        rule: BandRule,
        inv_freq: &[f64],
        layout: RopeLayout,
        head_dim: usize,
        block: usize,
    ) -> Result<Self> {
        let rotary = 2 * inv_freq.len();
        if rotary > head_dim {
            let reason = format!("{rotary} dims can't turn in a head of {head_dim}");
            return Err(PrismError::Bands { reason });
        }
        let still = head_dim - rotary;
        let (high, low) = match rule {
            BandRule::Auto => {
                let passing = inv_freq.iter().position(|&f| attenuation(f, block) > 0.5);
                let start = (2 * passing.unwrap_or(rotary / 2) + 8) / 16 * 16;
                let start = start.min(rotary);
                ((2 * start).min(rotary), rotary - start)
            }
            BandRule::Dims { high, low } => {
                let refuse = |reason: String| Err(PrismError::Bands { reason });
                if high > rotary || !high.is_multiple_of(2) {
                    return refuse(format!(
                        "high_dims must be even and at most the rotary dim ({rotary}), got {high}"
                    ));
                }
                if low > head_dim || (low != 0 && (low < still || !(low - still).is_multiple_of(2)))
                {
                    return refuse(format!(
                        "low_dims must be at most head_dim ({head_dim}) and an even number over \
                         the {still} un-rotated dims, got {low}"
                    ));
                }
                if high == 0 && low == 0 {
                    return refuse("high_dims and low_dims are both 0".into());
                }
                (high, low.saturating_sub(still))
            }
        };
        let pairs = |range: std::ops::Range<usize>| {
            let mut dims: Vec<usize> = range.flat_map(|j| layout.pair(j, rotary)).collect();
            dims.sort_unstable();
            dims
        };
        let mut low_dims = pairs((rotary - low) / 2..rotary / 2);
        if !matches!(rule, BandRule::Dims { low: 0, .. }) {
            low_dims.extend(rotary..head_dim);
        }
        Ok(Self { head_dim, high: pairs(0..high / 2), low: low_dims })
    }

    /// Dims of the head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Dims of the high band.
    pub fn high(&self) -> &[usize] {
        &self.high
    }

    /// Dims of the low band.
    pub fn low(&self) -> &[usize] {
        &self.low
    }

    /// The bands that hold dims: high first, then low.
    pub fn iter(&self) -> impl Iterator<Item = &[usize]> {
        [&self.high[..], &self.low[..]].into_iter().filter(|dims| !dims.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case(128, 1e6, 128, 64, 96)]
    #[case(128, 5e5, 128, 64, 96)]
    #[case(64, 5e5, 128, 32, 48)]
    #[case(64, 1e5, 128, 32, 48)]
    #[case(128, 1e4, 128, 96, 80)]
    fn auto_gives_the_published_widths(
        #[case] head_dim: usize,
        #[case] theta: f64,
        #[case] block: usize,
        #[case] high: usize,
        #[case] low: usize,
    ) {
        let bands = Bands::new(BandRule::Auto, Some(&Rope::new(theta)), head_dim, block).unwrap();
        assert_eq!((bands.high().len(), bands.low().len()), (high, low));
    }

    #[test]
    fn rotate_half_and_interleaved_pick_the_same_pairs() {
        let rule = BandRule::Dims { high: 4, low: 6 };
        let half = Bands::new(rule, Some(&Rope::new(1e4)), 8, 16).unwrap();
        assert_eq!(half.high(), [0, 1, 4, 5]);
        assert_eq!(half.low(), [1, 2, 3, 5, 6, 7]);
        let rope = Rope { layout: RopeLayout::Interleaved, ..Rope::new(1e4) };
        let interleaved = Bands::new(rule, Some(&rope), 8, 16).unwrap();
        assert_eq!(interleaved.high(), [0, 1, 2, 3]);
        assert_eq!(interleaved.low(), [2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn unrotated_dims_are_low() {
        let rope = Rope { rotary_dim: Some(8), ..Rope::new(1e4) };
        let bands = Bands::new(BandRule::Dims { high: 4, low: 6 }, Some(&rope), 12, 16).unwrap();
        assert_eq!(bands.low(), [3, 7, 8, 9, 10, 11]);
        let bands = Bands::new(BandRule::Auto, None, 12, 16).unwrap();
        assert_eq!((bands.high().len(), bands.low().len()), (0, 12));
    }

    #[test]
    fn every_head_dim_from_32_to_256_works() {
        for head_dim in (32..=256).step_by(2) {
            for theta in [1e4, 1e5, 5e5, 1e6, 5e6] {
                for block in [16, 64, 128, 256] {
                    let rope = Rope::new(theta);
                    let bands = Bands::new(BandRule::Auto, Some(&rope), head_dim, block).unwrap();
                    assert!(bands.iter().all(|dims| dims.iter().all(|&c| c < head_dim)));
                    let covered = (0..head_dim)
                        .all(|c| bands.high().contains(&c) || bands.low().contains(&c));
                    assert!(covered, "head_dim {head_dim}, theta {theta}, block {block}");
                }
            }
        }
    }

    #[rstest]
    #[case(3, 8)]
    #[case(18, 8)]
    #[case(8, 7)]
    #[case(8, 18)]
    #[case(0, 0)]
    fn bad_widths_are_refused(#[case] high: usize, #[case] low: usize) {
        let rule = BandRule::Dims { high, low };
        let got = Bands::new(rule, Some(&Rope::new(1e4)), 16, 16);
        assert!(matches!(got, Err(PrismError::Bands { .. })), "{got:?}");
    }
}
