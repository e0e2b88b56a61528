//! Does every rung compute the attention that the definition gives, dense and over a selection, on
//! every kind of grid, with K and V as views into a longer cache?

mod support;

use half::{bf16, f16};
use prism_core::selection::extent;
use prism_core::{BlockSelection, oracle};
use prism_kernels::attend::{AttendProblem, AttendRung, attend_on};
use prism_kernels::select::Selection;
use prism_kernels::{Element, Operand};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::*;

/// Values as the element type holds them, and their bytes.
fn rounded(values: &[f32], element: Element) -> (Vec<f32>, Vec<u8>) {
    match element {
        Element::F32 => (values.to_vec(), bytemuck::cast_slice(values).to_vec()),
        Element::F16 => {
            let x: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
            (x.iter().map(|x| x.to_f32()).collect(), bytemuck::cast_slice(&x).to_vec())
        }
        Element::BF16 => {
            let x: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
            (x.iter().map(|x| x.to_f32()).collect(), bytemuck::cast_slice(&x).to_vec())
        }
    }
}

fn read(device: &Bench, handle: &cubecl::server::Handle, element: Element) -> Vec<f32> {
    let bytes = device.client.read_one(handle.clone()).expect("the kernel ran");
    match element {
        Element::F32 => bytemuck::cast_slice(&bytes).to_vec(),
        Element::F16 => bytemuck::cast_slice::<_, f16>(&bytes).iter().map(|x| x.to_f32()).collect(),
        Element::BF16 => {
            bytemuck::cast_slice::<_, bf16>(&bytes).iter().map(|x| x.to_f32()).collect()
        }
    }
}

/// K or V as the first `len` positions of a cache of twice the length, the rest NaN.
fn cached(device: &Bench, values: &[f32], shape: [usize; 4], element: Element) -> Operand {
    let [batch, heads, len, dim] = shape;
    let mut cache = vec![f32::NAN; batch * heads * 2 * len * dim];
    for head in 0..batch * heads {
        cache[head * 2 * len * dim..][..len * dim]
            .copy_from_slice(&values[head * len * dim..][..len * dim]);
    }
    let handle = device.client.create_from_slice(&rounded(&cache, element).1);
    Operand::new(handle, shape, [heads * 2 * len * dim, 2 * len * dim, dim, 1], element)
}

fn random_selection(problem: &Problem, seed: u64) -> BlockSelection {
    let mut rng = StdRng::seed_from_u64(seed);
    let (rows, key_blocks) = extent(&problem.grids);
    let (batch, heads) = (problem.shape.batch, problem.shape.q_heads);
    let width = key_blocks.div_ceil(32);
    let mut words = vec![0u32; batch * heads * rows * width];
    for (b, grid) in problem.grids.iter().enumerate() {
        for line in (0..heads * grid.rows())
            .map(|i| (b * heads + i / grid.rows().max(1)) * rows + i % grid.rows().max(1))
        {
            let causal = grid.causal_blocks(line % rows);
            for v in 0..causal {
                if v + 1 == causal || rng.random_bool(0.4) {
                    words[line * width + v / 32] |= 1 << (v % 32);
                }
            }
        }
    }
    let counts =
        words.chunks(width.max(1)).map(|row| row.iter().map(|w| w.count_ones()).sum()).collect();
    BlockSelection::from_words([batch, heads, rows, key_blocks], words, counts).unwrap()
}

#[test]
fn does_every_rung_agree_with_the_definition() {
    for device in devices() {
        let elements: &[Element] = match device.name {
            "wgpu" => &[Element::F32],
            _ => &[Element::F32, Element::F16, Element::BF16],
        };
        // Each problem is a kernel of its own to compile, which software drivers are slow at.
        let mut problems = problems();
        problems.truncate(if device.name == "wgpu" { 4 } else { usize::MAX });
        for problem in &problems {
            for &element in elements {
                check(&device, problem, element);
            }
        }
    }
}

fn check(device: &Bench, problem: &Problem, element: Element) {
    let Bench { client, capabilities, name } = device;
    let shape = &problem.shape;
    let d = shape.head_dim;
    let kv = [shape.batch, shape.kv_heads, shape.kv_len, d];
    let q_shape = [shape.batch, shape.q_heads, shape.q_len, d];
    let (q, q_bytes) = rounded(&random(5, q_shape.iter().product()), element);
    let (k, _) = rounded(&random(6, kv.iter().product()), element);
    let (v, _) = rounded(&random(7, kv.iter().product()), element);
    let q_operand = Operand::contiguous(client.create_from_slice(&q_bytes), q_shape, element);
    let (k_operand, v_operand) = (cached(device, &k, kv, element), cached(device, &v, kv, element));
    let scale = 0.7 / (d as f64).sqrt();
    let host = random_selection(problem, 8);
    let selection = Selection {
        words: client.create_from_slice(bytemuck::cast_slice(host.words())),
        counts: client.create_from_slice(bytemuck::cast_slice(host.counts())),
        rows: host.shape()[2],
        words_per_row: host.words_per_row(),
    };
    for selected in [None, Some((&selection, &host))] {
        let want = oracle::attend(
            &widened(&q),
            &widened(&k),
            &widened(&v),
            shape,
            &problem.grids,
            selected.map(|s| s.1),
            scale,
        );
        let attend = AttendProblem::new(
            &q_operand,
            &k_operand,
            &v_operand,
            &problem.grids,
            selected.map(|s| s.0),
            None,
            scale,
            true,
        );
        for rung in AttendRung::LADDER {
            // Mesa's software driver takes minutes to compile some shapes of the unit rung.
            let slow = *name == "wgpu" && rung == AttendRung::Unit && problem.shape.q_heads > 2;
            if slow || rung.check(capabilities, &attend).is_err() {
                continue;
            }
            let got = attend_on(client, capabilities, &attend, rung);
            let out = read(device, &got.out, element);
            let lse = floats(client, &got.lse.unwrap());
            let what = format!(
                "{name} {rung} {element:?}, {}, sparse {}",
                problem.name,
                selected.is_some()
            );
            let tolerance = match element {
                Element::F32 => 1e-5,
                Element::F16 => 4e-3,
                Element::BF16 => 3e-2,
            };
            for (i, (got, want)) in out.iter().zip(&want.out).enumerate() {
                assert!((f64::from(*got) - want).abs() < tolerance, "{what}: {i} {got} {want}");
            }
            for (i, (got, want)) in lse.iter().zip(&want.lse).enumerate() {
                let close = (f64::from(*got) - want).abs() < tolerance;
                assert!(close || f64::from(*got) == *want, "{what}: LSE {i} {got} {want}");
            }
        }
    }
}
