//! What `prism run` and `prism chat` take.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{AttentionArg, AttentionArgs, ModelArgs};

#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The prompt
    #[arg(long, conflicts_with = "prompt_file")]
    #[arg(required_unless_present_any = ["prompt_file", "prompts"])]
    pub prompt: Option<String>,
    /// A file that holds the prompt
    #[arg(long, value_name = "FILE", alias = "file")]
    pub prompt_file: Option<PathBuf>,
    /// A file of prompts that are read and answered together, each as it would be alone: one JSON
    /// string a line
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "prompt_file"])]
    pub prompts: Option<PathBuf>,
    /// Take the prompt as it is, without the model's chat template
    #[arg(long, conflicts_with_all = ["system", "template_arg"])]
    pub raw: bool,
    #[command(flatten)]
    pub template: TemplateArgs,
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_tokens: usize,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub read: ReadArgs,
}

#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Tokens that the conversation may have [default: what the model was trained for, at most 8192]
    #[arg(long, value_name = "N")]
    pub context: Option<NonZeroUsize>,
    #[command(flatten)]
    pub template: TemplateArgs,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub max_tokens: usize,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub read: ReadArgs,
}

/// For the chat template.
#[derive(Debug, Args)]
pub struct TemplateArgs {
    /// A message of the system before the first of the user
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// A variable of the chat template, as enable_thinking=false; JSON, or else a text
    #[arg(long, value_name = "NAME=VALUE")]
    pub template_arg: Vec<String>,
}

/// How tokens are chosen.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// Sampling temperature; 0 takes the likeliest token [default: the model's, or 0]
    #[arg(long, allow_negative_numbers = true)]
    pub temperature: Option<f64>,
    /// Choose from so many of the likeliest tokens; 0 for all [default: the model's, or 0]
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Share of probability that sampling chooses from, above 0 and at most 1 [default: the
    /// model's, or 1]
    #[arg(long, allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Least probability of a token beside the likeliest one's, 0 to 1 [default: the model's, or 0]
    #[arg(long, allow_negative_numbers = true)]
    pub min_p: Option<f64>,
    /// What tokens that occurred are made less likely by, above 1, or more, below it [default: the
    /// model's, or 1]
    #[arg(long, value_name = "FACTOR", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f64>,
    /// Seed of the sampling [default: 0]
    #[arg(long)]
    pub seed: Option<u64>,
    /// End the answer where this text begins; may be given more than once
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ReportArg {
    /// Share of the causal blocks that each head of each layer read
    Density,
}

/// How the prompt is read.
#[derive(Debug, Args)]
pub struct ReadArgs {
    /// Tokens of the prompt to run at a time; all at once unless given
    #[arg(long, value_name = "TOKENS")]
    pub chunk: Option<NonZeroUsize>,
    /// Attention of the prompt (decoding is always dense)
    #[arg(long, value_enum, default_value_t = AttentionArg::Prism)]
    pub attention: AttentionArg,
    /// Also print what reading the prompt selected
    #[arg(long, value_enum)]
    pub report: Option<ReportArg>,
    #[command(flatten)]
    pub settings: AttentionArgs,
}
