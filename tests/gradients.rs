//! Does autodiff work? Untracked tensors keep the kernels, tracked ones get right gradients.

use burn::tensor::{DType, Device, Tensor};
use burn_prism::{
    AttentionOptions, AttentionShape, PrismConfig, SelectedBlocks, block_sparse_attention,
    prism_attention,
};
use tests::{Inputs, Kind, all_devices, grids, random_selection, values};

fn inputs() -> Inputs {
    let kv = [1, 1, 24, 8];
    let shape = AttentionShape::new([1, 2, 24, 8], kv, kv).unwrap();
    Inputs::random(shape, Kind::Normal, DType::F32, 1)
}

#[test]
fn untracked_tensors_on_an_autodiff_device_keep_the_kernel() {
    let inputs = inputs();
    let config = PrismConfig::llama3().with_block(8).with_dense_below(0);
    let run = |device: &Device| {
        let [q, k, v] = inputs.tensors(DType::F32, device);
        let options = AttentionOptions::default().with_lse();
        let got = prism_attention(q, k, v, &config, &options).unwrap();
        (values(got.output), values(got.lse.unwrap()))
    };
    // The native kernel's bits, which tensor ops don't reproduce.
    for device in all_devices() {
        assert_eq!(run(&device), run(&device.clone().autodiff()), "{device:?}");
    }
}

/// Gradients of Σ w·out with respect to Q, K and V against central differences of the oracle.
#[test]
fn gradients_agree_with_finite_differences() {
    let inputs = inputs();
    let shape = inputs.shape;
    let grids = grids(&shape, 8);
    let selection = random_selection(&grids, 2, 0.4, 3);
    let weights = tests::random(Kind::Normal, 2 * 24 * 8, DType::F32, 9);
    let loss = |inputs: &Inputs| -> f64 {
        let out = inputs.oracle(&grids, Some(&selection)).out;
        out.iter().zip(&weights).map(|(o, &w)| o * f64::from(w)).sum()
    };
    for device in all_devices() {
        let device = device.autodiff();
        let selected = SelectedBlocks::from_host(&selection, &shape, 8, None, &device).unwrap();

        let [q, k, v] = inputs.tensors(DType::F32, &device).map(Tensor::require_grad);
        let options = AttentionOptions::default();
        let out =
            block_sparse_attention(q.clone(), k.clone(), v.clone(), &selected, &options).unwrap();
        let w = tests::tensor(&weights, [1, 2, 24, 8], DType::F32, &device);
        let grads = (out.output * w).sum().backward();

        for (name, tensor) in [("q", &q), ("k", &k), ("v", &v)] {
            let grad = values(tensor.grad(&grads).unwrap());
            for i in (0..grad.len()).step_by(7) {
                let moved = |by: f32| {
                    let mut inputs = inputs.clone();
                    let x = match name {
                        "q" => &mut inputs.q,
                        "k" => &mut inputs.k,
                        _ => &mut inputs.v,
                    };
                    x[i] += by;
                    let at = f64::from(x[i]);
                    (loss(&inputs), at)
                };
                let ((up, at_up), (down, at_down)) = (moved(1e-2), moved(-1e-2));
                let right = (up - down) / (at_up - at_down);
                let off = (f64::from(grad[i]) - right).abs();
                assert!(
                    off < 2e-3 * right.abs().max(1.0),
                    "{device:?} d{name}[{i}]: {} not {right}",
                    grad[i]
                );
            }
        }
    }
}
