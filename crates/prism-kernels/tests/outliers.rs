//! Do the kernels of outliers select what `prism_core` does? A block may differ whose mass lies within
//! rounding of the threshold.

mod support;

use prism_core::selection::extent;
use prism_core::selectors::{Outliers, Selector, SelectorInput};
use prism_core::{BlockSelection, SelectionRule};
use prism_kernels::select::SelectRung;
use prism_kernels::select::outliers::{OutliersError, OutliersProblem, select_outliers_on};
use support::*;

/// Some keys that stand out, some alike to the bit, and scores that scatter more than the number of
/// keys bears.
fn inputs(problem: &Problem) -> (Vec<f32>, Vec<f32>) {
    let shape = &problem.shape;
    let d = shape.head_dim;
    let mut q = random(11, shape.batch * shape.q_heads * shape.q_len * d);
    let mut k = random(12, shape.batch * shape.kv_heads * shape.kv_len * d);
    k.chunks_mut(d).step_by(37).for_each(|k| k.fill(0.02));
    k.chunks_mut(d).skip(90).take(60).for_each(|k| k[3] *= 9.0);
    q.chunks_mut(d).skip(50).step_by(2).for_each(|q| q[3] += 6.0);
    (q, k)
}

fn host(
    problem: &Problem,
    (q, k): (&[f32], &[f32]),
    options: &Outliers,
    rule: SelectionRule,
    more_follows: bool,
) -> BlockSelection {
    let input = SelectorInput {
        rule,
        more_follows,
        scale: 0.2,
        ..SelectorInput::new(q, k, problem.shape, &problem.grids)
    };
    options.select(&input).unwrap()
}

#[test]
fn do_kernels_select_what_the_rule_selects() {
    let plain = SelectionRule::default();
    let bare = SelectionRule { sink_blocks: 0, recent_blocks: 0, dense_last_blocks: 0, ..plain };
    let none = SelectionRule { min_blocks: 0, ..bare };
    let forced = SelectionRule { sink_blocks: 1, recent_blocks: 2, dense_last_blocks: 1, ..plain };
    let lengths = [(150, 430), (1, 77), (99, 99), (0, 0)];
    let cases = [
        (problem("one token", [1, 1, 1, 1, 1, 64], 64, None), [32, 32]),
        (problem("group 3", [1, 3, 1, 333, 333, 80], 64, None), [32, 32]),
        (problem("a chunk", [1, 4, 2, 151, 431, 64], 128, None), [32, 32]),
        (problem("short sub-blocks", [1, 2, 2, 70, 395, 128], 128, None), [16, 16]),
        (problem("ragged", [4, 2, 1, 150, 430, 64], 64, Some(&lengths)), [16, 32]),
        (problem("more queries than keys", [1, 2, 2, 60, 40, 30], 32, None), [32, 16]),
        (problem("many words", [1, 2, 1, 40, 2100, 16], 16, None), [16, 16]),
    ];
    for Bench { client, capabilities, name } in &devices() {
        for (problem, subs) in &cases {
            let shape = &problem.shape;
            let (q, k) = inputs(problem);
            let len = |heads: usize, len: usize| [shape.batch, heads, len, shape.head_dim];
            let q_on = operand(client, &q, len(shape.q_heads, shape.q_len));
            let k_on = operand(client, &k, len(shape.kv_heads, shape.kv_len));
            for (rule, more, scratch) in [
                (bare, false, 64 << 20),
                (none, false, 3000),
                (forced, false, 3000),
                (forced, true, 1),
            ] {
                let of = |threshold: f64| Outliers {
                    threshold,
                    query_sub: Some(subs[0]),
                    key_sub: Some(subs[1]),
                };
                let host =
                    |threshold: f64| host(problem, (&q, &k), &of(threshold), rule, more).to_bools();
                let threshold = 0.03;
                let (least, most) = (host(threshold + 1e-5), host(threshold - 1e-5));
                let on = OutliersProblem {
                    scratch,
                    ..OutliersProblem::new(
                        &q_on,
                        &k_on,
                        &problem.grids,
                        *subs,
                        of(threshold).target(),
                        0.2,
                        &rule,
                        more,
                    )
                };
                for rung in SelectRung::LADDER {
                    if !on.runs(capabilities, rung) {
                        continue;
                    }
                    let got = select_outliers_on(client, capabilities, &on, rung).unwrap();
                    let (rows, key_blocks) = extent(&problem.grids);
                    let got = BlockSelection::from_words(
                        [shape.batch, shape.q_heads, rows, key_blocks],
                        integers(client, &got.words),
                        integers(client, &got.counts),
                    )
                    .unwrap();
                    let what = format!("{name} {rung}, {}, {rule:?}, {more}", problem.name);
                    got.validate(&problem.grids, shape.q_heads).expect(&what);
                    for (i, got) in got.to_bools().into_iter().enumerate() {
                        assert!(got >= least[i] && got <= most[i], "{what}: block {i} of all");
                    }
                }
            }
        }
    }
}

#[test]
fn limits_are_refused() {
    let rule = SelectionRule { max_blocks: Some(4), ..SelectionRule::default() };
    let error = OutliersError::check(&rule).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the kernels of outliers take min_blocks up to 1 and no max_blocks, got 1 and Some(4)"
    );
}
