//! All settings of Prism attention in one place; nothing is read from the environment.

use prism_core::bands::{BandRule, Bands};
use prism_core::error::{PrismError, Result};
use prism_core::{Budget, Calibration, Rope, Scoring, SelectionRule, SelectorConfig};
use serde::{Deserialize, Serialize};

use crate::heads::{self, HeadGroup, HeadOverride};
use crate::module::PrismAttention;

/// Settings of Prism attention. The dial that matters is the mass: more of it is closer to dense
/// attention, less is faster.
///
/// ```
/// use burn_prism::{PrismConfig, Rope};
///
/// let config = PrismConfig::new(Rope::new(10_000.0)).with_mass(0.9);
/// let json = serde_json::to_string(&config)?;
/// assert_eq!(serde_json::from_str::<PrismConfig>(&json)?, config);
/// assert!(serde_json::from_str::<PrismConfig>(r#"{"rope": {"theta": 1e4}, "masss": 0.9}"#).is_err());
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrismConfig {
    /// The model's rotary embedding; decides the bands, so it must be the model's own.
    pub rope: Rope,
    /// Positions a block.
    #[serde(default = "default_block")]
    pub block: usize,
    /// How blocks are scored.
    #[serde(default)]
    pub scoring: Scoring,
    /// Another method in place of Prism's, whose scoring, bands and calibration then stay as they are
    /// by default ([`with_selector`](Self::with_selector)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<SelectorConfig>,
    /// How dims are shared out between the bands; automatic where the scoring has none.
    #[serde(default)]
    pub bands: BandRule,
    /// Over which blocks the temperature calibration runs; second-order scoring has no temperature
    /// and always selects what [`Calibration::Causal`] promises.
    #[serde(default)]
    pub calibration: Calibration,
    /// Which blocks a row reads, given its scores.
    #[serde(default)]
    pub selection: SelectionRule,
    /// Factor on the attention scores; 1/√head_dim unless given.
    #[serde(default)]
    pub scale: Option<f64>,
    /// Prompts with fewer keys than this run dense; the backend's measured crossover unless given.
    #[serde(default)]
    pub dense_below: Option<usize>,
    /// What single query heads select by instead; a head may be named once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub heads: Vec<HeadOverride>,
}

fn default_block() -> usize {
    128
}

impl PrismConfig {
    /// The paper's settings for a model with this rotary embedding: blocks of 128, mass .95.
    pub fn new(rope: Rope) -> Self {
        Self {
            rope,
            block: default_block(),
            scoring: Scoring::default(),
            selector: None,
            bands: BandRule::default(),
            calibration: Calibration::default(),
            selection: SelectionRule::default(),
            scale: None,
            dense_below: None,
            heads: Vec::new(),
        }
    }

    /// Llama 3, 3.1, 3.2 and 3.3: θ = 500 000, mass .95. The context scaling of 3.1 and later
    /// leaves the bands as they are (it starts at wavelengths of 2048).
    pub fn llama3() -> Self {
        Self::new(Rope::new(5e5))
    }

    /// Qwen3: θ = 1 000 000, mass .93.
    pub fn qwen3() -> Self {
        Self::new(Rope::new(1e6)).with_mass(0.93)
    }

    /// Qwen2 and Qwen2.5: θ = 1 000 000, mass .93.
    pub fn qwen2() -> Self {
        Self::new(Rope::new(1e6)).with_mass(0.93)
    }

    /// SmolLM2: θ = 100 000, mass .95.
    pub fn smollm2() -> Self {
        Self::new(Rope::new(1e5))
    }

    /// Sets the mass that each row keeps, in (0, 1].
    pub fn with_mass(mut self, mass: f64) -> Self {
        self.selection.budget = Budget::Mass(mass);
        self
    }

    /// Sets the block size.
    pub fn with_block(mut self, block: usize) -> Self {
        self.block = block;
        self
    }

    /// Sets how blocks are scored.
    pub fn with_scoring(mut self, scoring: Scoring) -> Self {
        self.scoring = scoring;
        self
    }

    /// Sets the method that chooses blocks, in place of scoring, bands and calibration.
    ///
    /// `prism` and `second_order` become these settings themselves, so that the block comes first: the
    /// sub-blocks of second order follow it. A mass of theirs becomes the budget. Only `prism` with a
    /// `pool_block` is a method beside them.
    ///
    /// ```
    /// use burn_prism::{PrismConfig, SelectorConfig};
    ///
    /// let xattention = SelectorConfig::from_settings("xattention", &[("stride", "16")])?;
    /// let config = PrismConfig::llama3().with_selector(xattention);
    /// config.validate(128)?;
    /// let second_order = SelectorConfig::from_settings("second_order", &[("mass", "0.9")])?;
    /// let config = config.with_selector(second_order);
    /// assert_eq!(config.scoring, burn_prism::Scoring::second_order());
    /// # Ok::<(), burn_prism::PrismError>(())
    /// ```
    pub fn with_selector(mut self, selector: SelectorConfig) -> Self {
        (self.scoring, self.bands, self.calibration, self.selector) = Default::default();
        let mass = match selector {
            SelectorConfig::Prism(options) if options.pool_block.is_none() => {
                (self.bands, self.calibration) = (options.bands(), options.calibration);
                options.mass
            }
            SelectorConfig::SecondOrder(options) => {
                self.scoring = options.scoring(self.block);
                options.mass
            }
            other => {
                self.selector = Some(other);
                None
            }
        };
        match mass {
            Some(mass) => self.with_mass(mass),
            None => self,
        }
    }

    /// Sets explicit band widths, as the paper counts them.
    pub fn with_bands(mut self, high: usize, low: usize) -> Self {
        self.bands = BandRule::Dims { high, low };
        self
    }

    /// Sets the calibration.
    pub fn with_calibration(mut self, calibration: Calibration) -> Self {
        self.calibration = calibration;
        self
    }

    /// Sets how many of the last query blocks read everything.
    pub fn with_dense_last_blocks(mut self, blocks: usize) -> Self {
        self.selection.dense_last_blocks = blocks;
        self
    }

    /// Sets the number of keys below which prompts run dense; 0 for never.
    pub fn with_dense_below(mut self, keys: usize) -> Self {
        self.dense_below = Some(keys);
        self
    }

    /// Adds settings of single query heads.
    pub fn with_heads(mut self, heads: HeadOverride) -> Self {
        self.heads.push(heads);
        self
    }

    /// Creates the module. Settings are checked against the heads at the first call, or before it
    /// with [`validate_for`](Self::validate_for).
    pub fn init(&self) -> PrismAttention {
        PrismAttention::new(self.clone())
    }

    /// Checks every setting for a layer of `q_heads` query heads of `head_dim` dims and returns the
    /// bands.
    ///
    /// # Errors
    /// The first setting out of range, with its limit and the value got.
    pub fn validate_for(&self, q_heads: usize, head_dim: usize) -> Result<Bands> {
        let bands = self.validate(head_dim)?;
        heads::check(&self.heads, self.selection, q_heads)?;
        Ok(bands)
    }

    /// [`validate_for`](Self::validate_for) any number of query heads.
    ///
    /// # Errors
    /// As there, but for heads past the last.
    pub fn validate(&self, head_dim: usize) -> Result<Bands> {
        prism_core::BlockGrid::new(self.block, 0, 0)?;
        self.scoring.validate(self.block)?;
        if self.scoring != Scoring::Bands && self.bands != BandRule::Auto {
            let reason = format!("second-order scoring has none to set, got {:?}", self.bands);
            return Err(PrismError::Bands { reason });
        }
        self.selection.validate()?;
        self.check_selector()?;
        heads::check(&self.heads, self.selection, usize::MAX)?;
        check_scale(self.scale)?;
        // Fails on bad RoPE settings even where explicit bands don't need the frequencies.
        self.rope.inv_freq(head_dim)?;
        for HeadOverride { heads, bands, .. } in &self.heads {
            let Some(rule) = *bands else { continue };
            let refuse = |reason: String| {
                Err(PrismError::HeadOverrides { reason: format!("heads {heads:?}: {reason}") })
            };
            if !self.is_banded() {
                return refuse("only Prism's own scoring has bands of heads".into());
            }
            if let Err(error) = self.bands_by(rule, head_dim) {
                return refuse(error.to_string());
            }
        }
        let (rule, block) = self.band_rules().first().copied().unwrap_or((self.bands, self.block));
        Bands::new(rule, Some(&self.rope), head_dim, block)
    }

    /// The bands of a rule for means of blocks: the layer's, or that of a group of heads.
    pub(crate) fn bands_by(&self, rule: BandRule, head_dim: usize) -> Result<Bands> {
        Bands::new(rule, Some(&self.rope), head_dim, self.block)
    }

    /// Every rule of bands that scores are made by, the layer's first, with the positions of a mean.
    pub(crate) fn band_rules(&self) -> Vec<(BandRule, usize)> {
        match (&self.selector, self.scoring) {
            (Some(SelectorConfig::Prism(options)), _) => {
                vec![(options.bands(), options.pool_block.unwrap_or(self.block))]
            }
            (None, Scoring::Bands) => {
                let own = self.heads.iter().filter_map(|one| one.bands);
                std::iter::once(self.bands).chain(own).map(|rule| (rule, self.block)).collect()
            }
            _ => Vec::new(),
        }
    }

    fn check_selector(&self) -> Result<()> {
        let Some(selector) = &self.selector else {
            return Ok(());
        };
        let name = selector.name();
        let refuse = |reason: String| Err(PrismError::Selector { reason });
        let settings = match selector {
            SelectorConfig::Prism(options) => options.pool_block.is_none(),
            other => matches!(other, SelectorConfig::SecondOrder(_)),
        };
        if settings {
            return refuse(format!("{name} is set by scoring, bands and calibration"));
        }
        selector.validate_block(self.block)?;
        let default = (Scoring::default(), BandRule::default(), Calibration::default());
        let set = (self.scoring, self.bands, self.calibration);
        if set != default {
            let reason =
                format!("beside {name} no scoring, bands or calibration is set, got {set:?}");
            return refuse(reason);
        }
        if !selector.takes_budget() && self.heads.iter().any(|one| one.mass.is_some()) {
            return refuse(format!("{name} has a budget of its own, but heads have a mass"));
        }
        Ok(())
    }

    /// Whether blocks are scored within bands.
    pub(crate) fn is_banded(&self) -> bool {
        self.selector.is_none() && self.scoring == Scoring::Bands
    }

    /// The query heads of a checked layer by the settings that they select by.
    pub(crate) fn head_groups(&self, q_heads: usize) -> Vec<HeadGroup> {
        heads::groups(&self.heads, (self.selection, self.bands), q_heads)
    }
}

/// The factor on the scores.
pub(crate) fn resolve_scale(scale: Option<f64>, head_dim: usize) -> Result<f64> {
    check_scale(scale)?;
    Ok(scale.unwrap_or(1.0 / (head_dim as f64).sqrt()))
}

fn check_scale(scale: Option<f64>) -> Result<()> {
    match scale {
        Some(got) if !(got > 0.0 && got.is_finite()) => {
            Err(PrismError::OutOfRange { name: "scale", allowed: "finite and above 0", got })
        }
        _ => Ok(()),
    }
}
