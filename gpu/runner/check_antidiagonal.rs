//! Masses by sums along antidiagonals against their definition in f64, and what they choose against the
//! host's rule, bit for bit.

use half::{bf16, f16};
use prism_bench::Gpu;
use prism_bench::inputs::{Dims, upload_values, value};
use prism_bench::report::Run;
use prism_core::second_order::SubBlocks;
use prism_core::select::{ByMass, MASS_ONE};
use prism_core::selection::WORD_BITS;
use prism_core::{BlockGrid, SelectionRule};
use prism_kernels::select::antidiagonal::{AntidiagonalProblem, antidiagonal_masses};
use prism_kernels::select::{MassesProblem, select_from_masses};
use prism_kernels::{Element, Operand};

use crate::check_attention::push;
use crate::check_outliers::integers;

/// Shape, block and stride.
const CASES: [(Dims, usize, usize); 9] = [
    ([1, 4, 2, 2000, 2000, 128], 128, 8),
    ([2, 4, 1, 1000, 2900, 128], 128, 16),
    ([1, 2, 1, 777, 1501, 64], 128, 4),
    ([1, 3, 3, 1300, 1300, 96], 64, 16),
    ([1, 2, 1, 600, 500, 80], 64, 8),
    ([1, 2, 2, 1, 3000, 128], 256, 8),
    ([1, 2, 1, 1100, 1100, 256], 32, 16),
    ([1, 1, 1, 3, 3, 64], 128, 8),
    ([1, 2, 1, 900, 900, 64], 256, 4),
];

/// Positions of one head.
struct Head<'a> {
    values: &'a [f32],
    dim: usize,
}

impl Head<'_> {
    fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.dim..][..self.dim]
    }
}

/// Masses of the rows by definition, `[rows][causal blocks]`.
fn masses(q: &Head, k: &Head, grid: &BlockGrid, stride: usize, scale: f64) -> Vec<Vec<f64>> {
    let groups = SubBlocks::new(*grid, stride, stride);
    let first = groups.queries().first_block();
    // The score of two groups: query S − 1 − c meets key c, where both are there.
    let score = |a: usize, b: usize| {
        let product = |c: usize| {
            let (query, key) = (a * stride + stride - 1 - c, b * stride + c);
            let there = (grid.first_position()..grid.kv_len()).contains(&query);
            if !there || key >= grid.kv_len() {
                return 0.0;
            }
            let query = q.row(query - grid.first_position() + grid.blind_queries());
            let pairs = query.iter().zip(k.row(key));
            pairs.map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>()
        };
        (0..stride).map(product).sum::<f64>() * scale / stride as f64
    };
    (0..grid.rows())
        .map(|row| {
            let mut masses = vec![0.0; grid.causal_blocks(row)];
            let of_row = groups.of_row(row);
            for a in of_row.clone() {
                let scores: Vec<f64> =
                    (0..groups.causal_keys(a)).map(|b| score(first + a, b)).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
                for (b, score) in scores.iter().enumerate() {
                    let share = (score - largest).exp() / total / of_row.len() as f64;
                    masses[b / groups.keys_per_block()] += share;
                }
            }
            masses
        })
        .collect()
}

/// Every case in both element types, all rows at once and some of them, keys in a cache of more room.
pub fn right(gpu: &Gpu, run: &mut Run) {
    let Gpu { client, capabilities } = gpu;
    for ((dims, block, stride), element) in
        CASES.iter().flat_map(|case| [Element::F16, Element::BF16].map(|element| (*case, element)))
    {
        let [batch, q_heads, kv_heads, q_len, kv_len, dim] = dims;
        let name = format!("antidiagonal {element:?} {dims:?} block {block} stride {stride}");
        let of = |seed, heads: usize, len: usize| -> Vec<f32> {
            let round = |x: f32| match element {
                Element::F16 => f16::from_f32(x).to_f32(),
                _ => bf16::from_f32(x).to_f32(),
            };
            // Positions of a stretch have something in common, so that masses differ.
            let shared = |i: usize| value(seed + 9, i / dim / 40 * dim + i % dim, Element::F32);
            (0..batch * heads * len * dim)
                .map(|i| round((value(seed, i, Element::F32) + 1.5 * shared(i)) as f32))
                .collect()
        };
        let room = kv_len + 24;
        let (q_values, k_values) = (of(1, q_heads, q_len), of(2, kv_heads, room));
        let q = upload_values(gpu, &q_values, [batch, q_heads, q_len, dim], element);
        let k = upload_values(gpu, &k_values, [batch, kv_heads, room, dim], element);
        let k = Operand { shape: [batch, kv_heads, kv_len, dim], ..k };
        let grid = BlockGrid::new(block, q_len, kv_len).expect("a block size in range");
        let scale = 1.3 / (dim as f64).sqrt();
        let want: Vec<Vec<Vec<f64>>> = (0..batch * q_heads)
            .map(|head| {
                let kv_head = head / q_heads * kv_heads + head % q_heads / (q_heads / kv_heads);
                let q = Head { values: &q_values[head * q_len * dim..], dim };
                let k = Head { values: &k_values[kv_head * room * dim..], dim };
                masses(&q, &k, &grid, stride, scale)
            })
            .collect();
        let some = grid.rows() / 3..grid.rows() - grid.rows() / 4;
        // All heads at once, and one by one.
        for (rows, scratch) in [(0..grid.rows(), 64 << 20), (some, 1)] {
            let problem = AntidiagonalProblem::new(&q, &k, &grid, rows.clone(), stride, scale);
            let problem = AntidiagonalProblem { scratch, ..problem };
            if !problem.runs(capabilities) {
                push(run, name.clone(), Err("doesn't run".into()));
                continue;
            }
            let handle = antidiagonal_masses(client, capabilities, &problem);
            let got = integers(gpu, &handle);
            let blocks = grid.causal_blocks(rows.end - 1);
            let (mut worst, mut late) = (0.0f64, 0);
            for (line, masses) in got.chunks(blocks).enumerate() {
                let want = &want[line / rows.len()][rows.start + line % rows.len()];
                for (got, want) in masses.iter().zip(want) {
                    let got = f64::from(*got) / f64::from(MASS_ONE);
                    worst = worst.max((got - want).abs());
                }
                late += masses[want.len()..].iter().filter(|&&mass| mass != 0).count();
            }
            let passed = worst < 1e-4 && late == 0;
            let detail = format!("rows {rows:?}: largest error {worst:.1e}, {late} in the future");
            push(run, name.clone(), if passed { Ok(detail) } else { Err(detail) });

            // What the same masses choose.
            let rule = SelectionRule::default();
            let (heads, words_per_row) = (batch * q_heads, grid.key_blocks().div_ceil(WORD_BITS));
            let target = Some((0.9 * f64::from(MASS_ONE)) as u32);
            let shape = [heads, rows.len(), 1, blocks];
            let by = ByMass::AfterForced(target);
            let problem = MassesProblem::new(
                &handle,
                shape,
                &grid,
                rows.start,
                words_per_row,
                by,
                &rule,
                false,
            );
            let chosen = select_from_masses(client, capabilities, &problem);
            let mut right = vec![0; heads * rows.len() * words_per_row];
            for (line, words) in right.chunks_mut(words_per_row).enumerate() {
                let row = rows.start + line % rows.len();
                let masses = &got[line * blocks..][..grid.causal_blocks(row)];
                let dense = row + rule.dense_last_blocks >= grid.rows();
                rule.select_row_after_forced(masses, target, dense, words);
            }
            let same = integers(gpu, &chosen.words) == right;
            let counts: u32 = integers(gpu, &chosen.counts).iter().sum();
            let ones = right.iter().map(|word| word.count_ones()).sum::<u32>();
            let detail = format!("rows {rows:?}: {counts} of {ones} blocks, the same: {same}");
            let passed = same && counts == ones;
            push(run, format!("{name}, chosen"), if passed { Ok(detail) } else { Err(detail) });
        }
    }
}

/// Scores that are no numbers count for nothing, infinite ones don't spoil a row.
pub fn bad(gpu: &Gpu, run: &mut Run) {
    let Gpu { client, capabilities } = gpu;
    let (len, dim, block, stride) = (900, 64, 128, 8);
    let grid = BlockGrid::new(block, len, len).expect("a block size in range");
    for (name, bad) in [("NaN", f32::NAN), ("infinity", f32::INFINITY)] {
        let mut values: Vec<f32> =
            (0..len * dim).map(|i| value(1, i, Element::BF16) as f32).collect();
        values[300 * dim + 5] = bad;
        let q = upload_values(gpu, &values, [1, 1, len, dim], Element::BF16);
        let problem = AntidiagonalProblem::new(&q, &q, &grid, 0..grid.rows(), stride, 0.125);
        let got = integers(gpu, &antidiagonal_masses(client, capabilities, &problem));
        let blocks = grid.key_blocks();
        let off: Vec<f64> = got
            .chunks(blocks)
            .map(|row| row.iter().map(|&mass| f64::from(mass)).sum::<f64>() / f64::from(MASS_ONE))
            .map(|sum| (sum - 1.0).abs())
            .collect();
        // Row 2 has a group whose every score is bad, with NaN: 15 of 16 groups are left.
        let right = |(row, &off): (usize, &f64)| off < if row == 2 { 0.07 } else { 1e-4 };
        let passed = off.iter().enumerate().all(right);
        let detail = format!("sums of masses are off by {off:?}");
        let name = format!("antidiagonal with {name}");
        push(run, name, if passed { Ok(detail) } else { Err(detail) });
    }
}
