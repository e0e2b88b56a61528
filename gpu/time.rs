//! Timings: pool, select and attend over length, rung, density and head_dim, on any device.
//!
//! Sustained: the median of windows of back-to-back launches. Burst: a few launches after idling,
//! before a card reaches its power limit. Both by the device's own clock where it has one.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use derive_new::new;
use prism_core::bands::{BandRule, Bands};
use prism_core::selection::extent;
use prism_core::{BlockGrid, Calibration, Rope, Scoring, SelectionRule, Side};
use prism_kernels::attend::{AttendProblem, AttendRung, Attended, attend_into};
use prism_kernels::band_mask::BandMask;
use prism_kernels::calibrate::calibrate;
use prism_kernels::moments::pool_moments;
use prism_kernels::pool::{pool, pool_one};
use prism_kernels::schedule::schedule;
use prism_kernels::select::{
    SecondOrderProblem, SelectProblem, SelectRung, select_blocks, select_blocks_on,
    select_by_second_order,
};
use prism_kernels::{Element, Operand};

use crate::Gpu;
use crate::data::{poisoned, random_selection, scaled_tensor, tensor, upload};
use crate::million::a_million;
use crate::report::{Record, Run};

pub(crate) const BLOCK: usize = 128;

/// What is timed, and for how long.
#[derive(Debug, Clone)]
pub struct Budget {
    /// Seconds in all.
    pub seconds: f64,
    /// Milliseconds of a window.
    pub window: f64,
    /// Milliseconds of a call from which on longer prompts are left out.
    pub slowest: f64,
    /// Densities of sparse attention.
    pub densities: Vec<f64>,
    /// Also a prompt of a million tokens.
    pub million: bool,
    /// Steps to time, as the records name them; all if empty.
    pub only: Vec<String>,
    /// Rungs to time, likewise.
    pub rungs: Vec<String>,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            seconds: 120.0,
            window: 350.0,
            slowest: 2000.0,
            densities: vec![0.1],
            million: false,
            only: Vec::new(),
            rungs: Vec::new(),
        }
    }
}

/// A layer's attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, new)]
pub struct Shape {
    /// Query heads.
    pub q_heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Tokens.
    pub len: usize,
    /// Elements of a head.
    pub dim: usize,
    /// Type of Q, K and V.
    pub element: Element,
}

/// A call that is ready to be made, again and again.
pub type Call = Box<dyn Fn()>;

/// Another's dense attention: a name, and a function that calls it for Q, K and V of a shape, or
/// says why it can't.
pub struct Peer<'a> {
    /// Name in the report.
    pub name: &'a str,
    /// Prepares a call; what it returns does the call and waits for it to be under way.
    pub prepare: &'a dyn Fn(&Shape) -> Result<Call>,
}

/// Takes times, as long as the budget lasts.
pub struct Clock<'a> {
    pub(crate) gpu: &'a Gpu,
    budget: &'a Budget,
    end: Instant,
    /// The longest prompt, and the milliseconds it took, by step, rung and head_dim.
    seen: HashMap<(String, String, usize), (usize, f64)>,
}

impl Clock<'_> {
    pub(crate) fn sync(&self) -> Result<()> {
        Ok(cubecl::future::block_on(self.gpu.client.sync())?)
    }

    /// Milliseconds a call.
    fn batch(&self, launches: usize, call: &dyn Fn()) -> Result<f64> {
        let client = &self.gpu.client;
        let window = client.profile_start()?;
        (0..launches).for_each(|_| call());
        let ticks = client.profile_end(window)?.into_future();
        let ticks = cubecl::future::block_on(ticks).context("the device measured no time")?;
        Ok(ticks.duration().as_secs_f64() * 1e3 / launches as f64)
    }

    /// Milliseconds a call, sustained and in a burst; `None` when time is up, nobody asked, or a
    /// shorter prompt says that it would take too long.
    fn time(
        &mut self,
        shape: &Shape,
        what: &str,
        rung: &str,
        call: &dyn Fn(),
    ) -> Result<Option<(f64, f64)>> {
        let only = &self.budget.only;
        let asked = (only.is_empty() || only.iter().any(|only| only == what))
            && (self.budget.rungs.is_empty() || self.budget.rungs.iter().any(|one| one == rung));
        let key = (what.to_string(), rung.to_string(), shape.dim);
        let slow = self.seen.get(&key).is_some_and(|&(len, ms)| {
            shape.len > len && ms * (shape.len as f64 / len as f64).powi(2) > self.budget.slowest
        });
        if !asked || slow || Instant::now() > self.end {
            return Ok(None);
        }
        call();
        self.sync()?;
        let once = self.batch(1, call)?.max(1e-3);
        let idle = (2.0 * self.budget.window).min(4.0 * once.max(20.0));
        std::thread::sleep(Duration::from_secs_f64(idle / 1e3));
        let burst = self.batch(((15.0 / once) as usize).clamp(1, 200), call)?;
        let launches = ((self.budget.window / burst.min(once)) as usize + 1).min(20_000);
        let mut windows = Vec::new();
        for _ in 0..3 {
            windows.push(self.batch(launches, call)?);
        }
        windows.sort_by(f64::total_cmp);
        self.seen.insert(key, (shape.len, windows[1]));
        Ok(Some((windows[1], burst)))
    }
}

impl Shape {
    pub(crate) fn record(
        &self,
        what: &str,
        rung: &str,
        density: f64,
        (ms, burst): (f64, f64),
    ) -> Record {
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

    /// What a sparse call allocates besides its output: means, energies, factors, the keys' halves,
    /// selection, order.
    pub(crate) fn extra_memory(&self) -> String {
        let blocks = self.len.div_ceil(BLOCK);
        let means = (self.q_heads + self.kv_heads) * blocks * (self.dim * 4 + 16);
        let rows = self.q_heads * blocks;
        let halves = self.kv_heads * blocks * (self.dim + 1) * 4;
        let bytes = means + halves + rows * (8 + blocks.div_ceil(32) * 4 + 4 + 4);
        format!("{:.1} MiB besides the output", bytes as f64 / f64::from(1 << 20))
    }

    /// 10¹² operations a second of attention over `tiles` pairs of blocks, all heads counted.
    pub(crate) fn rate(&self, tiles: f64, ms: f64) -> f64 {
        4.0 * (self.dim * BLOCK * BLOCK) as f64 * tiles / ms / 1e9
    }
}

/// Times every step of every shape, and `peers` beside them. `write` gets the run after each record,
/// so that one cut short keeps what it has.
pub fn time(
    gpu: &Gpu,
    shapes: &[Shape],
    budget: &Budget,
    peers: &[Peer],
    run: &mut Run,
    write: &mut dyn FnMut(&Run) -> Result<()>,
) -> Result<()> {
    let end = Instant::now() + Duration::from_secs_f64(budget.seconds);
    let mut clock = Clock { gpu, budget, end, seen: HashMap::new() };
    let mut add = |run: &mut Run, record: Record| -> Result<()> {
        println!(
            "{:>9} {:>12} {} d{} {:>7} tokens density {:.3}: {:.4} ms (burst {:.4}) {} {}",
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
    for shape in shapes {
        let layer = Layer::new(&clock, shape)?;
        layer.estimate(&mut clock, run, &mut add)?;
        layer.second_order(&mut clock, run, &mut add)?;
        layer.attend(&mut clock, run, &mut add)?;
    }
    // After all of ours: another's may take any time to get under way.
    for shape in shapes {
        for peer in peers {
            match (peer.prepare)(shape) {
                Err(reason) => {
                    let note = format!("{}, {} tokens: {reason}", peer.name, shape.len);
                    println!("skipped: {note}");
                    run.notes.push(format!("skipped: {note}"));
                }
                Ok(call) => {
                    if let Some(time) = clock.time(shape, "dense", peer.name, &*call)? {
                        let mut record = shape.record("dense", peer.name, 1.0, time);
                        record.peer = true;
                        add(run, record)?;
                    }
                }
            }
        }
    }
    if budget.million {
        a_million(&clock, run, &mut add)?;
    }
    Ok(())
}

type Add<'a> = dyn FnMut(&mut Run, Record) -> Result<()> + 'a;

/// Inputs of a layer.
struct Layer<'a> {
    gpu: &'a Gpu,
    shape: Shape,
    q: Operand,
    k: Operand,
    v: Operand,
    grids: [BlockGrid; 1],
}

impl<'a> Layer<'a> {
    fn new(clock: &Clock<'a>, shape: &Shape) -> Result<Self> {
        let &Shape { q_heads, kv_heads, len, dim, element } = shape;
        let input = |seed, heads| tensor(clock.gpu, seed, [1, heads, len, dim], element);
        Ok(Self {
            gpu: clock.gpu,
            shape: *shape,
            q: input(1, q_heads),
            k: input(2, kv_heads),
            v: input(3, kv_heads),
            grids: [BlockGrid::new(BLOCK, len, len)?],
        })
    }

    /// Pool, calibrate, select, schedule.
    fn estimate(&self, clock: &mut Clock, run: &mut Run, add: &mut Add) -> Result<()> {
        let (Gpu { client, capabilities }, shape, grids) = (self.gpu, &self.shape, &self.grids);
        let &Shape { q_heads, kv_heads, len, dim, element } = shape;
        let bands = Bands::new(BandRule::Auto, Some(&Rope::new(5e5)), dim, BLOCK)?;
        let mask = BandMask::new(&bands);
        let heads = [q_heads, kv_heads, dim];
        let own = if capabilities.cores.is_some() { "unit" } else { "plane" };
        let pooled = || pool(client, capabilities, &self.q, &self.k, grids, &mask);
        if let Some(time) = clock.time(shape, "pool", own, &|| drop(pooled()))? {
            let mut record = shape.record("pool", own, 1.0, time);
            let bytes = (q_heads + kv_heads) * len * dim * element.size();
            record.gbps = Some(bytes as f64 / time.0 / 1e6);
            add(run, record)?;
        }
        let (q, k) = pooled();
        let global = Calibration::Global;
        let calibrated =
            || calibrate(client, capabilities, &q, &k, None, grids, heads, &mask, global);
        if let Some(time) = clock.time(shape, "calibrate", "unit", &|| drop(calibrated()))? {
            add(run, shape.record("calibrate", "unit", 1.0, time))?;
        }
        let (factors, rule) = (calibrated(), SelectionRule::default());
        let problem =
            SelectProblem::new(&q.means, &k.means, &factors, heads, grids, &mask, &rule, false);
        // Rows that read everything are scored and not searched.
        let unsearched = SelectionRule { dense_last_blocks: usize::MAX, ..rule };
        let scored = SelectProblem { rule: &unsearched, ..problem.clone() };
        for rung in SelectRung::LADDER {
            if !rung.runs(capabilities, &problem) {
                continue;
            }
            for (what, problem) in [("score", &scored), ("select", &problem)] {
                let select = || drop(select_blocks_on(client, capabilities, problem, rung));
                // The unit rung scores only rows that it searches.
                if what == "score" && rung == SelectRung::Unit {
                    continue;
                }
                if let Some(time) = clock.time(shape, what, &rung.to_string(), &select)? {
                    add(run, shape.record(what, &rung.to_string(), 1.0, time))?;
                }
            }
        }
        let selected = select_blocks(client, capabilities, &problem);
        let (in_order, key_blocks) = ([1, q_heads, kv_heads], extent(grids).1);
        let ordered = || drop(schedule(client, capabilities, &selected, in_order, key_blocks));
        if let Some(time) = clock.time(shape, "schedule", "unit", &ordered)? {
            add(run, shape.record("schedule", "unit", 1.0, time))?;
        }
        Ok(())
    }

    /// Pooling and selection by second-order scores.
    fn second_order(&self, clock: &mut Clock, run: &mut Run, add: &mut Add) -> Result<()> {
        let (Gpu { client, capabilities }, shape, grids) = (self.gpu, &self.shape, &self.grids);
        let Scoring::SecondOrder { query_sub, key_sub } = Scoring::second_order() else {
            return Ok(());
        };
        let (subs, rule) = ([query_sub, key_sub], SelectionRule::default());
        let [q_grids, k_grids] = subs.map(|sub| grids.map(|grid| grid.subdivided(sub)));
        let moments = || {
            let q = pool_one(client, capabilities, &self.q, &q_grids, Side::Queries);
            (q, pool_moments(client, capabilities, &self.k, &k_grids))
        };
        if let Some(time) = clock.time(shape, "pool", "second order", &|| drop(moments()))? {
            add(run, shape.record("pool", "second order", 1.0, time))?;
        }
        let (q, k) = moments();
        let heads = [shape.q_heads, shape.kv_heads, shape.dim];
        let problem = SecondOrderProblem::new(
            &q.means,
            &k.means,
            &k.variances,
            heads,
            grids,
            subs,
            &rule,
            false,
        );
        let select = || drop(select_by_second_order(client, capabilities, &problem));
        if let Some(time) = clock.time(shape, "select", "second order", &select)? {
            add(run, shape.record("select", "second order", 1.0, time))?;
        }
        Ok(())
    }

    /// Dense and sparse attention on every rung.
    fn attend(&self, clock: &mut Clock, run: &mut Run, add: &mut Add) -> Result<()> {
        let (Gpu { client, capabilities }, shape, grids) = (self.gpu, &self.shape, &self.grids);
        let &Shape { q_heads, kv_heads, len, dim, element } = shape;
        let causal = grids[0].causal_pairs() as f64 * q_heads as f64;
        let scale = 1.0 / (dim as f64).sqrt();
        let out = poisoned(self.gpu, q_heads * len * dim, element);
        let attended = Attended { out, lse: None };
        let factor = (scale * std::f64::consts::LOG2_E) as f32;
        let prescaled_q = scaled_tensor(self.gpu, 1, self.q.shape, element, factor);
        let (in_order, key_blocks) = ([1, q_heads, kv_heads], extent(grids).1);
        for density in std::iter::once(1.0).chain(clock.budget.densities.clone()) {
            let host = (density < 1.0).then(|| random_selection(grids, q_heads, density));
            let selection = host.as_ref().map(|host| upload(self.gpu, host));
            let ordered = |s| schedule(client, capabilities, s, in_order, key_blocks);
            let order = selection.as_ref().map(ordered);
            let blocks = |count: &u32| f64::from(*count);
            let tiles = host.as_ref().map_or(causal, |s| s.counts().iter().map(blocks).sum());
            let problem = AttendProblem::new(
                &self.q,
                &self.k,
                &self.v,
                grids,
                selection.as_ref(),
                order.as_ref(),
                scale,
                false,
            );
            for rung in AttendRung::LADDER {
                if rung.check(capabilities, &problem).is_err() {
                    continue;
                }
                // Queries that carry the scale spare this rung an operation a score.
                let ways: &[bool] =
                    if rung == AttendRung::Hopper { &[false, true] } else { &[false] };
                for &prescaled in ways {
                    let q = if prescaled { &prescaled_q } else { &self.q };
                    let problem = AttendProblem { q, prescaled, ..problem.clone() };
                    let call = || attend_into(client, capabilities, &problem, &attended, rung);
                    let what = if density < 1.0 { "attend" } else { "dense" };
                    let name = format!("{rung}{}", if prescaled { " pre-scaled" } else { "" });
                    if let Some(time) = clock.time(shape, what, &name, &call)? {
                        let mut record = shape.record(what, &name, tiles / causal, time);
                        record.tflops = Some(shape.rate(tiles, time.0));
                        if density < 1.0 {
                            record.note = shape.extra_memory();
                        }
                        add(run, record)?;
                    }
                }
            }
        }
        Ok(())
    }
}
