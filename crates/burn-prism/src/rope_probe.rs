//! Whether the rotary embedding in a config is the one in the model.
//!
//! Bands are sets of dims that turn fast or slowly. A config with the wrong layout or frequencies puts
//! dims into the wrong band, and nothing fails: selections only get worse. [`probe_rope`] finds out
//! before the first prompt, by rotating unit vectors with the model's own code.

use std::f64::consts::PI;

use burn::tensor::{DType, Device, Tensor, TensorData};
use prism_core::bands::Bands;
use prism_core::{PrismError, RopeLayout};

use crate::config::PrismConfig;
use crate::rope_mismatch::{RopeMismatch, RopeProbe, WrongBands};

/// A second place to look at; any table has 64 positions.
const FAR: usize = 61;

/// What rounding to bf16 may change in a cosine, a product or an angle.
const ROUNDING: f64 = 0.02;

/// Two frequencies or factors are the same if they differ by less than this part. Rounded to bf16,
/// sine and cosine give 0.4 %.
const SAME: f64 = 0.01;

/// The smallest sine that f16 can hold: less is a pair at rest.
const AT_REST: f64 = 3e-8;

/// Starting positions that a rotation which doesn't start where it should is tried at.
const STARTS: std::ops::Range<i64> = -64..8192;

/// Compares a model's own rotary embedding with the one in `config`.
///
/// `rotate` applies the embedding to `[1, heads, n, head_dim]` in f32, whose rows sit at the positions
/// from its second argument on, and returns the same shape. It is called twice with head_dim + 1 heads
/// and 2 rows, all positions below 64.
///
/// ```
/// use burn::tensor::Device;
/// use burn_nn::RotaryEncodingConfig;
/// use burn_prism::{PrismConfig, Rope, RopeLayout, RopeMismatch, probe_rope};
///
/// let device = Device::flex();
/// let rope = RotaryEncodingConfig::new(4096, 64).init(&device); // your model's
/// let config = PrismConfig::new(Rope::new(10_000.0));
/// let found = probe_rope(&config, 64, &device, |x, first| rope.apply(x, first));
/// // Burn's own embedding turns neighbouring dims.
/// assert!(matches!(found, Err(RopeMismatch::Layout { got: RopeLayout::Interleaved, .. })));
///
/// let rope_of_burn = Rope { layout: RopeLayout::Interleaved, ..Rope::new(10_000.0) };
/// let config = PrismConfig::new(rope_of_burn);
/// println!("{}", probe_rope(&config, 64, &device, |x, first| rope.apply(x, first))?);
/// # Ok::<(), RopeMismatch>(())
/// ```
///
/// # Errors
/// What differs, the config's value and the model's, and how many dims the bands would be wrong
/// about. Frequencies that differ may leave the bands as they are
/// ([`wrong_dims`](RopeMismatch::wrong_dims) is 0), as the scaling of Llama 3.1 does under
/// [`PrismConfig::llama3`].
pub fn probe_rope(
    config: &PrismConfig,
    head_dim: usize,
    device: &Device,
    mut rotate: impl FnMut(Tensor<4>, usize) -> Tensor<4>,
) -> Result<RopeProbe, RopeMismatch> {
    let expected = config.validate(head_dim)?;
    let inv_freq = config.rope.inv_freq(head_dim)?;
    let near = Turned::new(0, head_dim, device, &mut rotate)?;
    let far = Turned::new(FAR, head_dim, device, &mut rotate)?;

    let partners = partners(&[&near, &far])?;
    let rotary_dim = partners.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
    let layout = layout(&partners[..rotary_dim], config.rope.layout)?;
    let pairs: Vec<_> = (0..rotary_dim / 2).map(|j| layout.pair(j, rotary_dim)).collect();
    let factor = stretch(&[&near, &far], &pairs)?;
    let [first, second] = [0, 1].map(|row| near.angles(row, &pairs));
    let turns: Vec<f64> = second.iter().zip(&first).map(|(b, a)| wrap(b - a)).collect();

    let bands = wrong_bands(config, head_dim, &turns, layout);
    if rotary_dim != 2 * inv_freq.len() {
        let expected = 2 * inv_freq.len();
        return Err(RopeMismatch::RotaryDim { expected, got: rotary_dim, bands });
    }
    if layout != config.rope.layout {
        return Err(RopeMismatch::Layout { expected: config.rope.layout, got: layout, bands });
    }
    // Far from 0 small angles drown in rounding, so that a wrong start is looked for first.
    let start = position(&first, &inv_freq, 0);
    let worst = differing(&turns, &inv_freq);
    if let (Some(pair), None | Some(0)) = (worst, start) {
        let (expected, got, theta) = (inv_freq[pair], turns[pair], theta(&turns));
        return Err(RopeMismatch::Frequency { pair, expected, got, theta, bands });
    }
    let wanted = config.rope.attention_factor();
    if !pairs.is_empty() && (factor - wanted).abs() > SAME * wanted {
        return Err(RopeMismatch::AttentionFactor { expected: wanted, got: factor });
    }
    for turned in [&near, &far] {
        for row in [0, 1] {
            let asked = turned.first + row;
            let got = position(&turned.angles(row, &pairs), &inv_freq, asked);
            if !pairs.is_empty() && got != Some(asked as i64) {
                return Err(RopeMismatch::Position { asked, got });
            }
        }
    }
    Ok(RopeProbe { layout, rotary_dim, inv_freq: turns, attention_factor: factor, bands: expected })
}

/// Unit vectors, one a head, rotated at positions `first` and `first + 1`.
struct Turned {
    first: usize,
    head_dim: usize,
    /// `[head_dim, 2, head_dim]`.
    values: Vec<f64>,
}

impl Turned {
    fn new(
        first: usize,
        head_dim: usize,
        device: &Device,
        rotate: &mut impl FnMut(Tensor<4>, usize) -> Tensor<4>,
    ) -> Result<Self, RopeMismatch> {
        let shape = [1, head_dim + 1, 2, head_dim];
        // The last head mixes the unit vectors: a rotation mixes their images likewise.
        let weight = |c: usize| 1.0 + c as f64 / head_dim as f64;
        let entry = |head: usize, c: usize| match head == head_dim {
            true => weight(c) as f32,
            false => f32::from(u8::from(head == c)),
        };
        let row = |head| (0..head_dim).map(move |c| entry(head, c));
        let x = (0..=head_dim).flat_map(|head| row(head).chain(row(head))).collect();
        let y = rotate(Tensor::from_data(TensorData::new(x, shape), (device, DType::F32)), first);
        if y.dims() != shape {
            let got = y.dims().to_vec();
            let what = "the rotated tensor";
            return Err(PrismError::Shape { what, expected: shape.to_vec(), got }.into());
        }
        let failed = |reason: String| PrismError::Read { reason };
        let data = y.try_into_data_dtype(DType::F32).map_err(|error| failed(error.to_string()))?;
        let values = data.try_into_vec::<f32>().map_err(|error| failed(format!("{error:?}")))?;
        let values: Vec<f64> = values.into_iter().map(f64::from).collect();
        let turned = Self { first, head_dim, values };
        for row in [0, 1] {
            for k in 0..head_dim {
                let sum: f64 = (0..head_dim).map(|i| weight(i) * turned.at(i, row, k)).sum();
                let got = turned.at(head_dim, row, k);
                let off = (sum - got).abs() / sum.abs().max(1.0);
                if off.is_nan() || off > 2.0 * ROUNDING {
                    return not_a_rotation(format!(
                        "it isn't linear: dim {k} of a sum of vectors is {got}, of their images \
                         {sum}; leave norms and biases out"
                    ));
                }
            }
        }
        Ok(turned)
    }

    /// Component `k` of what unit vector `i` became.
    fn at(&self, i: usize, row: usize, k: usize) -> f64 {
        self.values[(i * 2 + row) * self.head_dim + k]
    }

    /// Angle of each pair.
    fn angles(&self, row: usize, pairs: &[[usize; 2]]) -> Vec<f64> {
        let angle = |&[a, b]: &[usize; 2]| {
            let sin = self.at(a, row, b) - self.at(b, row, a);
            sin.atan2(self.at(a, row, a) + self.at(b, row, b))
        };
        pairs.iter().map(angle).collect()
    }
}

fn not_a_rotation<T>(reason: String) -> Result<T, RopeMismatch> {
    Err(RopeMismatch::NotARotation { reason })
}

/// The dim that each dim turns with.
fn partners(turned: &[&Turned]) -> Result<Vec<Option<usize>>, RopeMismatch> {
    let head_dim = turned.first().map_or(0, |turned| turned.head_dim);
    let rows = || turned.iter().flat_map(|turned| [(turned, 0), (turned, 1)]);
    let meets = |i, k| rows().any(|(t, row)| t.at(i, row, k).abs() > AT_REST);
    let mut partners = vec![None; head_dim];
    for (i, partner) in partners.iter_mut().enumerate() {
        for k in (0..head_dim).filter(|&k| k != i && (meets(i, k) || meets(k, i))) {
            if let Some(other) = partner.replace(k) {
                return not_a_rotation(format!("dim {i} mixes with dims {other} and {k}"));
            }
        }
        for (turned, row) in rows() {
            let kept = turned.at(i, row, i);
            if partner.is_none() && (kept - 1.0).abs() > ROUNDING {
                return not_a_rotation(format!(
                    "dim {i} turns with no other, but is scaled by {kept}"
                ));
            }
        }
    }
    Ok(partners)
}

/// The layout of dims that turn; `usual` where both are the same.
fn layout(partners: &[Option<usize>], usual: RopeLayout) -> Result<RopeLayout, RopeMismatch> {
    let n = partners.len();
    if let Some(still) = partners.iter().position(Option::is_none) {
        let reason = format!("dim {still} rests, dim {} turns; leading dims turn", n - 1);
        return Err(RopeMismatch::Pairs { reason });
    }
    let first_other = |layout: RopeLayout| {
        let other =
            |j: &usize| partners.get(layout.pair(*j, n)[0]) != Some(&Some(layout.pair(*j, n)[1]));
        (0..n / 2).find(other)
    };
    for layout in [usual, RopeLayout::RotateHalf, RopeLayout::Interleaved] {
        if n.is_multiple_of(2) && first_other(layout).is_none() {
            return Ok(layout);
        }
    }
    let with = |i: usize| partners[i].map_or("none".into(), |k| k.to_string());
    let reason = format!("of {n} dims 0 turns with {}, 1 with {}", with(0), with(1));
    Err(RopeMismatch::Pairs { reason })
}

/// The factor on cosines and sines, of pairs that do turn.
fn stretch(turned: &[&Turned], pairs: &[[usize; 2]]) -> Result<f64, RopeMismatch> {
    let mut factor = None;
    for turned in turned {
        for row in [0, 1] {
            for &[a, b] in pairs {
                let at = |i, k| turned.at(i, row, k);
                let size = at(a, a).hypot(at(a, b));
                let common = *factor.get_or_insert(size);
                let off = [size - common, at(a, a) - at(b, b), at(a, b) + at(b, a)];
                // In this form so that NaN and a factor of 0 are refused.
                if !(common > 0.0 && off.iter().all(|x| x.abs() <= ROUNDING * common)) {
                    return not_a_rotation(format!(
                        "dims {a} and {b} become [{:.4}, {:.4}] and [{:.4}, {:.4}] at position {}, \
                         not a turn by {common:.4}",
                        at(a, a),
                        at(a, b),
                        at(b, a),
                        at(b, b),
                        turned.first + row
                    ));
                }
            }
        }
    }
    Ok(factor.unwrap_or(1.0))
}

/// The pair whose frequency differs most, if one does.
fn differing(got: &[f64], expected: &[f64]) -> Option<usize> {
    let ratio = |j: usize| (got[j] - expected[j]).abs() / expected[j];
    (0..got.len())
        .filter(|&j| (got[j] - expected[j]).abs() > SAME * expected[j] + AT_REST)
        .max_by(|&a, &b| ratio(a).total_cmp(&ratio(b)))
}

/// The position where pairs of frequencies `inv_freq` have these angles: the one asked for if it may be,
/// none if nothing turns.
fn position(angles: &[f64], inv_freq: &[f64], asked: usize) -> Option<i64> {
    let off = |p: i64| {
        let off = |(angle, f): (&f64, &f64)| wrap(angle - p as f64 * f).abs();
        angles.iter().zip(inv_freq).map(off).fold(0.0, f64::max)
    };
    let asked = (asked as i64, off(asked as i64));
    let others = || STARTS.map(|p| (p, off(p))).min_by(|a, b| a.1.total_cmp(&b.1));
    let nearest = if asked.1 < ROUNDING { Some(asked) } else { others() };
    nearest.filter(|&(_, off)| off < ROUNDING && !angles.is_empty()).map(|(p, _)| p)
}

/// The θ whose unscaled frequencies these are.
fn theta(inv_freq: &[f64]) -> Option<f64> {
    let pairs = inv_freq.len() as f64;
    let slowest = *inv_freq.last().filter(|&&f| f > 0.0 && inv_freq.len() > 1)?;
    let theta = slowest.powf(-pairs / (pairs - 1.0));
    let unscaled = |j: usize| theta.powf(-(j as f64) / pairs);
    let fits = (0..inv_freq.len()).all(|j| (inv_freq[j] / unscaled(j) - 1.0).abs() < SAME);
    fits.then_some(theta)
}

/// Dims that are in other bands than the measured rotation puts them, of the heads that it is worst for;
/// none where scores have no bands.
fn wrong_bands(
    config: &PrismConfig,
    head_dim: usize,
    inv_freq: &[f64],
    layout: RopeLayout,
) -> WrongBands {
    let belongs = |bands: &Bands, c| (bands.high().contains(&c), bands.low().contains(&c));
    let wrong = |(rule, block)| {
        let expected = Bands::new(rule, Some(&config.rope), head_dim, block);
        let right = Bands::of_pairs(rule, inv_freq, layout, head_dim, block);
        match (expected, right) {
            (Ok(expected), Ok(right)) => {
                (0..head_dim).filter(|&c| belongs(&expected, c) != belongs(&right, c)).count()
            }
            // Widths that the model's rotation doesn't have.
            _ => head_dim,
        }
    };
    let dims = config.band_rules().into_iter().map(wrong).max().unwrap_or(0);
    WrongBands { dims, head_dim }
}

/// An angle in [−π, π).
fn wrap(angle: f64) -> f64 {
    (angle + PI).rem_euclid(2.0 * PI) - PI
}
