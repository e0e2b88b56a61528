//! Does Flex's native attention compute what plain f64 loops do?
#![cfg(feature = "flex")]

mod cases;

use burn_prism::flex::attend::{AttendProblem, Attended, Blocks, attend};
use burn_prism::flex::view::{Element, View};
use half::{bf16, f16};
use prism_core::BlockGrid;

use self::cases::Case;

const LIMIT: f64 = 2e-6;

#[test]
fn every_length_and_block_size() {
    for block in [1, 16, 64, 100, 128] {
        for len in [1, 2, 63, 127, 128, 129, 300, 515] {
            for density in [None, Some(0.4)] {
                Case::new(len as u64, (2, 1, 16), block, &[(len, len)], density).check(LIMIT);
            }
        }
    }
}

#[test]
fn every_head_dim_and_group() {
    for dim in [1, 8, 33, 40, 64, 80, 96, 128, 256] {
        for (q_heads, kv_heads) in [(1, 1), (6, 2), (4, 1), (7, 1)] {
            let heads = (q_heads, kv_heads, dim);
            Case::new(dim as u64, heads, 64, &[(150, 150)], Some(0.6)).check(LIMIT);
        }
    }
}

#[test]
fn queries_and_keys_of_different_lengths() {
    let lengths = [(1, 300), (70, 300), (200, 129), (300, 1), (5, 0), (0, 5), (0, 0), (129, 200)];
    for block in [1, 16, 100, 128, 1000] {
        for pair in lengths {
            Case::new(3, (2, 1, 8), block, &[pair], None).check(LIMIT);
            Case::new(4, (2, 1, 8), block, &[pair], Some(0.5)).check(LIMIT);
        }
    }
    // Ragged, with NaN in all padding.
    Case::new(5, (6, 2, 24), 64, &lengths, None).check(LIMIT);
    Case::new(6, (6, 2, 24), 64, &lengths, Some(0.3)).check(LIMIT);
}

#[test]
fn strides_make_no_difference() {
    let case = Case::new(7, (4, 2, 40), 32, &[(90, 90), (70, 80)], Some(0.5));
    let plain = attend(&case.problem()).unwrap();
    // Dimensions reversed, and the length backwards.
    let reversed = |x: &[f32], [b, h, l, d]: [usize; 4]| {
        let mut y = vec![0.0; x.len()];
        for (i, &value) in x.iter().enumerate() {
            let (c, at, head, batch) = (i % d, i / d % l, i / d / l % h, i / d / l / h);
            y[((c * l + l - 1 - at) * h + head) * b + batch] = value;
        }
        y
    };
    let (q, k) = (reversed(&case.q, case.q_shape), reversed(&case.k, case.k_shape));
    let v = reversed(&case.v, case.k_shape);
    let view = |x, [b, h, l, d]: [usize; 4]| {
        let strides = [1, b, h * b, l * h * b].map(|stride| stride as isize);
        View::new(
            x,
            [b, h, l, d],
            [strides[0], strides[1], -strides[2], strides[3]],
            (l - 1) * h * b,
        )
    };
    let problem = AttendProblem {
        q: view(&q, case.q_shape).unwrap(),
        k: view(&k, case.k_shape).unwrap(),
        v: view(&v, case.k_shape).unwrap(),
        ..case.problem()
    };
    assert_eq!(attend(&problem).unwrap(), plain);
    // One head broadcast over batch and heads.
    let [b, h, l, d] = case.k_shape;
    let one = View::new(&case.k, case.k_shape, [0, 0, d as isize, 1], 0).unwrap();
    let copies = case.k[..l * d].repeat(b * h);
    let copied = View::contiguous(&copies, case.k_shape).unwrap();
    let run = |k| attend(&AttendProblem { k, ..case.problem() }).unwrap();
    assert_eq!(run(one), run(copied));
}

fn halves<T: Element>(limit: f64) {
    let mut case = Case::new(8, (3, 1, 64), 32, &[(100, 100), (33, 64)], Some(0.5));
    let narrow = |x: &mut [f32]| {
        let mut y = vec![T::default(); x.len()];
        T::narrow(x, &mut y);
        T::widen(&y, x);
        assert!(x.iter().zip(&y).all(|(x, y)| x.to_bits() == y.to_f32().to_bits()));
        y
    };
    let (q, k, v) = (narrow(&mut case.q), narrow(&mut case.k), narrow(&mut case.v));
    let (out, lse) = attend(&AttendProblem {
        q: View::contiguous(&q, case.q_shape).unwrap(),
        k: View::contiguous(&k, case.k_shape).unwrap(),
        v: View::contiguous(&v, case.k_shape).unwrap(),
        grids: &case.grids,
        blocks: case.blocks(),
        scale: case.scale,
        want_lse: true,
    })
    .unwrap();
    let mut wide = vec![0.0; out.len()];
    T::widen(&out, &mut wide);
    case.compare(&wide, &lse.unwrap(), limit);
}

#[test]
fn half_precision_rounds_only_the_output() {
    halves::<f16>(5e-4);
    halves::<bf16>(4e-3);
}

#[test]
fn large_scores_and_spikes() {
    let mut case = Case::new(9, (2, 1, 64), 64, &[(200, 200)], None);
    case.q.iter_mut().for_each(|x| *x *= 100.0);
    case.k.iter_mut().for_each(|x| *x *= 30.0);
    // Scores of 1e4 carry f32 errors of about 1e-3.
    case.check(1e-2);
    let mut case = Case::new(10, (2, 1, 64), 64, &[(200, 200)], Some(0.5));
    case.k[70 * 64..71 * 64].iter_mut().for_each(|x| *x *= 50.0);
    case.check(1e-5);
}

/// Bits, so that NaN equals itself.
fn bits(attended: Attended<f32>) -> (Vec<u32>, Vec<u32>) {
    let bits = |x: Vec<f32>| x.into_iter().map(f32::to_bits).collect();
    (bits(attended.0), bits(attended.1.unwrap_or_default()))
}

#[test]
fn a_bad_key_or_value_reaches_only_the_rows_that_read_it() {
    let dim = 40;
    for density in [None, Some(0.5)] {
        let clean = Case::new(12, (3, 1, dim), 32, &[(150, 150)], density);
        let (plain, plain_lse) = bits(attend(&clean.problem()).unwrap());
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e38] {
            for j in [0, 40, 77, 149] {
                let mut key = Case::new(12, (3, 1, dim), 32, &[(150, 150)], density);
                key.k[j * dim..(j + 1) * dim].fill(bad);
                let mut value = Case::new(12, (3, 1, dim), 32, &[(150, 150)], density);
                value.v[j * dim + 3] = bad;
                for case in [key, value] {
                    let (out, lse) = bits(attend(&case.problem()).unwrap());
                    for line in 0..3 * 150 {
                        if !case.reads(0, line / 150, line % 150, j) {
                            let row = line * dim..(line + 1) * dim;
                            assert_eq!(out[row.clone()], plain[row], "{bad} at {j}, row {line}");
                            assert_eq!(lse[line], plain_lse[line]);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn infinite_scores() {
    // Every query is (1, 0, …): the score of a key is its first element.
    let score = |scores: [f32; 4]| {
        let dim = 8;
        let mut case = Case::new(13, (1, 1, dim), 2, &[(4, 4)], None);
        case.q.chunks_exact_mut(dim).for_each(|q| q.fill(0.0));
        case.q.chunks_exact_mut(dim).for_each(|q| q[0] = 1.0);
        for (k, score) in case.k.chunks_exact_mut(dim).zip(scores) {
            k.fill(0.0);
            k[0] = score;
        }
        let (out, lse) = attend(&case.problem()).unwrap();
        (out.chunks(dim).map(|row| row[0]).collect::<Vec<_>>(), lse.unwrap())
    };
    let low = f32::NEG_INFINITY;
    let (out, lse) = score([low, low, 0.0, low]);
    assert_eq!((out[0], out[1], lse[0], lse[1]), (0.0, 0.0, low, low));
    assert_eq!((lse[2], lse[3]), (0.0, 0.0));
    for bad in [f32::INFINITY, f32::NAN] {
        let (out, lse) = score([0.0, 0.0, bad, 0.0]);
        assert!(out[0].is_finite() && out[1].is_finite() && lse[1].is_finite());
        assert!(out[2].is_nan() && out[3].is_nan());
    }
}

#[test]
fn bits_depend_neither_on_threads_nor_on_how_dense_is_said() {
    let mut case = Case::new(14, (6, 2, 64), 16, &[(300, 300), (90, 200)], Some(2.0));
    let full = bits(attend(&case.problem()).unwrap());
    let two = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for pool in [one, two] {
        assert_eq!(pool.install(|| bits(attend(&case.problem()).unwrap())), full);
    }
    case.words = None;
    assert_eq!(bits(attend(&case.problem()).unwrap()), full);
}

#[test]
fn what_does_not_fit_is_refused() {
    let case = Case::new(15, (2, 1, 8), 16, &[(40, 40)], Some(0.5));
    let problem = case.problem();
    assert!(attend(&AttendProblem { grids: &[], ..problem }).is_err());
    let long = [BlockGrid::new(16, 41, 40).unwrap()];
    assert!(attend(&AttendProblem { grids: &long, ..problem }).is_err());
    let blocks = Blocks::Selected { words: &[0; 5], words_per_row: 1, rows: 3 };
    assert!(attend(&AttendProblem { blocks, ..problem }).is_err());
    assert!(attend(&AttendProblem { k: problem.q, ..problem }).is_err());
}
