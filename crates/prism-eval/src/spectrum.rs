//! The paper's figure for any model: how strong Q and K are in each RoPE pair, a token and pooled over a
//! block, beside what pooling does to a pair that turns so fast.
//!
//! A pair that turns once or more within a block is *dead*: its mean cancels out. One that turns by at most
//! 1/32 is *semantic*: λ ≥ .998. Between lies the *transition*. For d = 128, θ = 1e6 and blocks of 128 these
//! are the paper's zones: dims below 28, up to 60, and above (§3.2). Dims that aren't rotated are *still*.

use std::f64::consts::TAU;

use burn::tensor::{DType, Tensor};
use burn_prism::AttentionOptions;
use prism_core::bands::attenuation;
use prism_models::{LayerInputs, Llama, ModelError};
use serde::{Deserialize, Serialize};

use crate::error::{EvalError, Result};
use crate::plots::Line;
use crate::progress::Progress;
use crate::store::Store;

/// What pooling does to a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Zone {
    /// Turns once or more within a block.
    Dead,
    /// Between.
    Transition,
    /// Turns by at most 1/32 within a block.
    Semantic,
    /// Isn't rotated.
    Still,
}

impl Zone {
    /// Of a pair that turns `inv_freq` radians a position.
    pub fn of(inv_freq: f64, block: usize) -> Self {
        let turns = block as f64 * inv_freq / TAU;
        if turns >= 1.0 {
            Self::Dead
        } else if turns > 1.0 / 32.0 {
            Self::Transition
        } else {
            Self::Semantic
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dead => "dead",
            Self::Transition => "transition",
            Self::Semantic => "semantic",
            Self::Still => "still",
        }
    }
}

/// Mean squares of each dim of the heads of one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Energy {
    q_token: Vec<f64>,
    q_pooled: Vec<f64>,
    k_token: Vec<f64>,
    k_pooled: Vec<f64>,
}

/// One pair of one layer, or of all.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Pair {
    /// Index of the layer; `None` for the mean energy of all.
    pub layer: Option<usize>,
    /// Index of the pair.
    pub pair: usize,
    /// Turns within a block.
    pub turns: f64,
    /// λ: what mean pooling leaves of a constant.
    pub attenuation: f64,
    /// What that makes it.
    pub zone: Zone,
    /// RMS of the queries, a token.
    pub q_token: f64,
    /// RMS of the queries' block means.
    pub q_pooled: f64,
    /// RMS of the keys, a token.
    pub k_token: f64,
    /// RMS of the keys' block means.
    pub k_pooled: f64,
}

/// One zone of one layer, or of all.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ZoneEnergy {
    /// Index of the layer; `None` for the mean energy of all.
    pub layer: Option<usize>,
    /// The zone.
    pub zone: Zone,
    /// Dims in it.
    pub dims: usize,
    /// RMS of the queries, a token.
    pub q_token: f64,
    /// RMS of the queries' block means.
    pub q_pooled: f64,
    /// The one over the other: energy collapse.
    pub q_ratio: f64,
    /// RMS of the keys, a token.
    pub k_token: f64,
    /// RMS of the keys' block means.
    pub k_pooled: f64,
    /// The one over the other.
    pub k_ratio: f64,
}

/// The spectrum of a model on a text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Spectrum {
    /// All layers together first, then each.
    pub pairs: Vec<Pair>,
    /// The same by zones.
    pub zones: Vec<ZoneEnergy>,
}

/// Measures a model that attends exactly, over the whole blocks of the text.
///
/// # Errors
/// A text shorter than a block, a block of 0, a failing model or store.
pub fn measure(
    llama: &mut Llama,
    ids: &[u32],
    block: usize,
    store: &mut Store,
    progress: &mut dyn Progress,
) -> Result<Spectrum> {
    if block == 0 || ids.len() < block {
        let allowed = format!("1 to the {} tokens of the text", ids.len());
        return Err(EvalError::argument("block", allowed, block));
    }
    let layers = llama.config().layers;
    progress.start("spectrum", layers);
    let energies = store.get_or("energies", || {
        llama.set_attention(None)?;
        let mut cache = llama.cache(ids.len(), block)?;
        let mut energies: Vec<Energy> = Vec::new();
        llama.hidden_with_inputs(ids, &mut cache, &AttentionOptions::default(), &mut |inputs| {
            energies.push(energy(inputs, block)?);
            progress.step();
            Ok::<(), EvalError>(())
        })?;
        Ok(energies)
    })?;
    progress.finish();
    let mut spectrum = Spectrum { pairs: Vec::new(), zones: Vec::new() };
    let whole = mean(&energies);
    let of = std::iter::once((None, &whole));
    for (layer, energy) in of.chain(energies.iter().enumerate().map(|(i, e)| (Some(i), e))) {
        spectrum.add(layer, energy, llama, block);
    }
    Ok(spectrum)
}

fn energy(inputs: LayerInputs, block: usize) -> Result<Energy> {
    let [q_token, q_pooled] = squares(inputs.q, block)?;
    let [k_token, k_pooled] = squares(inputs.k, block)?;
    Ok(Energy { q_token, q_pooled, k_token, k_pooled })
}

/// Mean squares of each dim of `[1, heads, n, head_dim]`: of tokens, and of the means of whole blocks.
fn squares(x: Tensor<4>, block: usize) -> Result<[Vec<f64>; 2]> {
    let [batch, heads, n, dim] = x.dims();
    let blocks = n / block;
    let x = x.slice([0..batch, 0..heads, 0..blocks * block, 0..dim]).cast(DType::F32);
    let x = x.reshape([batch * heads * blocks, block, dim]);
    let pooled = x.clone().mean_dim(1);
    Ok([mean_square(x)?, mean_square(pooled)?])
}

fn mean_square(x: Tensor<3>) -> Result<Vec<f64>> {
    let dim = x.dims()[2];
    let mean = x.square().mean_dim(1).mean_dim(0).reshape([dim]);
    let data = mean.try_into_data().map_err(|e| ModelError::Read { reason: e.to_string() })?;
    let values = data.try_into_vec::<f32>();
    let values = values.map_err(|e| ModelError::Read { reason: format!("{e:?}") })?;
    Ok(values.into_iter().map(f64::from).collect())
}

fn mean(energies: &[Energy]) -> Energy {
    let of = |pick: fn(&Energy) -> &Vec<f64>| -> Vec<f64> {
        let dims = energies.first().map_or(0, |energy| pick(energy).len());
        let sum = |dim| energies.iter().map(|energy| pick(energy)[dim]).sum::<f64>();
        (0..dims).map(|dim| sum(dim) / energies.len() as f64).collect()
    };
    Energy {
        q_token: of(|e| &e.q_token),
        q_pooled: of(|e| &e.q_pooled),
        k_token: of(|e| &e.k_token),
        k_pooled: of(|e| &e.k_pooled),
    }
}

/// Root of the mean of the mean squares of some dims.
fn rms(squares: &[f64], dims: &[usize]) -> f64 {
    (dims.iter().map(|&dim| squares[dim]).sum::<f64>() / dims.len().max(1) as f64).sqrt()
}

impl Spectrum {
    fn add(&mut self, layer: Option<usize>, energy: &Energy, llama: &Llama, block: usize) {
        let (inv_freq, rope) = (llama.inv_freq(), &llama.config().rope);
        let rotary = 2 * inv_freq.len();
        let mut zones: Vec<(Zone, Vec<usize>)> =
            [Zone::Dead, Zone::Transition, Zone::Semantic, Zone::Still]
                .map(|zone| (zone, Vec::new()))
                .into();
        let mut put = |zone, dims: &[usize]| {
            zones.iter_mut().filter(|(of, _)| *of == zone).for_each(|(_, all)| all.extend(dims));
        };
        for (pair, &f) in inv_freq.iter().enumerate() {
            let dims = rope.pair(pair, rotary);
            let zone = Zone::of(f, block);
            put(zone, &dims);
            self.pairs.push(Pair {
                layer,
                pair,
                turns: block as f64 * f / TAU,
                attenuation: attenuation(f, block),
                zone,
                q_token: rms(&energy.q_token, &dims),
                q_pooled: rms(&energy.q_pooled, &dims),
                k_token: rms(&energy.k_token, &dims),
                k_pooled: rms(&energy.k_pooled, &dims),
            });
        }
        put(Zone::Still, &(rotary..energy.q_token.len()).collect::<Vec<_>>());
        for (zone, dims) in zones.into_iter().filter(|(_, dims)| !dims.is_empty()) {
            let [q_token, q_pooled, k_token, k_pooled] =
                [&energy.q_token, &energy.q_pooled, &energy.k_token, &energy.k_pooled]
                    .map(|squares| rms(squares, &dims));
            let ratio = |pooled, token| if token > 0.0 { pooled / token } else { f64::NAN };
            self.zones.push(ZoneEnergy {
                layer,
                zone,
                dims: dims.len(),
                q_token,
                q_pooled,
                q_ratio: ratio(q_pooled, q_token),
                k_token,
                k_pooled,
                k_ratio: ratio(k_pooled, k_token),
            });
        }
    }

    /// The curves of a layer, or of all together, against twice the pair: the paper's dim. λ is a curve too.
    pub fn lines(&self, layer: Option<usize>) -> Vec<Line> {
        let of = |name: &str, pick: fn(&Pair) -> f64| Line {
            name: name.into(),
            points: (self.pairs.iter().filter(|pair| pair.layer == layer))
                .map(|pair| (2.0 * pair.pair as f64, pick(pair)))
                .collect(),
        };
        vec![
            of("Q, a token", |pair| pair.q_token),
            of("Q, pooled", |pair| pair.q_pooled),
            of("K, a token", |pair| pair.k_token),
            of("K, pooled", |pair| pair.k_pooled),
            of("λ, what pooling leaves", |pair| pair.attenuation),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use prism_core::Rope;

    #[test]
    fn are_the_zones_the_papers() {
        let inv_freq = Rope::new(1e6).inv_freq(128).unwrap();
        let zones: Vec<Zone> = inv_freq.iter().map(|&f| Zone::of(f, 128)).collect();
        let first = |zone| 2 * zones.iter().position(|&of| of == zone).unwrap();
        assert_eq!(first(Zone::Transition), 28);
        assert_eq!(first(Zone::Semantic), 62);
    }

    /// A constant turned by RoPE keeps its energy a token, and λ of it in a block mean.
    #[test]
    fn does_a_rotating_constant_shrink_by_lambda() {
        let (block, blocks, f) = (16, 4, 0.3);
        let turn = |i: usize| [(f * i as f64).cos() as f32, (f * i as f64).sin() as f32];
        let values: Vec<f32> = (0..block * blocks + 5).flat_map(turn).collect();
        let n = values.len() / 2;
        let data = burn::tensor::TensorData::new(values, [1, 1, n, 2]);
        let x = Tensor::from_data(data, &Device::flex());
        let [token, pooled] = squares(x, block).unwrap();
        let total = |squares: &[f64]| (squares[0] + squares[1]).sqrt();
        assert!((total(&token) - 1.0).abs() < 1e-6);
        assert!((total(&pooled) - attenuation(f, block)).abs() < 1e-6);
    }
}
