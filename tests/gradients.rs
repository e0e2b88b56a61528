//! Does autodiff work? Untracked tensors keep the kernels, tracked ones get right gradients.

use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_prism::{
    AttentionOptions, AttentionShape, GateUp, LinearOptions, PrismConfig, SelectedBlocks,
    block_sparse_attention, linear_with, prism_attention, swiglu,
};
use tests::{Inputs, Kind, all_devices, grids, random, random_selection, values};

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

fn assert_near(what: &str, got: f32, right: f64) {
    let off = (f64::from(got) - right).abs();
    assert!(off < 2e-3 * right.abs().max(1.0), "{what}: {got}, not {right}");
}

/// Gradients of Σ g·(x·W + bias + residual), which are products too.
#[test]
fn gradients_of_a_product_are_products() {
    let (m, k, n) = (70, 16, 24);
    let fill = |len: usize, seed: u64| random(Kind::Normal, len, DType::F32, seed);
    let (x, w, g) = (fill(m * k, 1), fill(k * n, 2), fill(m * n, 3));
    let dot = |len: usize, term: &dyn Fn(usize) -> f32| -> f64 {
        (0..len).map(|c| f64::from(term(c))).sum()
    };
    for device in all_devices() {
        let device = device.autodiff();
        let tensor = |values: &[f32], shape: [usize; 2]| {
            Tensor::<2>::from_data(TensorData::new(values.to_vec(), shape), &device)
        };
        let rows = tensor(&x, [m, k]).require_grad();
        let weight = tensor(&w, [k, n]).require_grad();
        let bias = Tensor::<1>::zeros([n], &device).require_grad();
        let residual = Tensor::<2>::zeros([m, n], &device).require_grad();
        let options =
            LinearOptions::default().with_bias(bias.clone()).with_residual(residual.clone());
        let out = linear_with(rows.clone(), weight.clone(), options).unwrap();
        let grads = (out * tensor(&g, [m, n])).sum().backward();

        let grad = values(rows.grad(&grads).unwrap());
        for (i, j) in [(0, 0), (1, 5), (m - 1, k - 1)] {
            let right = dot(n, &|c| g[i * n + c] * w[j * n + c]);
            assert_near(&format!("{device:?} dx[{i}, {j}]"), grad[i * k + j], right);
        }
        let grad = values(weight.grad(&grads).unwrap());
        for (i, j) in [(0, 0), (7, 5), (k - 1, n - 1)] {
            let right = dot(m, &|c| x[c * k + i] * g[c * n + j]);
            assert_near(&format!("{device:?} dw[{i}, {j}]"), grad[i * n + j], right);
        }
        let grad = values(bias.grad(&grads).unwrap());
        let right = dot(m, &|c| g[c * n + n - 1]);
        assert_near(&format!("{device:?} dbias"), grad[n - 1], right);
        assert_eq!(values(residual.grad(&grads).unwrap()), g);
    }
}

/// With the same weight as gate and as up the output is a²·σ(a), whose derivative is known.
#[test]
fn gradients_of_swiglu_are_right_in_one_weight_and_in_two() {
    let (m, k, f) = (5, 16, 24);
    let x = random(Kind::Normal, m * k, DType::F32, 1);
    let w: Vec<f32> =
        random(Kind::Normal, k * f, DType::F32, 2).into_iter().map(|w| w / 4.0).collect();
    let at = |i: usize, c: usize| -> f64 {
        (0..k).map(|j| f64::from(x[i * k + j]) * f64::from(w[j * f + c])).sum()
    };
    let slope = |a: f64| {
        let s = 1.0 / (1.0 + (-a).exp());
        2.0 * a * s + a * a * s * (1.0 - s)
    };
    for device in all_devices() {
        let device = device.autodiff();
        let tensor = |values: &[f32], shape: [usize; 2]| {
            Tensor::<2>::from_data(TensorData::new(values.to_vec(), shape), &device)
        };
        for weights in [
            GateUp::new(tensor(&w, [k, f]), tensor(&w, [k, f])).unwrap(),
            GateUp::interleaved(tensor(&w, [k, f]), tensor(&w, [k, f])).unwrap(),
        ] {
            let rows = tensor(&x, [m, k]).require_grad();
            let grads = swiglu(rows.clone(), &weights).unwrap().sum().backward();
            let grad = values(rows.grad(&grads).unwrap());
            for (i, j) in [(0, 0), (2, 7), (m - 1, k - 1)] {
                let right = (0..f).map(|c| slope(at(i, c)) * f64::from(w[j * f + c])).sum();
                assert_near(&format!("{device:?} dx[{i}, {j}]"), grad[i * k + j], right);
            }
        }
    }
}
