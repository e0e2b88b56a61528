//! How tokens are chosen: what the user says, else what the model's makers recommend.

use anyhow::{Result, bail};
use prism_models::{GenerationConfig, Sampling, StopTexts};
use serde::Serialize;

use crate::args::SamplingArgs;

/// Settings of sampling, and where they come from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Choice {
    #[serde(skip)]
    pub sampling: Sampling,
    pub temperature: f64,
    /// `None` for all.
    pub top_k: Option<usize>,
    pub top_p: f64,
    pub min_p: f64,
    pub repetition_penalty: f64,
    pub seed: u64,
    /// Settings that the model's files recommend and that nothing was said of.
    pub from_model: Vec<&'static str>,
}

impl Choice {
    /// From the arguments, or else from the recommendations.
    ///
    /// Arguments that do nothing without sampling are refused where nothing is sampled.
    pub fn new(args: &SamplingArgs, model: &GenerationConfig) -> Result<Self> {
        let mut sampling = model.sampling();
        if let Some(temperature) = args.temperature {
            sampling.temperature = temperature;
        }
        if let Some(top_k) = args.top_k {
            sampling.top_k = Some(top_k).filter(|&k| k > 0);
        }
        sampling.top_p = args.top_p.unwrap_or(sampling.top_p);
        sampling.min_p = args.min_p.unwrap_or(sampling.min_p);
        sampling.repetition_penalty =
            args.repetition_penalty.unwrap_or(sampling.repetition_penalty);
        sampling.validate()?;
        let given = [
            ("--top-k", args.top_k.is_some()),
            ("--top-p", args.top_p.is_some()),
            ("--min-p", args.min_p.is_some()),
            ("--seed", args.seed.is_some()),
        ];
        if let Some((name, _)) =
            given.iter().find(|(_, given)| sampling.temperature == 0.0 && *given)
        {
            bail!("{name} does nothing at temperature 0: give a --temperature above it too");
        }
        let samples = sampling.temperature > 0.0;
        let (no_k, no_penalty) = (args.top_k.is_none(), args.repetition_penalty.is_none());
        let recommended = [
            ("temperature", samples && args.temperature.is_none()),
            ("top_k", samples && no_k && sampling.top_k.is_some()),
            ("top_p", samples && args.top_p.is_none() && model.top_p.is_some()),
            ("min_p", samples && args.min_p.is_none() && model.min_p.is_some()),
            ("repetition_penalty", no_penalty && model.repetition_penalty.is_some()),
        ];
        let from_model = recommended.iter().filter(|(_, from)| *from).map(|(name, _)| *name);
        let Sampling { repetition_penalty, temperature, top_k, top_p, min_p } = sampling;
        let seed = args.seed.unwrap_or(0);
        let from_model = from_model.collect();
        Ok(Self {
            sampling,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            seed,
            from_model,
        })
    }

    /// For people: what acts, and where it comes from.
    pub fn describe(&self) -> String {
        let from = |name| if self.from_model.contains(&name) { " (the model's)" } else { "" };
        let mut parts = Vec::new();
        let mut say = |acts: bool, name: &'static str, value: String| {
            if acts {
                parts.push(format!("{} {value}{}", name.replace('_', "-"), from(name)));
            }
        };
        let samples = self.temperature > 0.0;
        say(samples, "temperature", self.temperature.to_string());
        say(samples && self.top_k.is_some(), "top_k", self.top_k.unwrap_or(0).to_string());
        say(samples && self.top_p < 1.0, "top_p", self.top_p.to_string());
        say(samples && self.min_p > 0.0, "min_p", self.min_p.to_string());
        let penalty = self.repetition_penalty;
        say(penalty != 1.0, "repetition_penalty", penalty.to_string());
        say(samples, "seed", self.seed.to_string());
        if !samples {
            parts.insert(0, "likeliest tokens".into());
        }
        parts.join(", ")
    }
}

/// Refuses arguments that no model could make right, before one is opened.
pub fn check(args: &SamplingArgs) -> Result<()> {
    let greedy = Sampling::GREEDY;
    let sampling = Sampling {
        repetition_penalty: args.repetition_penalty.unwrap_or(greedy.repetition_penalty),
        temperature: args.temperature.unwrap_or(greedy.temperature),
        top_k: None,
        top_p: args.top_p.unwrap_or(greedy.top_p),
        min_p: args.min_p.unwrap_or(greedy.min_p),
    };
    sampling.validate()?;
    if StopTexts::new(&args.stop).is_err() {
        bail!("--stop must not be empty");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> SamplingArgs {
        SamplingArgs {
            temperature: None,
            top_k: None,
            top_p: None,
            min_p: None,
            repetition_penalty: None,
            seed: None,
            stop: vec![],
        }
    }

    #[test]
    fn do_arguments_come_before_the_models_recommendations() {
        let model = GenerationConfig {
            do_sample: Some(true),
            temperature: Some(0.6),
            top_k: Some(20),
            top_p: Some(0.9),
            repetition_penalty: Some(1.05),
            min_p: None,
        };
        let choice = Choice::new(&args(), &model).unwrap();
        assert_eq!(choice.sampling, model.sampling());
        assert_eq!(choice.from_model, ["temperature", "top_k", "top_p", "repetition_penalty"]);
        assert_eq!(
            choice.describe(),
            "temperature 0.6 (the model's), top-k 20 (the model's), top-p 0.9 (the model's), \
             repetition-penalty 1.05 (the model's), seed 0"
        );

        let given =
            SamplingArgs { top_k: Some(0), temperature: Some(0.5), seed: Some(3), ..args() };
        let choice = Choice::new(&given, &model).unwrap();
        assert_eq!((choice.temperature, choice.top_k, choice.seed), (0.5, None, 3));
        assert_eq!(choice.from_model, ["top_p", "repetition_penalty"]);

        let greedy = SamplingArgs { temperature: Some(0.0), ..args() };
        let choice = Choice::new(&greedy, &model).unwrap();
        assert_eq!(choice.describe(), "likeliest tokens, repetition-penalty 1.05 (the model's)");
        let nothing = Choice::new(&args(), &GenerationConfig::default()).unwrap();
        assert_eq!((nothing.describe(), nothing.from_model.len()), ("likeliest tokens".into(), 0));
    }

    #[test]
    fn are_arguments_that_would_do_nothing_refused() {
        let model = GenerationConfig::default();
        for (name, given) in [
            ("--top-k", SamplingArgs { top_k: Some(5), ..args() }),
            ("--top-p", SamplingArgs { top_p: Some(0.5), ..args() }),
            ("--min-p", SamplingArgs { min_p: Some(0.5), ..args() }),
            ("--seed", SamplingArgs { seed: Some(5), ..args() }),
        ] {
            let error = Choice::new(&given, &model).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
