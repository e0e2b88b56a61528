//! An ONNX model with Prism for its attention: `cargo run --release` in this folder.
//!
//! `build.rs` imports the same file twice, as it is and with [`Attention`] in the place of its
//! `Attention` nodes. Nothing else differs: both load the weights that the import wrote.

use std::sync::{Arc, Mutex};

use burn::module::Module;
use burn::tensor::{Device, Distribution, Tensor};
use burn_prism::{AttentionOptions, PrismConfig, Report, Rope};

#[allow(dead_code, missing_docs, clippy::all)]
mod dense {
    include!(concat!(env!("OUT_DIR"), "/dense/attention_block.rs"));
}

#[allow(dead_code, missing_docs, clippy::all)]
mod prism {
    include!(concat!(env!("OUT_DIR"), "/prism/attention_block.rs"));

    impl Model {
        /// The model with this attention; the import's code keeps the field to itself.
        pub fn with_attention(self, attention: crate::Attention) -> Self {
            Self { attention1: attention, ..self }
        }
    }
}

/// What the build script puts in the place of an `Attention` node.
#[derive(Module, Debug)]
pub struct Attention {
    #[module(skip)]
    config: PrismConfig,
    /// What the calls did; generated code has no other way to hand it out.
    #[module(skip)]
    reports: Arc<Mutex<Vec<Report>>>,
}

impl Default for Attention {
    /// With the RoPE of `export.py`, which the bands depend on.
    fn default() -> Self {
        Self { config: PrismConfig::new(Rope::new(1e4)), reports: Arc::default() }
    }
}

impl Attention {
    /// Attention of Q `[batch, q_heads, n, head_dim]` over K and V `[batch, kv_heads, n, head_dim]`;
    /// the scale is 1/√head_dim unless given.
    ///
    /// # Panics
    /// What Prism refuses: generated code has no errors.
    pub fn forward(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        scale: Option<f64>,
    ) -> Tensor<4> {
        let options = AttentionOptions { scale, ..AttentionOptions::default() };
        let result = self.config.init().forward_with(q, k, v, &options);
        let result = result.unwrap_or_else(|error| panic!("attention: {error}"));
        self.reports.lock().unwrap_or_else(|held| held.into_inner()).push(result.report);
        result.output
    }

    fn last_density(&self) -> anyhow::Result<f64> {
        let reports = self.reports.lock().unwrap_or_else(|held| held.into_inner());
        let last = reports.last().ok_or_else(|| anyhow::anyhow!("no call so far"))?;
        Ok(last.density()?)
    }
}

/// The block's output with Prism at a mass, and the density of the selection.
fn with_prism(x: Tensor<3>, mass: f64) -> anyhow::Result<(Tensor<3>, f64)> {
    let mut attention = Attention::default();
    attention.config = attention.config.with_mass(mass).with_dense_below(0);
    let model = prism::Model::default().with_attention(attention.clone());
    let output = model.forward(x);
    Ok((output, attention.last_density()?))
}

/// Root mean square of the difference over that of `right`.
fn difference(left: Tensor<3>, right: Tensor<3>) -> f32 {
    let rms = |x: Tensor<3>| x.square().mean().sqrt().into_scalar::<f32>();
    rms(left - right.clone()) / rms(right)
}

/// Hidden states `[1, n, 64]` that are alike within a topic of 128 positions, as those of real text are.
fn hidden_states(n: usize) -> Tensor<3> {
    let device = Device::default();
    let random = |rows| Tensor::<3>::random([1, rows, 64], Distribution::Normal(0.0, 0.5), &device);
    let topics = (random(n.div_ceil(128)) * 2.5).unsqueeze_dim::<4>(2);
    let topics =
        topics.expand([1, n.div_ceil(128), 128, 64]).reshape([1, n.div_ceil(128) * 128, 64]);
    random(n) + topics.slice_dim(1, 0..n)
}

fn main() -> anyhow::Result<()> {
    let x = hidden_states(2048);
    let exact = dense::Model::default().forward(x.clone());
    for mass in [1.0, 0.9] {
        let (output, density) = with_prism(x.clone(), mass)?;
        let differs = difference(output, exact.clone());
        println!(
            "mass {mass}: {:.0} % of the causal blocks read, differs by {differs:.1e}",
            density * 100.0
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::TensorData;

    /// The import itself computes what ONNX's evaluator does.
    #[test]
    fn dense_import_agrees_with_onnx() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../golden.json")).unwrap();
        let tensor = |name: &str| {
            let values = golden[name].as_array().unwrap().iter();
            let values: Vec<f32> = values.map(|x| x.as_f64().unwrap() as f32).collect();
            Tensor::<3>::from_data(TensorData::new(values, [1, 12, 64]), &Device::default())
        };
        let output = dense::Model::default().forward(tensor("input"));
        let off = difference(output, tensor("output"));
        assert!(off < 1e-5, "{off}");
    }

    /// Lengths that fill blocks and lengths that don't.
    #[test]
    fn mass_1_is_the_dense_import() {
        for n in [1, 12, 128, 700, 1024] {
            let x = hidden_states(n);
            let (output, density) = with_prism(x.clone(), 1.0).unwrap();
            assert_eq!(density, 1.0);
            let off = difference(output, dense::Model::default().forward(x));
            assert!(off < 1e-5, "{n} positions: {off}");
        }
    }

    #[test]
    fn mass_90_reads_less_and_stays_near() {
        let x = hidden_states(2048);
        let (output, density) = with_prism(x.clone(), 0.9).unwrap();
        assert!((0.05..0.95).contains(&density), "{density}");
        let off = difference(output, dense::Model::default().forward(x));
        assert!(off > 0.0 && off < 0.3, "{off}");
    }

    #[test]
    fn example_runs() {
        main().unwrap();
    }
}
