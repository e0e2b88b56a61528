//! What a method is given, and how it says what it chose.

use crate::error::{PrismError, Result};
use crate::grid::BlockGrid;
use crate::masses::MASS_ONE;
use crate::rope::Rope;
use crate::select::{Budget, SelectionRule};
use crate::selection::{BlockSelection, extent, set_bits};
use crate::shape::AttentionShape;

/// A way to choose blocks: head by head, from the head's queries and its kv head's keys.
///
/// No method here looks at values; one that did would hold them itself.
pub trait Selector {
    /// Its name, as in settings.
    fn name(&self) -> &'static str;

    /// Checks the options by themselves.
    ///
    /// # Errors
    /// The first that is out of range, with its limit and the value got.
    fn validate(&self) -> Result<()>;

    /// Checks the options against what they are to choose from.
    ///
    /// # Errors
    /// What the method can't do with this block or these lengths.
    fn validate_for(&self, input: &SelectorInput) -> Result<()> {
        let _ = input;
        Ok(())
    }

    /// Chooses the blocks of every row of a head.
    ///
    /// # Errors
    /// Options that don't fit the head.
    fn select_head(&self, head: &Head, rows: &mut Rows) -> Result<()>;

    /// Chooses the blocks of every row of every head.
    ///
    /// # Errors
    /// Slices, grids or options that don't fit each other.
    fn select(&self, input: &SelectorInput) -> Result<BlockSelection> {
        self.validate()?;
        input.validate()?;
        self.validate_for(input)?;
        let SelectorInput { q, k, shape, grids, rule, more_follows, .. } = *input;
        let AttentionShape { q_heads, kv_heads, q_len, kv_len, head_dim: d, .. } = shape;
        let (rows, key_blocks) = extent(grids);
        let mut selection = BlockSelection::empty(shape.batch, q_heads, rows, key_blocks);
        for (b, &grid) in grids.iter().enumerate() {
            for h in 0..q_heads {
                let kv = b * kv_heads + h / shape.group();
                let head = Head {
                    q: &q[(b * q_heads + h) * q_len * d..][..grid.q_len() * d],
                    k: &k[kv * kv_len * d..][..grid.kv_len() * d],
                    head_dim: d,
                    index: h,
                    grid,
                    scale: input.scale,
                    rope: input.rope,
                };
                let mut rows = Rows {
                    words: vec![0; selection.words_per_row()],
                    dense_from: rule.dense_from(&grid, more_follows),
                    selection: &mut selection,
                    at: (b, h),
                    grid,
                    rule,
                };
                self.select_head(&head, &mut rows)?;
            }
        }
        Ok(selection)
    }
}

/// What is chosen from: contiguous Q `[batch, q_heads, q_len, head_dim]` and K
/// `[batch, kv_heads, kv_len, head_dim]`, both rotated.
#[derive(Debug, Clone, Copy)]
pub struct SelectorInput<'a> {
    /// Queries.
    pub q: &'a [f32],
    /// Keys.
    pub k: &'a [f32],
    /// Shape of both.
    pub shape: AttentionShape,
    /// Block grid of each sequence, all of one block size.
    pub grids: &'a [BlockGrid],
    /// Factor on the scores of attention. Prism and second order take 1/√head_dim whatever it is.
    pub scale: f64,
    /// The model's rotary embedding, which decides Prism's bands; `None` for layers without one. No
    /// other method looks at it.
    pub rope: Option<&'a Rope>,
    /// Forced blocks, limits, and the budget of methods that have none of their own.
    pub rule: SelectionRule,
    /// Whether this is a chunk of a prompt that goes on.
    pub more_follows: bool,
}

impl<'a> SelectorInput<'a> {
    /// Of a whole prompt, with scale 1/√head_dim, no RoPE and the default rule.
    pub fn new(q: &'a [f32], k: &'a [f32], shape: AttentionShape, grids: &'a [BlockGrid]) -> Self {
        let (scale, rule) = (1.0 / (shape.head_dim as f64).sqrt(), SelectionRule::default());
        Self { q, k, shape, grids, scale, rope: None, rule, more_follows: false }
    }

    /// Positions a block.
    pub fn block(&self) -> usize {
        self.grids.first().map_or(1, BlockGrid::block)
    }

    fn validate(&self) -> Result<()> {
        let AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim } = self.shape;
        let q_dims = [batch, q_heads, q_len, head_dim];
        let k_dims = [batch, kv_heads, kv_len, head_dim];
        AttentionShape::new(q_dims, k_dims, k_dims)?;
        for (what, slice, dims) in [("q", self.q, q_dims), ("k", self.k, k_dims)] {
            if slice.len() != dims.iter().product::<usize>() {
                let (expected, got) = (dims.to_vec(), vec![slice.len()]);
                return Err(PrismError::Shape { what, expected, got });
            }
        }
        if self.grids.len() != batch {
            let reason = format!("expected {batch} block grids, got {}", self.grids.len());
            return Err(PrismError::Lengths { reason });
        }
        for grid in self.grids {
            if grid.block() != self.block() {
                let reason = format!(
                    "blocks of one batch have one size, got {} and {}",
                    self.block(),
                    grid.block()
                );
                return Err(PrismError::Lengths { reason });
            }
            if grid.q_len() > q_len || grid.kv_len() > kv_len {
                let reason = format!(
                    "a grid of {} queries and {} keys is longer than the tensors, {q_len} and {kv_len}",
                    grid.q_len(),
                    grid.kv_len()
                );
                return Err(PrismError::Lengths { reason });
            }
        }
        if !(self.scale > 0.0 && self.scale.is_finite()) {
            let (name, allowed) = ("scale", "finite and above 0");
            return Err(PrismError::OutOfRange { name, allowed, got: self.scale });
        }
        self.rule.validate()
    }
}

/// One query head of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// Queries, `[q_len, head_dim]`.
    pub q: &'a [f32],
    /// Keys of its kv head, `[kv_len, head_dim]`.
    pub k: &'a [f32],
    /// Elements of a query and of a key.
    pub head_dim: usize,
    /// Its number among the query heads.
    pub index: usize,
    /// Where queries and keys are.
    pub grid: BlockGrid,
    /// Factor on the scores of attention.
    pub scale: f64,
    /// The model's rotary embedding.
    pub rope: Option<&'a Rope>,
}

impl<'a> Head<'a> {
    /// Query `i`.
    pub fn query(&self, i: usize) -> &'a [f32] {
        &self.q[i * self.head_dim..][..self.head_dim]
    }

    /// Key `j`.
    pub fn key(&self, j: usize) -> &'a [f32] {
        &self.k[j * self.head_dim..][..self.head_dim]
    }
}

/// Where a method writes what the rows of a head read.
#[derive(Debug)]
pub struct Rows<'a> {
    selection: &'a mut BlockSelection,
    at: (usize, usize),
    grid: BlockGrid,
    rule: SelectionRule,
    dense_from: usize,
    words: Vec<u32>,
}

impl Rows<'_> {
    /// The rule with this mass as its budget, or with its own.
    pub fn rule(&self, mass: Option<f64>) -> SelectionRule {
        SelectionRule { budget: mass.map_or(self.rule.budget, Budget::Mass), ..self.rule }
    }

    /// Lets a row choose by the integer masses of its causal blocks in each band.
    pub fn by_masses(&mut self, row: usize, rule: SelectionRule, bands: &[impl AsRef<[u32]>]) {
        let causal = self.grid.causal_blocks(row);
        let dense = row >= self.dense_from;
        rule.select_row(bands, causal, dense, &mut self.words);
        self.write(row);
    }

    /// Lets a row choose by masses, forced blocks first, until they reach a share of one.
    pub fn by_masses_after_forced(&mut self, row: usize, share: f64, masses: &[u32]) {
        let target = (share < 1.0).then(|| ((share * f64::from(MASS_ONE)).round() as u32).max(1));
        let dense = row >= self.dense_from;
        self.rule.select_row_after_forced(masses, target, dense, &mut self.words);
        self.write(row);
    }

    /// Lets a row read the blocks whose integer mass reaches `target`.
    pub fn by_threshold(&mut self, row: usize, target: u32, masses: &[u32]) {
        let dense = row >= self.dense_from;
        self.rule.select_row_above(masses, target, dense, &mut self.words);
        self.write(row);
    }

    /// Lets a row read these blocks, those that are causal.
    pub fn by_blocks(&mut self, row: usize, blocks: impl IntoIterator<Item = usize>) {
        let causal = self.grid.causal_blocks(row);
        let dense = row >= self.dense_from;
        self.rule.select_row_blocks(blocks, causal, dense, &mut self.words);
        self.write(row);
    }

    fn write(&mut self, row: usize) {
        let (b, h) = self.at;
        self.selection.set_row(b, h, row, set_bits(&self.words));
    }
}
