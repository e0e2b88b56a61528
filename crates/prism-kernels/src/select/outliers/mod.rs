//! Selection with outlier keys apart ([`prism_core::selectors::outliers`]): every block whose mass
//! reaches a threshold.
//!
//! A query sub-block and a key block have the log of a sum of exponentials, of the block's sub-blocks
//! and of the [shortest](shortest) key of each: [`mma`] takes it on tensor cores, [`unit`] anywhere.
//! [`choose`] adds these sums up to the row's and compares. No masses are formed. The sums of some
//! rows at a time lie in scratch, which is small enough to stay in a GPU's second-level cache.

mod choose;
mod mma;
mod shortest;
mod terms;
mod unit;

use cubecl::prelude::*;
use cubecl::server::Handle;
use derive_new::new;
use prism_core::selection::extent;
use prism_core::{BlockGrid, SelectionRule, Side};
use thiserror::Error;

use super::{SelectNumbersLaunch, SelectRung, Selection, numbers};
use crate::capabilities::Capabilities;
use crate::moments::pool_moments;
use crate::operand::Operand;
use crate::pool::pool_one;
use crate::span::{Span, Spans};
use shortest::shortest;

/// Bytes of sums that are there at once.
pub const SCRATCH: usize = 64 << 20;

/// What a selection is made from.
#[derive(Debug, Clone, new)]
pub struct OutliersProblem<'a> {
    /// Queries `[batch, q_heads, q_len, head_dim]`.
    pub q: &'a Operand,
    /// Keys `[batch, kv_heads, kv_len, head_dim]`, of the same element type.
    pub k: &'a Operand,
    /// Block grid of each sequence.
    pub grids: &'a [BlockGrid],
    /// Positions a query and a key sub-block, which
    /// [`Outliers::validate_block`](prism_core::selectors::Outliers::validate_block) has checked.
    pub subs: [usize; 2],
    /// Integer mass from which a block is read
    /// ([`Outliers::target`](prism_core::selectors::Outliers::target)).
    pub target: u32,
    /// Factor on the scores of attention.
    pub scale: f64,
    /// Forced blocks. Its budget plays no part.
    pub rule: &'a SelectionRule,
    /// Whether this is a chunk of a prompt that goes on.
    pub more_follows: bool,
    /// Bytes of sums that are there at once, about; [`SCRATCH`] unless changed.
    #[new(value = "SCRATCH")]
    pub scratch: usize,
}

/// Why a rule isn't one of these kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum OutliersError {
    /// Rows are neither filled up beyond one block nor cut: there are no masses to rank blocks by.
    #[error(
        "the kernels of outliers take min_blocks up to 1 and no max_blocks, got {min_blocks} and {max_blocks:?}"
    )]
    Limits {
        /// As [`SelectionRule::min_blocks`].
        min_blocks: usize,
        /// As [`SelectionRule::max_blocks`].
        max_blocks: Option<usize>,
    },
}

impl OutliersError {
    /// Checks that the kernels take a rule.
    ///
    /// # Errors
    /// A rule with limits.
    pub fn check(rule: &SelectionRule) -> Result<(), Self> {
        let SelectionRule { min_blocks, max_blocks, .. } = *rule;
        if min_blocks > 1 || max_blocks.is_some() {
            return Err(Self::Limits { min_blocks, max_blocks });
        }
        Ok(())
    }
}

impl OutliersProblem<'_> {
    /// Whether a rung can run the problem. On tensor cores: head_dim in multiples of 16, and 2, 4 or
    /// 8 key sub-blocks a block.
    pub fn runs(&self, capabilities: &Capabilities, rung: SelectRung) -> bool {
        match rung {
            SelectRung::Unit => true,
            SelectRung::Plane => false,
            SelectRung::Mma => mma::runs(capabilities, self),
        }
    }

    /// The quickest rung that can run it.
    pub fn best(&self, capabilities: &Capabilities) -> SelectRung {
        let runs = |rung: &SelectRung| self.runs(capabilities, *rung);
        SelectRung::LADDER.into_iter().find(runs).unwrap_or(SelectRung::Unit)
    }

    fn block(&self) -> usize {
        self.grids.first().map_or(1, BlockGrid::block)
    }
}

/// Selects on the quickest rung.
///
/// # Errors
/// A rule with limits.
pub fn select_outliers(
    client: &Client,
    capabilities: &Capabilities,
    problem: &OutliersProblem,
) -> Result<Selection, OutliersError> {
    select_outliers_on(client, capabilities, problem, problem.best(capabilities))
}

/// Selects on a given rung, which must [run](OutliersProblem::runs) the problem.
///
/// # Errors
/// A rule with limits.
pub fn select_outliers_on(
    client: &Client,
    capabilities: &Capabilities,
    problem: &OutliersProblem,
    rung: SelectRung,
) -> Result<Selection, OutliersError> {
    OutliersError::check(problem.rule)?;
    let OutliersProblem { q, k, grids, subs, .. } = *problem;
    let [batch, q_heads, _, dim] = q.shape;
    let selection = Selection::empty(client, grids, q_heads);
    let heads = batch * q_heads;
    if heads * selection.rows == 0 {
        return Ok(selection);
    }
    let divided = |sub: usize| grids.iter().map(|grid| grid.subdivided(sub)).collect::<Vec<_>>();
    let [q_grids, k_grids] = subs.map(divided);
    let moments = pool_moments(client, capabilities, k, &k_grids);
    let apart = shortest(client, capabilities, k, &k_grids);
    let parts = Parts {
        q_means: pool_one(client, capabilities, q, &q_grids, Side::Queries).means,
        means: moments.means,
        variances: moments.variances,
        outliers: apart.keys,
        positions: apart.positions,
        sizes: Sizes {
            q_heads: heads,
            k_heads: batch * k.shape[1],
            q_subs: extent(&q_grids).0,
            k_subs: moments.blocks,
            key_blocks: extent(grids).1,
            dim,
        },
    };
    let block = problem.block();
    let per_row = block / subs[0];
    // Whole heads, or rows of one head where not even one fits.
    let row = per_row * parts.sizes.key_blocks * 4;
    let rows = (problem.scratch / row).clamp(1, selection.rows);
    let at_once = (problem.scratch / (row * rows)).clamp(1, heads);
    let sums = client.empty(at_once * rows * row);
    let spans = Spans::new(client, grids);
    let ragged = spans.ragged();
    let shape = OutliersShape { block, subs, dim, ragged };
    let score: Score = match rung {
        SelectRung::Mma => {
            let keys = mma::Splits::new(client, &parts);
            Box::new(move |launch, run| mma::score(launch, &keys, run, shape))
        }
        _ => {
            let keys = unit::Keys::new(client, capabilities, &parts);
            Box::new(move |launch, run| unit::score(launch, &keys, run, shape))
        }
    };
    let launch = Launch { client, capabilities, problem, parts, selection, spans, sums };
    for first_head in (0..heads).step_by(at_once) {
        for first_row in (0..launch.selection.rows).step_by(rows) {
            let run = HostRun {
                first_head,
                heads: at_once.min(heads - first_head),
                first_row,
                rows: rows.min(launch.selection.rows - first_row),
            };
            score(&launch, &run);
            choose::choose(&launch, &run, shape);
        }
    }
    Ok(launch.selection)
}

/// Scores the rows of a run.
type Score = Box<dyn Fn(&Launch, &HostRun)>;

/// Sub-blocks of all sequences, contiguous in f32.
struct Parts {
    /// `[q_heads, q_subs, dim]`.
    q_means: Handle,
    /// `[k_heads, k_subs, dim]`, as are the next two.
    means: Handle,
    variances: Handle,
    /// The shortest keys.
    outliers: Handle,
    /// Their positions, `[k_heads, k_subs]` u32.
    positions: Handle,
    sizes: Sizes,
}

/// Heads count those of all sequences, sub-blocks and blocks are those of the longest.
#[derive(Clone, Copy)]
struct Sizes {
    q_heads: usize,
    k_heads: usize,
    q_subs: usize,
    k_subs: usize,
    key_blocks: usize,
    dim: usize,
}

/// What every launch takes.
struct Launch<'a> {
    client: &'a Client,
    capabilities: &'a Capabilities,
    problem: &'a OutliersProblem<'a>,
    parts: Parts,
    selection: Selection,
    spans: Spans,
    /// Logarithms to base 2, `[heads, query sub-blocks, key blocks]` f32 of a run.
    sums: Handle,
}

impl Launch<'_> {
    fn numbers(&self) -> SelectNumbersLaunch {
        let OutliersProblem { q, k, grids, rule, more_follows, .. } = *self.problem;
        let heads = [q.shape[1], k.shape[1], q.shape[3]];
        numbers(rule, heads, grids, more_follows, &self.spans, &self.selection)
    }

    fn run(&self, run: &HostRun) -> RunLaunch {
        let Sizes { q_subs, k_subs, .. } = self.parts.sizes;
        RunLaunch::new(run.first_head, run.heads, run.first_row, run.rows, q_subs, k_subs)
    }
}

/// Rows whose sums are there at once.
struct HostRun {
    first_head: usize,
    heads: usize,
    first_row: usize,
    rows: usize,
}

impl HostRun {
    /// Query sub-blocks of all its heads.
    fn lines(&self, shape: OutliersShape) -> usize {
        self.heads * self.rows * shape.per_row()
    }
}

/// What the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct OutliersShape {
    block: usize,
    /// Positions a query and a key sub-block.
    subs: [usize; 2],
    dim: usize,
    ragged: bool,
}

impl OutliersShape {
    /// Query sub-blocks a row of blocks.
    fn per_row(&self) -> usize {
        self.block / self.subs[0]
    }

    /// Key sub-blocks a block.
    fn per_block(&self) -> usize {
        self.block / self.subs[1]
    }
}

/// Rows whose sums are there at once, of some heads; and sub-blocks of a head.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct Run {
    first_head: usize,
    heads: usize,
    first_row: usize,
    rows: usize,
    q_subs: usize,
    k_subs: usize,
}

/// A query sub-block.
#[derive(CubeType, Clone, Copy)]
struct Query {
    /// Its line among those of all heads.
    line: usize,
    /// Keys that its last query sees; 0 where a sequence lacks the sub-block.
    visible: usize,
}

#[cube]
impl Run {
    /// Sub-block `sub` of the run's rows of a head. Rows begin with blocks, so that the first may lack
    /// sub-blocks.
    fn query(
        &self,
        span: &Span,
        head: usize,
        sub: usize,
        #[comptime] shape: OutliersShape,
    ) -> Query {
        let per_row = comptime!(shape.per_row());
        let width = comptime!(shape.subs[0]);
        let first = span.first_position() / width;
        let at = (span.first_block(comptime!(shape.block)) + self.first_row) * per_row + sub;
        let there = span.seeing > 0 && at >= first && at * width < span.kv_len;
        let line = (at.max(first) - first).min(self.q_subs - 1);
        let end = ((at + 1) * width).min(span.kv_len);
        Query { line: head * self.q_subs + line, visible: select(there, end, 0usize) }
    }
}
