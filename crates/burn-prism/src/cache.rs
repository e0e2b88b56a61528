//! A preallocated cache of keys and values, with what the keys leave behind block by block.
//!
//! Pooled keys are append-only but for the last block, so later chunks of a prompt select from
//! means (and for second-order scoring variances) that earlier chunks paid for. For causal
//! calibration the cache also keeps the energy of the query blocks seen so far.

use burn::tensor::{DType, Device, Tensor, TensorData};
use prism_core::error::{PrismError, Result};
use prism_core::{AttentionShape, BlockGrid, Scoring};

use crate::attention::AttentionOptions;
use crate::check;
use crate::config::PrismConfig;
use crate::heads::HeadGroup;
use crate::ops::Side;
use crate::pooled::PooledBlocks;
use crate::select::{self, PooledKeys};

/// Keys, values and pooled keys of one layer, `[batch, kv_heads, capacity, head_dim]`.
#[derive(Debug, Clone)]
pub struct PrismCache {
    k: Tensor<4>,
    v: Tensor<4>,
    /// Means of the blocks.
    means: PooledBlocks<1>,
    /// Means and variances of the sub-blocks of second-order scoring, once that has been asked for.
    moments: Option<PooledBlocks<2>>,
    /// Energy of earlier query blocks, `[batch, q_heads, 4]`: high, low, all, blocks.
    history: Tensor<3>,
    len: usize,
}

impl PrismCache {
    /// An empty cache for `capacity` positions; `shape` gives batch, heads and head_dim (its
    /// lengths don't matter).
    ///
    /// # Errors
    /// A block size or capacity of 0, or an element type that attention or the device lacks.
    pub fn new(
        shape: &AttentionShape,
        capacity: usize,
        block: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        check::element("cache", dtype)?;
        check::supported(dtype, device)?;
        BlockGrid::new(block, capacity, capacity)?;
        if capacity == 0 {
            return Err(PrismError::ZeroDim { name: "cache capacity" });
        }
        let AttentionShape { batch, q_heads, kv_heads, head_dim, .. } = *shape;
        let dims = [batch, kv_heads, capacity, head_dim];
        Ok(Self {
            k: Tensor::zeros(dims, (device, dtype)),
            v: Tensor::zeros(dims, (device, dtype)),
            means: PooledBlocks::new(dims, block, device),
            moments: None,
            history: Tensor::zeros([batch, q_heads, 4], (device, DType::F32)),
            len: 0,
        })
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions a block of the pooled keys.
    pub fn block(&self) -> usize {
        self.means.block()
    }

    /// Positions it can hold.
    pub fn capacity(&self) -> usize {
        self.k.dims()[2]
    }

    /// Forgets everything, pooled keys and calibration included; keeps the memory.
    pub fn reset(&mut self) {
        self.keep(0);
    }

    /// Keeps the first `len` positions, to answer another question on the same text. Calibration
    /// starts anew.
    ///
    /// # Errors
    /// More positions than are held.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        if len > self.len {
            let reason = format!("can't keep {len} positions of {}", self.len);
            return Err(PrismError::Cache { reason });
        }
        self.keep(len);
        Ok(())
    }

    fn keep(&mut self, len: usize) {
        self.len = len;
        self.means.truncate(len);
        self.moments.iter_mut().for_each(|moments| moments.truncate(len));
        self.history = self.history.zeros_like();
    }

    /// Appends K and V `[batch, kv_heads, n, head_dim]`.
    ///
    /// # Errors
    /// Shapes, element type or device other than the cache's, or more positions than are free;
    /// the cache is unchanged then.
    pub fn append(&mut self, k: Tensor<4>, v: Tensor<4>) -> Result<()> {
        let [batch, kv_heads, capacity, head_dim] = self.k.dims();
        let n = k.dims()[2];
        for (left, tensor) in [("k", &k), ("v", &v)] {
            let dims = tensor.dims();
            let limits = [
                ("batch", dims[0], batch),
                ("heads", dims[1], kv_heads),
                ("head_dim", dims[3], head_dim),
            ];
            for (name, left_len, right_len) in limits {
                if left_len != right_len {
                    let right = "the cache";
                    return Err(PrismError::DimMismatch { name, left, left_len, right, right_len });
                }
            }
            if tensor.dtype() != self.k.dtype() {
                let got = format!("{:?}", tensor.dtype());
                let allowed = "the element type of the cache";
                return Err(PrismError::DType { what: left, allowed, got });
            }
            if tensor.device() != self.k.device() {
                return Err(PrismError::Device { left, right: "cache" });
            }
        }
        if v.dims()[2] != n {
            let (left, right, right_len) = ("v", "k", n);
            let left_len = v.dims()[2];
            return Err(PrismError::DimMismatch {
                name: "length",
                left,
                left_len,
                right,
                right_len,
            });
        }
        if n > capacity - self.len {
            let reason =
                format!("{n} more positions don't fit: {} of {capacity} are taken", self.len);
            return Err(PrismError::Cache { reason });
        }
        if n == 0 {
            return Ok(());
        }
        let at = [0..batch, 0..kv_heads, self.len..self.len + n, 0..head_dim];
        self.k.inplace(|all| all.slice_assign(at.clone(), k));
        self.v.inplace(|all| all.slice_assign(at, v));
        self.len += n;
        Ok(())
    }

    /// The keys held, a view of `[batch, kv_heads, len, head_dim]`.
    pub fn keys(&self) -> Tensor<4> {
        self.held(&self.k)
    }

    /// The values held, a view of `[batch, kv_heads, len, head_dim]`.
    pub fn values(&self) -> Tensor<4> {
        self.held(&self.v)
    }

    fn held(&self, all: &Tensor<4>) -> Tensor<4> {
        let [batch, heads, _, head_dim] = all.dims();
        all.clone().slice([0..batch, 0..heads, 0..self.len, 0..head_dim])
    }

    /// Checks a call of attention before the cache is changed.
    pub(crate) fn check_call(
        &self,
        q: &Tensor<4>,
        config: &PrismConfig,
        options: &AttentionOptions,
    ) -> Result<()> {
        let [batch, kv_heads, capacity, head_dim] = self.k.dims();
        let q_heads = self.history.dims()[1];
        let dims = q.dims();
        let limits = [
            ("batch", dims[0], batch),
            ("heads", dims[1], q_heads),
            ("head_dim", dims[3], head_dim),
        ];
        for (name, left_len, right_len) in limits {
            if left_len != right_len {
                let (left, right) = ("q", "the cache");
                return Err(PrismError::DimMismatch { name, left, left_len, right, right_len });
            }
        }
        AttentionShape::new(dims, [batch, kv_heads, capacity, head_dim], self.v.dims())?;
        if q.dtype() != self.k.dtype() {
            let got = format!("{:?}", q.dtype());
            let allowed = "the element type of the cache";
            return Err(PrismError::DType { what: "q", allowed, got });
        }
        if q.device() != self.k.device() {
            return Err(PrismError::Device { left: "q", right: "cache" });
        }
        let block = self.means.block();
        if config.block != block {
            let reason =
                format!("it pools blocks of {block}, but the settings say {}", config.block);
            return Err(PrismError::Cache { reason });
        }
        if options.lengths.is_some() {
            let reason = "sequences of one cache have one length, but lengths were given".into();
            return Err(PrismError::Cache { reason });
        }
        Ok(())
    }

    /// What the keys held leave behind for a way of scoring; pools what is new.
    pub(crate) fn pooled_keys(&mut self, scoring: Scoring) -> PooledKeys {
        match scoring {
            Scoring::Bands => {
                let [means] = self
                    .means
                    .of(&self.k, self.len, |keys, grids| [select::pool(keys, grids, Side::Keys)]);
                PooledKeys::Bands { means, history: self.history.clone() }
            }
            Scoring::SecondOrder { query_sub, key_sub } => {
                let fresh = || PooledBlocks::new(self.k.dims(), key_sub, &self.k.device());
                let held = self.moments.take().filter(|held| held.block() == key_sub);
                let moments = self.moments.insert(held.unwrap_or_else(fresh));
                let [means, variances] = moments
                    .of(&self.k, self.len, |keys, grids| select::pool_moments(keys, grids).into());
                PooledKeys::SecondOrder { query_sub, key_sub, means, variances }
            }
        }
    }

    /// Adds the energy of query blocks `[batch, q_heads, rows, head_dim]` just attended, within the
    /// bands of a checked config.
    pub(crate) fn record_queries(
        &mut self,
        pooled_q: Tensor<4>,
        config: &PrismConfig,
    ) -> Result<()> {
        let [batch, heads, _, head_dim] = pooled_q.dims();
        let device = pooled_q.device();
        let square = pooled_q.clone() * pooled_q;
        let all = square.clone().sum_dim(3);
        // A block that isn't finite is left out, as in the scores.
        let bad = all.clone().is_nan().bool_or(all.is_inf());
        let shape = square.dims();
        let square = square.mask_fill(bad.clone().expand(shape), 0.0);
        let blocks = bad.bool_not().float().cast(DType::F32).sum_dim(2);
        let [high, low] = band_masks(config, heads, head_dim, &device)?;
        let energy = |x: Tensor<4>| x.sum_dim(3).sum_dim(2);
        let added = vec![
            energy(square.clone() * high),
            energy(square.clone() * low),
            energy(square),
            blocks,
        ];
        self.history = self.history.clone() + Tensor::cat(added, 3).reshape([batch, heads, 4]);
        Ok(())
    }
}

/// 1 for the dims of the high and of the low band, each `[1, q_heads, 1, head_dim]`, or
/// `[1, 1, 1, head_dim]` where all heads have the same.
fn band_masks(
    config: &PrismConfig,
    q_heads: usize,
    head_dim: usize,
    device: &Device,
) -> Result<[Tensor<4>; 2]> {
    let groups = config.head_groups(q_heads);
    let lines = if groups.len() == 1 { 1 } else { q_heads };
    let mut masks = [(); 2].map(|()| vec![0f32; lines * head_dim]);
    for HeadGroup { heads, bands, .. } in &groups {
        let bands = config.bands_by(*bands, head_dim)?;
        // One line stands for all heads of a single group.
        for head in heads.iter().take(lines) {
            for (mask, dims) in masks.iter_mut().zip([bands.high(), bands.low()]) {
                dims.iter().for_each(|c| mask[head * head_dim + c] = 1.0);
            }
        }
    }
    let shape = [1, lines, 1, head_dim];
    Ok(masks.map(|mask| Tensor::from_data(TensorData::new(mask, shape), (device, DType::F32))))
}
