//! Settings of single query heads.
//!
//! A selection is made head by head, from the head's own queries and its kv head's keys. Heads that
//! share settings are selected together; the rest of a call doesn't know of them.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use prism_core::bands::BandRule;
use prism_core::error::{PrismError, Result};
use prism_core::{Budget, SelectionRule};
use serde::{Deserialize, Serialize};

/// Selection settings of some query heads; what isn't given stays as the config has it. Scoring and
/// calibration are the layer's: heads have none of their own.
///
/// ```
/// use burn_prism::{HeadOverride, PrismConfig};
///
/// // Head 3 reads every causal block, heads 4 and 5 more than the rest; head 6 has one band.
/// let config = PrismConfig::llama3()
///     .with_heads(HeadOverride::new([3]).with_mass(1.0))
///     .with_heads(HeadOverride::new([4, 5]).with_mass(0.98))
///     .with_heads(HeadOverride::new([6]).with_bands(0, 128));
/// config.validate_for(32, 128)?;
/// let error = config.validate_for(6, 128).unwrap_err().to_string();
/// assert_eq!(error, "head overrides: there is no query head 6: there are 6");
/// # Ok::<(), burn_prism::PrismError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadOverride {
    /// Query heads, counted from 0.
    pub heads: Vec<usize>,
    /// Mass that each row keeps, in (0, 1]; 1 reads every causal block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mass: Option<f64>,
    /// How dims are shared out between the bands; not where scoring has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bands: Option<BandRule>,
    /// As [`SelectionRule::min_blocks`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_blocks: Option<usize>,
    /// As [`SelectionRule::max_blocks`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_blocks: Option<usize>,
}

impl HeadOverride {
    /// An override of these query heads that sets nothing yet.
    pub fn new(heads: impl Into<Vec<usize>>) -> Self {
        Self { heads: heads.into(), ..Self::default() }
    }

    /// Sets the mass that each row keeps.
    pub fn with_mass(mut self, mass: f64) -> Self {
        self.mass = Some(mass);
        self
    }

    /// Sets explicit band widths, as the paper counts them.
    pub fn with_bands(mut self, high: usize, low: usize) -> Self {
        self.bands = Some(BandRule::Dims { high, low });
        self
    }

    /// Sets up to how many blocks a row is filled.
    pub fn with_min_blocks(mut self, blocks: usize) -> Self {
        self.min_blocks = Some(blocks);
        self
    }

    /// Sets to how many blocks a row is cut.
    pub fn with_max_blocks(mut self, blocks: usize) -> Self {
        self.max_blocks = Some(blocks);
        self
    }

    /// The rule of its heads in a layer of the given rule.
    fn rule(&self, layer: SelectionRule) -> SelectionRule {
        SelectionRule {
            budget: self.mass.map_or(layer.budget, Budget::Mass),
            min_blocks: self.min_blocks.unwrap_or(layer.min_blocks),
            max_blocks: self.max_blocks.or(layer.max_blocks),
            ..layer
        }
    }
}

/// Checks overrides of a layer with `q_heads` query heads.
pub(crate) fn check(
    overrides: &[HeadOverride],
    layer: SelectionRule,
    q_heads: usize,
) -> Result<()> {
    let refuse = |reason| Err(PrismError::HeadOverrides { reason });
    for (i, one) in overrides.iter().enumerate() {
        if one.heads.is_empty() {
            return refuse(format!("override {i} must name at least 1 head, got 0"));
        }
        if HeadOverride::new(one.heads.clone()) == *one {
            return refuse(format!("override {i}, of heads {:?}, sets nothing", one.heads));
        }
        for (at, &head) in one.heads.iter().enumerate() {
            if head >= q_heads {
                return refuse(format!("there is no query head {head}: there are {q_heads}"));
            }
            let earlier = overrides[..i].iter().flat_map(|one| &one.heads);
            if earlier.chain(&one.heads[..at]).any(|&other| other == head) {
                return refuse(format!("query head {head} must be named at most once, got twice"));
            }
        }
        one.rule(layer).validate()?;
    }
    Ok(())
}

/// Query heads, increasing, that select alike.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct HeadGroup {
    pub heads: Vec<usize>,
    pub rule: SelectionRule,
    pub bands: BandRule,
}

/// All query heads by their settings; a single group where every head has the layer's, or the same.
pub(crate) fn groups(
    overrides: &[HeadOverride],
    (rule, bands): (SelectionRule, BandRule),
    q_heads: usize,
) -> Vec<HeadGroup> {
    let mut settings = vec![(rule, bands); q_heads];
    for one in overrides {
        let own = (one.rule(rule), one.bands.unwrap_or(bands));
        one.heads.iter().for_each(|&head| settings[head] = own);
    }
    let mut groups: Vec<HeadGroup> = Vec::new();
    for (head, (rule, bands)) in settings.into_iter().enumerate() {
        match groups.iter_mut().find(|group| (group.rule, group.bands) == (rule, bands)) {
            Some(group) => group.heads.push(head),
            None => groups.push(HeadGroup { heads: vec![head], rule, bands }),
        }
    }
    groups
}

/// Heads as indices on a device.
pub(crate) fn indices(heads: impl IntoIterator<Item = usize>, device: &Device) -> Tensor<1, Int> {
    let heads: Vec<i32> = heads.into_iter().map(|head| head as i32).collect();
    let shape = [heads.len()];
    Tensor::from_data(TensorData::new(heads, shape), (device, DType::I32))
}

/// Where each head went: the inverse of the order that the groups leave heads in.
pub(crate) fn places(groups: &[HeadGroup]) -> Vec<usize> {
    let order: Vec<usize> = groups.iter().flat_map(|group| group.heads.iter().copied()).collect();
    let mut places = vec![0; order.len()];
    for (place, head) in order.into_iter().enumerate() {
        places[head] = place;
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_of_equal_settings_form_one_group() {
        let (rule, bands) = (SelectionRule::default(), BandRule::default());
        let layer = (rule, bands);
        assert_eq!(groups(&[], layer, 3).len(), 1);
        // The first says what the layer says.
        let overrides = [
            HeadOverride::new([0]).with_mass(0.95),
            HeadOverride::new([4, 1]).with_mass(0.5),
            HeadOverride::new([2]).with_mass(0.5),
            HeadOverride::new([5]).with_mass(0.5).with_bands(8, 8),
        ];
        let split = groups(&overrides, layer, 6);
        let heads: Vec<_> = split.iter().map(|group| group.heads.clone()).collect();
        assert_eq!(heads, [vec![0, 3], vec![1, 2, 4], vec![5]]);
        assert_eq!(places(&split), [0, 2, 3, 1, 4, 5]);
        assert_eq!(split[1].rule, SelectionRule { budget: Budget::Mass(0.5), ..rule });
        assert_eq!(split[2].bands, BandRule::Dims { high: 8, low: 8 });
        let every = [HeadOverride::new([0, 1, 2]).with_mass(0.5)];
        assert_eq!(groups(&every, layer, 3).len(), 1);
    }
}
