//! Are products with a weight right? Every device, element type, rank and order of the weight against
//! a product in f64, with a bias, a residual, or SwiGLU; and is what does not fit refused?

use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_prism::plan::{Kernel, kernel};
use burn_prism::{
    GateUp, LinearKernel, LinearOptions, PrismError, interleave, linear, linear_with, plan_linear,
    plan_swiglu, swiglu,
};
use rstest::rstest;
use tests::{Kind, all_devices, assert_right, devices, has, random, round, values};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// A tensor of any rank.
fn tensor<const D: usize>(
    values: &[f32],
    shape: [usize; D],
    dtype: DType,
    device: &Device,
) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), (device, dtype))
}

/// `[M, K]` times `[K, N]` in f64.
fn product(x: &[f32], w: &[f32], [m, k, n]: [usize; 3]) -> Vec<f64> {
    let mut out = vec![0.0; m * n];
    for (x, out) in x.chunks_exact(k).zip(out.chunks_exact_mut(n)) {
        for (&x, w) in x.iter().zip(w.chunks_exact(n)) {
            out.iter_mut().zip(w).for_each(|(out, &w)| *out += f64::from(x) * f64::from(w));
        }
    }
    out
}

/// The same with operands rounded to `dtype`, summed one after the other in f32, and rounded: how far
/// off an honest product may be.
fn naive(x: &[f32], w: &[f32], [m, k, n]: [usize; 3], dtype: DType) -> Vec<f32> {
    let rounded = |x: &[f32]| x.iter().map(|&x| round(x, dtype)).collect::<Vec<_>>();
    let (x, w, mut out) = (rounded(x), rounded(w), vec![0.0; m * n]);
    for (x, out) in x.chunks_exact(k).zip(out.chunks_exact_mut(n)) {
        for (x, w) in x.iter().zip(w.chunks_exact(n)) {
            out.iter_mut().zip(w).for_each(|(out, w)| *out += x * w);
        }
    }
    out.into_iter().map(|sum| round(sum, dtype)).collect()
}

/// Burn's matrix products on tensor cores cut f32 to the ten bits of a mantissa that f16 has.
fn judged(device: &Device, dtype: DType) -> DType {
    let tensor_cores = matches!(kernel(device), Kernel::CubeMma | Kernel::CubeHopper);
    if tensor_cores && dtype == DType::F32 { DType::F16 } else { dtype }
}

/// Weights small enough that products are about 1, as a model's are.
fn weights(len: usize, k: usize, dtype: DType, seed: u64) -> Vec<f32> {
    let w = random(Kind::Normal, len, DType::F32, seed);
    w.into_iter().map(|w| round(w / (k as f32).sqrt(), dtype)).collect()
}

fn check(devices: Vec<Device>, shape: [usize; 3]) {
    let [m, k, n] = shape;
    for device in devices {
        for dtype in DTYPES.into_iter().filter(|&dtype| has(&device, dtype)) {
            let judged = judged(&device, dtype);
            let x = random(Kind::Normal, m * k, dtype, 1);
            let w = weights(k * n, k, dtype, 2);
            let bias = random(Kind::Normal, n, dtype, 3);
            let residual = random(Kind::Normal, m * n, dtype, 4);
            let (right, near) = (product(&x, &w, shape), naive(&x, &w, shape, judged));
            let rows = tensor(&x, [m, k], dtype, &device);
            let row_major = tensor(&w, [k, n], dtype, &device);
            // The same matrix, column after column in memory.
            let turned: Vec<f32> = (0..n * k).map(|i| w[i % k * n + i / k]).collect();
            let column_major = tensor(&turned, [n, k], dtype, &device).transpose();
            for (order, w) in [("row-major", row_major), ("column-major", column_major)] {
                for (biased, added) in [(false, false), (true, false), (false, true), (true, true)]
                {
                    let what = format!("{device:?} {dtype:?} {shape:?} {order} {biased} {added}");
                    let (mut right, mut near) = (right.clone(), near.clone());
                    let mut options = LinearOptions::default();
                    let mut add = |terms: &[f32]| {
                        for (i, (right, near)) in right.iter_mut().zip(&mut near).enumerate() {
                            let term = terms[i % terms.len()];
                            *right += f64::from(term);
                            *near = round(*near + term, judged);
                        }
                    };
                    if biased {
                        add(&bias);
                        options = options.with_bias(tensor(&bias, [n], dtype, &device));
                    }
                    if added {
                        add(&residual);
                        options = options.with_residual(tensor(&residual, [m, n], dtype, &device));
                    }
                    let got = linear_with(rows.clone(), w.clone(), options).unwrap();
                    assert_eq!((got.dims(), got.dtype()), ([m, n], dtype));
                    assert_right(&what, &values(got), &right, &near, n, m, judged);
                }
            }
        }
    }
}

#[rstest]
#[case::one([1, 1, 1])]
#[case::odd([3, 5, 7])]
#[case::a_token([1, 64, 136])]
#[case::half_a_tile([64, 72, 256])]
#[case::tails([130, 136, 264])]
#[case::clusters([300, 200, 520])]
#[case::columns_that_tma_cannot_step_over([70, 64, 100])]
fn a_product_is_right(#[case] shape: [usize; 3]) {
    check(devices(), shape);
}

#[test]
fn a_product_is_right_on_every_device() {
    check(all_devices(), [70, 40, 24]);
}

#[test]
fn rank_and_strides_of_x_change_nothing() {
    let [m, k, n] = [2 * 3 * 20, 40, 24];
    for device in devices() {
        let dtype = if has(&device, DType::BF16) { DType::BF16 } else { DType::F32 };
        let x = tensor(&random(Kind::Normal, m * k, dtype, 1), [m, k], dtype, &device);
        let weight = tensor(&weights(k * n, k, dtype, 2), [k, n], dtype, &device);
        // A view whose rows lie further apart than they are long.
        let residual = x.clone().slice([0..m, 0..n]);
        let add = |residual| LinearOptions::default().with_residual(residual);
        let right = values(linear_with(x.clone(), weight.clone(), add(residual.clone())).unwrap());

        let three = x.clone().reshape([6, 20, k]);
        let options = LinearOptions::default().with_residual(residual.clone().reshape([6, 20, n]));
        let got = linear_with(three, weight.clone(), options).unwrap();
        assert_eq!(got.dims(), [6, 20, n]);
        assert_close(&values(got), &right, dtype);
        let four = x.clone().reshape([2, 3, 20, k]);
        let options = LinearOptions::default().with_residual(residual.reshape([2, 3, 20, n]));
        let got = linear_with(four.clone(), weight.clone(), options).unwrap();
        assert_eq!(got.dims(), [2, 3, 20, n]);
        assert_close(&values(got), &right, dtype);

        let right = values(linear(x.clone(), weight.clone()).unwrap());
        let swapped = linear(four.swap_dims(1, 2), weight.clone()).unwrap().swap_dims(1, 2);
        assert_close(&values(swapped), &right, dtype);
        let narrow = Tensor::cat(vec![x.clone(), x], 1).slice([0..m, k..2 * k]);
        assert_close(&values(linear(narrow, weight).unwrap()), &right, dtype);
    }
}

/// Up to the order of sums.
fn assert_close(got: &[f32], right: &[f32], dtype: DType) {
    let allowed = if dtype == DType::F32 { 1e-5 } else { 1e-2 };
    assert_eq!(got.len(), right.len());
    for (a, b) in got.iter().zip(right) {
        assert!((a - b).abs() <= allowed * b.abs().max(1.0), "{a}, not {b}");
    }
}

#[test]
fn no_rows_make_no_rows() {
    for device in all_devices() {
        let (x, w) = (Tensor::<3>::zeros([2, 0, 16], &device), Tensor::zeros([16, 24], &device));
        let residual = Tensor::zeros([2, 0, 24], &device);
        let options = LinearOptions::default().with_residual(residual);
        assert_eq!(linear_with(x.clone(), w.clone(), options).unwrap().dims(), [2, 0, 24]);
        for weights in [GateUp::new(w.clone(), w.clone()), GateUp::interleaved(w.clone(), w)] {
            assert_eq!(swiglu(x.clone(), &weights.unwrap()).unwrap().dims(), [2, 0, 24]);
        }
    }
}

#[test]
fn interleaved_columns_alternate_in_groups_of_eight() {
    let (k, f) = (3, 16);
    for device in all_devices() {
        let numbers = |from: usize| {
            let numbers: Vec<f32> = (from..from + k * f).map(|x| x as f32).collect();
            tensor(&numbers, [k, f], DType::F32, &device)
        };
        let got = values(interleave(numbers(0), numbers(100)).unwrap());
        for (row, got) in got.chunks_exact(2 * f).enumerate() {
            for (column, &got) in got.iter().enumerate() {
                let (group, within) = (column / 8, column % 8);
                let right = group % 2 * 100 + row * f + group / 2 * 8 + within;
                assert_eq!(got, right as f32, "{device:?} row {row} column {column}");
            }
        }
    }
}

fn check_swiglu(devices: Vec<Device>, [m, k, f]: [usize; 3]) {
    for device in devices {
        for dtype in DTYPES.into_iter().filter(|&dtype| has(&device, dtype)) {
            let judged = judged(&device, dtype);
            let x = random(Kind::Normal, m * k, dtype, 1);
            let (gate, up) = (weights(k * f, k, dtype, 2), weights(k * f, k, dtype, 3));
            let silu = |x: f64| x / (1.0 + (-x).exp());
            let both = |w: &[f32]| product(&x, w, [m, k, f]);
            let right: Vec<f64> =
                both(&gate).into_iter().zip(both(&up)).map(|(gate, up)| silu(gate) * up).collect();
            let both = |w: &[f32]| naive(&x, w, [m, k, f], judged);
            let round = |x: f32| round(x, judged);
            let step = |(gate, up): (f32, f32)| {
                let sigmoid = round(1.0 / (1.0 + (-gate).exp()));
                round(round(gate * sigmoid) * up)
            };
            let near: Vec<f32> = both(&gate).into_iter().zip(both(&up)).map(step).collect();
            let weight = |w: &[f32]| tensor(w, [k, f], dtype, &device);
            let rows = tensor(&x, [1, m, k], dtype, &device);
            for weights in [
                GateUp::new(weight(&gate), weight(&up)).unwrap(),
                GateUp::interleaved(weight(&gate), weight(&up)).unwrap(),
            ] {
                let what = format!("{device:?} {dtype:?} {} {m} {k} {f}", weights.is_interleaved());
                let got = swiglu(rows.clone(), &weights).unwrap();
                assert_eq!((got.dims(), got.dtype()), ([1, m, f], dtype));
                assert_right(&what, &values(got), &right, &near, f, m, judged);
            }
        }
    }
}

#[rstest]
#[case::a_token([1, 64, 24])]
#[case::half_a_tile([64, 72, 128])]
#[case::tails([130, 136, 264])]
#[case::clusters([300, 200, 520])]
fn swiglu_is_right_in_one_weight_and_in_two(#[case] shape: [usize; 3]) {
    check_swiglu(devices(), shape);
}

#[test]
fn swiglu_is_right_on_every_device() {
    check_swiglu(all_devices(), [70, 40, 24]);
}

/// Hopper's kernel on Hopper, for what it takes; elsewhere and otherwise Burn's, with the reason.
#[test]
fn the_plan_says_which_kernel_and_why() {
    for device in all_devices() {
        let hopper = kernel(&device) == Kernel::CubeHopper;
        let plan = |shape, dtype| plan_linear(shape, dtype, &device).unwrap();
        let right = if hopper { LinearKernel::Hopper } else { LinearKernel::Burn };
        let got = plan([128, 64, 64], DType::BF16);
        assert_eq!((got.kernel, got.refused.is_none()), (right, hopper), "{got}");
        assert_eq!((got.bytes, got.flops), (128 * 64 * 2, 2.0 * 128.0 * 64.0 * 64.0));
        let got = plan_swiglu([128, 64, 64], DType::F16, &device).unwrap();
        assert_eq!(got.kernel, right, "{got}");
        assert_eq!((got.bytes, got.flops), (128 * 64 * 2, 4.0 * 128.0 * 64.0 * 64.0));
        let weight = || Tensor::<2>::zeros([64, 64], (&device, DType::F32));
        assert!(!GateUp::new(weight(), weight()).unwrap().is_interleaved());
        for (shape, dtype, says) in [
            ([63, 64, 64], DType::BF16, "from 64 rows, got 63"),
            ([128, 60, 64], DType::BF16, "K must be a multiple of 8, got 60"),
            ([128, 64, 60], DType::BF16, "N must be a multiple of 8, got 60"),
            ([128, 64, 64], DType::F32, "f16 and bf16, got F32"),
        ] {
            let got = plan(shape, dtype);
            assert_eq!(got.kernel, LinearKernel::Burn);
            let text = got.to_string();
            assert!(text.starts_with("Burn's matmul (not hopper matmul: "), "{text}");
            assert!(!hopper || text.contains(says), "{text}");
        }
    }
}

#[test]
fn weights_that_do_not_fit_are_refused() {
    let device = Device::flex();
    let matrix = |rows, columns| Tensor::<2>::zeros([rows, columns], &device);
    let x = || Tensor::<3>::zeros([2, 5, 16], &device);
    let says = |error: PrismError, text: &str| assert_eq!(error.to_string(), text);

    says(linear(x(), matrix(24, 16)).unwrap_err(), "weight must be [16, 16], got [24, 16]");
    says(linear(x(), matrix(16, 0)).unwrap_err(), "columns of a weight must be at least 1, got 0");
    let none = Tensor::<3>::zeros([2, 5, 0], &device);
    says(linear(none, matrix(0, 8)).unwrap_err(), "columns of x must be at least 1, got 0");
    let half = matrix(16, 24).cast(DType::F16);
    let error = linear(x(), half).unwrap_err();
    says(error, "weight: element type F16 is not supported, expected that of x");
    let elsewhere = Tensor::<2>::zeros([16, 24], &tests::ndarray());
    let error = linear(x(), elsewhere).unwrap_err();
    assert_eq!(error, PrismError::Device { left: "x", right: "weight" });

    let with = |options| linear_with(x(), matrix(16, 24), options).unwrap_err();
    let bias = Tensor::<1>::zeros([23], &device);
    says(with(LinearOptions::default().with_bias(bias)), "bias must be [24], got [23]");
    let options = LinearOptions::default().with_residual(x());
    says(with(options), "residual must be [2, 5, 24], got [2, 5, 16]");
    says(plan_linear([5, 0, 8], DType::F32, &device).unwrap_err(), "K must be at least 1, got 0");
    says(plan_linear([5, 8, 0], DType::F32, &device).unwrap_err(), "N must be at least 1, got 0");

    let error = GateUp::new(matrix(16, 24), matrix(16, 32)).unwrap_err();
    says(error, "up must be [16, 24], got [16, 32]");
    let error = interleave(matrix(16, 20), matrix(16, 20)).unwrap_err();
    says(error, "F must be a multiple of 8, got 20");
    assert!(GateUp::new(matrix(16, 24), matrix(16, 24).cast(DType::F16)).is_err());
    let narrow = |made: fn(Tensor<2>, Tensor<2>) -> burn_prism::Result<GateUp>| {
        swiglu(x(), &made(matrix(8, 24), matrix(8, 24)).unwrap()).unwrap_err()
    };
    says(narrow(GateUp::new), "gate must be [16, 24], got [8, 24]");
    says(narrow(GateUp::interleaved), "gate and up must be [16, 48], got [8, 48]");
}
