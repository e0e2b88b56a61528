//! Rotation of Q and K against the definition in f64, and what is pooled beside it against `pool`.

use prism_bench::Gpu;
use prism_bench::inputs::{Dims, poisoned, tensor, value};
use prism_bench::report::Run;
use prism_core::bands::{BandRule, Bands};
use prism_core::{Rope, RopeLayout};
use prism_kernels::band_mask::BandMask;
use prism_kernels::pool::{Pooled, pool};
use prism_kernels::rotate::{RotaryTable, RotateProblem, rotate_and_pool};
use prism_kernels::{Element, Operand};
use rayon::prelude::*;

use crate::check::values;
use crate::check_attention::{grids, push};

/// What a scale does to Q; a power of two, so that it rounds nothing.
const FACTOR: f64 = 0.25;

type Lengths = Option<Vec<(usize, usize)>>;

pub fn rotation(gpu: &Gpu, run: &mut Run) {
    let cases: [(Dims, usize, usize, Lengths); 5] = [
        ([1, 8, 2, 1000, 1000, 128], 128, 128, None),
        ([1, 7, 1, 700, 1500, 64], 128, 64, None),
        ([2, 6, 3, 300, 500, 80], 48, 32, Some(vec![(300, 500), (129, 200)])),
        ([1, 2, 2, 300, 300, 256], 128, 64, None),
        ([1, 3, 1, 200, 200, 96], 16, 6, None),
    ];
    for (dims, block, rotary_dim, lengths) in cases {
        for element in [Element::F32, Element::F16, Element::BF16] {
            for layout in [RopeLayout::RotateHalf, RopeLayout::Interleaved] {
                let rope = Rope { layout, rotary_dim: Some(rotary_dim), ..Rope::new(500_000.0) };
                let result = rotated(gpu, dims, block, lengths.as_deref(), element, rope);
                let ragged = if lengths.is_some() { "ragged" } else { "" };
                let name = format!("rotate {layout:?} {rotary_dim} {element:?} {dims:?} {ragged}");
                push(run, name, result);
            }
        }
    }
}

fn rotated(
    gpu: &Gpu,
    dims: Dims,
    block: usize,
    lengths: Option<&[(usize, usize)]>,
    element: Element,
    rope: Rope,
) -> Result<String, String> {
    let Gpu { client, capabilities } = gpu;
    let [batch, q_heads, kv_heads, q_len, kv_len, dim] = dims;
    let grids = grids(dims, block, lengths);
    let bands = Bands::new(BandRule::Auto, Some(&rope), dim, block).map_err(|e| e.to_string())?;
    let mask = BandMask::new(&bands);
    let table = RotaryTable::of(client, &rope, dim, kv_len).map_err(|e| e.to_string())?;
    let q = tensor(gpu, 1, [batch, q_heads, q_len, dim], element);
    let k = tensor(gpu, 2, [batch, kv_heads, kv_len, dim], element);
    let plain = RotateProblem::new(&q, &k, &table, &grids, &mask);
    let scaled = RotateProblem { prescale: Some(FACTOR * std::f64::consts::LN_2), ..plain.clone() };
    let run = |problem| rotate_and_pool(client, capabilities, problem).map_err(|e| e.to_string());
    let (plain, scaled) = (run(&plain)?, run(&scaled)?);

    let query = |b: usize, i: usize| {
        let grid = &grids[b];
        let position = (i + grid.kv_len()).checked_sub(grid.q_len());
        position.filter(|_| i < grid.q_len())
    };
    let key = |b: usize, i: usize| (i < grids[b].kv_len()).then_some(i);
    let want_q = turned(1, q.shape, element, &rope, query)?;
    let want_k = turned(2, k.shape, element, &rope, key)?;
    let [got_q, got_scaled, got_k] =
        [&plain.q, &scaled.q, &plain.k].map(|x| values(gpu, &x.handle, element));
    let limit = match element {
        Element::F32 => 2e-6,
        Element::F16 => 6e-4,
        Element::BF16 => 4.5e-3,
    };
    let mut worst = 0.0f64;
    for (name, got, want) in [("q", &got_q, &want_q), ("k", &got_k, &want_k)] {
        let error =
            |(got, want): (&f32, &f64)| (f64::from(*got) - want).abs() / want.abs().max(1.0);
        let error = got.iter().zip(want).map(error).fold(0.0, |a, b| if b <= a { a } else { b });
        if got.len() != want.len() || error.is_nan() || error > limit {
            return Err(format!("{name}: error {error:.1e}"));
        }
        worst = worst.max(error);
    }
    // Even f32 rounds log2 e · ln 2.
    let off = |(scaled, plain): (&f32, &f32)| {
        (f64::from(*scaled) - f64::from(*plain) * FACTOR).abs()
            > limit * f64::from(plain.abs()) + 1e-6
    };
    if got_scaled.iter().zip(&got_q).any(off) {
        return Err("the scaled q is no multiple of q".into());
    }

    let (pooled_q, pooled_k) = pool(client, capabilities, &plain.q, &plain.k, &grids, &mask);
    let numbers = |pooled: &Pooled| {
        [&pooled.means, &pooled.energy].map(|handle| values(gpu, handle, Element::F32))
    };
    let same = |name: &str, got: &Pooled, want: &Pooled| {
        let off = |(got, want): (&f32, &f32)| {
            let error = (got - want).abs();
            error.is_nan() || error > 1e-5 * want.abs().max(1.0)
        };
        let differ = |(got, want): (&Vec<f32>, &Vec<f32>)| got.iter().zip(want).any(off);
        let (got, want) = (numbers(got), numbers(want));
        if got.iter().zip(&want).any(differ) {
            Err(format!("pooled {name} differs"))
        } else {
            Ok(())
        }
    };
    same("q", &plain.pooled_q, &pooled_q)?;
    same("k", &plain.pooled_k, &pooled_k)?;
    if numbers(&scaled.pooled_q) != numbers(&plain.pooled_q) {
        return Err("the scale changes what is pooled of q".into());
    }

    // Keys of a whole prompt into a cache with room.
    if q_len == kv_len && lengths.is_none() {
        let room = kv_len + 37;
        let handle = poisoned(gpu, batch * kv_heads * room * dim, element);
        let whole = Operand::contiguous(handle, [batch, kv_heads, room, dim], element);
        let cache = Operand { shape: k.shape, ..whole };
        let problem = RotateProblem::new(&q, &k, &table, &grids, &mask);
        let cached = run(&RotateProblem { cache: Some(&cache), ..problem })?;
        let held = values(gpu, &cached.k.handle, element);
        for (line, want) in got_k.chunks_exact(kv_len * dim).enumerate() {
            let (got, rest) = held[line * room * dim..][..room * dim].split_at(kv_len * dim);
            if got != want || !rest.iter().all(|x| x.is_nan()) {
                return Err(format!("head {line} of the cache differs"));
            }
        }
        same("cache", &cached.pooled_k, &pooled_k)?;
    }
    Ok(format!("error {worst:.1e}"))
}

/// Every row by definition; 0 where `position` says none.
fn turned(
    seed: u32,
    [batch, heads, len, dim]: [usize; 4],
    element: Element,
    rope: &Rope,
    position: impl Fn(usize, usize) -> Option<usize> + Sync,
) -> Result<Vec<f64>, String> {
    let rotary = rope.rotary_dim(dim).map_err(|e| e.to_string())?;
    let inv_freq = rope.inv_freq(dim).map_err(|e| e.to_string())?;
    let rows = (0..batch * heads * len).into_par_iter().flat_map_iter(|line| {
        let mut row: Vec<f64> = (0..dim).map(|c| value(seed, line * dim + c, element)).collect();
        match position(line / len / heads, line % len) {
            Some(position) => {
                for (j, freq) in inv_freq.iter().enumerate() {
                    let (sin, cos) = (freq * position as f64).sin_cos();
                    let [a, b] = rope.pair(j, rotary);
                    let (x, y) = (row[a], row[b]);
                    (row[a], row[b]) = (x * cos - y * sin, x * sin + y * cos);
                }
            }
            None => row.fill(0.0),
        }
        row
    });
    Ok(rows.collect())
}
