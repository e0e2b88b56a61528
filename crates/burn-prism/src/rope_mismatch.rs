//! What a probe of a model's rotary embedding found: [`RopeProbe`] where it is the config's,
//! [`RopeMismatch`] where it isn't.

use std::fmt;

use prism_core::bands::Bands;
use prism_core::{PrismError, RopeLayout};
use thiserror::Error;

/// The rotary embedding that [`probe_rope`](crate::probe_rope) found, equal to the config's.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeProbe {
    /// Which dims form a pair.
    pub layout: RopeLayout,
    /// Leading dims that turn.
    pub rotary_dim: usize,
    /// Radians a position of each pair, as measured.
    pub inv_freq: Vec<f64>,
    /// Factor on cosines and sines, as measured.
    pub attention_factor: f64,
    /// The bands that the config gives this head.
    pub bands: Bands,
}

impl fmt::Display for RopeProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (layout, head_dim) = (name(self.layout), self.bands.head_dim());
        write!(f, "{layout}, {} of {head_dim} dims turn", self.rotary_dim)?;
        if let [fastest, .., slowest] = self.inv_freq[..] {
            write!(f, " by {fastest:.3e} to {slowest:.3e} radians a position")?;
        }
        write!(f, ", attention factor {:.3}", self.attention_factor)
    }
}

/// What a wrong rotary embedding does to the bands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WrongBands {
    /// Dims that the config puts into another band than the model's rotation would.
    pub dims: usize,
    /// Dims of the head.
    pub head_dim: usize,
}

impl fmt::Display for WrongBands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.dims {
            0 => f.write_str("the bands are the same all the same"),
            n => write!(f, "{n} of {} dims would be scored in the wrong band", self.head_dim),
        }
    }
}

/// How a model's rotation differs from the config's.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum RopeMismatch {
    /// The config, the head or the device is refused.
    #[error(transparent)]
    Refused(#[from] PrismError),
    /// The function does something else than turning pairs of dims.
    #[error("not a rotary embedding: {reason}")]
    NotARotation {
        /// What it does, and the value got.
        reason: String,
    },
    /// The pairs are those of no known layout.
    #[error("neither rotate-half nor interleaved: {reason}")]
    Pairs {
        /// Which dims turn together.
        reason: String,
    },
    /// More or fewer dims turn.
    #[error(
        "the config turns {expected} dims of the head, the model {got}: {bands}; set `rotary_dim`"
    )]
    RotaryDim {
        /// Dims that turn by the config.
        expected: usize,
        /// Dims that turn in the model.
        got: usize,
        /// What it does to the bands.
        bands: WrongBands,
    },
    /// Other dims form the pairs.
    #[error(
        "the config's layout is {}, the model's {}: {bands}; set `layout`",
        name(*.expected),
        name(*.got)
    )]
    Layout {
        /// The config's.
        expected: RopeLayout,
        /// The model's.
        got: RopeLayout,
        /// What it does to the bands.
        bands: WrongBands,
    },
    /// Pairs turn by other angles: another θ, or another scaling of the context.
    #[error(
        "pair {pair} turns by {expected:.3e} radians a position in the config, by {got:.3e} in the \
         model{}: {bands}; set `theta` and `scaling`",
        like(*.theta)
    )]
    Frequency {
        /// The pair that differs most.
        pair: usize,
        /// The config's radians a position.
        expected: f64,
        /// The model's; negative if it turns backwards.
        got: f64,
        /// The θ whose unscaled frequencies the model's are, if there is one.
        theta: Option<f64>,
        /// What it does to the bands.
        bands: WrongBands,
    },
    /// Cosines and sines carry another factor. The bands don't depend on it.
    #[error("the config's attention factor is {expected:.4}, the model's {got:.4}; set `scaling`")]
    AttentionFactor {
        /// The config's.
        expected: f64,
        /// The model's.
        got: f64,
    },
    /// A row isn't turned as its position asks. The bands don't depend on it; chunks and cached keys
    /// would stand at wrong distances.
    #[error("the row at position {asked} is turned as {}", at(*.got))]
    Position {
        /// The position asked for.
        asked: usize,
        /// The position whose rotation it got, if it is one's.
        got: Option<i64>,
    },
}

impl RopeMismatch {
    /// Dims that would be scored in the wrong band; `None` where that can't be said.
    pub fn wrong_dims(&self) -> Option<usize> {
        match self {
            Self::RotaryDim { bands, .. }
            | Self::Layout { bands, .. }
            | Self::Frequency { bands, .. } => Some(bands.dims),
            Self::AttentionFactor { .. } | Self::Position { .. } => Some(0),
            Self::Refused(_) | Self::NotARotation { .. } | Self::Pairs { .. } => None,
        }
    }
}

fn name(layout: RopeLayout) -> &'static str {
    match layout {
        RopeLayout::RotateHalf => "rotate-half",
        RopeLayout::Interleaved => "interleaved",
    }
}

fn like(theta: Option<f64>) -> String {
    theta.map_or_else(String::new, |theta| format!(" (as unscaled θ = {theta:.4e} would)"))
}

fn at(position: Option<i64>) -> String {
    position
        .map_or_else(|| "none of the config's".into(), |position| format!("position {position}"))
}
