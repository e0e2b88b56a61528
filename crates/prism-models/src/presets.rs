//! Prism's published settings, and which of them a model starts from.

use std::fmt;

use burn_prism::{PrismConfig, Rope};
use serde::Serialize;

use crate::config::{Architecture, ModelConfig};

/// A mass that Prism's authors used, the same for both bands, in blocks of 128 with calibration.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Published {
    /// The model.
    pub model: &'static str,
    /// What it was used for.
    pub task: &'static str,
    /// The mass.
    pub mass: f64,
    /// Where it stands: the paper (arXiv 2602.08426v2), or a script of its repository at d5a42526.
    pub source: &'static str,
}

/// Every mass that was published for a language model. Where the paper and a script differ, both
/// are here; [`recommended`] follows the paper.
pub const PUBLISHED: [Published; 7] = [
    published("Llama-3.1-8B-Instruct", "all of the paper's tasks", 0.95, "paper, §4.1"),
    published("Qwen3-8B, Qwen3-VL-8B", "all of the paper's tasks", 0.93, "paper, §4.1"),
    published("Llama-3.1-8B-Instruct", "PG19 perplexity, 4K to 128K", 0.92, "pg19.sh"),
    published("Qwen3-8B, or a Llama", "LongBench, up to 32K", 0.93, "longbench.sh"),
    published("Qwen3-8B with YaRN, or a Llama", "RULER, up to 128K", 0.95, "ruler.sh"),
    published("Qwen3-VL-8B-Instruct", "VideoMME, LongVideoBench", 0.93, "videomme.sh"),
    published("Llama-3.1-8B-Instruct", "time of layer 12, 8K to 128K", 0.95, "efficiency.sh"),
];

const fn published(
    model: &'static str,
    task: &'static str,
    mass: f64,
    source: &'static str,
) -> Published {
    Published { model, task, mass, source }
}

/// The settings to start from: the model's own RoPE, blocks of 128, bands from the RoPE, and the
/// mass that the paper gives the family (§4.1): .93 for Qwen, .95 for Llama.
///
/// Bands follow from the attenuation at this head_dim, θ and block; for the published models, with
/// heads of 128, they are the published 64 high and 96 low dims. Nothing was published for Qwen 2
/// and 2.5, nor for Mistral and the Llamas but 3.1: the first start from Qwen's mass, the others
/// from Llama's, which is the more careful.
///
/// ```
/// use prism_models::{Checkpoint, presets};
///
/// # std::env::set_current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))?;
/// let checkpoint = Checkpoint::open("fixtures/models/tiny-qwen3-yarn")?;
/// let config = presets::recommended(checkpoint.config());
/// assert_eq!(config.rope, checkpoint.config().rope);
/// assert_eq!(config.selection.budget, burn_prism::Budget::Mass(0.93));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn recommended(config: &ModelConfig) -> PrismConfig {
    of(config.architecture.into(), config.rope)
}

/// [`recommended`] of a family, where no more than the RoPE of a model is known.
pub fn of(family: Family, rope: Rope) -> PrismConfig {
    PrismConfig::new(rope).with_mass(match family {
        Family::Llama => 0.95,
        Family::Qwen => 0.93,
    })
}

/// Models that share a published mass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// Llama, and Mistral with it.
    Llama,
    /// Qwen 2 and 3.
    Qwen,
}

impl From<Architecture> for Family {
    fn from(architecture: Architecture) -> Self {
        match architecture {
            Architecture::Llama | Architecture::Mistral => Self::Llama,
            Architecture::Qwen2 | Architecture::Qwen3 => Self::Qwen,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Llama => "Llama",
            Self::Qwen => "Qwen",
        })
    }
}

/// [`PUBLISHED`] as a table in Markdown.
pub fn published_table() -> String {
    let mut table = String::from("| model | for | mass | source |\n|---|---|---|---|\n");
    for Published { model, task, mass, source } in PUBLISHED {
        table += &format!("| {model} | {task} | {mass} | {source} |\n");
    }
    table
}
