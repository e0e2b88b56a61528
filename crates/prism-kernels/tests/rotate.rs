//! Does one launch rotate Q and K as the definition does, and pool what `pool` would pool of them; and
//! does attention with the scale in Q equal attention with the scale on scores?

mod support;

use cubecl::prelude::*;
use half::{bf16, f16};
use prism_core::{PrismError, Rope, RopeLayout, RopeScaling};
use prism_kernels::attend::{AttendProblem, AttendRung, attend_on};
use prism_kernels::band_mask::BandMask;
use prism_kernels::pool::{Pooled, pool};
use prism_kernels::rotate::{
    RotaryTable, RotateError, RotateProblem, Rotated, rotate, rotate_and_pool,
};
use prism_kernels::{Capabilities, Element, Operand};
use rstest::rstest;
use support::*;

const LAYOUTS: [RopeLayout; 2] = [RopeLayout::RotateHalf, RopeLayout::Interleaved];

fn rope(layout: RopeLayout, rotary_dim: usize) -> Rope {
    Rope { layout, rotary_dim: Some(rotary_dim), ..Rope::new(10_000.0) }
}

fn bytes(values: &[f32], element: Element) -> Vec<u8> {
    let each = values.iter().copied();
    match element {
        Element::F32 => each.flat_map(f32::to_ne_bytes).collect(),
        Element::F16 => each.flat_map(|x| f16::from_f32(x).to_ne_bytes()).collect(),
        Element::BF16 => each.flat_map(|x| bf16::from_f32(x).to_ne_bytes()).collect(),
    }
}

fn read(device: &Bench, x: &Operand) -> Vec<f32> {
    let bytes = device.client.read_one(x.handle.clone()).expect("the kernel ran");
    let pairs = bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
    match x.element {
        Element::F32 => f32::from_bytes(&bytes).to_vec(),
        Element::F16 => pairs.map(|x| f16::from_ne_bytes(x).to_f32()).collect(),
        Element::BF16 => pairs.map(|x| bf16::from_ne_bytes(x).to_f32()).collect(),
    }
}

fn upload_as(device: &Bench, values: &[f32], shape: [usize; 4], element: Element) -> Operand {
    let handle = device.client.create_from_slice(&bytes(values, element));
    Operand::contiguous(handle, shape, element)
}

/// A head's dims at a position, by definition.
fn turned(x: &[f32], rope: &Rope, position: usize) -> Vec<f64> {
    let mut out = widened(x);
    let rotary = rope.rotary_dim(x.len()).unwrap();
    for (j, freq) in rope.inv_freq(x.len()).unwrap().into_iter().enumerate() {
        let (sin, cos) = (freq * position as f64).sin_cos();
        let (sin, cos) = (sin * rope.attention_factor(), cos * rope.attention_factor());
        let [a, b] = rope.pair(j, rotary);
        let (x, y) = (f64::from(x[a]), f64::from(x[b]));
        (out[a], out[b]) = (x * cos - y * sin, x * sin + y * cos);
    }
    out
}

/// Every row by definition, times `factor`; 0 where `position` says none.
fn all_turned(
    x: &[f32],
    [_, heads, len, dim]: [usize; 4],
    rope: &Rope,
    factor: f64,
    position: impl Fn(usize, usize) -> Option<usize>,
) -> Vec<f64> {
    let rows = x.chunks_exact(dim).enumerate().flat_map(|(line, row)| {
        match position(line / len / heads, line % len) {
            Some(position) => turned(row, rope, position).iter().map(|x| x * factor).collect(),
            None => vec![0.0; dim],
        }
    });
    rows.collect()
}

struct Case {
    problem: Problem,
    q: Vec<f32>,
    k: Vec<f32>,
    element: Element,
    rope: Rope,
}

impl Case {
    fn new(problem: Problem, element: Element, rope: Rope) -> Self {
        let shape = &problem.shape;
        let rounded = |seed, heads: usize, len: usize| -> Vec<f32> {
            let x = random(seed, shape.batch * heads * len * shape.head_dim);
            match element {
                Element::F32 => x,
                Element::F16 => x.into_iter().map(|x| f16::from_f32(x).to_f32()).collect(),
                Element::BF16 => x.into_iter().map(|x| bf16::from_f32(x).to_f32()).collect(),
            }
        };
        let q = rounded(31, shape.q_heads, shape.q_len);
        let k = rounded(32, shape.kv_heads, shape.kv_len);
        Self { q, k, problem, element, rope }
    }

    fn q_shape(&self) -> [usize; 4] {
        let shape = &self.problem.shape;
        [shape.batch, shape.q_heads, shape.q_len, shape.head_dim]
    }

    fn k_shape(&self) -> [usize; 4] {
        let shape = &self.problem.shape;
        [shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim]
    }

    fn mask(&self) -> BandMask {
        BandMask::new(&bands(self.problem.shape.head_dim, self.problem.grids[0].block()))
    }

    fn rotate(
        &self,
        device: &Bench,
        k: &Operand,
        prescale: Option<f64>,
        cache: Option<&Operand>,
    ) -> Rotated {
        let Bench { client, capabilities, .. } = device;
        self.with_problem(device, k, |problem| {
            let problem = RotateProblem { prescale, cache, ..problem };
            rotate_and_pool(client, capabilities, &problem).unwrap()
        })
    }

    fn rotate_alone(&self, device: &Bench, k: &Operand) -> [Operand; 2] {
        let Bench { client, capabilities, .. } = device;
        self.with_problem(device, k, |problem| rotate(client, capabilities, &problem).unwrap())
    }

    fn with_problem<T>(
        &self,
        device: &Bench,
        k: &Operand,
        run: impl FnOnce(RotateProblem) -> T,
    ) -> T {
        let (client, shape) = (&device.client, &self.problem.shape);
        let table = RotaryTable::of(client, &self.rope, shape.head_dim, shape.kv_len).unwrap();
        let (q, mask) = (upload_as(device, &self.q, self.q_shape(), self.element), self.mask());
        run(RotateProblem::new(&q, k, &table, &self.problem.grids, &mask))
    }

    /// `(q, k)` by definition.
    fn exact(&self, factor: f64) -> (Vec<f64>, Vec<f64>) {
        let grids = &self.problem.grids;
        let query = |b: usize, i: usize| {
            let queries = grids[b].q_len();
            (i < queries && i + grids[b].kv_len() >= queries)
                .then(|| i + grids[b].kv_len() - queries)
        };
        let key = |b: usize, i: usize| (i < grids[b].kv_len()).then_some(i);
        (
            all_turned(&self.q, self.q_shape(), &self.rope, factor, query),
            all_turned(&self.k, self.k_shape(), &self.rope, 1.0, key),
        )
    }

    fn tolerance(&self) -> f64 {
        match self.element {
            Element::F32 => 2e-6,
            Element::F16 => 6e-4,
            Element::BF16 => 5e-3,
        }
    }
}

fn close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&got, want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(error <= tolerance * want.abs().max(1.0), "{what}: {i} {got} {want}");
    }
}

fn same_pooled(device: &Bench, got: &Pooled, want: &Pooled, what: &str) {
    assert_eq!(got.blocks, want.blocks, "{what}");
    for (got, want, limit) in [(&got.means, &want.means, 1e-5), (&got.energy, &want.energy, 1e-4)] {
        let want = widened(&floats(&device.client, want));
        close(&floats(&device.client, got), &want, limit, what);
    }
}

fn check(device: &Bench, case: &Case) {
    let Bench { client, capabilities, name } = device;
    let what = format!("{name} {} {:?} {:?}", case.problem.name, case.element, case.rope);
    let k = upload_as(device, &case.k, case.k_shape(), case.element);
    let (grids, mask) = (&case.problem.grids, case.mask());
    let plain = case.rotate(device, &k, None, None);
    let (want_q, want_k) = case.exact(1.0);
    close(&read(device, &plain.q), &want_q, case.tolerance(), &format!("{what} q"));
    close(&read(device, &plain.k), &want_k, case.tolerance(), &format!("{what} k"));
    let (pooled_q, pooled_k) = pool(client, capabilities, &plain.q, &plain.k, grids, &mask);
    same_pooled(device, &plain.pooled_q, &pooled_q, &format!("{what} pooled q"));
    same_pooled(device, &plain.pooled_k, &pooled_k, &format!("{what} pooled k"));

    // Without the pooling Q and K are the same, bit for bit.
    let [alone_q, alone_k] = case.rotate_alone(device, &k);
    let bits = |x: &Operand| read(device, x).iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&alone_q), bits(&plain.q), "{what} q alone");
    assert_eq!(bits(&alone_k), bits(&plain.k), "{what} k alone");

    // The scale changes what is written of Q, and nothing of what is pooled.
    let scaled = case.rotate(device, &k, Some(0.125), None);
    let (want_q, _) = case.exact(0.125 * std::f64::consts::LOG2_E);
    close(&read(device, &scaled.q), &want_q, case.tolerance(), &format!("{what} scaled q"));
    let means = |pooled: &Pooled| (floats(client, &pooled.means), floats(client, &pooled.energy));
    assert_eq!(means(&scaled.pooled_q), means(&plain.pooled_q), "{what}");

    // New keys go behind those of a cache with room for more.
    let [batch, heads, kv_len, d] = case.k_shape();
    let (q_len, room) = (case.problem.shape.q_len, kv_len + 5);
    let rotated = read(device, &plain.k);
    let mut held = vec![f32::NAN; batch * heads * room * d];
    let mut new = vec![f32::NAN; batch * heads * q_len * d];
    for (line, row) in case.k.chunks_exact(d).enumerate() {
        let (head, position) = (line / kv_len, line % kv_len);
        let grid = &grids[head / heads];
        if position >= grid.kv_len() {
        } else if position < grid.first_position() {
            held[(head * room + position) * d..][..d].copy_from_slice(&rotated[line * d..][..d]);
        } else {
            let i = position - grid.first_position() + grid.blind_queries();
            new[(head * q_len + i) * d..][..d].copy_from_slice(row);
        }
    }
    let held = upload_as(device, &held, [batch, heads, room, d], case.element);
    let cache = Operand { shape: case.k_shape(), ..held };
    let new = upload_as(device, &new, [batch, heads, q_len, d], case.element);
    let cached = case.rotate(device, &new, None, Some(&cache));
    let got = read(device, &cached.k);
    for (line, want) in rotated.chunks_exact(d).enumerate() {
        let (head, position) = (line / kv_len, line % kv_len);
        let got = &got[(head * room + position) * d..][..d];
        if position < grids[head / heads].kv_len() {
            assert_eq!(got, want, "{what} cache {line}");
        } else {
            assert!(got.iter().all(|x| x.is_nan()), "{what} cache {line}");
        }
    }
    same_pooled(device, &cached.pooled_q, &pooled_q, &format!("{what} pooled q beside a cache"));
    same_pooled(device, &cached.pooled_k, &pooled_k, &format!("{what} pooled cache"));
}

#[test]
fn does_every_grid_agree_with_the_definition() {
    for device in devices() {
        for layout in LAYOUTS {
            for problem in problems() {
                let rope = rope(layout, problem.shape.head_dim);
                check(&device, &Case::new(problem, Element::F32, rope));
            }
        }
    }
}

#[rstest]
#[case(80, 32)] // Vectors that divide both parts
#[case(64, 6)] // single elements
#[case(48, 0)] // no rotation
#[case(256, 256)]
fn does_a_part_of_the_dims_turn(#[case] dim: usize, #[case] rotary_dim: usize) {
    for device in devices() {
        for layout in LAYOUTS {
            let lengths = [(40, 75), (17, 60)];
            let problem = problem("part", [2, 6, 3, 40, 75, dim], 16, Some(&lengths));
            check(&device, &Case::new(problem, Element::F32, rope(layout, rotary_dim)));
        }
    }
}

/// As on GPUs, where units of a cube share the rows of a block; few of them, since here each is a thread.
#[test]
fn do_units_share_a_block() {
    for device in devices().into_iter().filter(|device| device.name == "cpu") {
        let capabilities = Capabilities { cores: None, ..device.capabilities };
        let device = Bench { capabilities, ..device };
        // All dims turn, or half of them.
        for (layout, rotary_dim) in LAYOUTS.into_iter().zip([16, 8]) {
            let lengths = [(5, 7), (3, 6)];
            let problem = problem("shared", [2, 5, 1, 5, 7, 16], 4, Some(&lengths));
            check(&device, &Case::new(problem, Element::F32, rope(layout, rotary_dim)));
        }
    }
}

#[rstest]
fn are_elements_rounded_once(#[values(Element::F16, Element::BF16)] element: Element) {
    for device in devices().iter().filter(|device| device.name != "wgpu") {
        for layout in LAYOUTS {
            let problem = problem("rounded", [1, 4, 2, 70, 170, 64], 32, None);
            check(device, &Case::new(problem, element, rope(layout, 64)));
        }
    }
}

/// Q, K as `[batch, length, heads, head_dim]` in memory, as linear layers leave them; a factor on cos
/// and sin.
#[test]
fn are_views_read_in_place() {
    for device in devices() {
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_max_positions: 64,
            attention_factor: None,
        };
        let rope = Rope { scaling, ..rope(RopeLayout::RotateHalf, 32) };
        let problem = problem("view", [2, 2, 2, 50, 50, 32], 16, None);
        let case = Case::new(problem, Element::F32, rope);
        let [batch, heads, len, d] = case.k_shape();
        let mut values = vec![0.0; case.k.len()];
        for (line, row) in case.k.chunks_exact(d).enumerate() {
            let (b, h, i) = (line / len / heads, line / len % heads, line % len);
            values[((b * len + i) * heads + h) * d..][..d].copy_from_slice(row);
        }
        let k = upload_as(&device, &values, case.k_shape(), Element::F32);
        let k = Operand { strides: [len * heads * d, d, heads * d, 1], ..k };
        let got = case.rotate(&device, &k, None, None);
        assert_eq!(got.k.shape, [batch, heads, len, d]);
        close(&read(&device, &got.k), &case.exact(1.0).1, case.tolerance(), device.name);
    }
}

#[rstest]
fn does_attention_take_the_scale_in_q(
    #[values(Element::F32, Element::F16, Element::BF16)] element: Element,
) {
    for device in devices().iter().filter(|device| device.name != "wgpu" || element == Element::F32)
    {
        let Bench { client, capabilities, name } = device;
        let problem = problem("chunk", [1, 4, 2, 130, 200, 64], 32, None);
        let case = Case::new(problem, element, rope(RopeLayout::RotateHalf, 64));
        let k = upload_as(device, &case.k, case.k_shape(), element);
        let scale = 0.125;
        let plain = case.rotate(device, &k, None, None);
        let scaled = case.rotate(device, &k, Some(scale), None);
        let grids = &case.problem.grids;
        let attend = AttendProblem::new(&plain.q, &plain.k, &k, grids, None, None, scale, true);
        let prescaled = AttendProblem { q: &scaled.q, prescaled: true, ..attend.clone() };
        for rung in AttendRung::LADDER {
            if rung.check(capabilities, &attend).is_err() {
                continue;
            }
            let [want, got] = [&attend, &prescaled].map(|problem| {
                let attended = attend_on(client, capabilities, problem, rung);
                let out = Operand { handle: attended.out, ..plain.q.clone() };
                (read(device, &out), floats(client, &attended.lse.unwrap()))
            });
            let tolerance = match element {
                Element::F32 => 1e-5,
                Element::F16 => 4e-3,
                Element::BF16 => 3e-2,
            };
            let what = format!("{name} {rung} {element:?}");
            close(&got.0, &widened(&want.0), tolerance, &what);
            close(&got.1, &widened(&want.1), tolerance, &format!("{what} LSE"));
        }
    }
}

#[test]
fn is_what_does_not_go_together_refused() {
    let device = &devices()[0];
    let Bench { client, capabilities, .. } = device;
    let case = Case::new(problems().remove(3), Element::F32, rope(RopeLayout::RotateHalf, 32));
    let (q_shape, k_shape) = (case.q_shape(), case.k_shape());
    let q = upload_as(device, &case.q, q_shape, Element::F32);
    let k = upload_as(device, &case.k, k_shape, Element::F32);
    let (grids, mask) = (&case.problem.grids, case.mask());
    let run = |k: &Operand, positions, grids, cache| {
        let table = RotaryTable::of(client, &case.rope, 32, positions).unwrap();
        let problem = RotateProblem::new(&q, k, &table, grids, &mask);
        rotate_and_pool(client, capabilities, &RotateProblem { cache, ..problem }).err()
    };
    let len = k_shape[2];
    assert_eq!(run(&k, len, grids, None), None);
    let short = RotateError::Positions { needs: len, has: len - 1 };
    assert_eq!(run(&k, len - 1, grids, None), Some(short));
    assert_eq!(run(&k, len, &[], None), Some(RotateError::Grids(q_shape)));
    // Beside a cache there are as many keys as queries.
    let wrong = RotateError::Shape { name: "K", got: k_shape, q: q_shape };
    assert_eq!(run(&k, len, grids, Some(&k)), Some(wrong));
    let wrong = RotateError::Shape { name: "K", got: q_shape, q: q_shape };
    assert_eq!(run(&q, len, grids, None), Some(wrong));
    let half = Operand { element: Element::F16, ..k.clone() };
    let wrong = RotateError::Element { name: "K", got: Element::F16, q: Element::F32 };
    assert_eq!(run(&half, len, grids, None), Some(wrong));
    let odd = RotaryTable::of(client, &rope(RopeLayout::RotateHalf, 34), 32, 1);
    assert!(matches!(odd, Err(PrismError::Rope { .. })));
}
