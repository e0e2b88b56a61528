//! Random attention problems and what plain f64 loops make of them.

use burn_prism::flex::attend::{AttendProblem, Blocks, attend};
use burn_prism::flex::view::View;
use prism_core::BlockGrid;
use prism_core::selection::{WORD_BITS, extent};

/// A small generator of reproducible numbers.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (self.0 >> 33) as u32
    }

    /// Roughly normal, of unit variance.
    fn normal(&mut self) -> f32 {
        (0..6).map(|_| self.bits() as f32 / (1u64 << 30) as f32 - 1.0).sum::<f32>() / 2f32.sqrt()
    }

    fn tensor(&mut self, shape: [usize; 4], scale: f32) -> Vec<f32> {
        (0..shape.iter().product()).map(|_| self.normal() * scale).collect()
    }
}

/// One case: contiguous tensors of f32 and the selection as bools.
pub(super) struct Case {
    pub(super) q_shape: [usize; 4],
    pub(super) k_shape: [usize; 4],
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    pub(super) grids: Vec<BlockGrid>,
    pub(super) scale: f32,
    /// Words, words a row and rows of the selection; `None` is dense.
    pub(super) words: Option<(Vec<u32>, usize, usize)>,
}

impl Case {
    pub(super) fn new(
        seed: u64,
        (q_heads, kv_heads, dim): (usize, usize, usize),
        block: usize,
        lengths: &[(usize, usize)],
        density: Option<f64>,
    ) -> Self {
        let mut random = Random(seed);
        let (q_len, kv_len) = lengths.iter().fold((0, 0), |a, b| (a.0.max(b.0), a.1.max(b.1)));
        let q_shape = [lengths.len(), q_heads, q_len, dim];
        let k_shape = [lengths.len(), kv_heads, kv_len, dim];
        let [mut q, mut k, mut v] = [q_shape, k_shape, k_shape].map(|s| random.tensor(s, 1.0));
        for (b, &(q_seen, kv_seen)) in lengths.iter().enumerate() {
            for (x, heads, len, seen) in [
                (&mut q, q_heads, q_len, q_seen),
                (&mut k, kv_heads, kv_len, kv_seen),
                (&mut v, kv_heads, kv_len, kv_seen),
            ] {
                for h in 0..heads {
                    x[(b * heads + h) * len * dim..][seen * dim..len * dim].fill(f32::NAN);
                }
            }
        }
        let grids: Vec<_> =
            lengths.iter().map(|&(q, kv)| BlockGrid::new(block, q, kv).unwrap()).collect();
        let words = density.map(|density| {
            let (rows, key_blocks) = extent(&grids);
            let width = key_blocks.div_ceil(WORD_BITS);
            let mut words = vec![0; lengths.len() * q_heads * rows * width];
            for word in &mut words {
                for bit in 0..WORD_BITS {
                    let on = f64::from(random.bits()) < density * f64::from(1u32 << 31);
                    *word |= u32::from(on) << bit;
                }
            }
            (words, width, rows)
        });
        let scale = (dim as f32).sqrt().recip();
        Self { q_shape, k_shape, q, k, v, grids, scale, words }
    }

    pub(super) fn blocks(&self) -> Blocks<'_> {
        match &self.words {
            None => Blocks::Dense,
            Some((words, words_per_row, rows)) => {
                Blocks::Selected { words, words_per_row: *words_per_row, rows: *rows }
            }
        }
    }

    pub(super) fn problem(&self) -> AttendProblem<'_, f32> {
        AttendProblem {
            q: View::contiguous(&self.q, self.q_shape).unwrap(),
            k: View::contiguous(&self.k, self.k_shape).unwrap(),
            v: View::contiguous(&self.v, self.k_shape).unwrap(),
            grids: &self.grids,
            blocks: self.blocks(),
            scale: self.scale,
            want_lse: true,
        }
    }

    pub(super) fn reads(&self, b: usize, h: usize, i: usize, j: usize) -> bool {
        let grid = &self.grids[b];
        let seen = i < grid.q_len() && j < grid.visible_keys(i);
        seen && self.words.as_ref().is_none_or(|(words, width, rows)| {
            let row = (grid.visible_keys(i) - 1) / grid.block() - grid.first_block();
            let (line, v) = (b * self.q_shape[1] + h, j / grid.block());
            words[(line * rows + row) * width + v / 32] >> (v % 32) & 1 == 1
        })
    }

    fn expected(&self) -> (Vec<f64>, Vec<f64>) {
        let [batch, q_heads, q_len, dim] = self.q_shape;
        let [_, kv_heads, kv_len, _] = self.k_shape;
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        for line in 0..batch * q_heads * q_len {
            let (i, h, b) = (line % q_len, line / q_len % q_heads, line / q_len / q_heads);
            let kv_line = b * kv_heads + h / (q_heads / kv_heads);
            let key = |j: usize| (kv_line * kv_len + j) * dim..(kv_line * kv_len + j + 1) * dim;
            let query = &self.q[line * dim..][..dim];
            let mut scores = Vec::new();
            for j in (0..kv_len).filter(|&j| self.reads(b, h, i, j)) {
                let products = query.iter().zip(&self.k[key(j)]);
                let dot: f64 = products.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                scores.push((j, dot * f64::from(self.scale)));
            }
            let max = scores.iter().fold(f64::NEG_INFINITY, |max, &(_, s)| s.max(max));
            let total: f64 = scores.iter().map(|&(_, score)| (score - max).exp()).sum();
            let mut row = vec![0.0; dim];
            for &(j, score) in &scores {
                for (sum, &value) in row.iter_mut().zip(&self.v[key(j)]) {
                    *sum += (score - max).exp() / total * f64::from(value);
                }
            }
            out.extend(row);
            lse.push(if scores.is_empty() { f64::NEG_INFINITY } else { max + total.ln() });
        }
        (out, lse)
    }

    pub(super) fn check(&self, limit: f64) {
        let (out, lse) = attend(&self.problem()).unwrap();
        self.compare(&out, &lse.unwrap(), limit);
    }

    pub(super) fn compare(&self, out: &[f32], lse: &[f32], limit: f64) {
        let (expected, expected_lse) = self.expected();
        assert_eq!((out.len(), lse.len()), (expected.len(), expected_lse.len()));
        let largest = expected.iter().fold(1.0, |max: f64, value| max.max(value.abs()));
        for (i, (&got, &want)) in out.iter().zip(&expected).enumerate() {
            let error = (f64::from(got) - want).abs() / largest;
            assert!(error <= limit, "element {i}: {got}, expected {want}");
        }
        for (i, (&got, &want)) in lse.iter().zip(&expected_lse).enumerate() {
            let error = (f64::from(got) - want).abs() / want.abs().max(1.0);
            assert!(f64::from(got) == want || error <= limit, "LSE {i}: {got}, expected {want}");
        }
    }
}
