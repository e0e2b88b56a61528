//! A million tokens: what no other test is long enough for.

use std::time::Instant;

use anyhow::Result;
use prism_core::bands::{BandRule, Bands};
use prism_core::{BlockGrid, BlockSelection, Calibration, Rope, SelectionRule};
use prism_kernels::Element;
use prism_kernels::attend::{AttendProblem, AttendRung, Attended, attend_into};
use prism_kernels::band_mask::BandMask;
use prism_kernels::calibrate::calibrate;
use prism_kernels::pool::pool;
use prism_kernels::schedule::schedule;
use prism_kernels::select::{SelectProblem, select_blocks};

use crate::attention::{BLOCK, Shape};
use crate::clock::Time;
use crate::device::Gpu;
use crate::inputs::{exact, read, tensor};
use crate::report::{Check, Log};

/// A million tokens: time, memory, and sampled rows against the definition.
///
/// # Errors
/// A device without bf16 or the memory, or one that fails.
pub fn a_million(gpu: &Gpu, log: &mut Log) -> Result<()> {
    let Gpu { client, capabilities } = gpu;
    let shape = Shape::new(8, 2, 1 << 20, 128, Element::BF16);
    shape.check(gpu)?;
    let Shape { q_heads, kv_heads, len, dim, element } = shape;
    let q = tensor(gpu, 1, [1, q_heads, len, dim], element);
    let k = tensor(gpu, 2, [1, kv_heads, len, dim], element);
    let v = tensor(gpu, 3, [1, kv_heads, len, dim], element);
    let grids = [BlockGrid::new(BLOCK, len, len)?];
    let bands = Bands::new(BandRule::Auto, Some(&Rope::new(5e5)), dim, BLOCK)?;
    let mask = BandMask::new(&bands);
    let heads = [q_heads, kv_heads, dim];
    let rule = SelectionRule { max_blocks: Some(400), ..SelectionRule::default() };
    let estimate = || {
        let pooled = pool(client, capabilities, &q, &k, &grids, &mask);
        let factors = calibrate(
            client,
            capabilities,
            &pooled.0,
            &pooled.1,
            None,
            &grids,
            heads,
            &mask,
            Calibration::Global,
        );
        let problem = SelectProblem::new(
            &pooled.0.means,
            &pooled.1.means,
            &factors,
            heads,
            &grids,
            &mask,
            &rule,
            false,
        );
        (select_blocks(client, capabilities, &problem), pooled, factors)
    };
    let once = |call: &dyn Fn()| {
        call();
        gpu.sync()?;
        let start = Instant::now();
        call();
        gpu.sync()?;
        anyhow::Ok(start.elapsed().as_secs_f64() * 1e3)
    };
    let ms = once(&|| drop(estimate()))?;
    let (selection, pooled, factors) = estimate();
    log.record(shape.record("pool + select", "plane", 1.0, Time { sustained: ms, burst: ms }))?;

    let bytes = client.read_one(selection.words.clone())?;
    let words = bytemuck::cast_slice::<_, u32>(&bytes).to_vec();
    let bytes = client.read_one(selection.counts.clone())?;
    let counts = bytemuck::cast_slice::<_, u32>(&bytes).to_vec();
    let rows = selection.rows;
    let host = BlockSelection::from_words([1, q_heads, rows, rows], words, counts)?;
    host.validate(&grids, q_heads)?;
    // Rows of the selection against the rule, from the means that the device made.
    let (q_means, k_means, factors) = (
        read(gpu, &pooled.0.means, Element::F32)?,
        read(gpu, &pooled.1.means, Element::F32)?,
        read(gpu, &factors, Element::F32)?,
    );
    let mut differing = 0;
    let sampled = [(0, 5), (1, 1000), (3, 4096), (5, 8000), (7, 8190)];
    for (head, row) in sampled {
        let line = head * rows + row;
        let masses: Vec<Vec<u32>> = (0..2)
            .map(|z| {
                let scores: Vec<f32> = (0..=row)
                    .map(|u| {
                        let key = (head * kv_heads / q_heads) * rows + u;
                        let dims = if z == 0 { bands.high() } else { bands.low() };
                        let dot: f64 = dims
                            .iter()
                            .map(|&c| {
                                f64::from(q_means[line * dim + c])
                                    * f64::from(k_means[key * dim + c])
                            })
                            .sum();
                        (dot * f64::from(factors[line * 2 + z])) as f32
                    })
                    .collect();
                let mut masses = Vec::new();
                prism_core::select::integer_masses(&scores, &mut masses);
                masses
            })
            .collect();
        let mut bits = vec![0u32; host.words_per_row()];
        rule.select_row(&masses, row + 1, false, &mut bits);
        let got = &host.words()[line * bits.len()..][..bits.len()];
        differing += bits.iter().zip(got).map(|(a, b)| (a ^ b).count_ones()).sum::<u32>();
    }
    let of: u32 = sampled.iter().map(|&(head, row)| host.counts()[head * rows + row]).sum();
    log.check(Check {
        name: "a million tokens: sampled rows of the selection".into(),
        passed: differing <= of / 50,
        detail: format!("{differing} of {of} blocks differ (rounding of scores at the cut)"),
    })?;

    let order = schedule(client, capabilities, &selection, [1, q_heads, kv_heads], rows);
    let attended = Attended { out: client.empty(q_heads * len * dim * element.size()), lse: None };
    let scale = 1.0 / (dim as f64).sqrt();
    let problem =
        AttendProblem::new(&q, &k, &v, &grids, Some(&selection), Some(&order), scale, false);
    let rung = AttendRung::best(capabilities, &problem);
    let ms = once(&|| attend_into(client, capabilities, &problem, &attended, rung))?;
    let tiles: f64 = host.counts().iter().map(|&c| f64::from(c)).sum();
    let causal = grids[0].causal_pairs() as f64 * q_heads as f64;
    let mut record = shape.record(
        "attend",
        &rung.to_string(),
        tiles / causal,
        Time { sustained: ms, burst: ms },
    );
    record.tflops = Some(shape.rate(tiles, ms));
    record.note = shape.extra_memory();
    log.record(record)?;

    let out = client.read_one(attended.out.clone())?;
    let out: &[half::bf16] = bytemuck::cast_slice(&out);
    let (mut error, mut norm) = (0.0, 0.0);
    for (h, i) in [(0, 0), (1, 127_777), (4, 524_289), (7, len - 1 - BLOCK * 3)] {
        let dims = [1, q_heads, kv_heads, len, len, dim];
        let (want, _) = exact(dims, len, &grids, Some(&host), (0, h, i), scale, element);
        let got = &out[(h * len + i) * dim..][..dim];
        for (got, want) in got.iter().zip(want) {
            error += (got.to_f64() - want).powi(2);
            norm += want * want;
        }
    }
    let relative = (error / norm).sqrt();
    log.check(Check {
        name: "a million tokens: sampled rows of the attention".into(),
        passed: relative < 6e-3,
        detail: format!("relative error {relative:.2e}"),
    })
}
