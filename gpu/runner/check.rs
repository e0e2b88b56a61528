//! The catalogue of checks, as tasks that processes share out.

use cubecl::server::Handle;
use prism_bench::Gpu;
use prism_bench::inputs::{Dims, read};
use prism_bench::report::Run;
use prism_kernels::Element;

use crate::check_attention::{ELEMENTS, attention, bad_values, far_strides};
use crate::check_pool::pooling;
use crate::{
    check_antidiagonal, check_matmul, check_outliers, check_prefix, check_repeats, check_rotate,
    check_select,
};

/// A piece of the catalogue, ready to be checked.
pub type Task<'a> = Box<dyn Fn(&mut Run) + 'a>;

/// Shape, block and the (query, key) lengths of each sequence.
type AttentionCase = (Dims, usize, Option<Vec<(usize, usize)>>);

/// Values of a device buffer. A kernel that fails leaves nothing to check: the process ends.
pub fn values(gpu: &Gpu, handle: &Handle, element: Element) -> Vec<f32> {
    read(gpu, handle, element).expect("the kernels ran")
}

/// Checks this shard's part of the catalogue: small shapes only, or only the matrix product, if so asked.
pub fn check(gpu: &Gpu, small: bool, matmul: bool, (shard, shards): (usize, usize), run: &mut Run) {
    let mut tasks = if matmul { Vec::new() } else { attention_tasks(gpu, small) };
    tasks.extend(check_matmul::tasks(gpu, small));
    tasks.iter().enumerate().filter(|(i, _)| i % shards == shard).for_each(|(_, task)| task(run));
}

/// Attention and all that comes before it.
fn attention_tasks(gpu: &Gpu, small: bool) -> Vec<Task<'_>> {
    let mut cases: Vec<AttentionCase> = Vec::new();
    let groups = [(1, 1), (3, 1), (8, 2), (7, 1), (16, 2)];
    for (i, len) in [1, 127, 128, 129].into_iter().enumerate() {
        for (j, dim) in [64, 96, 128, 256].into_iter().enumerate() {
            let (q_heads, kv_heads) = groups[(i + j) % groups.len()];
            cases.push(([1, q_heads, kv_heads, len, len, dim], 128, None));
        }
    }
    cases.push(([1, 4, 2, 200, 777, 128], 128, None));
    cases.push(([1, 2, 2, 300, 200, 64], 64, None));
    cases.push(([3, 4, 1, 300, 500, 128], 128, Some(vec![(300, 500), (1, 129), (256, 256)])));
    cases.push(([1, 2, 1, 400, 400, 80], 48, None));
    cases.push(([2, 2, 1, 300, 450, 80], 128, None));
    cases.push(([1, 4, 2, 700, 1100, 128], 256, None));
    cases.push(([2, 2, 1, 600, 900, 64], 128, Some(vec![(600, 900), (333, 333)])));
    cases.push(([1, 2, 1, 300, 300, 112], 16, None));
    cases.push(([2, 3, 1, 513, 513, 192], 128, None));
    cases.push(([1, 2, 1, 300, 300, 32], 32, None));
    if !small {
        for (i, dim) in [64, 96, 128, 256].into_iter().enumerate() {
            let (q_heads, kv_heads) = groups[(i + 1) % groups.len()];
            cases.push(([1, q_heads, kv_heads, 4096, 4096, dim], 128, None));
        }
        cases.push(([1, 8, 2, 40_000, 40_000, 128], 128, None));
        cases.push(([1, 4, 1, 10_000, 40_000, 64], 128, None));
    }
    let mut tasks: Vec<Task> = Vec::new();
    for (dims, block, lengths) in cases {
        for element in ELEMENTS {
            let lengths = lengths.clone();
            tasks.push(Box::new(move |run| {
                attention(gpu, dims, block, lengths.as_deref(), element, (1.0, false), run);
            }));
        }
    }
    // Scores far apart: the running maximum moves by more than any rung may leave it behind.
    for (dim, sharpness) in [(64, 10.0), (128, 10.0), (96, 40.0), (128, 60.0)] {
        for element in [Element::F16, Element::BF16] {
            let dims = [1, 4, 2, 1500, 1500, dim];
            tasks.push(Box::new(move |run| {
                attention(gpu, dims, 128, None, element, (sharpness, false), run)
            }));
        }
    }
    // Q with the scale in it: scores near 0, where no reference is needed, and far from it.
    for (dim, sharpness) in [64, 128].into_iter().flat_map(|d| [1.0, 10.0, 60.0].map(|s| (d, s))) {
        for element in [Element::F16, Element::BF16] {
            let ragged = vec![(900, 1500), (200, 777)];
            for (dims, lengths) in
                [([1, 4, 2, 1500, 1500, dim], None), ([2, 4, 1, 900, 1500, dim], Some(ragged))]
            {
                tasks.push(Box::new(move |run| {
                    let lengths = lengths.as_deref();
                    attention(gpu, dims, 128, lengths, element, (sharpness, true), run)
                }));
            }
        }
    }
    tasks.push(Box::new(|run| check_rotate::rotation(gpu, run)));
    tasks.push(Box::new(|run| bad_values(gpu, run)));
    tasks.push(Box::new(|run| check_select::exact(gpu, run)));
    tasks.push(Box::new(|run| check_select::wild(gpu, run)));
    tasks.push(Box::new(|run| check_antidiagonal::right(gpu, run)));
    tasks.push(Box::new(|run| check_antidiagonal::bad(gpu, run)));
    tasks.push(Box::new(|run| check_prefix::right(gpu, run)));
    tasks.push(Box::new(|run| check_outliers::right(gpu, run)));
    tasks.push(Box::new(|run| check_outliers::bad(gpu, run)));
    tasks.push(Box::new(|run| pooling(gpu, run)));
    tasks.push(Box::new(|run| far_strides(gpu, run)));
    if !small {
        tasks.push(Box::new(|run| check_repeats::repeats(gpu, run)));
    }
    tasks
}
