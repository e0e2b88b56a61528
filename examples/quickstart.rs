//! Tensors in, report out: `cargo run --release --example quickstart`.

use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use burn_prism::{AttentionOptions, PrismConfig, dense_attention};

fn main() -> anyhow::Result<()> {
    let device = Device::flex();
    let (q_heads, kv_heads, length, head_dim) = (6, 2, 2048, 64);
    let random = |heads| {
        Tensor::<4>::random([1, heads, length, head_dim], Distribution::Normal(0.0, 1.0), &device)
    };
    // Queries and keys that are alike within a topic of 256 tokens, as those of real text are.
    let topics = Tensor::<4>::random(
        [1, 1, length / 256, head_dim],
        Distribution::Normal(0.0, 1.5),
        &device,
    )
    .unsqueeze_dim::<5>(3)
    .expand([1, 1, length / 256, 256, head_dim])
    .reshape([1, 1, length, head_dim]);
    let (q, k) = (random(q_heads) + topics.clone(), random(kv_heads) + topics);
    let v = random(kv_heads);

    let start = Instant::now();
    let exact =
        dense_attention(q.clone(), k.clone(), v.clone(), &AttentionOptions::default())?.output;
    let dense_seconds = start.elapsed().as_secs_f64();

    let attention = PrismConfig::llama3().init();
    let start = Instant::now();
    let prism = attention.forward_with(q, k, v, &AttentionOptions::default())?;
    let prism_seconds = start.elapsed().as_secs_f64();

    let error = (prism.output - exact.clone()).square().mean().sqrt().into_scalar::<f32>();
    let size = exact.square().mean().sqrt().into_scalar::<f32>();
    println!("path: {}", prism.report);
    println!("density: {:.3} of the causal blocks were read", prism.report.density()?);
    println!("time: dense {dense_seconds:.4} s, Prism {prism_seconds:.4} s");
    println!("error: {:.2} % of the output", 100.0 * error / size);
    anyhow::ensure!(error < 0.2 * size, "Prism lost too much: {error} of {size}");
    Ok(())
}

#[test]
fn runs() {
    main().unwrap();
}
