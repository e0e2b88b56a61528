//! Do the probabilities of the last queries add up by key and by distance?

mod support;

use prism_kernels::select::line_sums;
use support::*;

/// By definition, in f64.
fn expected(scores: &[f32], [heads, rows, len]: [usize; 3], first: usize) -> [Vec<f64>; 2] {
    let mut lines = [vec![0.0; heads * len], vec![0.0; heads * len]];
    for (row, scores) in scores.chunks(len).enumerate() {
        let (head, seen) = (row / rows, len - first - row % rows);
        let scores: Vec<f64> = (scores[..seen].iter())
            .map(|&x| if x.is_nan() { f64::NEG_INFINITY } else { f64::from(x.min(f32::MAX)) })
            .collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if largest == f64::NEG_INFINITY {
            continue;
        }
        let total: f64 = scores.iter().map(|x| (x - largest).exp()).sum();
        for (key, x) in scores.iter().enumerate() {
            let p = (x - largest).exp() / total;
            lines[0][head * len + key] += p;
            lines[1][head * len + seen - 1 - key] += p;
        }
    }
    lines
}

#[test]
fn do_probabilities_add_up_by_key_and_by_distance() {
    let shapes = [([3, 64, 1000], 0), ([2, 7, 130], 5), ([1, 1, 1], 0), ([2, 40, 40], 0)];
    for (shape @ [heads, rows, len], first) in shapes {
        let mut scores: Vec<f32> =
            random(3, heads * rows * len).into_iter().map(|x| x * 4.0).collect();
        if len > 100 {
            scores[5] = f32::NAN;
            scores[len + 7] = f32::INFINITY;
            scores[2 * len..3 * len].fill(f32::NEG_INFINITY);
            scores[3 * len..4 * len].fill(-3e38);
        }
        let want = expected(&scores, shape, first);
        for Bench { name, client, capabilities } in devices() {
            let handle = upload(&client, &scores);
            let lines = line_sums(&client, &capabilities, &handle, shape, first);
            for (what, got, want) in
                [("key", &lines.vertical, &want[0]), ("distance", &lines.slash, &want[1])]
            {
                for (i, (got, want)) in floats(&client, got).iter().zip(want).enumerate() {
                    let off = (f64::from(*got) - want).abs();
                    assert!(
                        off < 2e-5 * (1.0 + want),
                        "{name}, {what} {i} of {shape:?}: {got}, {want}"
                    );
                }
            }
        }
    }
}
