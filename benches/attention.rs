//! Prism's kernels on the CPU side by side in one run: `cargo bench`.
//!
//! Per shape (f32, two threads unless `RAYON_NUM_THREADS` says otherwise): Burn Flex's own
//! attention on repeated K and V (the repeat not counted), our dense attention, sparse attention
//! over random selections, and pooling plus selection. Every kernel is checked against the dense
//! one or the oracle's rules by the tests; a table of ratios of medians ends the run.

use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Device, Distribution, Tensor};
use burn_prism::{
    AttentionOptions, AttentionShape, BlockGrid, BlockSelection, PrismConfig, SelectedBlocks,
    block_sparse_attention, dense_attention, select_blocks,
};
use criterion::{BenchmarkId, Criterion};

const BLOCK: usize = 128;
const LENGTH: usize = 8192;

struct Problem {
    name: &'static str,
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    shape: AttentionShape,
}

fn problem(
    name: &'static str,
    q_heads: usize,
    kv_heads: usize,
    length: usize,
    d: usize,
) -> Problem {
    let device = Device::flex();
    let random =
        |heads| Tensor::random([1, heads, length, d], Distribution::Normal(0.0, 1.0), &device);
    let kv = [1, kv_heads, length, d];
    let shape = AttentionShape::new([1, q_heads, length, d], kv, kv).expect("a valid shape");
    Problem { name, q: random(q_heads), k: random(kv_heads), v: random(kv_heads), shape }
}

/// Keeps each causal block with probability `keep` by a fixed pattern, block 0 and the diagonal
/// always.
fn selection(shape: &AttentionShape, keep: f64) -> (BlockSelection, Vec<BlockGrid>) {
    let grid = BlockGrid::new(BLOCK, shape.q_len, shape.kv_len).expect("a valid grid");
    let mut selection = BlockSelection::empty(1, shape.q_heads, grid.rows(), grid.key_blocks());
    let mut state = 1u64;
    let mut uniform = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / f64::from(1u32 << 31)
    };
    for head in 0..shape.q_heads {
        for row in 0..grid.rows() {
            let last = grid.causal_blocks(row) - 1;
            let blocks: Vec<usize> =
                (0..=last).filter(|&v| v == 0 || v == last || uniform() < keep).collect();
            selection.set_row(0, head, row, blocks);
        }
    }
    (selection, vec![grid])
}

fn run(criterion: &mut Criterion, problem: &Problem) {
    let Problem { name, q, k, v, shape } = problem;
    let options = AttentionOptions::default();
    let mut group = criterion.benchmark_group(*name);
    group.sample_size(10).warm_up_time(Duration::from_millis(500));
    group.measurement_time(Duration::from_secs(4));

    let [b, kv_heads, n, d] = k.dims();
    let repeat = |x: &Tensor<4>| {
        x.clone().unsqueeze_dim::<5>(2).expand([b, kv_heads, shape.group(), n, d]).reshape([
            b,
            shape.q_heads,
            n,
            d,
        ])
    };
    let (k_all, v_all) = (repeat(k), repeat(v));
    group.bench_function("burn", |bencher| {
        bencher.iter(|| {
            let options = AttentionModuleOptions { is_causal: true, ..Default::default() };
            black_box(attention(q.clone(), k_all.clone(), v_all.clone(), None, None, options))
        });
    });
    group.bench_function("dense", |bencher| {
        bencher.iter(|| dense_attention(q.clone(), k.clone(), v.clone(), &options).expect("runs"));
    });
    for keep in [0.1, 0.3, 0.5] {
        let (selection, grids) = selection(shape, keep);
        let density = selection.density(&grids);
        let selected = SelectedBlocks::from_host(&selection, shape, BLOCK, None, &q.device())
            .expect("a valid selection");
        let id = BenchmarkId::new("sparse", format!("{density:.3}"));
        group.bench_function(id, |bencher| {
            bencher.iter(|| {
                block_sparse_attention(q.clone(), k.clone(), v.clone(), &selected, &options)
                    .expect("runs")
            });
        });
    }
    let config = PrismConfig::llama3();
    group.bench_function("select", |bencher| {
        bencher.iter(|| select_blocks(q.clone(), k.clone(), &config, &options).expect("runs"));
    });
    group.finish();
}

/// Ratios from interleaved runs: each round times every contender once, so that whatever slows the
/// machine down slows all of them.
fn ratios(problem: &Problem) {
    let Problem { name, q, k, v, shape } = problem;
    let options = AttentionOptions::default();
    let [b, kv_heads, n, d] = k.dims();
    let repeat = |x: &Tensor<4>| {
        x.clone().unsqueeze_dim::<5>(2).expand([b, kv_heads, shape.group(), n, d]).reshape([
            b,
            shape.q_heads,
            n,
            d,
        ])
    };
    let (k_all, v_all) = (repeat(k), repeat(v));
    let selections: Vec<(f64, SelectedBlocks)> = [0.1, 0.3, 0.5]
        .into_iter()
        .map(|keep| {
            let (selection, grids) = selection(shape, keep);
            let density = selection.density(&grids);
            let selected = SelectedBlocks::from_host(&selection, shape, BLOCK, None, &q.device());
            (density, selected.expect("a valid selection"))
        })
        .collect();
    let config = PrismConfig::llama3();
    let burn = || {
        let options = AttentionModuleOptions { is_causal: true, ..Default::default() };
        black_box(attention(q.clone(), k_all.clone(), v_all.clone(), None, None, options));
    };
    let dense = || {
        black_box(dense_attention(q.clone(), k.clone(), v.clone(), &options).expect("runs"));
    };
    let select = || {
        black_box(select_blocks(q.clone(), k.clone(), &config, &options).expect("runs"));
    };
    let mut contenders: Vec<(String, Box<dyn Fn() + '_>)> = vec![
        ("burn".into(), Box::new(burn)),
        ("dense".into(), Box::new(dense)),
        ("pool + select".into(), Box::new(select)),
    ];
    for (density, selected) in &selections {
        let sparse = || {
            let result =
                block_sparse_attention(q.clone(), k.clone(), v.clone(), selected, &options);
            black_box(result.expect("runs"));
        };
        contenders.push((format!("sparse {density:.3}"), Box::new(sparse)));
    }
    let mut times = vec![Vec::new(); contenders.len()];
    for _ in 0..7 {
        for ((_, run), times) in contenders.iter().zip(&mut times) {
            let start = Instant::now();
            run();
            times.push(start.elapsed().as_secs_f64());
        }
    }
    let medians: Vec<f64> = times
        .into_iter()
        .map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        })
        .collect();
    println!("\n{name}: medians of 7 interleaved rounds");
    println!("| | ms | over dense | over density · dense |\n|---|---|---|---|");
    for (i, (what, _)) in contenders.iter().enumerate() {
        let ratio = medians[i] / medians[1];
        let fair = i.checked_sub(3).map(|i| format!("{:.3}", ratio / selections[i].0));
        println!(
            "| {what} | {:.1} | {ratio:.3} | {} |",
            1e3 * medians[i],
            fair.unwrap_or_default()
        );
    }
}

fn main() {
    let problems = [
        problem("9 query, 3 kv heads, d 64, 8192 tokens", 9, 3, LENGTH, 64),
        problem("8 query, 2 kv heads, d 128, 8192 tokens", 8, 2, LENGTH, 128),
    ];
    let mut criterion = Criterion::default().configure_from_args();
    for problem in &problems {
        run(&mut criterion, problem);
    }
    criterion.final_summary();
    // Only a whole `cargo bench` prints ratios; a filter or `--test` asks for something else.
    if std::env::args().skip(1).all(|arg| arg == "--bench") {
        for problem in &problems {
            ratios(problem);
        }
    }
}
