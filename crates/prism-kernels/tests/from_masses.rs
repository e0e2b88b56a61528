//! Do masses found elsewhere choose the blocks that the rule says, bit for bit?

mod support;

use prism_core::select::{ByMass, MASS_ONE};
use prism_core::{BlockGrid, Budget, SelectionRule};
use prism_kernels::select::{MassesProblem, select_from_masses};
use support::*;

/// Masses `[heads, rows, bands, blocks]` that come to about one over a row's causal blocks: few heavy, many
/// alike, many nothing. All bits set after the causal ones.
fn masses([heads, bands]: [usize; 2], grid: &BlockGrid, rows: &[usize], blocks: usize) -> Vec<u32> {
    let mut random = random(7, heads * rows.len() * bands * blocks).into_iter();
    let mut all = Vec::new();
    for line in 0..heads * rows.len() * bands {
        let causal = grid.causal_blocks(rows[line / bands % rows.len()]);
        let mut weights: Vec<f64> = random
            .by_ref()
            .take(blocks)
            .map(f64::from)
            .map(|x| if x < -1.0 { 0.0 } else { (x * 3.0).floor().exp() })
            .collect();
        if line % 5 == 0 {
            weights.fill(1.0);
        }
        let sum: f64 = weights[..causal].iter().sum::<f64>().max(1e-9);
        all.extend(weights.iter().enumerate().map(|(v, weight)| {
            let mass = (weight / sum * f64::from(MASS_ONE)) as u32;
            if v < causal { mass } else { u32::MAX }
        }));
    }
    all
}

/// What the rule says on the host: words of all rows of all heads.
fn expected(
    rule: &SelectionRule,
    by: ByMass,
    masses: &[u32],
    [heads, bands, blocks, width]: [usize; 4],
    grid: &BlockGrid,
    rows: &[usize],
) -> Vec<u32> {
    let mut all = Vec::new();
    for head in 0..heads {
        for (i, &row) in rows.iter().enumerate() {
            let causal = grid.causal_blocks(row);
            let start = (head * rows.len() + i) * bands * blocks;
            let bands: Vec<_> =
                (0..bands).map(|z| &masses[start + z * blocks..][..causal]).collect();
            let dense = row + rule.dense_last_blocks >= grid.rows();
            let mut words = vec![0; width];
            match by {
                ByMass::Budget => rule.select_row(&bands, causal, dense, &mut words),
                ByMass::AfterForced(target) => {
                    rule.select_row_after_forced(bands[0], target, dense, &mut words);
                }
                ByMass::Above(target) => {
                    rule.select_row_above(bands[0], target, dense, &mut words);
                }
            }
            all.extend(words);
        }
    }
    all
}

fn rules() -> Vec<SelectionRule> {
    let rule = SelectionRule::default();
    let bare = SelectionRule { sink_blocks: 0, recent_blocks: 0, dense_last_blocks: 0, ..rule };
    vec![
        rule,
        bare,
        SelectionRule { min_blocks: 0, ..bare },
        SelectionRule { min_blocks: 9, budget: Budget::Mass(0.4), ..bare },
        SelectionRule { max_blocks: Some(4), sink_blocks: 2, recent_blocks: 3, ..rule },
        SelectionRule { min_blocks: 5, max_blocks: Some(7), dense_last_blocks: 2, ..bare },
        SelectionRule { budget: Budget::TopK(6), ..rule },
        SelectionRule { budget: Budget::Mass(1.0), ..bare },
    ]
}

#[test]
fn do_masses_choose_as_the_rule_says() {
    let target = |share: f64| (share * f64::from(MASS_ONE)) as u32;
    let one_band = [
        ByMass::Budget,
        ByMass::AfterForced(Some(target(0.9))),
        ByMass::AfterForced(Some(target(0.2))),
        ByMass::AfterForced(None),
        ByMass::Above(target(0.02)),
        ByMass::Above(target(0.6)),
    ];
    // A whole prompt, a chunk that starts within a block, and rows in its middle.
    let grids = [(7, 70 * 7 + 3, 70 * 7 + 3), (16, 1000, 2100), (32, 40, 40)];
    for (block, q_len, kv_len) in grids {
        let grid = BlockGrid::new(block, q_len, kv_len).unwrap();
        let all: Vec<usize> = (0..grid.rows()).collect();
        for rows in [&all[..], &all[all.len() / 3..all.len() - all.len() / 4]] {
            let blocks = grid.causal_blocks(*rows.last().unwrap());
            let width = grid.key_blocks().div_ceil(32);
            for rule in rules() {
                let by: &[ByMass] = &one_band;
                for (bands, by) in by.iter().map(|&by| (1, by)).chain([(2, ByMass::Budget)]) {
                    let masses = masses([3, bands], &grid, rows, blocks);
                    let right =
                        expected(&rule, by, &masses, [3, bands, blocks, width], &grid, rows);
                    for Bench { name, client, capabilities } in devices() {
                        let handle = client.create_from_slice(bytemuck::cast_slice(&masses));
                        let problem = MassesProblem::new(
                            &handle,
                            [3, rows.len(), bands, blocks],
                            &grid,
                            rows[0],
                            width,
                            by,
                            &rule,
                            false,
                        );
                        let got = select_from_masses(&client, &capabilities, &problem);
                        let case = format!("{name}, {by:?}, {bands} bands, {grid:?}, {rule:?}");
                        let (words, counts) =
                            (integers(&client, &got.words), integers(&client, &got.counts));
                        let ones = |words: &[u32]| words.iter().map(|w| w.count_ones()).sum();
                        let right_counts: Vec<u32> = right.chunks(width).map(ones).collect();
                        assert!(words == right, "{case}");
                        assert_eq!(counts, right_counts, "{case}");
                    }
                }
            }
        }
    }
}

/// A prompt that goes on has no last row yet.
#[test]
fn do_rows_of_a_chunk_that_goes_on_stay_sparse() {
    let grid = BlockGrid::new(16, 160, 160).unwrap();
    let rule = SelectionRule { sink_blocks: 0, dense_last_blocks: 3, ..SelectionRule::default() };
    let rows: Vec<usize> = (0..10).collect();
    for Bench { name, client, capabilities } in devices() {
        for more_follows in [false, true] {
            let none = vec![0u32; 10 * 10];
            let handle = client.create_from_slice(bytemuck::cast_slice(&none));
            let shape = [1, rows.len(), 1, 10];
            let by = ByMass::Above(1);
            let problem = MassesProblem::new(&handle, shape, &grid, 0, 1, by, &rule, more_follows);
            let got = select_from_masses(&client, &capabilities, &problem);
            let right: Vec<u32> = rows
                .iter()
                .map(|row| if row + 3 >= 10 && !more_follows { row + 1 } else { 1 } as u32)
                .collect();
            assert_eq!(integers(&client, &got.counts), right, "{name}, {more_follows}");
        }
    }
}
