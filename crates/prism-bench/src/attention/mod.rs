//! Timings of attention and of every step to it, over length, rung, density and head_dim.

mod layer;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Result, ensure};
use derive_new::new;
use prism_core::AttentionShape;
use prism_core::masses::check_row;
use prism_kernels::Element;

use self::layer::Layer;
use crate::clock::{Budget, Clock, Time};
use crate::device::{Gpu, name};
use crate::inputs::Alike;
use crate::report::{Log, Record, SECOND_ORDER};

/// Positions a block.
pub(crate) const BLOCK: usize = 128;
/// What is timed, in the order of a call. `rotate` is the rotary embedding alone, `rotate-pool` with `pool` in
/// the same launch, `score` the part of `select` before its search, `dense` attention that reads everything.
pub const STEPS: [&str; 9] = [
    "rotate",
    "rotate-pool",
    "pool",
    "calibrate",
    "score",
    "select",
    "schedule",
    "dense",
    "attend",
];
/// By what; `pre-scaled` where Q carries the scale of attention.
pub const RUNGS: [&str; 8] = [
    "hopper",
    "hopper pre-scaled",
    "mma",
    "plane",
    "plane pre-scaled",
    "unit",
    "unit pre-scaled",
    SECOND_ORDER,
];

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

impl Shape {
    /// Whether the kernels take the shape, and the device its element type.
    ///
    /// # Errors
    /// What stands in the way.
    pub fn check(&self, gpu: &Gpu) -> Result<()> {
        let &Self { q_heads, kv_heads, len, dim, element } = self;
        ensure!(len > 0, "length must be at least 1, got 0");
        ensure!(dim <= 256, "head_dim must be at most 256, got {dim}");
        let kv = [1, kv_heads, len, dim];
        AttentionShape::new([1, q_heads, len, dim], kv, kv)?;
        check_row(len.div_ceil(BLOCK))?;
        gpu.check(element)
    }

    pub(crate) fn record(&self, what: &str, rung: &str, density: f64, time: Time) -> Record {
        Record {
            what: what.into(),
            rung: rung.into(),
            dtype: name(self.element).into(),
            batch: 1,
            q_heads: self.q_heads,
            kv_heads: self.kv_heads,
            q_len: self.len,
            kv_len: self.len,
            head_dim: self.dim,
            density,
            ms: time.sustained,
            ms_burst: Some(time.burst),
            tflops: None,
            gbps: None,
            peer: false,
            note: String::new(),
        }
    }

    /// Bytes of Q and K.
    fn q_and_k(&self) -> f64 {
        ((self.q_heads + self.kv_heads) * self.len * self.dim * self.element.size()) as f64
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

/// Whether sparse attention of these densities can be timed.
///
/// # Errors
/// One outside of (0, 1].
pub fn check_densities(densities: &[f64]) -> Result<()> {
    for &density in densities {
        ensure!(
            density > 0.0 && density <= 1.0,
            "density must be above 0 and at most 1, got {density}"
        );
    }
    Ok(())
}

/// The selections of sparse attention.
#[derive(Debug, Clone, Copy)]
pub struct Draw<'a> {
    /// Shares of the causal blocks.
    pub densities: &'a [f64],
    /// Who draws alike.
    pub alike: Alike,
}

impl<'a> Draw<'a> {
    /// Everybody draws for itself.
    pub fn new(densities: &'a [f64]) -> Self {
        Self { densities, alike: Alike::default() }
    }

    fn check(&self) -> Result<()> {
        let Alike { heads, rows } = self.alike;
        ensure!(
            heads > 0 && rows > 0,
            "neighbours alike must be at least 1, got {heads} and {rows}"
        );
        check_densities(self.densities)
    }
}

/// Times every step of every shape, sparse attention at each density of `draw`, and `peers` beside them.
///
/// # Errors
/// A shape, a density or a budget that makes no sense, each before anything runs; a device that fails.
pub fn time(
    gpu: &Gpu,
    shapes: &[Shape],
    draw: &Draw,
    budget: &Budget,
    peers: &[Peer],
    log: &mut Log,
) -> Result<()> {
    let mut known = RUNGS.to_vec();
    known.extend(peers.iter().map(|peer| peer.name));
    budget.check(&STEPS, &known)?;
    draw.check()?;
    shapes.iter().try_for_each(|shape| shape.check(gpu))?;
    let mut session = Session {
        clock: Clock::new(gpu, budget),
        budget,
        seen: HashMap::new(),
        refused: BTreeMap::new(),
        left: BTreeSet::new(),
        log,
    };
    for shape in shapes {
        let layer = Layer::new(gpu, shape)?;
        layer.rotate(&mut session)?;
        layer.estimate(&mut session)?;
        layer.second_order(&mut session)?;
        layer.attend(&mut session, draw)?;
    }
    // After all of ours: another's may take any time to get under way.
    for shape in shapes {
        for peer in peers {
            match (peer.prepare)(shape) {
                Err(reason) => {
                    let what = format!("skipped: {}, {} tokens: {reason}", peer.name, shape.len);
                    session.refused.insert(peer.name.into(), reason.to_string());
                    session.log.note(what)?;
                }
                Ok(call) => {
                    if let Some(time) = session.time(shape, "dense", peer.name, &*call)? {
                        let record = shape.record("dense", peer.name, 1.0, time);
                        session.log.record(Record { peer: true, ..record })?;
                    }
                }
            }
        }
    }
    session.tell()
}

/// The clock, what it showed so far, and where that goes.
struct Session<'a, 'l, 'r> {
    clock: Clock<'a>,
    budget: &'a Budget,
    /// The longest prompt, and the milliseconds it took, by step, rung and head_dim.
    seen: HashMap<(String, String, usize), (usize, f64)>,
    /// Rungs that can't run, and why.
    refused: BTreeMap<String, String>,
    /// What was asked for and had no time.
    left: BTreeSet<String>,
    log: &'l mut Log<'r>,
}

impl Session<'_, '_, '_> {
    /// The time of a call; `None` where nobody asked, time is up, or a shorter prompt says that it would
    /// take too long.
    fn time(
        &mut self,
        shape: &Shape,
        what: &str,
        rung: &str,
        call: &dyn Fn(),
    ) -> Result<Option<Time>> {
        let key = (what.to_string(), rung.to_string(), shape.dim);
        let slow = self.seen.get(&key).is_some_and(|&(len, ms)| {
            shape.len > len && ms * (shape.len as f64 / len as f64).powi(2) > self.budget.slowest
        });
        if !self.budget.asks(what, rung) {
            return Ok(None);
        }
        if slow || self.clock.over() {
            self.left.insert(format!("{what} by {rung} at {} tokens", shape.len));
            return Ok(None);
        }
        let call = || {
            call();
            Ok(())
        };
        let time = self.clock.time(what, rung, &call)?;
        if let Some(time) = time {
            self.seen.insert(key, (shape.len, time.sustained));
        }
        Ok(time)
    }

    /// Notes what was left out, and what was asked for by name and never ran.
    fn tell(self) -> Result<()> {
        if !self.left.is_empty() {
            let left: Vec<String> = self.left.into_iter().collect();
            self.log.note(format!("skipped, for want of time: {}", left.join(", ")))?;
        }
        for rung in &self.budget.rungs {
            if !self.seen.keys().any(|(_, one, _)| one == rung) {
                let kind = rung.trim_end_matches(" pre-scaled");
                let why = self.refused.get(kind).map(|why| format!(": {why}")).unwrap_or_default();
                self.log.note(format!("nothing was timed by {rung}{why}"))?;
            }
        }
        for step in &self.budget.only {
            if !self.seen.keys().any(|(one, _, _)| one == step) {
                self.log.note(format!("{step} was not timed"))?;
            }
        }
        Ok(())
    }
}
