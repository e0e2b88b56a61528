//! Prism's settings one at a time, each over a sweep of masses: perplexity against density.

use std::str::FromStr;

use prism_core::{BandRule, Bands};
use prism_models::{Llama, ModelConfig};
use serde::Serialize;

use crate::attend::{Attend, BLOCK};
use crate::error::{EvalError, Result};
use crate::pareto;
use crate::perplexity::{self, Reading, Text};
use crate::plots::{Line, extend};
use crate::progress::Progress;
use crate::store::Store;

/// What is varied; all else stays as the paper has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// Nothing but the mass.
    Mass,
    /// Low band only, high band only, both, other widths, all dims as one band.
    Bands,
    /// Calibration off, global, causal.
    Calibration,
    /// Blocks of 64, 128, 256.
    Block,
    /// Means of 16 to 128 positions, of blocks of 128.
    PoolBlock,
    /// Dense last blocks 0, 1.
    DenseLastBlocks,
}

impl Axis {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Mass,
        Self::Bands,
        Self::Calibration,
        Self::Block,
        Self::PoolBlock,
        Self::DenseLastBlocks,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mass => "mass",
            Self::Bands => "bands",
            Self::Calibration => "calibration",
            Self::Block => "block",
            Self::PoolBlock => "pool-block",
            Self::DenseLastBlocks => "dense-last-blocks",
        }
    }

    /// Names and settings of its variants for heads of a model.
    fn variants(self, model: &ModelConfig) -> Result<Vec<(String, String)>> {
        let named = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|&(name, set)| (name.to_string(), set.to_string())).collect()
        };
        Ok(match self {
            Self::Mass => named(&[("published", "")]),
            Self::Calibration => named(&[
                ("calibration off", "calibration=off"),
                ("calibration global", "calibration=global"),
                ("calibration causal", "calibration=causal"),
            ]),
            Self::Block => named(&[
                ("block 64", "block=64"),
                ("block 128", "block=128"),
                ("block 256", "block=256"),
            ]),
            Self::PoolBlock => named(&[
                ("pool block 16", "pool_block=16"),
                ("pool block 32", "pool_block=32"),
                ("pool block 64", "pool_block=64"),
                ("pool block 128", ""),
            ]),
            Self::DenseLastBlocks => named(&[
                ("dense last blocks 0", "dense_last_blocks=0"),
                ("dense last blocks 1", "dense_last_blocks=1"),
            ]),
            Self::Bands => bands(model)?,
        })
    }
}

impl FromStr for Axis {
    type Err = EvalError;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|axis| axis.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            EvalError::argument("what to ablate", names, name)
        })
    }
}

/// The bands of the paper's own ablation, for whatever heads: with s dims before the low band, high 2s and
/// low d − s are the automatic ones.
fn bands(model: &ModelConfig) -> Result<Vec<(String, String)>> {
    let (dim, rope) = (model.head_dim, &model.rope);
    let auto = Bands::new(BandRule::Auto, Some(rope), dim, BLOCK)?;
    let rotary = rope.rotary_dim(dim)?;
    let (high, low) = (auto.high().len(), auto.low().len());
    let start = dim - low;
    let narrow = low.saturating_sub(start);
    let wide = [
        ("both bands", high, low),
        ("low band only", 0, low),
        ("high band only", high, 0),
        ("all dims as one band", 0, dim),
        ("high band narrow", start, low),
        ("low band narrow", high, narrow),
        ("high band wide", (high + start).min(rotary), low),
    ];
    let mut seen = Vec::new();
    let mut variants = Vec::new();
    for (name, high, low) in wide {
        let rule = BandRule::Dims { high, low };
        // Small heads have no room for some.
        if seen.contains(&(high, low)) || Bands::new(rule, Some(rope), dim, BLOCK).is_err() {
            continue;
        }
        seen.push((high, low));
        variants
            .push((format!("{name} ({high}, {low})"), format!("high_dims={high},low_dims={low}")));
    }
    Ok(variants)
}

/// One setting at one mass.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Point {
    /// What is varied.
    pub axis: &'static str,
    /// To what.
    pub variant: String,
    /// Estimated probability that each row keeps.
    pub mass: f64,
    /// Selected over causal blocks, mean over texts.
    pub density: f64,
    /// Mean −log p, nats a token, mean over texts.
    pub nll: f64,
    /// That, less exact attention's.
    pub loss: f64,
    /// exp(nll).
    pub perplexity: f64,
    /// Whether no point of the same axis is both as sparse and as good.
    pub front: bool,
}

/// Measures every variant of every axis at every mass on every text.
///
/// # Errors
/// As [`perplexity::measure`]; a mass that none of the variants takes.
pub fn measure(
    llama: &mut Llama,
    texts: &[Text],
    (axes, masses): (&[Axis], &[f64]),
    reading: &Reading,
    store: &mut Store,
    progress: &mut dyn Progress,
) -> Result<Vec<Point>> {
    let mut named = Vec::new();
    for &axis in axes {
        for (variant, settings) in axis.variants(llama.config())? {
            for &mass in masses {
                let set = if settings.is_empty() { String::new() } else { format!(",{settings}") };
                let attend = Attend::parse(&format!("prism:mass={mass}{set}"))?;
                named.push((axis, variant.clone(), mass, attend));
            }
        }
    }
    // The automatic bands at the default calibration and block are in several axes under several names;
    // they are measured under each.
    let ways: Vec<Attend> = named.iter().map(|(.., attend)| attend.clone()).collect();
    let report = perplexity::measure(llama, texts, &ways, reading, store, progress)?;
    let mut points = Vec::new();
    for (axis, variant, mass, attend) in named {
        let scores: Vec<_> =
            report.scores.iter().filter(|score| score.attend == attend.name()).collect();
        let mean = |of: fn(&perplexity::Score) -> f64| {
            scores.iter().map(|score| of(score)).sum::<f64>() / scores.len().max(1) as f64
        };
        let nll = mean(|score| score.nll);
        points.push(Point {
            axis: axis.name(),
            variant,
            mass,
            density: mean(|score| score.density),
            nll,
            loss: mean(|score| score.loss),
            perplexity: nll.exp(),
            front: false,
        });
    }
    for axis in axes {
        let of: Vec<usize> = (0..points.len()).filter(|&i| points[i].axis == axis.name()).collect();
        let curve: Vec<_> = of.iter().map(|&i| (points[i].density, points[i].loss)).collect();
        for (&i, front) in of.iter().zip(pareto::front(&curve)) {
            points[i].front = front;
        }
    }
    Ok(points)
}

/// A curve of every variant of an axis: loss against density.
pub fn lines(points: &[Point], axis: Axis) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for point in points.iter().filter(|point| point.axis == axis.name()) {
        extend(&mut lines, &point.variant, (point.density, point.loss));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn are_unknown_axes_refused_by_name() {
        let error = "depth".parse::<Axis>().unwrap_err().to_string();
        assert!(error.contains("mass, bands, calibration"), "{error}");
        for axis in Axis::ALL {
            assert_eq!(axis.name().parse::<Axis>().unwrap(), axis);
        }
    }

    #[test]
    fn are_the_bands_those_of_the_papers_ablation() {
        let model = prism_models::shapes::shape("llama-3.1-8b").unwrap();
        let variants = bands(&model).unwrap();
        let set: Vec<_> = variants.iter().map(|(_, set)| set.as_str()).collect();
        let paper = [
            "high_dims=64,low_dims=96",
            "high_dims=0,low_dims=96",
            "high_dims=64,low_dims=0",
            "high_dims=0,low_dims=128",
            "high_dims=32,low_dims=96",
        ];
        assert_eq!(set[..5], paper);
        assert_eq!(set[5], "high_dims=64,low_dims=64");
    }
}
