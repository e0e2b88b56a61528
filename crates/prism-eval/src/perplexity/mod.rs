//! Perplexity of a text over any window, exact attention against any other, by position in the window.

mod windows;

use std::time::Instant;

use burn_prism::AttentionOptions;
use prism_models::{LayerTrace, Llama};
use serde::{Deserialize, Serialize};

pub use windows::windows;

use crate::attend::Attend;
use crate::error::{EvalError, Result};
use crate::pareto;
use crate::plots::{Line, extend};
use crate::progress::Progress;
use crate::store::Store;
use crate::task::density;

/// A text to measure on.
#[derive(Debug, Clone)]
pub struct Text {
    /// Its name in results.
    pub name: String,
    /// Its tokens.
    pub ids: Vec<u32>,
    /// Words of those tokens, as whitespace parts them.
    pub words: usize,
}

/// How a text is read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reading {
    /// Tokens a window.
    pub window: usize,
    /// Positions a bucket.
    pub bucket: usize,
    /// Tokens of a window to run at a time; all at once where `None`.
    pub chunk: Option<usize>,
}

/// What one window of one text gave, attending one way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// −log p, nats, summed over the predictions of each bucket.
    pub nll: Vec<f64>,
    /// Predictions in each bucket.
    pub tokens: Vec<usize>,
    /// Selected over causal blocks, mean over layers.
    pub density: f64,
    /// Seconds of the prefill.
    pub seconds: f64,
}

/// One way to attend on one text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Score {
    /// The text.
    pub text: String,
    /// How attention was computed.
    pub attend: String,
    /// Predictions.
    pub tokens: usize,
    /// Mean −log p, nats a token.
    pub nll: f64,
    /// That, less exact attention's.
    pub loss: f64,
    /// exp(nll).
    pub perplexity: f64,
    /// exp of −log p a word, as published for PG19.
    pub word_perplexity: f64,
    /// Selected over causal blocks, mean over layers, weighted by the windows' causal blocks.
    pub density: f64,
    /// Seconds of all prefills.
    pub seconds: f64,
}

/// One way to attend: means over texts, each text counting alike.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Mean {
    /// How attention was computed.
    pub attend: String,
    /// Texts.
    pub texts: usize,
    /// Selected over causal blocks.
    pub density: f64,
    /// Mean −log p, nats a token.
    pub nll: f64,
    /// That, less exact attention's.
    pub loss: f64,
    /// Whether none is both as sparse and loses as little.
    pub front: bool,
}

/// One bucket of positions.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bucket {
    /// The text.
    pub text: String,
    /// How attention was computed.
    pub attend: String,
    /// First position of the bucket: that of the last token that the prediction reads.
    pub from: usize,
    /// The position after the last.
    pub to: usize,
    /// Predictions.
    pub tokens: usize,
    /// Mean −log p, nats a token.
    pub nll: f64,
    /// That, less exact attention's at the same positions.
    pub loss: f64,
}

/// Everything measured: a score of each text and way to attend, in their order, and its buckets.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Report {
    /// Of whole texts.
    pub scores: Vec<Score>,
    /// By position.
    pub buckets: Vec<Bucket>,
    /// Of all texts together.
    pub means: Vec<Mean>,
}

impl Report {
    /// Loss against the middle of each bucket, a curve of each text and way but the exact one.
    pub fn lines(&self) -> Vec<Line> {
        let mut lines: Vec<Line> = Vec::new();
        for bucket in self.buckets.iter().filter(|bucket| bucket.attend != "dense") {
            let name = format!("{}, {}", bucket.attend, bucket.text);
            let at = ((bucket.from + bucket.to) as f64 / 2.0, bucket.loss);
            extend(&mut lines, &name, at);
        }
        lines
    }

    /// Loss against density, means over texts: a curve of each selector over what it is swept by.
    pub fn curves(&self, ways: &[Attend]) -> Vec<Line> {
        let mut lines = Vec::new();
        for mean in self.means.iter().filter(|mean| mean.attend != "dense") {
            let way = ways.iter().find(|attend| attend.name() == mean.attend);
            let family = way.map_or(mean.attend.as_str(), Attend::family);
            extend(&mut lines, family, (mean.density, mean.loss));
        }
        lines
    }
}

/// Means over texts of each way, in the order of their scores.
fn means(scores: &[Score]) -> Vec<Mean> {
    let mut means: Vec<Mean> = Vec::new();
    for score in scores {
        if means.iter().any(|mean| mean.attend == score.attend) {
            continue;
        }
        let of: Vec<&Score> = scores.iter().filter(|other| other.attend == score.attend).collect();
        let mean = |pick: fn(&Score) -> f64| {
            of.iter().map(|score| pick(score)).sum::<f64>() / of.len() as f64
        };
        means.push(Mean {
            attend: score.attend.clone(),
            texts: of.len(),
            density: mean(|score| score.density),
            nll: mean(|score| score.nll),
            loss: mean(|score| score.loss),
            front: false,
        });
    }
    let points: Vec<_> = means.iter().map(|mean| (mean.density, mean.loss)).collect();
    for (mean, front) in means.iter_mut().zip(pareto::front(&points)) {
        mean.front = front;
    }
    means
}

impl Reading {
    fn check(&self) -> Result<()> {
        if self.bucket == 0 {
            return Err(EvalError::argument("bucket", "at least 1 position", self.bucket));
        }
        if self.chunk == Some(0) {
            return Err(EvalError::argument("chunk", "at least 1 token", 0));
        }
        Ok(())
    }
}

/// Measures every way to attend on every text. Exact attention is measured whether asked for or not: losses
/// are to it.
///
/// # Errors
/// Arguments out of range, settings that don't fit the model, a failing model or store.
pub fn measure(
    llama: &mut Llama,
    texts: &[Text],
    ways: &[Attend],
    reading: &Reading,
    store: &mut Store,
    progress: &mut dyn Progress,
) -> Result<Report> {
    reading.check()?;
    for attend in ways {
        attend.check(llama.config())?;
    }
    let dense = Attend::dense();
    let mut all = vec![&dense];
    all.extend(ways.iter().filter(|attend| !attend.is_dense()));
    let cut: Vec<_> =
        texts.iter().map(|text| windows(&text.ids, reading.window)).collect::<Result<_>>()?;
    progress.start("perplexity", cut.iter().map(Vec::len).sum::<usize>() * all.len());
    let mut report = Report::default();
    for (text, windows) in texts.iter().zip(&cut) {
        let mut exact: Option<Window> = None;
        for attend in &all {
            let mut parts = Vec::new();
            for (index, ids) in windows.iter().enumerate() {
                let key = format!("{}|{}|{index}", text.name, attend.name());
                parts.push(store.get_or(&key, || read(llama, ids, attend, reading))?);
                progress.step();
            }
            let whole = together(&parts);
            let exact = exact.get_or_insert_with(|| whole.clone());
            report.scores.push(score(text, attend, &whole, exact));
            report.buckets.extend(buckets(text, attend, &whole, exact, reading));
        }
    }
    progress.finish();
    report.means = means(&report.scores);
    Ok(report)
}

/// Reads one window.
fn read(llama: &mut Llama, ids: &[u32], attend: &Attend, reading: &Reading) -> Result<Window> {
    attend.set(llama)?;
    let block = attend.block();
    let mut cache = llama.cache(ids.len(), block)?;
    let layers = llama.config().layers;
    let chunk = reading.chunk.unwrap_or(ids.len());
    let mut traces: Vec<LayerTrace> = Vec::new();
    let mut hidden = Vec::new();
    let start = Instant::now();
    for part in ids.chunks(chunk) {
        let more_follows = cache.len() + part.len() < ids.len();
        let options = AttentionOptions::default().with_more_follows(more_follows);
        let mut trace = |trace| traces.push(trace);
        hidden.push(llama.hidden(part, &mut cache, &options, Some(&mut trace))?);
    }
    let hidden = burn::tensor::Tensor::cat(hidden, 1);
    let predictions = llama.predictions(&hidden, ids)?;
    let seconds = start.elapsed().as_secs_f64();
    let density = density(&traces, layers, ids.len(), chunk, block)?;
    let count = ids.len().div_ceil(reading.bucket);
    let (mut nll, mut tokens) = (vec![0.0; count], vec![0; count]);
    for (position, &one) in predictions.nll.iter().enumerate() {
        nll[position / reading.bucket] += f64::from(one);
        tokens[position / reading.bucket] += 1;
    }
    Ok(Window { nll, tokens, density, seconds })
}

/// Windows of one text added up, densities weighted by the pairs of tokens that a window of its length has.
fn together(parts: &[Window]) -> Window {
    let count = parts.iter().map(|part| part.nll.len()).max().unwrap_or(0);
    let mut whole =
        Window { nll: vec![0.0; count], tokens: vec![0; count], density: 0.0, seconds: 0.0 };
    let mut pairs = 0.0;
    for part in parts {
        for (bucket, (nll, tokens)) in part.nll.iter().zip(&part.tokens).enumerate() {
            whole.nll[bucket] += nll;
            whole.tokens[bucket] += tokens;
        }
        let weight = (part.tokens.iter().sum::<usize>() as f64).powi(2);
        whole.density += part.density * weight;
        whole.seconds += part.seconds;
        pairs += weight;
    }
    whole.density /= pairs;
    whole
}

fn score(text: &Text, attend: &Attend, whole: &Window, exact: &Window) -> Score {
    let tokens: usize = whole.tokens.iter().sum();
    let sum: f64 = whole.nll.iter().sum();
    let nll = sum / tokens as f64;
    Score {
        text: text.name.clone(),
        attend: attend.name().into(),
        tokens,
        nll,
        loss: nll - exact.nll.iter().sum::<f64>() / tokens as f64,
        perplexity: nll.exp(),
        word_perplexity: (sum / text.words.max(1) as f64).exp(),
        density: whole.density,
        seconds: whole.seconds,
    }
}

fn buckets<'a>(
    text: &'a Text,
    attend: &'a Attend,
    whole: &'a Window,
    exact: &'a Window,
    reading: &'a Reading,
) -> impl Iterator<Item = Bucket> + 'a {
    let filled = whole.tokens.iter().enumerate().filter(|&(_, &tokens)| tokens > 0);
    filled.map(move |(index, &tokens)| Bucket {
        text: text.name.clone(),
        attend: attend.name().into(),
        from: index * reading.bucket,
        to: (index + 1).saturating_mul(reading.bucket).min(reading.window),
        tokens,
        nll: whole.nll[index] / tokens as f64,
        loss: (whole.nll[index] - exact.nll[index]) / tokens as f64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_a_mean_that_of_all_texts_and_beaten_where_another_loses_less() {
        let score = |text: &str, attend: &str, density: f64, loss: f64| Score {
            text: text.into(),
            attend: attend.into(),
            tokens: 10,
            nll: 3.0 + loss,
            loss,
            perplexity: 0.0,
            word_perplexity: 0.0,
            density,
            seconds: 0.0,
        };
        let scores = [
            score("a", "prism:mass=0.9", 0.2, 0.1),
            score("a", "lsh", 0.4, 0.2),
            score("b", "prism:mass=0.9", 0.4, 0.3),
            score("b", "lsh", 0.6, 0.2),
        ];
        let means = means(&scores);
        let of: Vec<_> = means.iter().map(|mean| (mean.texts, mean.front)).collect();
        assert_eq!(of, [(2, true), (2, false)]);
        assert!((means[0].density - 0.3).abs() < 1e-12 && (means[0].loss - 0.2).abs() < 1e-12);
        let ways = ["prism:mass=0.9", "lsh"].map(|way| Attend::parse(way).unwrap());
        let curves = Report { means, ..Report::default() }.curves(&ways);
        let names: Vec<_> = curves.iter().map(|line| line.name.as_str()).collect();
        assert_eq!(names, ["prism", "lsh"]);
    }
}
