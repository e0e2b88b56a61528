//! A Burn attention block before and after: `cargo run --release --example patch_your_llama`.
//!
//! The lines that change are marked `// +` and, where they replaced others, `// -`.

use burn::module::Module;
use burn::tensor::activation::softmax;
use burn::tensor::{Bool, Device, Distribution, Tensor};
use burn_nn::{Linear, LinearConfig, RotaryEncoding, RotaryEncodingConfig};
use burn_prism::{PrismAttention, PrismConfig, PrismError, Rope, RopeLayout}; // +

const HIDDEN: usize = 256;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;

/// The block as one writes it in Burn: repeats K and V, and builds the whole score matrix.
#[derive(Module, Debug)]
struct Before {
    wq: Linear,
    wk: Linear,
    wv: Linear,
    wo: Linear,
    rope: RotaryEncoding,
}

impl Before {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, n, _] = x.dims();
        let heads = |y: Tensor<3>, h| y.reshape([batch, n, h, HEAD_DIM]).swap_dims(1, 2);
        let q = self.rope.forward(heads(self.wq.forward(x.clone()), HEADS));
        let k = self.rope.forward(heads(self.wk.forward(x.clone()), KV_HEADS));
        let v = heads(self.wv.forward(x), KV_HEADS);
        let repeat = |y: Tensor<4>| {
            y.unsqueeze_dim::<5>(2)
                .expand([batch, KV_HEADS, HEADS / KV_HEADS, n, HEAD_DIM])
                .reshape([batch, HEADS, n, HEAD_DIM])
        };
        let scores = q.matmul(repeat(k).transpose()) / (HEAD_DIM as f32).sqrt(); // -
        let mask = Tensor::<2, Bool>::tril_mask([n, n], 0, &scores.device()); // -
        let scores = scores.mask_fill(mask.unsqueeze(), f32::NEG_INFINITY); // -
        let output = softmax(scores, 3).matmul(repeat(v)); // -
        self.wo.forward(output.swap_dims(1, 2).reshape([batch, n, HIDDEN]))
    }
}

/// The same block with Prism.
#[derive(Module, Debug)]
struct After {
    wq: Linear,
    wk: Linear,
    wv: Linear,
    wo: Linear,
    rope: RotaryEncoding,
    attention: PrismAttention, // +
}

impl After {
    fn forward(&self, x: Tensor<3>) -> Result<Tensor<3>, PrismError> {
        let [batch, n, _] = x.dims();
        let heads = |y: Tensor<3>, h| y.reshape([batch, n, h, HEAD_DIM]).swap_dims(1, 2);
        let q = self.rope.forward(heads(self.wq.forward(x.clone()), HEADS));
        let k = self.rope.forward(heads(self.wk.forward(x.clone()), KV_HEADS));
        let v = heads(self.wv.forward(x), KV_HEADS);
        let output = self.attention.forward(q, k, v)?; // +
        Ok(self.wo.forward(output.swap_dims(1, 2).reshape([batch, n, HIDDEN])))
    }
}

/// Burn's RotaryEncoding rotates neighbouring dims: say so, the bands depend on it.
fn prism() -> PrismConfig {
    let rope = Rope { layout: RopeLayout::Interleaved, ..Rope::new(1e4) }; // +
    PrismConfig::new(rope) // +
}

fn main() -> anyhow::Result<()> {
    let device = Device::flex();
    let linear = |i, o| LinearConfig::new(i, o).with_bias(false).init(&device);
    let before = Before {
        wq: linear(HIDDEN, HEADS * HEAD_DIM),
        wk: linear(HIDDEN, KV_HEADS * HEAD_DIM),
        wv: linear(HIDDEN, KV_HEADS * HEAD_DIM),
        wo: linear(HIDDEN, HIDDEN),
        rope: RotaryEncodingConfig::new(2048, HEAD_DIM).init(&device),
    };
    let x = Tensor::<3>::random([1, 1536, HIDDEN], Distribution::Normal(0.0, 1.0), &device);
    let right = before.forward(x.clone());
    let difference = |config: &PrismConfig| -> anyhow::Result<f32> {
        let Before { wq, wk, wv, wo, rope } = before.clone();
        let after = After { wq, wk, wv, wo, rope, attention: config.init() };
        let error = (after.forward(x.clone())? - right.clone()).square().mean().sqrt();
        let size = right.clone().square().mean().sqrt();
        Ok((error / size).into_scalar::<f32>())
    };
    let exact = difference(&prism().with_mass(1.0))?;
    let sparse = difference(&prism().with_mass(0.95))?;
    println!("mass 1:   differs by {exact:.1e}");
    println!("mass .95: differs by {sparse:.1e}");
    anyhow::ensure!(exact < 1e-4, "mass 1 reads everything and must not differ, but by {exact}");
    anyhow::ensure!(sparse < 0.3, "mass .95 differs by {sparse}");
    Ok(())
}

#[test]
fn runs() {
    main().unwrap();
}

/// The promise of the README: fewer than 15 changed lines.
#[test]
fn changes_fewer_than_15_lines() {
    let source = include_str!("patch_your_llama.rs");
    let changed = source.lines().filter(|line| line.ends_with("// +") || line.ends_with("// -"));
    let changed = changed.count();
    assert!((5..15).contains(&changed), "{changed} lines change");
}
