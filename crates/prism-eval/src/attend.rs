//! Ways to attend that are compared, by name: `dense`, `prism:mass=0.9`, `second_order:mass=0.9,key_sub=32`,
//! `policy:FILE`.

use std::path::Path;

use burn_prism::{PrismConfig, SelectorConfig};
use prism_models::{AttentionPolicy, Llama, ModelConfig};

use crate::error::{EvalError, Result};

/// Positions a block where nothing else is said.
pub const BLOCK: usize = 128;

/// One way to attend. The name says it all: it is the key of results.
#[derive(Debug, Clone, PartialEq)]
pub struct Attend {
    name: String,
    /// The name without what the selector is swept by.
    family: String,
    /// Exact attention while `None`.
    policy: Option<AttentionPolicy>,
}

impl Attend {
    /// Exact attention.
    pub fn dense() -> Self {
        Self { name: "dense".into(), family: "dense".into(), policy: None }
    }

    /// A policy under a name. Prompts of every length attend as it says unless it sets `dense_below`: what
    /// is measured is the selection, not when it pays.
    pub fn policy(name: impl Into<String>, mut policy: AttentionPolicy) -> Self {
        policy.base.dense_below.get_or_insert(0);
        let name = name.into();
        Self { family: name.clone(), name, policy: Some(policy) }
    }

    /// Reads `dense`, `SELECTOR`, `SELECTOR:KEY=VALUE,KEY=VALUE` or `policy:FILE`. Keys are the selector's
    /// options, and `block`, `sink_blocks`, `recent_blocks`, `dense_last_blocks`, `min_blocks`, `max_blocks`
    /// and `dense_below` of its layers.
    ///
    /// # Errors
    /// An unknown selector or key, a value that doesn't parse, a file that is no policy. Whether the
    /// settings fit the model is found by [`check`](Self::check).
    pub fn parse(spec: &str) -> Result<Self> {
        let refuse = |reason: String| EvalError::Attend { spec: spec.into(), reason };
        let (selector, settings) = spec.split_once(':').unwrap_or((spec, ""));
        if selector == "policy" {
            return Ok(Self::policy(spec, AttentionPolicy::open(Path::new(settings))?));
        }
        let mut pairs: Vec<(&str, String)> = Vec::new();
        for given in settings.split(',').filter(|given| !given.is_empty()) {
            match (given.split_once('='), pairs.last_mut()) {
                (Some((key, value)), _) => pairs.push((key, value.into())),
                // The next of a list.
                (None, Some((_, list))) => *list = format!("{list},{given}"),
                (None, None) => {
                    return Err(refuse(format!("settings are KEY=VALUE, got {given:?}")));
                }
            }
        }
        for (i, (key, _)) in pairs.iter().enumerate() {
            if pairs[..i].iter().any(|(other, _)| other == key) {
                return Err(refuse(format!("{key} is given twice")));
            }
        }
        if selector == "dense" {
            return match pairs.first() {
                None => Ok(Self::dense()),
                Some((key, _)) => Err(refuse(format!("dense has no setting {key:?}"))),
            };
        }
        let policy = policy(selector, &pairs).map_err(refuse)?;
        Ok(Self { family: family(selector, settings), ..Self::policy(spec, policy) })
    }

    /// Reads several; one that could say a mass but doesn't becomes one of each of `masses`, if there are any.
    ///
    /// # Errors
    /// As [`parse`](Self::parse), and a way that is given twice.
    pub fn parse_all(specs: &[String], masses: &[f64]) -> Result<Vec<Self>> {
        let mut ways: Vec<Self> = Vec::new();
        for spec in specs {
            let selector = spec.split(':').next().unwrap_or(spec);
            let swept =
                !masses.is_empty() && !spec.contains("mass=") && dial(selector) == Some("mass");
            let specs: Vec<String> = match swept {
                true => masses.iter().map(|&mass| with_mass(spec, mass)).collect(),
                false => vec![spec.clone()],
            };
            for spec in specs {
                let attend = Self::parse(&spec)?;
                if ways.contains(&attend) {
                    return Err(EvalError::Attend { spec, reason: "given twice".into() });
                }
                ways.push(attend);
            }
        }
        Ok(ways)
    }

    /// The name, as it was given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name without what the selector is swept by, its mass or threshold: what a curve is called.
    pub fn family(&self) -> &str {
        &self.family
    }

    /// Whether it attends exactly.
    pub fn is_dense(&self) -> bool {
        self.policy.is_none()
    }

    /// Positions a block of the caches it needs.
    pub fn block(&self) -> usize {
        self.policy.as_ref().and_then(|policy| policy.block).unwrap_or(BLOCK)
    }

    /// The settings of every layer of a model, `None` for layers that attend exactly.
    ///
    /// # Errors
    /// Settings that don't fit the model.
    pub fn layers(&self, model: &ModelConfig) -> Result<Vec<Option<PrismConfig>>> {
        match &self.policy {
            None => Ok(vec![None; model.layers]),
            Some(policy) => Ok(policy.resolve(model)?),
        }
    }

    /// Refuses settings that don't fit a model.
    ///
    /// # Errors
    /// As [`layers`](Self::layers).
    pub fn check(&self, model: &ModelConfig) -> Result<()> {
        self.layers(model).map(drop)
    }

    /// Lets a model attend so.
    ///
    /// # Errors
    /// Settings that don't fit the model.
    pub fn set(&self, llama: &mut Llama) -> Result<()> {
        match &self.policy {
            None => llama.set_attention(None)?,
            Some(policy) => llama.set_policy(policy)?,
        }
        Ok(())
    }
}

fn with_mass(spec: &str, mass: f64) -> String {
    let separator = if spec.contains(':') { ',' } else { ':' };
    format!("{spec}{separator}mass={mass}")
}

/// A name without the selector's dial.
fn family(selector: &str, settings: &str) -> String {
    let dial = dial(selector).map(|dial| format!("{dial}="));
    let swept = |set: &&str| dial.as_ref().is_some_and(|dial| set.starts_with(dial));
    let kept: Vec<&str> =
        settings.split(',').filter(|set| !swept(set) && !set.is_empty()).collect();
    if kept.is_empty() { selector.into() } else { format!("{selector}:{}", kept.join(",")) }
}

/// What the settings of a selector say: those of the layer here, its own in the selector.
fn policy(
    selector: &str,
    pairs: &[(&str, String)],
) -> std::result::Result<AttentionPolicy, String> {
    let mut policy = AttentionPolicy::default();
    let mut own = Vec::new();
    for (key, value) in pairs {
        let base = &mut policy.base;
        match *key {
            "block" => policy.block = Some(number(key, value)?),
            "sink_blocks" => base.sink_blocks = Some(number(key, value)?),
            "recent_blocks" => base.recent_blocks = Some(number(key, value)?),
            "dense_last_blocks" => base.dense_last_blocks = Some(number(key, value)?),
            "min_blocks" => base.min_blocks = Some(number(key, value)?),
            "max_blocks" => base.max_blocks = Some(number(key, value)?),
            "dense_below" => base.dense_below = Some(number(key, value)?),
            _ => own.push((*key, value)),
        }
    }
    let selector = SelectorConfig::from_settings(selector, &own);
    policy.base.selector = Some(selector.map_err(|error| error.to_string())?);
    Ok(policy)
}

/// The option that a selector's fidelity is swept by, if it has one.
fn dial(selector: &str) -> Option<&'static str> {
    SelectorConfig::all().into_iter().find(|of| of.name() == selector)?.dial()
}

fn number<T: std::str::FromStr>(key: &str, value: &str) -> std::result::Result<T, String> {
    value.parse().map_err(|_| format!("{key} must be a number, got {value:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn do_names_become_settings() {
        let spec = "prism:mass=0.8,high_dims=16,low_dims=48,calibration=off,sink_blocks=2";
        let attend = Attend::parse(spec).unwrap();
        let base = &attend.policy.as_ref().unwrap().base;
        let own =
            [("mass", "0.8"), ("high_dims", "16"), ("low_dims", "48"), ("calibration", "off")];
        assert_eq!(base.selector, Some(SelectorConfig::from_settings("prism", &own).unwrap()));
        assert_eq!((base.sink_blocks, base.dense_below), (Some(2), Some(0)));
        assert_eq!(attend.family(), "prism:high_dims=16,low_dims=48,calibration=off,sink_blocks=2");
        let attend = Attend::parse("second_order:block=64").unwrap();
        assert_eq!((attend.block(), attend.name()), (64, "second_order:block=64"));
        assert!(Attend::parse("dense").unwrap().is_dense());
        // A list has commas too.
        let attend = Attend::parse("dilated:segments=2048,4096,strides=1,2,block=64").unwrap();
        let own = [("segments", "2048,4096"), ("strides", "1,2")];
        let dilated = SelectorConfig::from_settings("dilated", &own).unwrap();
        assert_eq!(attend.policy.as_ref().unwrap().base.selector, Some(dilated));
        assert_eq!(Attend::parse("xattention:threshold=0.8").unwrap().family(), "xattention");
    }

    #[test]
    fn are_masses_swept_where_none_is_said() {
        let specs = ["dense", "prism", "second_order:key_sub=32", "prism:mass=0.5"];
        let ways = Attend::parse_all(&specs.map(String::from), &[0.8, 0.95]).unwrap();
        let names: Vec<_> = ways.iter().map(Attend::name).collect();
        let sub = ["second_order:key_sub=32,mass=0.8", "second_order:key_sub=32,mass=0.95"];
        assert_eq!(names[..3], ["dense", "prism:mass=0.8", "prism:mass=0.95"]);
        assert_eq!((&names[3..5], names[5]), (&sub[..], "prism:mass=0.5"));
        let families: Vec<_> = ways.iter().map(Attend::family).collect();
        let sub = "second_order:key_sub=32";
        assert_eq!(families, ["dense", "prism", "prism", sub, sub, "prism"]);
        assert!(Attend::parse_all(&["prism".into(), "prism".into()], &[]).is_err());
    }

    #[test]
    fn is_everything_else_refused_by_name() {
        for (spec, says) in [
            ("prisma", "there is no prisma: there are prism, second_order"),
            ("dense:mass=1", "dense has no setting \"mass\""),
            ("prism:key_sub=16", "prism has no option key_sub"),
            ("second_order:calibration=off", "second_order has no option calibration"),
            ("prism:block=many", "block must be a number, got \"many\""),
            ("prism:mass=much", "mass=much"),
            ("prism:mass=0.9,mass=0.8", "mass is given twice"),
            ("prism:mass", "settings are KEY=VALUE"),
            ("policy:/no/such/file", "/no/such/file"),
        ] {
            let error = Attend::parse(spec).unwrap_err().to_string();
            assert!(error.contains(says), "{spec}: {error}");
        }
    }
}
