//! Selection: equal to `prism_core` bit for bit on scores that every order of summation gives, and
//! to the unit rung on numbers of every size.

use cubecl::prelude::*;
use cubecl::server::Handle;
use prism_bench::Gpu;
use prism_bench::inputs::value;
use prism_bench::report::Run;
use prism_core::bands::{BandRule, Bands};
use prism_core::{
    AttentionShape, BlockGrid, BlockSelection, Budget, Calibration, Rope, SelectionRule, oracle,
};
use prism_kernels::Element;
use prism_kernels::band_mask::BandMask;
use prism_kernels::select::{SelectProblem, SelectRung, select_blocks_on};

use crate::check_attention::push;

/// The rule on pooled vectors of small integers and factors that are powers of two: every order
/// of summation gives the same scores, so the selections must be equal bit for bit.
pub fn exact(gpu: &Gpu, run: &mut Run) {
    let Gpu { client, capabilities } = gpu;
    let plain = SelectionRule::default();
    let bare = SelectionRule { sink_blocks: 0, recent_blocks: 0, dense_last_blocks: 0, ..plain };
    let rules = [
        plain,
        SelectionRule { budget: Budget::Mass(0.9), ..bare },
        SelectionRule { budget: Budget::TopK(7), ..bare },
        SelectionRule { budget: Budget::TopK(1), min_blocks: 9, ..bare },
        SelectionRule { budget: Budget::Mass(0.8), max_blocks: Some(5), ..plain },
    ];
    let dim = 64;
    let bands = Bands::new(BandRule::Dims { high: 16, low: 64 }, Some(&Rope::new(1e4)), dim, 128)
        .expect("bands of a head");
    let mask = BandMask::new(&bands);
    for key_blocks in [1, 31, 32, 33, 257, 1024, 8192, 9000] {
        let rows = 16.min(key_blocks);
        let (q_len, kv_len) = (rows * 128, key_blocks * 128);
        let shape =
            AttentionShape::new([1, 4, q_len, dim], [1, 2, kv_len, dim], [1, 2, kv_len, dim])
                .expect("a shape");
        let grids = [BlockGrid::new(128, q_len, kv_len).expect("a grid")];
        let whole = |seed, len| -> Vec<f32> {
            (0..len).map(|i| (value(seed, i, Element::F32) * 1.2).round() as f32).collect()
        };
        let (q, k) = (whole(5, 4 * rows * dim), whole(6, 2 * key_blocks * dim));
        let (q_means, k_means) = (
            client.create_from_slice(f32::as_bytes(&q)),
            client.create_from_slice(f32::as_bytes(&k)),
        );
        // 1/√16 and 1/√64.
        let factors: Vec<f32> = (0..4 * rows).flat_map(|_| [0.25, 0.125]).collect();
        let factors = client.create_from_slice(f32::as_bytes(&factors));
        for rule in &rules {
            let want = oracle::select(&q, &k, &shape, &grids, &bands, Calibration::Off, rule);
            let problem = SelectProblem::new(
                &q_means,
                &k_means,
                &factors,
                [4, 2, dim],
                &grids,
                &mask,
                rule,
                false,
            );
            for rung in SelectRung::LADDER {
                if !rung.runs(capabilities, &problem) {
                    continue;
                }
                let got = select_blocks_on(client, capabilities, &problem, rung);
                let (words, counts) = (integers(gpu, &got.words), integers(gpu, &got.counts));
                let differing = differing(&words, want.words());
                let counts_equal = counts == want.counts();
                let name = format!("select {rung:?} {key_blocks} blocks {:?}", rule.budget);
                let detail = format!("{differing} bits differ, counts equal: {counts_equal}");
                push(
                    run,
                    name,
                    if differing == 0 && counts_equal { Ok(detail) } else { Err(detail) },
                );
            }
        }
    }
}

/// Pooled vectors whose rows differ by many powers of two, with zeros, infinities and NaN among them.
/// Rounding of scores may move a block across the mass, which it rarely does; bad numbers leave
/// selections valid and the same each time.
pub fn wild(gpu: &Gpu, run: &mut Run) {
    let Gpu { client, capabilities } = gpu;
    let (heads, rows, key_blocks) = ([4, 2], 64, 300);
    for (dim, bad) in [64, 80, 128, 256].into_iter().flat_map(|dim| [(dim, false), (dim, true)]) {
        let bands = Bands::new(BandRule::Auto, Some(&Rope::new(5e5)), dim, 128).expect("bands");
        let mask = BandMask::new(&bands);
        let grids = [BlockGrid::new(128, rows * 128, key_blocks * 128).expect("a grid")];
        // Of key blocks every 7th tiny, every 11th large; the queries' powers cancel in the factors.
        let of = |seed, lines: usize, size: &dyn Fn(usize) -> f32| -> Vec<f32> {
            (0..lines * dim).map(|i| value(seed, i, Element::F32) as f32 * size(i / dim)).collect()
        };
        let q = of(1, heads[0] * rows, &|line| 2f32.powi((line % 41) as i32 - 20));
        let mut k = of(2, heads[1] * key_blocks, &|line| match line {
            line if line % 7 == 3 => 1e-12,
            line if line % 11 == 5 => 30.0,
            _ => 1.0,
        });
        k[200 * dim..201 * dim].fill(0.0);
        if bad {
            for (line, bad) in [(10, f32::NAN), (60, f32::INFINITY), (110, f32::NEG_INFINITY)] {
                k[line * dim + 5] = bad;
            }
            k[201 * dim..202 * dim].fill(3e38);
        }
        let factors: Vec<f32> = (0..heads[0] * rows)
            .flat_map(|line| [2f32.powi(20 - (line % 41) as i32) / 8.0; 2])
            .collect();
        let [q, k, factors] = [q, k, factors].map(|x| client.create_from_slice(f32::as_bytes(&x)));
        let rule = SelectionRule {
            sink_blocks: 0,
            recent_blocks: 0,
            dense_last_blocks: 0,
            ..SelectionRule::default()
        };
        let shape = [heads[0], heads[1], dim];
        let problem = SelectProblem::new(&q, &k, &factors, shape, &grids, &mask, &rule, false);
        let select = |rung| {
            let got = select_blocks_on(client, capabilities, &problem, rung);
            (integers(gpu, &got.words), integers(gpu, &got.counts))
        };
        let (want, counts) = select(SelectRung::Unit);
        let selected: u32 = counts.iter().sum();
        for rung in SelectRung::LADDER {
            if !rung.runs(capabilities, &problem) {
                continue;
            }
            let (words, counts) = select(rung);
            let differing = differing(&words, &want);
            let detail = format!("{differing} of {selected} blocks differ from the unit rung");
            let valid =
                BlockSelection::from_words([1, heads[0], rows, key_blocks], words.clone(), counts)
                    .and_then(|selection| selection.validate(&grids, heads[0]));
            // Sums that overflow depend on their order, so bad numbers may be told by it.
            let alike = bad || differing * 500 <= selected;
            // Repeated: the same bits.
            let steady = select(rung).0 == words;
            let passed = alike && selected > 0 && steady && valid.is_ok();
            let name = format!("select {rung} d{dim} wild, bad numbers: {bad}");
            push(run, name, if passed { Ok(detail) } else { Err(detail) });
        }
    }
}

fn integers(gpu: &Gpu, handle: &Handle) -> Vec<u32> {
    let bytes = gpu.client.read_one(handle.clone()).expect("the kernel ran");
    bytemuck::cast_slice(&bytes).to_vec()
}

fn differing(a: &[u32], b: &[u32]) -> u32 {
    a.iter().zip(b).map(|(a, b)| (a ^ b).count_ones()).sum()
}
