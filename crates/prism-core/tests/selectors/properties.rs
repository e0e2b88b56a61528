//! What holds for every method.

use prism_core::selectors::Selector;
use prism_core::{BlockSelection, Budget, PrismError, SelectionRule};

use crate::support::{Problem, bare, small};

/// Whole prompts, chunks that start mid-block, more queries than keys, ragged batches, short ones.
fn problems() -> Vec<Problem> {
    let of = |lengths: &[(usize, usize)]| Problem::new(16, lengths, (4, 2), 8, 3);
    vec![
        of(&[(200, 200)]),
        of(&[(70, 200)]),
        of(&[(210, 200)]),
        of(&[(200, 200), (37, 37), (0, 0), (5, 170)]),
        of(&[(1, 1)]),
        of(&[(1, 200)]),
        of(&[(3, 0)]),
    ]
}

#[test]
fn rows_read_causal_blocks_and_at_least_one() {
    for problem in problems() {
        for selector in small() {
            for rule in [bare(), SelectionRule::default()] {
                let selection = selector.select(&problem.input(rule)).unwrap();
                let checked = selection.validate(&problem.grids, problem.shape.q_heads);
                checked.unwrap_or_else(|error| panic!("{selector}: {error}"));
                let again = selector.select(&problem.input(rule)).unwrap();
                assert!(selection == again, "{selector}: not the same twice");
            }
        }
    }
}

#[test]
fn they_leave_something_out() {
    let problem = Problem::new(16, &[(400, 400)], (4, 2), 8, 5);
    for selector in small() {
        let density = problem.select(&selector).density(&problem.grids);
        assert!(density < 0.95, "{selector}: {density}");
    }
}

#[test]
fn forced_blocks_and_limits_hold() {
    let problem = Problem::new(16, &[(300, 300)], (2, 1), 8, 7);
    let grid = problem.grids[0];
    for selector in small() {
        let rule = SelectionRule {
            sink_blocks: 2,
            recent_blocks: 3,
            dense_last_blocks: 2,
            min_blocks: 7,
            max_blocks: Some(8),
            ..bare()
        };
        let selection = selector.select(&problem.input(rule)).unwrap();
        for (h, row) in (0..2).flat_map(|h| (0..grid.rows()).map(move |row| (h, row))) {
            let causal = grid.causal_blocks(row);
            let count = selection.count(0, h, row);
            if row + 2 >= grid.rows() {
                assert_eq!(count, causal, "{selector}: row {row} is dense");
                continue;
            }
            for v in (0..causal).filter(|v| *v < 2 || v + 3 >= causal) {
                assert!(selection.contains(0, h, row, v), "{selector}: row {row}, block {v}");
            }
            assert!((7.min(causal)..=8).contains(&count), "{selector}: row {row} reads {count}");
        }
    }
}

/// A chunk that goes on has no last rows.
#[test]
fn dense_last_rows_are_those_of_the_prompt() {
    let problem = Problem::new(16, &[(200, 200)], (1, 1), 8, 11);
    let rule = SelectionRule { dense_last_blocks: 4, ..bare() };
    for selector in small() {
        let goes_on =
            prism_core::selectors::SelectorInput { more_follows: true, ..problem.input(rule) };
        let goes_on = selector.select(&goes_on).unwrap();
        assert_eq!(goes_on, problem.select(&selector), "{selector}");
        let ends = selector.select(&problem.input(rule)).unwrap();
        assert_eq!(ends.count(0, 0, 9), 10, "{selector}");
    }
}

/// Bad numbers neither hang nor leave a row without blocks, and stay with the heads that have them.
#[test]
fn bad_numbers_terminate() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let good = Problem::new(16, &[(130, 130)], (2, 2), 8, 13);
        let mut one = good.clone();
        one.k[8 * 40..8 * 41].fill(bad);
        one.q[8 * 100] = bad;
        let mut all = good.clone();
        all.k.fill(bad);
        all.q.fill(bad);
        for selector in small() {
            for problem in [&one, &all] {
                problem.select(&selector).validate(&problem.grids, 2).unwrap();
            }
            let (one, good) = (one_head(&one, &selector, 1), one_head(&good, &selector, 1));
            assert_eq!(one, good, "{selector}: {bad} in another head");
        }
    }
}

fn one_head(problem: &Problem, selector: &impl Selector, h: usize) -> Vec<Vec<usize>> {
    let selection = problem.select(selector);
    rows(&selection, 0, h, problem.grids[0].rows())
}

fn rows(selection: &BlockSelection, b: usize, h: usize, rows: usize) -> Vec<Vec<usize>> {
    (0..rows).map(|row| selection.blocks(b, h, row).collect()).collect()
}

#[test]
fn zeros_are_no_trouble() {
    let mut problem = Problem::new(16, &[(130, 130)], (2, 2), 8, 13);
    problem.q.fill(0.0);
    problem.k.fill(0.0);
    for selector in small() {
        problem.select(&selector).validate(&problem.grids, 2).unwrap();
    }
}

/// What lies past the end of a sequence is never looked at, and sequences don't see each other.
#[test]
fn a_ragged_batch_is_its_sequences() {
    let mut problem = Problem::new(16, &[(200, 200), (90, 141)], (4, 2), 8, 17);
    let (q_len, kv_len, d) = (200, 200, 8);
    for h in 0..4 {
        problem.q[((4 + h) * q_len + 90) * d..((4 + h) * q_len + q_len) * d].fill(f32::NAN);
    }
    for h in 0..2 {
        problem.k[((2 + h) * kv_len + 141) * d..((2 + h) * kv_len + kv_len) * d].fill(f32::NAN);
    }
    let mut alone = Problem::new(16, &[(90, 141)], (4, 2), 8, 0);
    for (h, x) in alone.q.chunks_exact_mut(90 * d).enumerate() {
        x.copy_from_slice(&problem.q[(4 + h) * q_len * d..][..90 * d]);
    }
    for (h, x) in alone.k.chunks_exact_mut(141 * d).enumerate() {
        x.copy_from_slice(&problem.k[(2 + h) * kv_len * d..][..141 * d]);
    }
    for selector in small() {
        let (both, alone) = (problem.select(&selector), alone.select(&selector));
        for h in 0..4 {
            let count = problem.grids[1].rows();
            assert_eq!(rows(&both, 1, h, count), rows(&alone, 0, h, count), "{selector}");
        }
    }
}

/// Grouped heads choose what they'd choose with keys of their own.
#[test]
fn grouped_heads_are_expanded_heads() {
    let grouped = Problem::new(16, &[(200, 200)], (4, 2), 8, 19);
    let mut expanded = Problem::new(16, &[(200, 200)], (4, 4), 8, 0);
    expanded.q = grouped.q.clone();
    let heads: Vec<&[f32]> = grouped.k.chunks_exact(200 * 8).collect();
    expanded.k = [0, 0, 1, 1].iter().flat_map(|&h: &usize| heads[h].to_vec()).collect();
    for selector in small() {
        assert_eq!(grouped.select(&selector), expanded.select(&selector), "{selector}");
    }
}

#[test]
fn all_of_the_mass_is_everything() {
    let problem = Problem::new(16, &[(70, 200)], (2, 1), 8, 23);
    let dense = BlockSelection::dense(&problem.grids, 2);
    for name in ["prism", "second_order", "mean_pool", "oracle", "xattention"] {
        let dial = if name == "xattention" { "threshold" } else { "mass" };
        let selector = prism_core::SelectorConfig::from_settings(name, &[(dial, "1")]).unwrap();
        assert_eq!(problem.select(&selector), dense, "{selector}");
    }
}

/// Without a mass of its own a method takes the rule's budget, whatever that is.
#[test]
fn the_rule_s_budget_is_the_default() {
    let problem = Problem::new(16, &[(200, 200)], (2, 1), 8, 29);
    for name in ["prism", "second_order", "mean_pool", "oracle"] {
        let of = |settings: &[(&str, &str)]| {
            prism_core::SelectorConfig::from_settings(name, settings).unwrap()
        };
        let rule = SelectionRule { budget: Budget::Mass(0.6), ..bare() };
        let by_rule = of(&[]).select(&problem.input(rule)).unwrap();
        assert_eq!(by_rule, problem.select(&of(&[("mass", "0.6")])), "{name}");
    }
    let rule = SelectionRule { budget: Budget::TopK(4), ..bare() };
    let of = |name: &str, settings: &[(&str, &str)]| {
        let selector = prism_core::SelectorConfig::from_settings(name, settings).unwrap();
        selector.select(&problem.input(rule)).unwrap()
    };
    assert_eq!(of("mean_pool", &[]), of("top_k", &[("blocks", "4")]));
}

#[test]
fn what_does_not_fit_is_refused() {
    let problem = Problem::new(16, &[(200, 200)], (2, 1), 8, 31);
    let says = |name: &str, settings: &[(&str, &str)], problem: &Problem, says: &str| {
        let selector = prism_core::SelectorConfig::from_settings(name, settings).unwrap();
        let error = selector.select(&problem.input(bare())).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    let odd = Problem::new(20, &[(200, 200)], (2, 1), 8, 31);
    says("xattention", &[], &odd, "block must be a multiple of 8, got 20");
    says("dilated", &[], &odd, "segment must be a multiple of 20, got 2048");
    says("second_order", &[("query_sub", "8")], &problem, "query_sub must be 16 to 128");
    says(
        "prism",
        &[("high_dims", "6"), ("low_dims", "2")],
        &odd,
        "without a RoPE there is one band",
    );
    let mut short = problem.clone();
    short.k.pop();
    says("mean_pool", &[], &short, "k must be [1, 1, 200, 8], got [1599]");
    let mut grids = problem.clone();
    grids.grids.clear();
    says("mean_pool", &[], &grids, "expected 1 block grids, got 0");
    let selector = prism_core::selectors::TopK { blocks: 0 };
    let error = selector.select(&problem.input(bare())).unwrap_err();
    assert!(matches!(error, PrismError::OutOfRange { name: "blocks", .. }));
}
