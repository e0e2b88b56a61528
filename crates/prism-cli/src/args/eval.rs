//! What `prism eval` takes.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{ModelArgs, TemplateArgs};

#[derive(Debug, Args)]
pub struct EvalArgs {
    #[command(subcommand)]
    pub what: EvalCommand,
}

#[derive(Debug, Subcommand)]
pub enum EvalCommand {
    /// Perplexity of texts, exact attention against others, by position
    Perplexity(PerplexityArgs),
    /// A needle at every depth of texts of every length, as a map
    Needle(NeedleArgs),
    /// RULER: 11 tasks made here, and questions over local passages
    Ruler(RulerArgs),
    /// LongBench, from local copies of its data
    #[command(name = "longbench")]
    LongBench(LongBenchArgs),
    /// InfiniteBench, from local copies of its data
    #[command(name = "infinitebench")]
    InfiniteBench(InfiniteBenchArgs),
    /// Softmax mass and output that selections keep, by layer and head
    Recall(RecallArgs),
    /// Energy of Q and K in each RoPE pair, a token and pooled
    Spectrum(SpectrumArgs),
    /// Prism's settings one at a time: perplexity against density
    Ablate(AblateArgs),
}

#[derive(Debug, Args)]
pub struct EvalCommonArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Print CSV instead of tables
    #[arg(long, conflicts_with = "json")]
    pub csv: bool,
    /// Write results, tables and plots to this folder; what it holds already isn't measured again
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// Ways to attend.
#[derive(Debug, Args)]
pub struct EvalWaysArgs {
    /// A way to attend: dense, SELECTOR, SELECTOR:KEY=VALUE,KEY=VALUE or policy:FILE; may be given more
    /// than once (docs/selectors.md)
    #[arg(long, value_name = "SPEC", default_value = "prism")]
    pub selector: Vec<String>,
    /// Masses of each selector that is swept by its mass and says none
    #[arg(long, value_name = "MASS", value_delimiter = ',', allow_negative_numbers = true)]
    pub mass: Vec<f64>,
}

/// Texts.
#[derive(Debug, Args)]
pub struct EvalTextsArgs {
    /// A text file, UTF-8; may be given more than once
    #[arg(long, required = true)]
    pub file: Vec<PathBuf>,
    /// Most tokens of each to read
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub tokens: usize,
}

#[derive(Debug, Args)]
pub struct PerplexityArgs {
    #[command(flatten)]
    pub common: EvalCommonArgs,
    #[command(flatten)]
    pub texts: EvalTextsArgs,
    #[command(flatten)]
    pub ways: EvalWaysArgs,
    /// Tokens a window; windows are read apart [default: the whole text]
    #[arg(long, value_name = "N")]
    pub window: Option<usize>,
    /// Positions a bucket
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub bucket: usize,
    /// Run windows in chunks of this many tokens
    #[arg(long, value_name = "N")]
    pub chunk: Option<NonZeroUsize>,
}

/// How questions are asked.
#[derive(Debug, Args)]
pub struct EvalAnswersArgs {
    #[command(flatten)]
    pub template: TemplateArgs,
    /// Ask without the model's chat template
    #[arg(long, conflicts_with_all = ["system", "template_arg"])]
    pub raw: bool,
    /// Run prompts in chunks of this many tokens
    #[arg(long, value_name = "N")]
    pub chunk: Option<NonZeroUsize>,
}

#[derive(Debug, Args)]
pub struct NeedleArgs {
    #[command(flatten)]
    pub common: EvalCommonArgs,
    #[command(flatten)]
    pub ways: EvalWaysArgs,
    /// Tokens of prompt and answer
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "2048,4096,8192")]
    pub lengths: Vec<usize>,
    /// Where the needle stands, percent
    #[arg(long, value_name = "PERCENT", value_delimiter = ',', default_value = "0,25,50,75,100")]
    #[arg(allow_negative_numbers = true)]
    pub depths: Vec<f64>,
    /// Questions of each length and depth
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub samples: usize,
    /// A text to hide it in; repeated sentences unless given
    #[arg(long, value_name = "FILE")]
    pub haystack: Option<PathBuf>,
    /// Seed of all questions
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    #[command(flatten)]
    pub answers: EvalAnswersArgs,
}

#[derive(Debug, Args)]
pub struct RulerArgs {
    #[command(flatten)]
    pub common: EvalCommonArgs,
    #[command(flatten)]
    pub ways: EvalWaysArgs,
    /// Tokens of prompt and answer
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "4096")]
    pub lengths: Vec<usize>,
    /// Only these tasks: niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue, niah_multiquery, vt,
    /// cwe, fwe, or none [default: all]
    #[arg(long, value_name = "TASK", value_delimiter = ',')]
    pub tasks: Vec<String>,
    /// Questions of each task and length
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub samples: usize,
    /// A text to hide needles in
    #[arg(long, value_name = "FILE")]
    pub haystack: Option<PathBuf>,
    /// Also questions over passages, lines of {"question", "answers", "documents"}; may be given more
    /// than once
    #[arg(long, value_name = "JSONL")]
    pub qa: Vec<PathBuf>,
    /// Seed of all questions
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    #[command(flatten)]
    pub answers: EvalAnswersArgs,
}

#[derive(Debug, Args)]
pub struct LongBenchArgs {
    #[command(flatten)]
    pub common: EvalCommonArgs,
    #[command(flatten)]
    pub ways: EvalWaysArgs,
    /// Folder of NAME.jsonl files
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Only these data sets [default: those that the folder has]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub datasets: Vec<String>,
    /// Questions of each data set, the first of its file [default: all]
    #[arg(long, value_name = "N")]
    pub samples: Option<usize>,
    /// Most tokens of a text before its chat template; the middle of a longer one is cut out
    #[arg(long, value_name = "N", default_value_t = 7500)]
    pub length: usize,
    #[command(flatten)]
    pub answers: EvalAnswersArgs,
}

#[derive(Debug, Args)]
pub struct InfiniteBenchArgs {
    #[command(flatten)]
    pub common: EvalCommonArgs,
    #[command(flatten)]
    pub ways: EvalWaysArgs,
    /// Folder of NAME.jsonl files
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Only these tasks [default: those that the folder has]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub tasks: Vec<String>,
    /// Questions of each task, the first of its file [default: all]
    #[arg(long, value_name = "N")]
    pub samples: Option<usize>,
    /// Most tokens of a prompt; the middle of a longer one is cut out
    #[arg(long, value_name = "N", default_value_t = 131_072)]
    pub length: usize,
    /// Most tokens of an answer, where the task allows more
    #[arg(long, value_name = "N", default_value_t = 1200)]
    pub answer_tokens: usize,
    /// Run prompts in chunks of this many tokens
    #[arg(long, value_name = "N")]
    pub chunk: Option<NonZeroUsize>,
}

#[derive(Debug, Args)]
pub struct RecallArgs {
    #[command(flatten)]
    pub common: EvalCommonArgs,
    #[command(flatten)]
    pub texts: EvalTextsArgs,
    #[command(flatten)]
    pub ways: EvalWaysArgs,
    /// Only these layers
    #[arg(long, value_name = "LAYER", value_delimiter = ',')]
    pub layers: Vec<usize>,
}

#[derive(Debug, Args)]
pub struct SpectrumArgs {
    #[command(flatten)]
    pub common: EvalCommonArgs,
    /// The text file, UTF-8
    #[arg(long)]
    pub file: PathBuf,
    /// Most tokens of it to read
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub tokens: usize,
    /// Positions a block
    #[arg(long, default_value_t = 128)]
    pub block: usize,
}

#[derive(Debug, Args)]
pub struct AblateArgs {
    #[command(flatten)]
    pub common: EvalCommonArgs,
    #[command(flatten)]
    pub texts: EvalTextsArgs,
    /// What to vary: mass, bands, calibration, block, pool-block, dense-last-blocks [default: all]
    #[arg(long, value_name = "SETTING", value_delimiter = ',')]
    pub vary: Vec<String>,
    /// Masses of each setting
    #[arg(long, value_name = "MASS", value_delimiter = ',', default_value = "0.8,0.9,0.95")]
    #[arg(allow_negative_numbers = true)]
    pub mass: Vec<f64>,
    /// Tokens a window; windows are read apart [default: the whole text]
    #[arg(long, value_name = "N")]
    pub window: Option<usize>,
    /// Run windows in chunks of this many tokens
    #[arg(long, value_name = "N")]
    pub chunk: Option<NonZeroUsize>,
}
