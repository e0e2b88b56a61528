//! Outliers: every rung against `prism_core`, where rounding decides only of blocks near the threshold,
//! and bad numbers.

use cubecl::server::Handle;
use half::{bf16, f16};
use prism_bench::Gpu;
use prism_bench::inputs::{Dims, upload_values, value};
use prism_bench::report::Run;
use prism_core::selection::extent;
use prism_core::selectors::{Outliers, Selector, SelectorInput};
use prism_core::{AttentionShape, BlockSelection, SelectionRule};
use prism_kernels::Element;
use prism_kernels::select::SelectRung;
use prism_kernels::select::outliers::{OutliersProblem, select_outliers_on};

use crate::check_attention::{ELEMENTS, grids, push};

const THRESHOLD: f64 = 0.05;

/// Shape, block, sub-blocks and the (query, key) lengths of each sequence.
type Case = (Dims, usize, [usize; 2], Option<Vec<(usize, usize)>>);

fn cases() -> Vec<Case> {
    let ragged = vec![(900, 1500), (1, 129), (0, 0), (333, 333)];
    vec![
        ([1, 4, 2, 3000, 3000, 128], 128, [32, 32], None),
        ([1, 3, 1, 1500, 4099, 64], 128, [32, 32], None),
        ([1, 2, 2, 777, 2222, 96], 128, [16, 64], None),
        ([1, 2, 1, 200, 5000, 128], 128, [32, 16], None),
        ([2, 2, 1, 600, 901, 256], 64, [32, 32], None),
        ([4, 6, 2, 900, 1500, 128], 128, [32, 32], Some(ragged)),
        ([1, 2, 1, 500, 700, 80], 32, [16, 32], None),
        ([1, 1, 1, 1, 1, 64], 128, [32, 32], None),
    ]
}

/// What the checks share of a case.
struct Inputs {
    q: Vec<f32>,
    k: Vec<f32>,
    shape: AttentionShape,
    grids: Vec<prism_core::BlockGrid>,
    element: Element,
}

impl Inputs {
    /// Keys that stand out, keys alike to the bit, and queries that find more spread than so few keys
    /// can show.
    fn new((dims, block, _, lengths): &Case, element: Element) -> Self {
        let [batch, q_heads, kv_heads, q_len, kv_len, d] = *dims;
        let kv = [batch, kv_heads, kv_len, d];
        let shape = AttentionShape::new([batch, q_heads, q_len, d], kv, kv).expect("a shape");
        let of = |seed, len: usize| -> Vec<f32> {
            (0..len).map(|i| value(seed, i, element) as f32).collect()
        };
        let mut q = of(1, batch * q_heads * q_len * d);
        let mut k = of(2, batch * kv_heads * kv_len * d);
        // What sub-blocks have in common, so that masses differ.
        for (seed, x) in [(3, &mut q), (4, &mut k)] {
            for (i, x) in x.chunks_mut(d).enumerate() {
                let shared = |c| 3.0 * value(seed, i / 32 * 8 + c, Element::F32) as f32;
                x.iter_mut().take(8).enumerate().for_each(|(c, x)| *x += shared(c));
            }
        }
        k.chunks_mut(d).step_by(37).for_each(|k| k.fill(0.03125));
        k.chunks_mut(d).skip(90).step_by(7).take(60).for_each(|k| k[3] *= 8.0);
        q.chunks_mut(d).step_by(3).for_each(|q| q[3] += 4.0);
        let round = |x: &mut f32| match element {
            Element::F32 => {}
            Element::F16 => *x = f16::from_f32(*x).to_f32(),
            Element::BF16 => *x = bf16::from_f32(*x).to_f32(),
        };
        q.iter_mut().chain(&mut k).for_each(round);
        Self { q, k, shape, grids: grids(*dims, *block, lengths.as_deref()), element }
    }

    fn scale(&self) -> f64 {
        1.2 / (self.shape.head_dim as f64).sqrt()
    }

    fn host(&self, options: &Outliers, rule: SelectionRule) -> BlockSelection {
        let input = SelectorInput::new(&self.q, &self.k, self.shape, &self.grids);
        let input = SelectorInput { rule, scale: self.scale(), ..input };
        options.select(&input).expect("the host selects")
    }

    /// What each rung that runs selects, twice, in runs of `scratch` bytes.
    fn device(
        &self,
        gpu: &Gpu,
        options: &Outliers,
        rule: SelectionRule,
        scratch: usize,
    ) -> Vec<(SelectRung, [BlockSelection; 2])> {
        let AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim: d } = self.shape;
        let Gpu { client, capabilities } = gpu;
        let q = upload_values(gpu, &self.q, [batch, q_heads, q_len, d], self.element);
        let k = upload_values(gpu, &self.k, [batch, kv_heads, kv_len, d], self.element);
        let subs = options.subs(self.grids[0].block());
        let target = options.target();
        let problem =
            OutliersProblem::new(&q, &k, &self.grids, subs, target, self.scale(), &rule, false);
        let problem = OutliersProblem { scratch, ..problem };
        let (rows, key_blocks) = extent(&self.grids);
        let select = |rung| {
            let got = select_outliers_on(client, capabilities, &problem, rung).expect("no limits");
            let (words, counts) = (integers(gpu, &got.words), integers(gpu, &got.counts));
            BlockSelection::from_words([batch, q_heads, rows, key_blocks], words, counts)
                .expect("counts of the words")
        };
        SelectRung::LADDER
            .into_iter()
            .filter(|&rung| problem.runs(capabilities, rung))
            .map(|rung| (rung, [select(rung), select(rung)]))
            .collect()
    }
}

/// Every rung selects the blocks whose mass is above the threshold on the host, and none below it; of
/// those within a hundredth of it, or for f32's sums a thousandth, either.
pub fn right(gpu: &Gpu, run: &mut Run) {
    // Forced blocks, so that no row is filled up with one of several that are nearly alike.
    let rule = SelectionRule::default();
    for (case, element) in cases().iter().flat_map(|case| ELEMENTS.map(|element| (case, element))) {
        let inputs = Inputs::new(case, element);
        let of = |threshold| {
            let [query_sub, key_sub] = case.2.map(Some);
            Outliers { threshold, query_sub, key_sub }
        };
        let at = |threshold| inputs.host(&of(threshold), rule).to_bools();
        let exact = at(THRESHOLD);
        for scratch in [64 << 20, 20_000] {
            for (rung, [got, again]) in inputs.device(gpu, &of(THRESHOLD), rule, scratch) {
                let near = if rung == SelectRung::Mma { 1e-2 } else { 1e-3 };
                let (least, most) = (at(THRESHOLD * (1.0 + near)), at(THRESHOLD * (1.0 - near)));
                let steady = got == again;
                let valid = got.validate(&inputs.grids, inputs.shape.q_heads).is_ok();
                let got = got.to_bools();
                let count =
                    |wrong: &dyn Fn(usize) -> bool| (0..got.len()).filter(|&i| wrong(i)).count();
                let wrong = count(&|i| got[i] < least[i] || got[i] > most[i]);
                let other = count(&|i| got[i] != exact[i]);
                let selected = count(&|i| got[i]);
                let name = format!("outliers {rung} {element:?} {case:?} scratch {scratch}");
                let detail = format!(
                    "{wrong} wrong, {other} near the threshold of {selected} selected, steady: {steady}, valid: {valid}"
                );
                let passed = wrong == 0 && steady && valid;
                push(run, name, if passed { Ok(detail) } else { Err(detail) });
            }
        }
    }
}

/// Keys and queries with NaN, infinities and numbers of every size: selections stay valid and the same
/// each time, and another head's are what they were.
pub fn bad(gpu: &Gpu, run: &mut Run) {
    let case: Case = ([1, 2, 2, 700, 2000, 128], 128, [32, 32], None);
    let options = Outliers { threshold: THRESHOLD, ..Outliers::default() };
    let rule = SelectionRule::default();
    let good = Inputs::new(&case, Element::F32);
    let mut inputs = Inputs::new(&case, Element::F32);
    let d = 128;
    for (at, x) in [(100, f32::NAN), (600, f32::INFINITY), (900, f32::NEG_INFINITY), (1200, 3e38)] {
        inputs.k[at * d + 5] = x;
    }
    inputs.k[300 * d..400 * d].iter_mut().for_each(|x| *x *= 1e-30);
    inputs.k[1500 * d..1600 * d].iter_mut().for_each(|x| *x *= 1e15);
    inputs.q[650 * d] = f32::NAN;
    inputs.q[500 * d..520 * d].fill(0.0);
    let good = good.device(gpu, &options, rule, 64 << 20);
    let bad = inputs.device(gpu, &options, rule, 64 << 20);
    for ((rung, [good, _]), (_, [got, again])) in good.iter().zip(&bad) {
        let steady = got == again;
        let valid = got.validate(&inputs.grids, 2).is_ok();
        let rows = extent(&inputs.grids).0;
        let apart = (0..rows).all(|row| got.row_words(0, 1, row) == good.row_words(0, 1, row));
        let detail = format!("steady: {steady}, valid: {valid}, other heads alike: {apart}");
        let passed = steady && valid && apart;
        push(
            run,
            format!("outliers {rung}, bad numbers"),
            if passed { Ok(detail) } else { Err(detail) },
        );
    }
}

pub(super) fn integers(gpu: &Gpu, handle: &Handle) -> Vec<u32> {
    let bytes = gpu.client.read_one(handle.clone()).expect("the kernel ran");
    bytemuck::cast_slice(&bytes).to_vec()
}
