//! What a call did: which path ran, why, and how much it read.

use std::fmt;

use prism_core::error::Result;
use serde::Serialize;

use crate::selected::SelectedBlocks;

/// How attention was computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Path {
    /// Exactly, over every causal block.
    Dense,
    /// Over the selected blocks.
    Sparse,
}

/// Why a path was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Long enough to gain.
    LongPrompt {
        /// Keys of the longest sequence.
        keys: usize,
        /// Sparse from this many keys.
        crossover: usize,
    },
    /// Too short to gain.
    ShortPrompt {
        /// Keys of the longest sequence.
        keys: usize,
        /// Sparse from this many keys.
        crossover: usize,
    },
    /// The backend's sparse path would not be quicker.
    NoSparseKernel,
    /// One query a sequence: decoding reads everything.
    Decode,
    /// No query or no key.
    Empty,
    /// The caller asked for it.
    Chosen,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dense => "dense",
            Self::Sparse => "sparse",
        })
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LongPrompt { keys, crossover } => {
                write!(f, "{keys} keys, sparse from {crossover}")
            }
            Self::ShortPrompt { keys, crossover } => {
                write!(f, "{keys} keys, dense below {crossover}")
            }
            Self::NoSparseKernel => f.write_str("no sparse kernel on this backend"),
            Self::Decode => f.write_str("one query: decoding is dense"),
            Self::Chosen => f.write_str("as asked for"),
            Self::Empty => f.write_str("no queries or no keys"),
        }
    }
}

/// The report of one call.
#[derive(Debug, Clone)]
pub struct Report {
    /// The path that ran.
    pub path: Path,
    /// Why.
    pub reason: Reason,
    /// The blocks that were read; `None` on the dense path, which reads them all.
    pub selected: Option<SelectedBlocks>,
}

impl Report {
    /// Selected over causal blocks, 1 on the dense path. Waits for the device.
    ///
    /// # Errors
    /// The device failed.
    pub fn density(&self) -> Result<f64> {
        self.selected.as_ref().map_or(Ok(1.0), SelectedBlocks::density)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.path, self.reason)
    }
}
