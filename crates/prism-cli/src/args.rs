//! What the program takes.

mod eval;
mod generation;
mod selector;

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Result, bail};
use burn_prism::{Calibration, PrismConfig, Scoring};
use clap::{Args, Parser, Subcommand, ValueEnum};

pub use eval::{
    AblateArgs, EvalAnswersArgs, EvalArgs, EvalCommand, EvalCommonArgs, EvalTextsArgs,
    EvalWaysArgs, InfiniteBenchArgs, LongBenchArgs, NeedleArgs, PerplexityArgs, RecallArgs,
    RulerArgs, SpectrumArgs,
};
pub use generation::{ChatArgs, ReadArgs, ReportArg, RunArgs, SamplingArgs, TemplateArgs};
pub use selector::SelectorArgs;

/// Run Llama models with Prism block-sparse attention, and measure what it saves and costs.
#[derive(Debug, Parser)]
#[command(name = "prism", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Generate text from a prompt
    Run(RunArgs),
    /// Talk to a chat model: one message a line, each answered from one cache
    Chat(ChatArgs),
    /// Perplexity of a text file
    Ppl(PplArgs),
    /// Read a long text both ways, dense and Prism, and compare time and predictions
    Compare(CompareArgs),
    /// What a call of attention would do and need, without running it
    Plan(PlanArgs),
    /// What sparse attention keeps and loses: studies of a model (docs/evaluation.md)
    Eval(EvalArgs),
    /// Time the kernels of a CubeCL device: sustained, and in bursts after idling
    Bench(BenchArgs),
    /// What this machine can run, and why not the rest
    Doctor(DoctorArgs),
}

#[derive(Debug, Args)]
pub struct ModelArgs {
    /// A GGUF file, or a Hugging Face directory of safetensors files; with the feature `hub`
    /// also a Hugging Face id
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,
    /// Device to run on: flex, cpu, cuda, rocm, wgpu, vulkan or metal where the build has it; cuda:1
    /// takes the second GPU
    #[arg(long, default_value = "flex")]
    pub device: String,
    /// Print one JSON object instead of text and tables
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AttentionArg {
    /// Exact attention
    Dense,
    /// Prism attention
    Prism,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CalibrationArg {
    /// Over all blocks (the paper)
    Global,
    /// Over the blocks so far: chunks select what the whole prompt selects
    Causal,
    /// None
    Off,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ScoringArg {
    /// Block means within spectral bands (the paper)
    Bands,
    /// Sub-block means and key variances
    SecondOrder,
}

#[derive(Debug, Args)]
pub struct PrismArgs {
    /// Estimated probability that each row keeps, above 0 and at most 1 [default: what was published
    /// for the model's family, 0.95 for Llama and 0.93 for Qwen]
    #[arg(long, allow_negative_numbers = true)]
    pub mass: Option<f64>,
    /// Positions a block
    #[arg(long, default_value_t = 128)]
    pub block: usize,
    /// Last query blocks that read everything
    #[arg(long, value_name = "K", default_value_t = 1)]
    pub dense_last_blocks: usize,
    #[command(flatten)]
    pub selector: SelectorArgs,
    /// How blocks are scored
    #[arg(long, value_enum, default_value_t = ScoringArg::Bands, conflicts_with = "selector")]
    pub scoring: ScoringArg,
    /// Positions a query sub-block of --scoring second-order [default: 32, at most the block]
    #[arg(long, value_name = "N", conflicts_with = "selector")]
    pub query_sub: Option<usize>,
    /// Positions a key sub-block of --scoring second-order [default: 16, at most the block]
    #[arg(long, value_name = "N", conflicts_with = "selector")]
    pub key_sub: Option<usize>,
    /// Dims of the high band, with --low-dims; chosen from the model's RoPE unless given
    #[arg(long, requires = "low_dims", conflicts_with = "selector")]
    pub high_dims: Option<usize>,
    /// Dims of the low band, with --high-dims
    #[arg(long, requires = "high_dims", conflicts_with = "selector")]
    pub low_dims: Option<usize>,
    /// Temperature calibration
    #[arg(long, value_enum, default_value_t = CalibrationArg::Global, conflicts_with = "selector")]
    pub calibration: CalibrationArg,
    /// Prompts with fewer keys run dense; the device's measured crossover unless given
    #[arg(long, value_name = "KEYS")]
    pub dense_below: Option<usize>,
}

impl PrismArgs {
    /// Applies the arguments to a model's own settings.
    ///
    /// Arguments that the scoring has no use for are refused rather than ignored.
    pub fn apply(&self, mut config: PrismConfig) -> Result<PrismConfig> {
        if let Some(mass) = self.mass {
            config = config.with_mass(mass);
        }
        config = config
            .with_block(self.block)
            .with_scoring(self.scoring()?)
            .with_dense_last_blocks(self.dense_last_blocks)
            .with_calibration(match self.calibration {
                CalibrationArg::Global => Calibration::Global,
                CalibrationArg::Causal => Calibration::Causal,
                CalibrationArg::Off => Calibration::Off,
            });
        if let (Some(high), Some(low)) = (self.high_dims, self.low_dims) {
            config = config.with_bands(high, low);
        }
        config.dense_below = self.dense_below;
        if let Some(selector) = self.selector.config()? {
            if self.mass.is_some() && !selector.takes_budget() {
                bail!("--mass is no setting of --selector {selector}: give its own by --set");
            }
            config = config.with_selector(selector);
        }
        Ok(config)
    }

    fn scoring(&self) -> Result<Scoring> {
        match self.scoring {
            ScoringArg::Bands if self.query_sub.is_some() || self.key_sub.is_some() => {
                bail!("--query-sub and --key-sub need --scoring second-order")
            }
            ScoringArg::Bands => Ok(Scoring::Bands),
            ScoringArg::SecondOrder if self.calibration != CalibrationArg::Global => {
                bail!("--calibration is for --scoring bands: second order needs none")
            }
            ScoringArg::SecondOrder => Ok(Scoring::SecondOrder {
                query_sub: self.query_sub.unwrap_or(self.block.min(32)),
                key_sub: self.key_sub.unwrap_or(self.block.min(16)),
            }),
        }
    }
}

/// Prism's settings, or a file of them.
#[derive(Debug, Args)]
pub struct AttentionArgs {
    #[command(flatten)]
    pub prism: PrismArgs,
    /// Take all settings, by layer and by head, from a JSON file (docs/policies.md)
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "mass", "block", "dense_last_blocks", "selector", "set", "scoring", "query_sub", "key_sub", "high_dims",
        "low_dims", "calibration", "dense_below",
    ])]
    pub policy: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct PplArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The text file, UTF-8
    #[arg(long)]
    pub file: PathBuf,
    /// Most tokens of it to read
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub tokens: usize,
    /// Attention to measure
    #[arg(long, value_enum, default_value_t = AttentionArg::Prism)]
    pub attention: AttentionArg,
    /// Read the text in chunks of this many tokens
    #[arg(long, value_name = "N")]
    pub chunk: Option<NonZeroUsize>,
    #[command(flatten)]
    pub settings: AttentionArgs,
}

#[derive(Debug, Args)]
pub struct CompareArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The text file, UTF-8
    #[arg(long)]
    pub file: PathBuf,
    /// Most tokens of it to read
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub tokens: usize,
    /// Tokens to continue the text with, each way
    #[arg(long, value_name = "N", default_value_t = 24)]
    pub continue_tokens: usize,
    /// Write a heat map of one layer's selected blocks to this SVG file
    #[arg(long, value_name = "SVG")]
    pub heatmap: Option<PathBuf>,
    /// Layer of the heat map; the middle one unless given
    #[arg(long)]
    pub layer: Option<usize>,
    #[command(flatten)]
    pub settings: AttentionArgs,
}

#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Take heads, RoPE and the family's mass from this model; a Llama's mass without one
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// Take them from a known model: llama-3.1-8b, llama-3.2-1b, qwen3-8b, qwen2.5-7b or smollm2-135m
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    pub shape: Option<String>,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub tokens: usize,
    /// Tokens already in the cache
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub cached: usize,
    /// Sequences
    #[arg(long, default_value_t = 1)]
    pub batch: usize,
    /// Query heads, without a model
    #[arg(long, default_value_t = 32, conflicts_with_all = ["model", "shape"])]
    pub q_heads: usize,
    /// Key/value heads, without a model
    #[arg(long, default_value_t = 8, conflicts_with_all = ["model", "shape"])]
    pub kv_heads: usize,
    /// Elements of a head, without a model
    #[arg(long, default_value_t = 128, conflicts_with_all = ["model", "shape"])]
    pub head_dim: usize,
    /// Base of the RoPE frequencies, without a model
    #[arg(long, default_value_t = 500_000.0, conflicts_with_all = ["model", "shape"])]
    pub rope_theta: f64,
    /// Element type: f32, f16 or bf16
    #[arg(long, default_value = "f32")]
    pub dtype: String,
    /// Device to plan for, as in `prism run`
    #[arg(long, default_value = "flex")]
    pub device: String,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub prism: PrismArgs,
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub what: BenchCommand,
}

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Every step of a sparse call on every rung, and dense attention
    Attention(BenchAttentionArgs),
    /// Matrix products on Hopper's tensor cores
    Matmul(BenchMatmulArgs),
    /// Time to the first token of a whole model, and what it is spent on
    Prefill(BenchPrefillArgs),
    /// Choosing blocks, by every method: time, memory, density
    Selectors(BenchSelectorsArgs),
}

#[derive(Debug, Args)]
pub struct BenchSelectorsArgs {
    #[command(flatten)]
    pub common: BenchCommonArgs,
    /// A method, SELECTOR or SELECTOR:KEY=VALUE,KEY=VALUE; may be given more than once; all unless given
    /// (docs/selectors.md)
    #[arg(long, value_name = "SPEC")]
    pub selector: Vec<String>,
    /// Whose heads: llama-3.1-8b, llama-3.2-1b, qwen3-8b, qwen2.5-7b or smollm2-135m, or a directory with a
    /// config.json
    #[arg(long, default_value = "llama-3.1-8b")]
    pub shape: String,
    /// Tokens of the prompts
    #[arg(long, value_name = "N", value_delimiter = ',')]
    #[arg(default_value = "8192,16384,32768,65536,131072")]
    pub lengths: Vec<usize>,
    /// Milliseconds of a call from which on longer prompts are left out
    #[arg(long, value_name = "MS", default_value_t = 1000.0, allow_negative_numbers = true)]
    pub slowest: f64,
}

#[derive(Debug, Args)]
pub struct BenchAttentionArgs {
    #[command(flatten)]
    pub common: BenchCommonArgs,
    /// Tokens of the prompts
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "8192,32768")]
    pub lengths: Vec<usize>,
    /// Query heads
    #[arg(long, default_value_t = 32)]
    pub q_heads: usize,
    /// Key/value heads
    #[arg(long, default_value_t = 8)]
    pub kv_heads: usize,
    /// Elements of a head
    #[arg(long, default_value_t = 128)]
    pub head_dim: usize,
    /// Shares of the causal blocks that sparse attention reads, above 0 and at most 1
    #[arg(long, value_name = "SHARE", value_delimiter = ',', default_value = "0.1")]
    #[arg(allow_negative_numbers = true)]
    pub densities: Vec<f64>,
    /// Only these steps: rotate, rotate-pool, pool, calibrate, score, select, schedule, dense, attend
    #[arg(long, value_name = "STEP", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Only these rungs: hopper, mma, plane, unit, these with " pre-scaled", second order
    #[arg(long, value_name = "RUNG", value_delimiter = ',')]
    pub rungs: Vec<String>,
    /// Also a prompt of a million tokens, checked on sampled rows
    #[arg(long)]
    pub million: bool,
}

#[derive(Debug, Args)]
pub struct BenchPrefillArgs {
    /// Device to time: flex, or cpu, cuda, rocm, wgpu, vulkan or metal where the build has it
    #[arg(long)]
    pub device: String,
    /// A known model, llama-3.1-8b, llama-3.2-1b, qwen3-8b, qwen2.5-7b or smollm2-135m, or a directory with
    /// a config.json
    #[arg(long, default_value = "llama-3.1-8b")]
    pub shape: String,
    /// Give it random weights, which is all that can be done so far: they take as long as trained ones
    #[arg(long)]
    pub random_weights: bool,
    /// Tokens of the prompts
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "4096,8192,32768,65536,131072"
    )]
    pub lengths: Vec<usize>,
    /// Ways to attend
    #[arg(long, value_enum, value_delimiter = ',', default_value = "prism,dense")]
    pub attention: Vec<AttentionArg>,
    /// Share of the causal blocks that Prism reads, above 0 and at most 1: random weights leave no
    /// structure to select by, so that the number of blocks a row is fixed [default: 0.1]
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    pub density: Option<f64>,
    #[command(flatten)]
    pub selector: SelectorArgs,
    /// Run prompts in chunks of this many tokens
    #[arg(long, value_name = "N")]
    pub chunk: Option<usize>,
    /// Element type of weights and cache: bf16, f16 or f32
    #[arg(long, default_value = "bf16")]
    pub dtype: String,
    /// Seconds in all: nothing is begun after them
    #[arg(long, default_value_t = 300.0, allow_negative_numbers = true)]
    pub seconds: f64,
    /// Also write run.json, table.md and records.csv to this folder
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct BenchMatmulArgs {
    #[command(flatten)]
    pub common: BenchCommonArgs,
    /// Products as MxNxK; those of Llama-3.1-8B unless given
    #[arg(long, value_name = "MxNxK", value_delimiter = ',')]
    pub shapes: Vec<String>,
    /// What is done to the product before it is written
    #[arg(long, value_enum, value_delimiter = ',', default_value = "plain")]
    pub epilogue: Vec<EpilogueArg>,
    /// Also plain products with W [K, N] in memory, beside the [N, K] of linear layers
    #[arg(long)]
    pub row_major: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EpilogueArg {
    /// Nothing
    Plain,
    /// A residual is added
    Residual,
    /// SwiGLU of interleaved columns
    Swiglu,
}

#[derive(Debug, Args)]
pub struct BenchCommonArgs {
    /// Device to time: cpu, cuda, rocm, wgpu, vulkan or metal where the build has it
    #[arg(long)]
    pub device: String,
    /// Element type: bf16, f16 or, but for products, f32
    #[arg(long, default_value = "bf16")]
    pub dtype: String,
    /// Seconds in all: nothing is begun after them
    #[arg(long, default_value_t = 120.0, allow_negative_numbers = true)]
    pub seconds: f64,
    /// Milliseconds of a window of back-to-back calls; in shorter ones a card may not have reached
    /// its power limit
    #[arg(long, value_name = "MS", default_value_t = 350.0, allow_negative_numbers = true)]
    pub window: f64,
    /// Also write run.json, table.md, records.csv and plots to this folder
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}
