//! Timings: pool, select and attend over length, rung and density.
//!
//! Sustained: the median of windows of at least 0.35 s of back-to-back launches. Burst: a few
//! launches after idling, before the card reaches its power limit.

use std::time::{Duration, Instant};

use anyhow::Result;
use gpu::report::{Record, Run};
use prism_core::bands::{BandRule, Bands};
use prism_core::selection::extent;
use prism_core::{BlockGrid, Calibration, Rope, SelectionRule};
use prism_kernels::Element;
use prism_kernels::attend::{AttendProblem, AttendRung, Attended, attend_into};
use prism_kernels::band_mask::BandMask;
use prism_kernels::calibrate::calibrate;
use prism_kernels::pool::pool;
use prism_kernels::schedule::schedule;
use prism_kernels::select::{SelectProblem, SelectRung, select_blocks, select_blocks_on};

use crate::Gpu;
use crate::check::{exact, random_selection, upload};
use crate::data::{poisoned, read, tensor};

const WINDOW: Duration = Duration::from_millis(350);
const BLOCK: usize = 128;

/// What is timed, and for how long.
pub struct Budget {
    /// Seconds in all.
    pub seconds: f64,
    /// Also a prompt of a million tokens.
    pub million: bool,
    /// Steps to time, as the records name them; all if empty.
    pub only: Vec<String>,
    /// Longest prompt.
    pub longest: usize,
}

struct Clock<'a> {
    gpu: &'a Gpu,
    end: Instant,
    only: &'a [String],
}

impl Clock<'_> {
    fn sync(&self) {
        cubecl::future::block_on(self.gpu.client.sync()).expect("the kernels ran");
    }

    fn batch(&self, launches: usize, call: &impl Fn()) -> f64 {
        let start = Instant::now();
        (0..launches).for_each(|_| call());
        self.sync();
        start.elapsed().as_secs_f64() * 1e3 / launches as f64
    }

    /// Milliseconds a call, sustained and in a burst; `None` when time is up or nobody asked.
    fn time(&self, what: &str, call: impl Fn()) -> Option<(f64, f64)> {
        let asked = self.only.is_empty() || self.only.iter().any(|only| only == what);
        if !asked || Instant::now() > self.end {
            return None;
        }
        call();
        self.sync();
        let once = self.batch(1, &call).max(1e-3);
        std::thread::sleep(Duration::from_millis(700));
        let burst = self.batch(((15.0 / once) as usize).clamp(1, 200), &call);
        let launches = ((WINDOW.as_secs_f64() * 1e3 / burst.min(once)) as usize + 1).min(20_000);
        let mut windows: Vec<f64> = (0..3).map(|_| self.batch(launches, &call)).collect();
        windows.sort_by(f64::total_cmp);
        Some((windows[1], burst))
    }
}

struct Shape {
    q_heads: usize,
    kv_heads: usize,
    len: usize,
    dim: usize,
    element: Element,
}

impl Shape {
    fn record(&self, what: &str, rung: &str, density: f64, (ms, burst): (f64, f64)) -> Record {
        Record {
            what: what.into(),
            rung: rung.into(),
            dtype: format!("{:?}", self.element).to_lowercase(),
            batch: 1,
            q_heads: self.q_heads,
            kv_heads: self.kv_heads,
            q_len: self.len,
            kv_len: self.len,
            head_dim: self.dim,
            density,
            ms,
            ms_burst: Some(burst),
            tflops: None,
            gbps: None,
            peer: false,
            note: String::new(),
        }
    }

    /// What a sparse call allocates besides its output: means, energies, factors, selection, order.
    fn extra_memory(&self) -> String {
        let blocks = self.len.div_ceil(BLOCK);
        let means = (self.q_heads + self.kv_heads) * blocks * (self.dim * 4 + 16);
        let rows = self.q_heads * blocks;
        let bytes = means + rows * (8 + blocks.div_ceil(32) * 4 + 4 + 4);
        format!("{:.1} MiB besides the output", bytes as f64 / f64::from(1 << 20))
    }

    /// Operations of attention over `tiles` pairs of blocks, all heads counted.
    fn rate(&self, tiles: f64, ms: f64) -> f64 {
        4.0 * (self.dim * BLOCK * BLOCK) as f64 * tiles / ms / 1e9
    }
}

pub fn time(
    gpu: &Gpu,
    budget: &Budget,
    run: &mut Run,
    write: impl Fn(&Run) -> Result<()>,
) -> Result<()> {
    let end = Instant::now() + Duration::from_secs_f64(budget.seconds);
    let clock = Clock { gpu, end, only: &budget.only };
    let mut add = |run: &mut Run, record: Record| -> Result<()> {
        println!(
            "{:>7} {:>6} {} d{} {:>7} tokens density {:.3}: {:.4} ms (burst {:.4}) {} {}",
            record.what,
            record.rung,
            record.dtype,
            record.head_dim,
            record.q_len,
            record.density,
            record.ms,
            record.ms_burst.unwrap_or(0.0),
            record.tflops.map_or(String::new(), |x| format!("{x:.0} TFLOP/s")),
            record.gbps.map_or(String::new(), |x| format!("{x:.0} GB/s")),
        );
        run.records.push(record);
        write(run)
    };
    let shapes = [(32, 128), (128, 128), (8, 128), (32, 64)];
    for (k, dim) in shapes.into_iter().filter(|(k, _)| k * 1024 <= budget.longest) {
        let shape = Shape { q_heads: 32, kv_heads: 8, len: k * 1024, dim, element: Element::BF16 };
        layer(&clock, &shape, run, &mut add)?;
    }
    let shape = Shape { q_heads: 32, kv_heads: 8, len: 4096, dim: 128, element: Element::F32 };
    layer(&clock, &shape, run, &mut add)?;
    if budget.million {
        a_million(&clock, run, &mut add)?;
    }
    Ok(())
}

fn layer(
    clock: &Clock,
    shape: &Shape,
    run: &mut Run,
    add: &mut impl FnMut(&mut Run, Record) -> Result<()>,
) -> Result<()> {
    let Gpu { client, capabilities } = clock.gpu;
    let &Shape { q_heads, kv_heads, len, dim, element } = shape;
    let q = tensor(clock.gpu, 1, [1, q_heads, len, dim], element);
    let k = tensor(clock.gpu, 2, [1, kv_heads, len, dim], element);
    let v = tensor(clock.gpu, 3, [1, kv_heads, len, dim], element);
    let grids = [BlockGrid::new(BLOCK, len, len)?];
    let bands = Bands::new(BandRule::Auto, Some(&Rope::new(5e5)), dim, BLOCK)?;
    let mask = BandMask::new(&bands);
    let heads = [q_heads, kv_heads, dim];

    let pooled = pool(client, capabilities, &q, &k, &grids, &mask);
    if let Some(time) =
        clock.time("pool", || drop(pool(client, capabilities, &q, &k, &grids, &mask)))
    {
        let mut record = shape.record("pool", "plane", 1.0, time);
        let bytes = (q_heads + kv_heads) * len * dim * element.size();
        record.gbps = Some(bytes as f64 / time.0 / 1e6);
        add(run, record)?;
    }
    let rule = SelectionRule::default();
    let calibrated = || {
        calibrate(
            client,
            capabilities,
            &pooled.0,
            &pooled.1,
            None,
            &grids,
            heads,
            &mask,
            Calibration::Global,
        )
    };
    let factors = calibrated();
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
    let selected = select_blocks(client, capabilities, &problem);
    if let Some(time) = clock.time("calibrate", || drop(calibrated())) {
        add(run, shape.record("calibrate", "unit", 1.0, time))?;
    }
    if let Some(time) = clock.time("select", || drop(select_blocks(client, capabilities, &problem)))
    {
        add(run, shape.record("select", "plane", 1.0, time))?;
    }
    // Rows that read everything are scored and not searched.
    let unsearched = SelectionRule { dense_last_blocks: usize::MAX, ..rule };
    let scored = SelectProblem { rule: &unsearched, ..problem.clone() };
    if let Some(time) = clock.time("score", || drop(select_blocks(client, capabilities, &scored))) {
        add(run, shape.record("score", "plane", 1.0, time))?;
    }
    if len <= 8192
        && let Some(time) = clock.time("select", || {
            drop(select_blocks_on(client, capabilities, &problem, SelectRung::Unit))
        })
    {
        add(run, shape.record("select", "unit", 1.0, time))?;
    }
    let key_blocks = extent(&grids).1;
    let in_order = [1, q_heads, kv_heads];
    if let Some(time) = clock
        .time("schedule", || drop(schedule(client, capabilities, &selected, in_order, key_blocks)))
    {
        add(run, shape.record("schedule", "unit", 1.0, time))?;
    }

    let causal = grids[0].causal_pairs() as f64 * q_heads as f64;
    let scale = 1.0 / (dim as f64).sqrt();
    let attended = Attended { out: poisoned(clock.gpu, q_heads * len * dim, element), lse: None };
    for density in [1.0, 0.1] {
        let host = (density < 1.0).then(|| random_selection(&grids, q_heads, density));
        let selection = host.as_ref().map(|host| upload(clock.gpu, host));
        let order =
            selection.as_ref().map(|s| schedule(client, capabilities, s, in_order, key_blocks));
        let tiles =
            host.as_ref().map_or(causal, |s| s.counts().iter().map(|&c| f64::from(c)).sum());
        for rung in [AttendRung::Mma, AttendRung::Plane] {
            let problem = AttendProblem::new(
                &q,
                &k,
                &v,
                &grids,
                selection.as_ref(),
                order.as_ref(),
                scale,
                false,
            );
            let long = rung == AttendRung::Plane && len > 8192;
            if long || rung.check(capabilities, &problem).is_err() {
                continue;
            }
            let call = || attend_into(client, capabilities, &problem, &attended, rung);
            let what = if density < 1.0 { "attend" } else { "dense" };
            if let Some(time) = clock.time(what, call) {
                let mut record = shape.record(what, &rung.to_string(), tiles / causal, time);
                record.tflops = Some(shape.rate(tiles, time.0));
                if density < 1.0 {
                    record.note = shape.extra_memory();
                }
                add(run, record)?;
            }
        }
    }
    Ok(())
}

/// A million tokens: time, memory, and sampled rows against the definition.
fn a_million(
    clock: &Clock,
    run: &mut Run,
    add: &mut impl FnMut(&mut Run, Record) -> Result<()>,
) -> Result<()> {
    let gpu = clock.gpu;
    let Gpu { client, capabilities } = gpu;
    let shape = Shape { q_heads: 8, kv_heads: 2, len: 1 << 20, dim: 128, element: Element::BF16 };
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
        clock.sync();
        let start = Instant::now();
        call();
        clock.sync();
        start.elapsed().as_secs_f64() * 1e3
    };
    let ms = once(&|| drop(estimate()));
    let (selection, pooled, factors) = estimate();
    add(run, shape.record("pool + select", "plane", 1.0, (ms, ms)))?;

    let bytes = client.read_one(selection.words.clone())?;
    let words = bytemuck::cast_slice::<_, u32>(&bytes).to_vec();
    let bytes = client.read_one(selection.counts.clone())?;
    let counts = bytemuck::cast_slice::<_, u32>(&bytes).to_vec();
    let rows = selection.rows;
    let host = prism_core::BlockSelection::from_words([1, q_heads, rows, rows], words, counts)?;
    host.validate(&grids, q_heads)?;
    // Rows of the selection against the rule, from the means that the device made.
    let (q_means, k_means, factors) = (
        read(gpu, &pooled.0.means, Element::F32),
        read(gpu, &pooled.1.means, Element::F32),
        read(gpu, &factors, Element::F32),
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
    run.checks.push(gpu::report::Check {
        name: "a million tokens: sampled rows of the selection".into(),
        passed: differing <= of / 50,
        detail: format!("{differing} of {of} blocks differ (rounding of scores at the cut)"),
    });

    let order = schedule(client, capabilities, &selection, [1, q_heads, kv_heads], rows);
    let attended = Attended { out: client.empty(q_heads * len * dim * element.size()), lse: None };
    let scale = 1.0 / (dim as f64).sqrt();
    let problem =
        AttendProblem::new(&q, &k, &v, &grids, Some(&selection), Some(&order), scale, false);
    let rung = AttendRung::best(capabilities, &problem);
    let ms = once(&|| attend_into(client, capabilities, &problem, &attended, rung));
    let tiles: f64 = host.counts().iter().map(|&c| f64::from(c)).sum();
    let causal = grids[0].causal_pairs() as f64 * q_heads as f64;
    let mut record = shape.record("attend", &rung.to_string(), tiles / causal, (ms, ms));
    record.tflops = Some(shape.rate(tiles, ms));
    record.note = shape.extra_memory();
    add(run, record)?;

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
    run.checks.push(gpu::report::Check {
        name: "a million tokens: sampled rows of the attention".into(),
        passed: relative < 6e-3,
        detail: format!("relative error {relative:.2e}"),
    });
    println!("{:?}", &run.checks[run.checks.len() - 2..]);
    Ok(())
}
