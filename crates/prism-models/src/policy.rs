//! Which layer attends how, and which head selects how much: settings for a whole model, from a
//! program or from a JSON file.

use std::path::Path;

use burn_prism::{
    BandRule, Calibration, HeadOverride, PrismConfig, PrismError, Scoring, SelectorConfig,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::{files, presets};

/// Largest policy file that is read, in bytes.
pub const MAX_POLICY_BYTES: u64 = 1 << 20;

/// Attention of every layer: what [`presets::recommended`] says of the model, changed by `base` for
/// all layers and by `layers` for some.
///
/// ```
/// use prism_models::AttentionPolicy;
///
/// let policy: AttentionPolicy = serde_json::from_str(
///     r#"{
///         "base": {"mass": 0.93, "dense_below": 4096},
///         "layers": [
///             {"first": 0, "last": 1, "dense": true},
///             {"first": 12, "last": 15, "set": {"mass": 0.97, "max_blocks": 256}},
///             {"first": 20, "last": 20, "set": {"heads": [{"heads": [3, 7], "mass": 1.0}]}}
///         ]
///     }"#,
/// )?;
/// assert_eq!(policy.base.mass, Some(0.93));
/// assert!(policy.layers[0].dense);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AttentionPolicy {
    /// Positions a block, in all layers: the caches of a model have one block size. 128 unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block: Option<usize>,
    /// Settings of every layer.
    pub base: LayerSettings,
    /// What some layers have instead. Two of these must not set the same of a layer, so that their
    /// order says nothing.
    pub layers: Vec<LayerOverride>,
}

/// Settings of a layer, each as in [`PrismConfig`] or its
/// [`SelectionRule`](burn_prism::SelectionRule); what isn't given stays as it is. The RoPE is the
/// model's.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LayerSettings {
    /// Estimated probability that each row keeps, in (0, 1].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mass: Option<f64>,
    /// The method that chooses blocks, in place of scoring, bands and calibration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selector: Option<SelectorConfig>,
    /// How blocks are scored, in place of a method set before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scoring: Option<Scoring>,
    /// How dims are shared out between the bands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bands: Option<BandRule>,
    /// Over which blocks the temperature calibration runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
    /// First blocks that every row reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sink_blocks: Option<usize>,
    /// Last causal blocks that every row reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recent_blocks: Option<usize>,
    /// Last query blocks of the prompt that read every causal block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dense_last_blocks: Option<usize>,
    /// Rows are filled up to this many blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_blocks: Option<usize>,
    /// Rows are cut to this many blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_blocks: Option<usize>,
    /// Prompts with fewer keys run dense.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dense_below: Option<usize>,
    /// Settings of single query heads, in place of those given before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heads: Option<Vec<HeadOverride>>,
}

/// What a range of layers has instead of the base.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerOverride {
    /// First layer, counted from 0.
    pub first: usize,
    /// Last layer, itself included.
    pub last: usize,
    /// Whether they attend exactly; nothing else can be set of them then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dense: bool,
    /// Settings of Prism.
    #[serde(default, skip_serializing_if = "LayerSettings::is_empty")]
    pub set: LayerSettings,
}

/// Why a policy was refused; the model is unchanged then.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// The file can't be read.
    #[error(transparent)]
    File(#[from] LoadError),
    /// The text is no policy.
    #[error("not a policy: {0}")]
    Json(#[from] serde_json::Error),
    /// A layer past the last.
    #[error("override {index}: there is no layer {layer}: the model has {layers}")]
    NoSuchLayer {
        /// Index of the override.
        index: usize,
        /// The layer.
        layer: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// A range that ends before it begins.
    #[error("override {index}: the last layer must be at least the first, {first}, got {last}")]
    Range {
        /// Index of the override.
        index: usize,
        /// First layer.
        first: usize,
        /// Last layer.
        last: usize,
    },
    /// An override that changes nothing.
    #[error("override {index}, of layers {first} to {last}, sets nothing")]
    Empty {
        /// Index of the override.
        index: usize,
        /// First layer.
        first: usize,
        /// Last layer.
        last: usize,
    },
    /// The same setting of a layer twice, or any beside `dense`.
    #[error(
        "layer {layer}: {setting} of override {index} contradicts {other} of override {earlier}"
    )]
    Contradiction {
        /// The layer.
        layer: usize,
        /// What is set.
        setting: &'static str,
        /// Index of the override that does.
        index: usize,
        /// What was set before.
        other: &'static str,
        /// Index of the override that did.
        earlier: usize,
    },
    /// A calibration for second-order scoring, which has no temperature.
    #[error("{of}: calibration is for scoring by bands: second order needs none")]
    Calibration {
        /// Whose settings.
        of: String,
    },
    /// A setting that a method doesn't have, or has by another name among its own options.
    #[error("{of}: {setting} is no setting of the selector {selector}")]
    Selector {
        /// Whose settings.
        of: String,
        /// What is set.
        setting: &'static str,
        /// The method with its options.
        selector: String,
    },
    /// Settings that don't fit the heads or each other.
    #[error("{of}: {source}")]
    Settings {
        /// Whose settings: of the base, or of a layer.
        of: String,
        /// What and why.
        source: PrismError,
    },
}

impl LayerSettings {
    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The names of what is set.
    fn names(&self) -> impl Iterator<Item = &'static str> {
        let set = [
            ("mass", self.mass.is_some()),
            ("selector", self.selector.is_some()),
            ("scoring", self.scoring.is_some()),
            ("bands", self.bands.is_some()),
            ("calibration", self.calibration.is_some()),
            ("sink_blocks", self.sink_blocks.is_some()),
            ("recent_blocks", self.recent_blocks.is_some()),
            ("dense_last_blocks", self.dense_last_blocks.is_some()),
            ("min_blocks", self.min_blocks.is_some()),
            ("max_blocks", self.max_blocks.is_some()),
            ("dense_below", self.dense_below.is_some()),
            ("heads", self.heads.is_some()),
        ];
        set.into_iter().filter(|&(_, set)| set).map(|(name, _)| name)
    }

    fn apply(&self, mut config: PrismConfig) -> PrismConfig {
        if let Some(selector) = &self.selector {
            config = config.with_selector(selector.clone());
        } else if self.scoring.is_some() {
            config.selector = None;
        }
        if let Some(mass) = self.mass {
            config = config.with_mass(mass);
        }
        replace(&mut config.scoring, self.scoring);
        replace(&mut config.bands, self.bands);
        replace(&mut config.calibration, self.calibration);
        replace(&mut config.selection.sink_blocks, self.sink_blocks);
        replace(&mut config.selection.recent_blocks, self.recent_blocks);
        replace(&mut config.selection.dense_last_blocks, self.dense_last_blocks);
        replace(&mut config.selection.min_blocks, self.min_blocks);
        config.selection.max_blocks = self.max_blocks.or(config.selection.max_blocks);
        config.dense_below = self.dense_below.or(config.dense_below);
        replace(&mut config.heads, self.heads.clone());
        config
    }

    fn check(&self, of: impl FnOnce() -> String) -> Result<(), PolicyError> {
        if let Some(selector) = &self.selector {
            let own = |&name: &&'static str| match name {
                "mass" => !selector.takes_budget(),
                "scoring" | "bands" | "calibration" => true,
                _ => false,
            };
            if let Some(setting) = self.names().find(own) {
                let (of, selector) = (of(), selector.to_string());
                return Err(PolicyError::Selector { of, setting, selector });
            }
        }
        match (self.scoring, self.calibration) {
            (Some(Scoring::SecondOrder { .. }), Some(_)) => {
                Err(PolicyError::Calibration { of: of() })
            }
            _ => Ok(()),
        }
    }
}

fn replace<T>(setting: &mut T, given: Option<T>) {
    if let Some(given) = given {
        *setting = given;
    }
}

impl AttentionPolicy {
    /// Reads a policy from a JSON file of at most [`MAX_POLICY_BYTES`].
    ///
    /// # Errors
    /// A file that can't be read or is too large, or no policy.
    pub fn open(path: &Path) -> Result<Self, PolicyError> {
        Ok(serde_json::from_slice(&files::read(path, MAX_POLICY_BYTES)?)?)
    }

    /// Prism's settings of every layer of a model, `None` for layers that attend exactly.
    ///
    /// # Errors
    /// Overrides that don't fit the model or each other, or settings that don't fit the heads.
    pub fn resolve(&self, model: &ModelConfig) -> Result<Vec<Option<PrismConfig>>, PolicyError> {
        self.base.check(|| "base".into())?;
        for (index, one) in self.layers.iter().enumerate() {
            one.check(index, model.layers)?;
        }
        let mut base = presets::recommended(model);
        replace(&mut base.block, self.block);
        let base = self.base.apply(base);
        base.validate_for(model.q_heads, model.head_dim)
            .map_err(|source| PolicyError::Settings { of: "base".into(), source })?;
        (0..model.layers).map(|layer| self.layer(layer, &base, model)).collect()
    }

    fn layer(
        &self,
        layer: usize,
        base: &PrismConfig,
        model: &ModelConfig,
    ) -> Result<Option<PrismConfig>, PolicyError> {
        let mut config = Some(base.clone());
        let mut set: Vec<(&'static str, usize)> = Vec::new();
        let here = |(_, one): &(usize, &LayerOverride)| (one.first..=one.last).contains(&layer);
        for (index, one) in self.layers.iter().enumerate().filter(here) {
            for setting in one.names() {
                let clash = |&&(other, _): &&(&str, usize)| {
                    setting == other || [setting, other].contains(&DENSE)
                };
                if let Some(&(other, earlier)) = set.iter().find(clash) {
                    let at = PolicyError::Contradiction { layer, setting, index, other, earlier };
                    return Err(at);
                }
                set.push((setting, index));
            }
            config = config.filter(|_| !one.dense).map(|config| one.set.apply(config));
        }
        if let Some(config) = &config {
            let of = || format!("layer {layer}");
            let own = config.selector.as_ref().filter(|selector| !selector.takes_budget());
            if let Some(selector) =
                own.filter(|_| set.iter().any(|&(setting, _)| setting == "mass"))
            {
                let (setting, selector) = ("mass", selector.to_string());
                return Err(PolicyError::Selector { of: of(), setting, selector });
            }
            config
                .validate_for(model.q_heads, model.head_dim)
                .map_err(|source| PolicyError::Settings { of: of(), source })?;
        }
        Ok(config)
    }
}

const DENSE: &str = "dense";

impl LayerOverride {
    /// The names of what is set.
    fn names(&self) -> impl Iterator<Item = &'static str> {
        self.dense.then_some(DENSE).into_iter().chain(self.set.names())
    }

    fn check(&self, index: usize, layers: usize) -> Result<(), PolicyError> {
        let Self { first, last, .. } = *self;
        if last < first {
            return Err(PolicyError::Range { index, first, last });
        }
        if last >= layers {
            return Err(PolicyError::NoSuchLayer { index, layer: last, layers });
        }
        if self.names().next().is_none() {
            return Err(PolicyError::Empty { index, first, last });
        }
        self.set.check(|| format!("override {index}"))
    }
}
