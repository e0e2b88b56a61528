//! One layer's inputs, and the steps of its attention.

use anyhow::Result;
use prism_core::bands::{BandRule, Bands};
use prism_core::selection::extent;
use prism_core::{BlockGrid, Calibration, Rope, Scoring, SelectionRule, Side};
use prism_kernels::Operand;
use prism_kernels::attend::{AttendProblem, AttendRung, Attended, attend_into};
use prism_kernels::band_mask::BandMask;
use prism_kernels::calibrate::calibrate;
use prism_kernels::moments::pool_moments;
use prism_kernels::pool::{pool, pool_one};
use prism_kernels::rotate::{RotaryTable, RotateProblem, rotate, rotate_and_pool};
use prism_kernels::schedule::schedule;
use prism_kernels::select::{
    SecondOrderProblem, SelectProblem, SelectRung, select_blocks, select_blocks_on,
    select_by_second_order,
};

use super::{BLOCK, Draw, Session, Shape};
use crate::device::Gpu;
use crate::inputs::{alike_selection, poisoned, scaled_tensor, tensor, upload};
use crate::report::SECOND_ORDER;

/// Base of the RoPE frequencies, as Llama 3 has it.
const THETA: f64 = 5e5;

/// Inputs of a layer.
pub(super) struct Layer<'a> {
    gpu: &'a Gpu,
    shape: Shape,
    q: Operand,
    k: Operand,
    v: Operand,
    grids: [BlockGrid; 1],
    bands: BandMask,
}

impl<'a> Layer<'a> {
    pub(super) fn new(gpu: &'a Gpu, shape: &Shape) -> Result<Self> {
        let &Shape { q_heads, kv_heads, len, dim, element } = shape;
        let input = |seed, heads| tensor(gpu, seed, [1, heads, len, dim], element);
        let bands = Bands::new(BandRule::Auto, Some(&Rope::new(THETA)), dim, BLOCK)?;
        Ok(Self {
            gpu,
            shape: *shape,
            q: input(1, q_heads),
            k: input(2, kv_heads),
            v: input(3, kv_heads),
            grids: [BlockGrid::new(BLOCK, len, len)?],
            bands: BandMask::new(&bands),
        })
    }

    /// What computes the steps that have one kernel for CPUs and one for the rest.
    fn own(&self) -> &'static str {
        if self.gpu.capabilities.cores.is_some() { "unit" } else { "plane" }
    }

    /// The rotary embedding, alone and with the pooling of Q and K in one launch, without and with
    /// attention's scale folded into Q.
    pub(super) fn rotate(&self, session: &mut Session) -> Result<()> {
        let (Gpu { client, capabilities }, shape) = (self.gpu, &self.shape);
        let table = RotaryTable::of(client, &Rope::new(THETA), shape.dim, shape.len)?;
        let plain = RotateProblem::new(&self.q, &self.k, &table, &self.grids, &self.bands);
        let scale = 1.0 / (shape.dim as f64).sqrt();
        for (prescale, suffix) in [(None, ""), (Some(scale), " pre-scaled")] {
            let problem = RotateProblem { prescale, ..plain.clone() };
            let alone = || rotate(client, capabilities, &problem).map(drop);
            let pooled = || rotate_and_pool(client, capabilities, &problem).map(drop);
            let ways: [(_, &dyn Fn() -> _); 2] = [("rotate", &alone), ("rotate-pool", &pooled)];
            let rung = format!("{}{suffix}", self.own());
            for (what, call) in ways {
                // Whether it runs says the first call.
                call()?;
                if let Some(time) = session.time(shape, what, &rung, &|| drop(call()))? {
                    let mut record = shape.record(what, &rung, 1.0, time);
                    record.gbps = Some(2.0 * shape.q_and_k() / time.sustained / 1e6);
                    session.log.record(record)?;
                }
            }
        }
        Ok(())
    }

    /// Pool, calibrate, select, schedule.
    pub(super) fn estimate(&self, session: &mut Session) -> Result<()> {
        let (Gpu { client, capabilities }, shape, grids) = (self.gpu, &self.shape, &self.grids);
        let (&Shape { q_heads, kv_heads, dim, .. }, mask) = (shape, &self.bands);
        let heads = [q_heads, kv_heads, dim];
        let own = self.own();
        let pooled = || pool(client, capabilities, &self.q, &self.k, grids, mask);
        if let Some(time) = session.time(shape, "pool", own, &|| drop(pooled()))? {
            let mut record = shape.record("pool", own, 1.0, time);
            record.gbps = Some(shape.q_and_k() / time.sustained / 1e6);
            session.log.record(record)?;
        }
        let (q, k) = pooled();
        let global = Calibration::Global;
        let calibrated =
            || calibrate(client, capabilities, &q, &k, None, grids, heads, mask, global);
        if let Some(time) = session.time(shape, "calibrate", "unit", &|| drop(calibrated()))? {
            session.log.record(shape.record("calibrate", "unit", 1.0, time))?;
        }
        let (factors, rule) = (calibrated(), SelectionRule::default());
        let problem =
            SelectProblem::new(&q.means, &k.means, &factors, heads, grids, mask, &rule, false);
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
                if let Some(time) = session.time(shape, what, &rung.to_string(), &select)? {
                    session.log.record(shape.record(what, &rung.to_string(), 1.0, time))?;
                }
            }
        }
        let selected = select_blocks(client, capabilities, &problem);
        let (in_order, key_blocks) = ([1, q_heads, kv_heads], extent(grids).1);
        let ordered = || drop(schedule(client, capabilities, &selected, in_order, key_blocks));
        if let Some(time) = session.time(shape, "schedule", "unit", &ordered)? {
            session.log.record(shape.record("schedule", "unit", 1.0, time))?;
        }
        Ok(())
    }

    /// Pooling and selection by second-order scores.
    pub(super) fn second_order(&self, session: &mut Session) -> Result<()> {
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
        if let Some(time) = session.time(shape, "pool", SECOND_ORDER, &|| drop(moments()))? {
            session.log.record(shape.record("pool", SECOND_ORDER, 1.0, time))?;
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
        if let Some(time) = session.time(shape, "select", SECOND_ORDER, &select)? {
            session.log.record(shape.record("select", SECOND_ORDER, 1.0, time))?;
        }
        Ok(())
    }

    /// Dense and sparse attention on every rung.
    pub(super) fn attend(&self, session: &mut Session, draw: &Draw) -> Result<()> {
        let (Gpu { client, capabilities }, shape, grids) = (self.gpu, &self.shape, &self.grids);
        let &Shape { q_heads, kv_heads, len, dim, element } = shape;
        let causal = grids[0].causal_pairs() as f64 * q_heads as f64;
        let scale = 1.0 / (dim as f64).sqrt();
        let out = poisoned(self.gpu, q_heads * len * dim, element);
        let attended = Attended { out, lse: None };
        let factor = (scale * std::f64::consts::LOG2_E) as f32;
        let prescaled_q = scaled_tensor(self.gpu, 1, self.q.shape, element, factor);
        let (in_order, key_blocks) = ([1, q_heads, kv_heads], extent(grids).1);
        for density in
            std::iter::once(1.0).chain(draw.densities.iter().copied().filter(|&d| d < 1.0))
        {
            let sparse =
                (density < 1.0).then(|| alike_selection(grids, q_heads, density, draw.alike));
            let host = sparse.transpose()?;
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
                if let Err(reason) = rung.check(capabilities, &problem) {
                    session.refused.insert(rung.to_string(), reason.to_string());
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
                    if let Some(time) = session.time(shape, what, &name, &call)? {
                        let mut record = shape.record(what, &name, tiles / causal, time);
                        record.tflops = Some(shape.rate(tiles, time.sustained));
                        if density < 1.0 {
                            record.note = shape.extra_memory();
                        }
                        session.log.record(record)?;
                    }
                }
            }
        }
        Ok(())
    }
}
