//! What an evaluation refuses, and why it fails.

use std::path::PathBuf;

use burn_prism::PrismError;
use prism_models::{ModelError, PolicyError, TokenizerError};
use thiserror::Error;

/// Why an evaluation could not be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EvalError {
    /// The model failed or refused.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Attention refused.
    #[error(transparent)]
    Attention(#[from] PrismError),
    /// Settings of attention that don't fit the model.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The tokenizer failed.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A file can't be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line of a file that isn't what it must be.
    #[error("{}, line {line}: {reason}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A folder that holds the results of another evaluation.
    #[error(
        "{} holds results of other settings: {setting} was {held}, is {got}; give another folder \
         or remove it",
        path.display()
    )]
    OtherResults {
        /// The file of results.
        path: PathBuf,
        /// The setting that differs.
        setting: String,
        /// What it was.
        held: String,
        /// What it is now.
        got: String,
    },
    /// An argument out of range.
    #[error("{name} must be {allowed}, got {got}")]
    Argument {
        /// Which.
        name: &'static str,
        /// What is allowed.
        allowed: String,
        /// What was given.
        got: String,
    },
    /// A way to attend that can't be read.
    #[error("attention {spec:?}: {reason}")]
    Attend {
        /// As given.
        spec: String,
        /// What is wrong.
        reason: String,
    },
    /// A task that needs what wasn't given or isn't here.
    #[error("{task}: {reason}")]
    Task {
        /// The task.
        task: String,
        /// What is missing.
        reason: String,
    },
    /// Results that can't be written.
    #[error("results can't be written: {reason}")]
    Results {
        /// Why.
        reason: String,
    },
    /// A picture that can't be drawn.
    #[error("{}: {reason}", path.display())]
    Plot {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// Result of an evaluation.
pub type Result<T, E = EvalError> = std::result::Result<T, E>;

impl EvalError {
    pub(crate) fn argument(
        name: &'static str,
        allowed: impl Into<String>,
        got: impl ToString,
    ) -> Self {
        Self::Argument { name, allowed: allowed.into(), got: got.to_string() }
    }

    pub(crate) fn task(task: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Task { task: task.into(), reason: reason.into() }
    }
}
