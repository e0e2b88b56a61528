//! What a cache keeps of its keys, block by block.

use burn::tensor::{DType, Device, Tensor};
use prism_core::BlockGrid;

/// Pooled vectors of the key blocks held, `[batch, kv_heads, blocks, head_dim]` in f32: `N` of
/// them, as means and variances.
///
/// They follow from the keys, so they are made when first asked for, and only for blocks that have
/// changed since.
#[derive(Debug, Clone)]
pub(crate) struct PooledBlocks<const N: usize> {
    pools: [Tensor<4>; N],
    /// Leading keys whose blocks are pooled.
    len: usize,
    block: usize,
}

impl<const N: usize> PooledBlocks<N> {
    /// Room for the blocks of keys `[batch, kv_heads, capacity, head_dim]`.
    pub fn new(keys: [usize; 4], block: usize, device: &Device) -> Self {
        let [batch, heads, capacity, head_dim] = keys;
        let dims = [batch, heads, capacity.div_ceil(block), head_dim];
        let pools = std::array::from_fn(|_| Tensor::zeros(dims, (device, DType::F32)));
        Self { pools, len: 0, block }
    }

    /// Positions a block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// Forgets all but the blocks that the first `len` keys fill.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len / self.block * self.block);
    }

    /// The pooled blocks of the first `len` of `keys`; `pool` does what is new.
    pub fn of(
        &mut self,
        keys: &Tensor<4>,
        len: usize,
        pool: impl Fn(Tensor<4>, &[BlockGrid]) -> [Tensor<4>; N],
    ) -> [Tensor<4>; N] {
        let [batch, heads, _, head_dim] = keys.dims();
        let at = |blocks| [0..batch, 0..heads, blocks, 0..head_dim];
        let (first, blocks) = (self.len / self.block, len.div_ceil(self.block));
        if self.len < len {
            let from = first * self.block;
            let fresh = keys.clone().slice(at(from..len));
            // `from` is on the grid and keys start at it, so a grid of their own is the same one.
            if let Ok(grid) = BlockGrid::new(self.block, 0, len - from) {
                let pooled = pool(fresh, &vec![grid; batch]);
                for (all, pooled) in self.pools.iter_mut().zip(pooled) {
                    all.inplace(|all| all.slice_assign(at(first..blocks), pooled));
                }
            }
            self.len = len;
        }
        self.pools.clone().map(|pool| pool.slice(at(0..blocks)))
    }
}
