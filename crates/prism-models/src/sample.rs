//! Choosing the next token from a model's logits.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Why a token could not be chosen.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// The temperature is negative, infinite or not a number.
    #[error("temperature is {got}; it must be finite and at least 0")]
    BadTemperature {
        /// Temperature asked for.
        got: f64,
    },
    /// The share of the probability is outside (0, 1].
    #[error("top_p is {got}; it must be above 0 and at most 1")]
    BadTopP {
        /// Share asked for.
        got: f64,
    },
    /// There are no logits.
    #[error("there are no logits")]
    Empty,
    /// A logit is NaN or plus infinity.
    #[error("the logit of token {index} is {got}")]
    BadLogit {
        /// Token id.
        index: usize,
        /// Its logit.
        got: f32,
    },
    /// All logits are minus infinity.
    #[error("every token has probability 0")]
    NoCandidate,
}

/// Chooses tokens: the most probable one, or one at random.
#[derive(Debug)]
pub struct Sampler {
    random: Option<Random>,
}

#[derive(Debug)]
struct Random {
    temperature: f64,
    top_p: f64,
    generator: StdRng,
}

impl Sampler {
    /// Always takes the most probable token, of equal ones that with the lowest id.
    pub fn greedy() -> Self {
        Self { random: None }
    }

    /// Takes tokens at random, from the most probable ones that together reach the share `top_p`
    /// of the probability; higher temperatures flatten it. The same seed gives the same tokens.
    /// A temperature of 0 is [`Sampler::greedy`].
    ///
    /// # Errors
    ///
    /// `temperature` is not finite and at least 0, or `top_p` is not above 0 and at most 1.
    pub fn new(temperature: f64, top_p: f64, seed: u64) -> Result<Self, SampleError> {
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(SampleError::BadTemperature { got: temperature });
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(SampleError::BadTopP { got: top_p });
        }
        if temperature == 0.0 {
            return Ok(Self::greedy());
        }
        let generator = StdRng::seed_from_u64(seed);
        Ok(Self { random: Some(Random { temperature, top_p, generator }) })
    }

    /// Chooses a token from `logits`, one for each id. Minus infinity rules a token out.
    ///
    /// # Errors
    ///
    /// There are no logits, one is NaN or plus infinity, or all are minus infinity.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, SampleError> {
        let best = most_probable(logits)?;
        let index = match &mut self.random {
            None => best,
            Some(random) => random.sample(logits, logits[best]),
        };
        Ok(index as u32)
    }
}

/// The index of the largest logit, the first of equal ones.
fn most_probable(logits: &[f32]) -> Result<usize, SampleError> {
    let mut best = 0;
    for (index, &got) in logits.iter().enumerate() {
        if got.is_nan() || got == f32::INFINITY {
            return Err(SampleError::BadLogit { index, got });
        }
        if got > logits[best] {
            best = index;
        }
    }
    match logits.get(best) {
        None => Err(SampleError::Empty),
        Some(&f32::NEG_INFINITY) => Err(SampleError::NoCandidate),
        Some(_) => Ok(best),
    }
}

impl Random {
    fn sample(&mut self, logits: &[f32], largest: f32) -> usize {
        // Relative to the largest, so that no exponential overflows.
        let weight =
            |logit: f32| ((f64::from(logit) - f64::from(largest)) / self.temperature).exp();
        let mut candidates = logits
            .iter()
            .map(|&logit| weight(logit))
            .enumerate()
            .filter(|(_, weight)| *weight > 0.0)
            .collect::<Vec<_>>();
        let mut total = candidates.iter().map(|(_, weight)| weight).sum::<f64>();
        if self.top_p < 1.0 {
            // The order is total, so that equal weights keep the order of their ids.
            candidates.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let (kept, share) = nucleus(&candidates, self.top_p * total);
            candidates.truncate(kept);
            total = share;
        }
        let mut left = self.generator.random::<f64>() * total;
        let mut chosen = 0;
        for &(index, weight) in &candidates {
            chosen = index;
            left -= weight;
            if left < 0.0 {
                break;
            }
        }
        chosen
    }
}

/// The fewest leading candidates whose weights reach `share`, and the sum of their weights.
fn nucleus(candidates: &[(usize, f64)], share: f64) -> (usize, f64) {
    let mut sum = 0.0;
    for (index, (_, weight)) in candidates.iter().enumerate() {
        sum += weight;
        if sum >= share {
            return (index + 1, sum);
        }
    }
    (candidates.len(), sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn does_greedy_take_the_first_of_equal_logits() {
        assert_eq!(Sampler::greedy().sample(&[1.0, 3.0, 3.0, -1.0]), Ok(1));
        assert_eq!(Sampler::new(0.0, 0.5, 1).unwrap().sample(&[0.0, 2.0]), Ok(1));
        assert_eq!(Sampler::greedy().sample(&[f32::NEG_INFINITY, -1.0]), Ok(1));
    }

    #[test]
    fn does_a_seed_repeat_its_tokens() {
        let logits = (0..50).map(|i| (i % 7) as f32).collect::<Vec<_>>();
        let draw = |seed| {
            let mut sampler = Sampler::new(0.8, 0.9, seed).unwrap();
            (0..40).map(|_| sampler.sample(&logits).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }

    #[test]
    fn do_frequencies_follow_the_temperature() {
        // Two tokens whose probabilities at temperature 2 are 1/4 and 3/4.
        let logits = [0.0, 2.0 * 3f32.ln()];
        let mut sampler = Sampler::new(2.0, 1.0, 7).unwrap();
        let ones = (0..4000).filter(|_| sampler.sample(&logits) == Ok(1)).count();
        assert!((2900..3100).contains(&ones), "{ones}");
    }

    #[test]
    fn does_top_p_keep_the_fewest_tokens_that_reach_it() {
        // Probabilities 0.4, 0.3, 0.2, 0.1.
        let logits = [0.1f32, 0.4, 0.2, 0.3].map(f32::ln);
        let drawn = |top_p| {
            let mut sampler = Sampler::new(1.0, top_p, 1).unwrap();
            let mut seen = [false; 4];
            (0..500).for_each(|_| seen[sampler.sample(&logits).unwrap() as usize] = true);
            seen
        };
        assert_eq!(drawn(0.3), [false, true, false, false]);
        assert_eq!(drawn(0.6), [false, true, false, true]);
        assert_eq!(drawn(1.0), [true; 4]);
    }

    #[test]
    fn do_extreme_logits_and_temperatures_stay_finite() {
        for temperature in [1e-300, 1.0, 1e300] {
            let mut sampler = Sampler::new(temperature, 0.9, 1).unwrap();
            let token = sampler.sample(&[f32::MIN, f32::MAX, f32::NEG_INFINITY]).unwrap();
            assert!(token < 2);
        }
    }

    #[test]
    fn are_bad_settings_and_logits_refused() {
        for temperature in [-0.1, f64::NAN, f64::INFINITY] {
            let error = Sampler::new(temperature, 1.0, 0).unwrap_err();
            assert!(matches!(error, SampleError::BadTemperature { .. }));
        }
        for top_p in [0.0, -1.0, 1.1, f64::NAN] {
            let error = Sampler::new(1.0, top_p, 0).unwrap_err();
            assert!(matches!(error, SampleError::BadTopP { .. }));
        }
        let mut sampler = Sampler::greedy();
        assert_eq!(sampler.sample(&[]), Err(SampleError::Empty));
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY]), Err(SampleError::NoCandidate));
        for bad in [f32::NAN, f32::INFINITY] {
            let error = sampler.sample(&[0.0, bad]).unwrap_err();
            assert!(matches!(error, SampleError::BadLogit { index: 1, .. }));
        }
    }
}
