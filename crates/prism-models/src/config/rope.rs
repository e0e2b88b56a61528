//! The rotary embedding of a `config.json`.

use prism_core::{Rope, RopeScaling};
use serde_json::{Map, Value};

use super::fields::Fields;
use super::{MAX_POSITIONS, out_of_range, positive, stretch_factor, unsupported, within};
use crate::error::ConfigError;

const ORIGINAL_POSITIONS: &str = "original_max_position_embeddings";
/// What any type of scaling may have beside its own settings.
const COMMON: [&str; 4] = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];

/// Reads both styles: `rope_parameters` with everything in it, or `rope_theta` beside an optional
/// `rope_scaling`.
pub(super) fn rope(fields: Fields<'_>, max_positions: usize) -> Result<Rope, ConfigError> {
    let empty = Map::new();
    let new = fields.find_object("rope_parameters")?;
    let old = fields.find_object("rope_scaling")?;
    if let (Some(new), Some(old)) = (new, old)
        && new != old
    {
        let got = Value::Object(old.clone());
        return Err(unsupported("rope_scaling", got, "the same as rope_parameters"));
    }
    let parameters = Fields(new.or(old).unwrap_or(&empty));
    let theta = match (parameters.find_f64("rope_theta")?, fields.find_f64("rope_theta")?) {
        (Some(inner), Some(outer)) if inner != outer => {
            let allowed = format!("the rope_theta of the scaling, {inner}");
            return Err(out_of_range("rope_theta", allowed, outer));
        }
        (Some(theta), _) | (None, Some(theta)) => theta,
        (None, None) => 10_000.0,
    };
    for fields in [fields, parameters] {
        if let Some(part) = fields.find_f64("partial_rotary_factor")?
            && part != 1.0
        {
            return Err(unsupported("partial_rotary_factor", part, "1"));
        }
    }
    let scaling = scaling(parameters, max_positions)?;
    Ok(Rope { scaling, ..Rope::new(theta) })
}

fn scaling(fields: Fields<'_>, max_positions: usize) -> Result<RopeScaling, ConfigError> {
    let kind = match (fields.find_str("rope_type")?, fields.find_str("type")?) {
        (Some(new), Some(old)) if new != old => {
            return Err(unsupported("type", old, "the same as rope_type"));
        }
        (Some(kind), _) | (None, Some(kind)) => kind,
        (None, None) => "default",
    };
    let own: &[&str] = match kind {
        "default" => &[],
        "linear" => &["factor"],
        "dynamic" => &["factor", ORIGINAL_POSITIONS],
        "llama3" => &["factor", "low_freq_factor", "high_freq_factor", ORIGINAL_POSITIONS],
        "yarn" => &YARN,
        other => return Err(ConfigError::UnsupportedRope { got: other.into() }),
    };
    // A setting that this type doesn't have would be without effect.
    let known = |name: &str| COMMON.contains(&name) || own.contains(&name);
    if let Some(field) = fields.0.keys().find(|name| !known(name) && fields.find(name).is_some()) {
        return Err(ConfigError::RopeSetting { field: field.clone(), rope_type: kind.into() });
    }
    let factor = || stretch_factor("factor", fields.f64("factor")?);
    match kind {
        "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
        "dynamic" => {
            // Hugging Face measures the growth against the context of the model.
            match original_positions(fields)? {
                Some(got) if got != max_positions => {
                    let allowed = format!("max_position_embeddings, {max_positions}");
                    Err(out_of_range(ORIGINAL_POSITIONS, allowed, got))
                }
                _ => Ok(RopeScaling::Dynamic {
                    factor: factor()?,
                    original_max_positions: max_positions,
                    length: max_positions,
                }),
            }
        }
        "llama3" => {
            let low = positive("low_freq_factor", fields.f64("low_freq_factor")?)?;
            let high = positive("high_freq_factor", fields.f64("high_freq_factor")?)?;
            if high <= low {
                let allowed = format!("above low_freq_factor = {low}");
                return Err(out_of_range("high_freq_factor", allowed, high));
            }
            Ok(RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_positions: original_positions(fields)?
                    .ok_or(ConfigError::Missing { field: ORIGINAL_POSITIONS })?,
            })
        }
        "yarn" => yarn(fields, factor()?, max_positions),
        _ => Ok(RopeScaling::None),
    }
}

const YARN: [&str; 8] = [
    "factor",
    ORIGINAL_POSITIONS,
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
];

fn yarn(fields: Fields<'_>, factor: f64, max_positions: usize) -> Result<RopeScaling, ConfigError> {
    if fields.find_bool("truncate")? == Some(false) {
        return Err(unsupported("truncate", false, "true"));
    }
    let number = |field: &'static str, default| match fields.find_f64(field)? {
        Some(got) => positive(field, got),
        None => Ok(default),
    };
    let (beta_fast, beta_slow) = (number("beta_fast", 32.0)?, number("beta_slow", 1.0)?);
    if beta_fast <= beta_slow {
        return Err(out_of_range("beta_fast", format!("above beta_slow = {beta_slow}"), beta_fast));
    }
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast,
        beta_slow,
        original_max_positions: original_positions(fields)?.unwrap_or(max_positions),
        attention_factor: attention_factor(fields, factor)?,
    })
}

/// The factor on cosines and sines where the file says one: outright, or as a pair of temperatures,
/// one for the rotation and one to take back in the scores.
fn attention_factor(fields: Fields<'_>, factor: f64) -> Result<Option<f64>, ConfigError> {
    let given = fields.find_f64("attention_factor")?;
    let pair = (fields.find_f64("mscale")?, fields.find_f64("mscale_all_dim")?);
    match (given, pair) {
        (Some(got), (None, None)) => positive("attention_factor", got).map(Some),
        (None, (None, None)) => Ok(None),
        (None, (Some(own), Some(all))) if own != 0.0 && all != 0.0 => {
            let temperature = |scale: f64| 0.1 * scale * factor.ln() + 1.0;
            positive("mscale", temperature(own) / temperature(all)).map(Some)
        }
        // Zeros count as absent.
        (None, (Some(own), Some(all))) if own == all => Ok(None),
        (_, (Some(got), _)) => {
            Err(unsupported("mscale", got, "with mscale_all_dim and without attention_factor"))
        }
        (_, (None, Some(got))) => {
            Err(unsupported("mscale_all_dim", got, "with mscale and without attention_factor"))
        }
    }
}

fn original_positions(fields: Fields<'_>) -> Result<Option<usize>, ConfigError> {
    let positions = fields.find_usize(ORIGINAL_POSITIONS)?;
    if let Some(positions) = positions {
        within(ORIGINAL_POSITIONS, positions, 1..=MAX_POSITIONS)?;
    }
    Ok(positions)
}
