//! Mean of each block of queries or keys, and variance of each block of keys.

use std::ops::Range;

use prism_core::error::{PrismError, Result};
use prism_core::grid::{BlockGrid, Side};
use rayon::prelude::*;

use super::view::{Element, Head, View};

/// Rows summed one after the other before sums are added in pairs.
const SERIAL: usize = 16;
/// Elements from which a second thread pays off.
const WORTH_A_THREAD: usize = 1 << 16;

/// Block means of a `[batch, heads, length, dim]` view: `[batch, heads, blocks, dim]` in f32,
/// contiguous, with as many blocks as the longest of `grids` (one a sequence) has.
///
/// Each mean is over the positions that its block really has; blocks that a shorter sequence lacks
/// are 0. Sums are in f32 by pairs, so that their error hardly grows with the block.
///
/// # Errors
/// Another number of grids than sequences, or a grid longer than the view.
pub fn pool<T: Element>(x: &View<'_, T>, grids: &[BlockGrid], side: Side) -> Result<Vec<f32>> {
    reduce(x, grids, side, 1, |head, rows, mean, scratch| average(head, rows, None, mean, scratch))
}

/// Means and variances of the key blocks of a `[batch, heads, length, dim]` view, each as [`pool`]
/// returns means. Variances are those of the population, each dim by itself, from deviations: keys
/// far from 0 lose nothing.
///
/// # Errors
/// As [`pool`].
pub fn pool_moments<T: Element>(
    x: &View<'_, T>,
    grids: &[BlockGrid],
) -> Result<(Vec<f32>, Vec<f32>)> {
    let [.., dim] = x.shape();
    let both = reduce(x, grids, Side::Keys, 2, |head, rows, both, scratch| {
        let (mean, variance) = both.split_at_mut(dim);
        average(head, rows.clone(), None, mean, scratch);
        average(head, rows, Some(mean), variance, scratch);
    })?;
    let halves =
        |half: usize| both.chunks_exact(2 * dim).flat_map(move |x| &x[half * dim..][..dim]);
    Ok((halves(0).copied().collect(), halves(1).copied().collect()))
}

/// Reduces each block to `values` rows of dim elements, `[batch, heads, blocks, values, dim]`; 0
/// for blocks that a sequence lacks.
fn reduce<T: Element>(
    x: &View<'_, T>,
    grids: &[BlockGrid],
    side: Side,
    values: usize,
    block_values: impl Fn(&Head<'_, T>, Range<usize>, &mut [f32], &mut Vec<f32>) + Sync,
) -> Result<Vec<f32>> {
    let [batch, heads, length, dim] = x.shape();
    if grids.len() != batch {
        let reason = format!("expected {batch} grids, got {}", grids.len());
        return Err(PrismError::Lengths { reason });
    }
    let blocks = |grid: &BlockGrid| match side {
        Side::Queries => grid.rows(),
        Side::Keys => grid.key_blocks(),
    };
    let longest = |grid: &BlockGrid| match side {
        Side::Queries => grid.q_len(),
        Side::Keys => grid.kv_len(),
    };
    if let Some((b, grid)) = grids.iter().enumerate().find(|(_, grid)| longest(grid) > length) {
        let reason =
            format!("sequence {b} is {} long, but the tensor holds only {length}", longest(grid));
        return Err(PrismError::Lengths { reason });
    }
    let most = grids.iter().map(blocks).max().unwrap_or(0);
    let mut reduced = vec![0.0; batch * heads * most * values * dim];
    if reduced.is_empty() {
        return Ok(reduced);
    }
    let few = (WORTH_A_THREAD * most).div_ceil(length * dim).max(1);
    let blocks_of = reduced.par_chunks_exact_mut(values * dim).with_min_len(few).enumerate();
    blocks_of.for_each_init(Vec::new, |scratch, (i, reduced)| {
        let (line, block) = (i / most, i % most);
        let (grid, head) = (&grids[line / heads], x.head(line / heads, line % heads));
        if block >= blocks(grid) {
            return;
        }
        let rows = match side {
            Side::Queries => grid.queries(block),
            Side::Keys => grid.keys(block),
        };
        block_values(&head, rows, reduced, scratch);
    });
    Ok(reduced)
}

/// Average of the rows `rows`, `[dim]`, or of their squared deviations from a mean.
fn average<T: Element>(
    head: &Head<'_, T>,
    rows: Range<usize>,
    mean: Option<&[f32]>,
    into: &mut [f32],
    scratch: &mut Vec<f32>,
) {
    // A row of sums a halving, and one to read into.
    let halvings = rows.len().div_ceil(SERIAL).next_power_of_two().ilog2() as usize;
    scratch.resize((halvings + 1) * into.len(), 0.0);
    let count = rows.len() as f32;
    sum(head, rows, mean, into, scratch);
    into.iter_mut().for_each(|value| *value /= count);
}

/// Sum of the rows `rows` into `into`, `[dim]`, by halves; with a mean, that of the squared
/// deviations from it.
fn sum<T: Element>(
    head: &Head<'_, T>,
    rows: Range<usize>,
    mean: Option<&[f32]>,
    into: &mut [f32],
    scratch: &mut [f32],
) {
    let half = rows.start + rows.len().div_ceil(SERIAL) / 2 * SERIAL;
    if half > rows.start {
        sum(head, rows.start..half, mean, into, scratch);
        let (upper, scratch) = scratch.split_at_mut(into.len());
        sum(head, half..rows.end, mean, upper, scratch);
        into.iter_mut().zip(upper).for_each(|(sum, value)| *sum += *value);
        return;
    }
    into.fill(0.0);
    for i in rows {
        let row = head.rows(i..i + 1, scratch).values;
        match mean {
            None => into.iter_mut().zip(row).for_each(|(sum, value)| *sum += value),
            Some(mean) => {
                for ((sum, value), mean) in into.iter_mut().zip(row).zip(mean) {
                    *sum += (value - mean) * (value - mean);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_accurate_and_padding_is_never_read() {
        let (heads, length, dim) = (2, 5000, 3);
        let mut data: Vec<f32> =
            (0..2 * heads * length * dim).map(|i| 1000.0 + (i * 7919 % 1009) as f32).collect();
        let grids = [(1, 5000, 5000), (1, 0, 0), (4096, 77, 5000), (100, 5000, 300)]
            .map(|(block, q_len, kv_len)| BlockGrid::new(block, q_len, kv_len).unwrap());
        for pair in [[grids[2], grids[3]], [grids[0], grids[1]], [grids[3], grids[1]]] {
            for side in [Side::Queries, Side::Keys] {
                let blocks = |grid: &BlockGrid| match side {
                    Side::Queries => (0..grid.rows()).map(|i| grid.queries(i)).collect::<Vec<_>>(),
                    Side::Keys => (0..grid.key_blocks()).map(|i| grid.keys(i)).collect(),
                };
                let most = pair.iter().map(|grid| blocks(grid).len()).max().unwrap();
                let start = |b: usize, h: usize| (b * heads + h) * length * dim;
                for (b, grid) in pair.iter().enumerate() {
                    let end = blocks(grid).last().map_or(0, |rows| rows.end);
                    for h in 0..heads {
                        data[start(b, h)..][end * dim..length * dim].fill(f32::NAN);
                    }
                }
                let view = View::contiguous(&data, [2, heads, length, dim]).unwrap();
                let means = pool(&view, &pair, side).unwrap();
                assert_eq!(means.len(), 2 * heads * most * dim);
                for (i, &mean) in means.iter().enumerate() {
                    let (c, v, line) = (i % dim, i / dim % most, i / dim / most);
                    let Some(rows) = blocks(&pair[line / heads]).get(v).cloned() else {
                        assert_eq!(mean, 0.0);
                        continue;
                    };
                    let count = rows.len() as f64;
                    let at = |i| f64::from(data[start(line / heads, line % heads) + i * dim + c]);
                    let expected = rows.map(at).sum::<f64>() / count;
                    assert!((f64::from(mean) / expected - 1.0).abs() < 3e-7, "{mean} {expected}");
                }
                data.iter_mut().enumerate().for_each(|(i, value)| {
                    *value = 1000.0 + (i * 7919 % 1009) as f32;
                });
            }
        }
    }
}
