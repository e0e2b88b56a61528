//! Choosing the next token from a model's logits.

use std::borrow::Cow;
use std::collections::HashSet;

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
    /// No token may be chosen from.
    #[error("top_k is 0; it must be at least 1")]
    BadTopK,
    /// The least share of the best token's probability is outside [0, 1].
    #[error("min_p is {got}; it must be at least 0 and at most 1")]
    BadMinP {
        /// Share asked for.
        got: f64,
    },
    /// The repetition penalty is not a positive number.
    #[error("the repetition penalty is {got}; it must be finite and above 0")]
    BadRepetitionPenalty {
        /// Penalty asked for.
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

/// How tokens are chosen. The restrictions apply in the order of the fields, as in Hugging Face
/// transformers; all but the penalty matter only where the temperature is above 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits of tokens that the text already holds are divided by it where they are positive, and
    /// multiplied where negative; 1 changes nothing.
    pub repetition_penalty: f64,
    /// Logits are divided by it; 0 takes the most probable token.
    pub temperature: f64,
    /// Only so many of the most probable tokens; all where `None`.
    pub top_k: Option<usize>,
    /// The most probable tokens that together reach this share of the probability; 1 keeps all.
    pub top_p: f64,
    /// Tokens at least so probable beside the most probable one; 0 keeps all.
    pub min_p: f64,
}

impl Sampling {
    /// Always the most probable token, of equal ones that with the lowest id.
    pub const GREEDY: Self =
        Self { repetition_penalty: 1.0, temperature: 0.0, top_k: None, top_p: 1.0, min_p: 0.0 };

    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// One is out of its range.
    pub fn validate(&self) -> Result<(), SampleError> {
        let Self { repetition_penalty, temperature, top_k, top_p, min_p } = *self;
        if !(repetition_penalty.is_finite() && repetition_penalty > 0.0) {
            return Err(SampleError::BadRepetitionPenalty { got: repetition_penalty });
        }
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(SampleError::BadTemperature { got: temperature });
        }
        if top_k == Some(0) {
            return Err(SampleError::BadTopK);
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(SampleError::BadTopP { got: top_p });
        }
        if !(0.0..=1.0).contains(&min_p) {
            return Err(SampleError::BadMinP { got: min_p });
        }
        Ok(())
    }
}

/// Chooses tokens: the most probable one, or one at random.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    generator: StdRng,
    /// Tokens of the text so far, for the repetition penalty.
    seen: HashSet<u32>,
}

impl Sampler {
    /// Always takes the most probable token, of equal ones that with the lowest id.
    pub fn greedy() -> Self {
        Self::unchecked(Sampling::GREEDY, 0)
    }

    /// Takes tokens as `sampling` says. The same seed gives the same tokens.
    ///
    /// # Errors
    ///
    /// A setting is out of its range.
    pub fn new(sampling: Sampling, seed: u64) -> Result<Self, SampleError> {
        sampling.validate()?;
        Ok(Self::unchecked(sampling, seed))
    }

    fn unchecked(sampling: Sampling, seed: u64) -> Self {
        Self { sampling, generator: StdRng::seed_from_u64(seed), seen: HashSet::new() }
    }

    /// Tells which tokens the text holds so far, for the repetition penalty. Those that are chosen
    /// from then on are added to them.
    pub fn set_context(&mut self, ids: &[u32]) {
        self.seen = ids.iter().copied().collect();
    }

    /// Chooses a token from `logits`, one for each id. Minus infinity rules a token out.
    ///
    /// # Errors
    ///
    /// There are no logits, one is NaN or plus infinity, or all are minus infinity.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, SampleError> {
        // Before the penalty, which might turn a bad logit into another.
        let mut best = most_probable(logits)?;
        let logits = self.penalised(logits);
        if matches!(logits, Cow::Owned(_)) {
            best = most_probable(&logits)?;
        }
        let index = match self.sampling.temperature {
            0.0 => best,
            _ => draw(&logits, logits[best], &self.sampling, &mut self.generator),
        };
        let token = index as u32;
        self.seen.insert(token);
        Ok(token)
    }

    fn penalised<'a>(&self, logits: &'a [f32]) -> Cow<'a, [f32]> {
        let penalty = self.sampling.repetition_penalty;
        if penalty == 1.0 {
            return Cow::Borrowed(logits);
        }
        let mut logits = logits.to_vec();
        for &id in &self.seen {
            if let Some(logit) = logits.get_mut(id as usize) {
                let wide = f64::from(*logit);
                let wide = if wide > 0.0 { wide / penalty } else { wide * penalty };
                // A penalty must not rule a token out, nor make it certain.
                if logit.is_finite() {
                    *logit = wide.clamp(f32::MIN.into(), f32::MAX.into()) as f32;
                }
            }
        }
        Cow::Owned(logits)
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

/// Draws the index of a token; `largest` is the largest of the logits.
fn draw(logits: &[f32], largest: f32, sampling: &Sampling, generator: &mut StdRng) -> usize {
    let Sampling { temperature, top_k, top_p, min_p, .. } = *sampling;
    // Relative to the largest, so that no exponential overflows.
    let weight = |logit: f32| ((f64::from(logit) - f64::from(largest)) / temperature).exp();
    let mut candidates = logits
        .iter()
        .map(|&logit| weight(logit))
        .enumerate()
        .filter(|(_, weight)| *weight > 0.0)
        .collect::<Vec<_>>();
    if top_k.is_some() || top_p < 1.0 {
        // The order is total, so that equal weights keep the order of their ids.
        candidates.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    }
    candidates.truncate(top_k.unwrap_or(usize::MAX));
    if top_p < 1.0 {
        candidates.truncate(nucleus(&candidates, top_p * total(&candidates)));
    }
    // The weight of the most probable token is 1.
    candidates.retain(|(_, weight)| *weight >= min_p);
    let mut left = generator.random::<f64>() * total(&candidates);
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

fn total(candidates: &[(usize, f64)]) -> f64 {
    candidates.iter().map(|(_, weight)| weight).sum()
}

/// How many leading candidates it takes at least for their weights to reach `share`.
fn nucleus(candidates: &[(usize, f64)], share: f64) -> usize {
    let mut sum = 0.0;
    for (index, (_, weight)) in candidates.iter().enumerate() {
        sum += weight;
        if sum >= share {
            return index + 1;
        }
    }
    candidates.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f64) -> Sampling {
        Sampling { temperature, ..Sampling::GREEDY }
    }

    /// Which of four tokens of probabilities 0.1, 0.4, 0.2 and 0.3 are ever drawn.
    fn drawn(sampling: Sampling) -> [bool; 4] {
        let logits = [0.1f32, 0.4, 0.2, 0.3].map(f32::ln);
        let mut sampler = Sampler::new(sampling, 1).unwrap();
        let mut seen = [false; 4];
        (0..500).for_each(|_| seen[sampler.sample(&logits).unwrap() as usize] = true);
        seen
    }

    #[test]
    fn does_greedy_take_the_first_of_equal_logits() {
        assert_eq!(Sampler::greedy().sample(&[1.0, 3.0, 3.0, -1.0]), Ok(1));
        let greedy = Sampling { top_p: 0.5, ..sampling(0.0) };
        assert_eq!(Sampler::new(greedy, 1).unwrap().sample(&[0.0, 2.0]), Ok(1));
        assert_eq!(Sampler::greedy().sample(&[f32::NEG_INFINITY, -1.0]), Ok(1));
    }

    #[test]
    fn does_a_seed_repeat_its_tokens() {
        let logits = (0..50).map(|i| (i % 7) as f32).collect::<Vec<_>>();
        let draw = |seed| {
            let mut sampler = Sampler::new(Sampling { top_p: 0.9, ..sampling(0.8) }, seed).unwrap();
            (0..40).map(|_| sampler.sample(&logits).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }

    #[test]
    fn do_frequencies_follow_the_temperature() {
        // Two tokens whose probabilities at temperature 2 are 1/4 and 3/4.
        let logits = [0.0, 2.0 * 3f32.ln()];
        let mut sampler = Sampler::new(sampling(2.0), 7).unwrap();
        let ones = (0..4000).filter(|_| sampler.sample(&logits) == Ok(1)).count();
        assert!((2900..3100).contains(&ones), "{ones}");
    }

    #[test]
    fn does_top_p_keep_the_fewest_tokens_that_reach_it() {
        let drawn = |top_p| drawn(Sampling { top_p, ..sampling(1.0) });
        assert_eq!(drawn(0.3), [false, true, false, false]);
        assert_eq!(drawn(0.6), [false, true, false, true]);
        assert_eq!(drawn(1.0), [true; 4]);
    }

    #[test]
    fn does_top_k_keep_the_k_most_probable_tokens() {
        let drawn = |top_k| drawn(Sampling { top_k: Some(top_k), ..sampling(1.0) });
        assert_eq!(drawn(1), [false, true, false, false]);
        assert_eq!(drawn(2), [false, true, false, true]);
        assert_eq!(drawn(9), [true; 4]);
    }

    #[test]
    fn does_min_p_compare_with_the_most_probable_token() {
        let drawn = |min_p| drawn(Sampling { min_p, ..sampling(1.0) });
        assert_eq!(drawn(0.6), [false, true, false, true]);
        assert_eq!(drawn(0.2), [true; 4]);
        assert_eq!(drawn(1.0), [false, true, false, false]);
    }

    #[test]
    fn does_top_p_count_only_what_top_k_keeps() {
        // Of the two most probable, 0.4 is 4/7 of the probability.
        let drawn = |top_p| drawn(Sampling { top_k: Some(2), top_p, ..sampling(1.0) });
        assert_eq!(drawn(0.57), [false, true, false, false]);
        assert_eq!(drawn(0.58), [false, true, false, true]);
    }

    #[test]
    fn does_the_repetition_penalty_count_the_prompt_and_what_was_chosen() {
        let penalty = Sampling { repetition_penalty: 2.0, ..Sampling::GREEDY };
        let mut sampler = Sampler::new(penalty, 0).unwrap();
        sampler.set_context(&[1, 3, 99]);
        let logits = [-1.0, 3.0, 1.8, -0.9];
        // 3.0 halves; then 1.8, chosen, halves too; and -0.9 doubles.
        assert_eq!(sampler.sample(&logits), Ok(2));
        assert_eq!(sampler.sample(&logits), Ok(1));
        assert_eq!(sampler.sample(&[-1.0, -3.0, -3.0, -0.9]), Ok(0));
        sampler.set_context(&[]);
        assert_eq!(sampler.sample(&logits), Ok(1));
    }

    #[test]
    fn does_an_extreme_penalty_leave_finite_logits() {
        for repetition_penalty in [1e-300, 1e300] {
            let extreme = Sampling { repetition_penalty, ..sampling(1.0) };
            let mut sampler = Sampler::new(extreme, 0).unwrap();
            sampler.set_context(&[0, 1]);
            assert!(sampler.sample(&[1.0, -1.0]).is_ok());
        }
    }

    #[test]
    fn do_extreme_logits_and_temperatures_stay_finite() {
        for temperature in [1e-300, 1.0, 1e300] {
            let mut sampler =
                Sampler::new(Sampling { top_p: 0.9, ..sampling(temperature) }, 1).unwrap();
            let token = sampler.sample(&[f32::MIN, f32::MAX, f32::NEG_INFINITY]).unwrap();
            assert!(token < 2);
        }
    }

    #[test]
    fn are_bad_settings_and_logits_refused() {
        for temperature in [-0.1, f64::NAN, f64::INFINITY] {
            let error = Sampler::new(sampling(temperature), 0).unwrap_err();
            assert!(matches!(error, SampleError::BadTemperature { .. }));
        }
        for top_p in [0.0, -1.0, 1.1, f64::NAN] {
            let error = Sampler::new(Sampling { top_p, ..Sampling::GREEDY }, 0).unwrap_err();
            assert!(matches!(error, SampleError::BadTopP { .. }));
        }
        let top_k = Some(0);
        let error = Sampler::new(Sampling { top_k, ..Sampling::GREEDY }, 0).unwrap_err();
        assert_eq!(error, SampleError::BadTopK);
        for min_p in [-0.1, 1.1, f64::NAN] {
            let error = Sampler::new(Sampling { min_p, ..Sampling::GREEDY }, 0).unwrap_err();
            assert!(matches!(error, SampleError::BadMinP { .. }));
        }
        for repetition_penalty in [0.0, -1.0, f64::INFINITY, f64::NAN] {
            let bad = Sampling { repetition_penalty, ..Sampling::GREEDY };
            let error = Sampler::new(bad, 0).unwrap_err();
            assert!(matches!(error, SampleError::BadRepetitionPenalty { .. }));
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
