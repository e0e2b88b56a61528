//! Attention, and its gradients.

use crate::support::*;
use burn::backend::tensor::Device;
use burn::backend::{AutodiffBackend, Backend, FloatDType, TensorMetadata};
use burn::tensor::DType;
use burn_prism::fallback;
use burn_prism::ops::{AttendParams, Side};

pub fn attends<B: Backend>() {
    for problem in problems() {
        for selection in [None, Some(problem.some_blocks())] {
            let expected = problem.oracle(selection.as_ref());
            let (out, lse) = problem.attend::<B>(selection.as_ref());
            close(&out, &expected.out, 1e-5);
            close(&lse, &expected.lse, 1e-5);
        }
    }
}

/// Long enough for several tiles of heads and queries; blocks longer than the sequence too.
pub fn attends_in_tiles<B: Backend>() {
    for (block, heads, length) in [(16, [12, 2], 720), (1 << 20, [12, 12], 600), (7, [2, 1], 530)] {
        let problem = Problem::new(heads, 8, block, &[(length, length)]);
        let selection = problem.some_blocks();
        let expected = problem.oracle(Some(&selection));
        let (out, lse) = problem.attend::<B>(Some(&selection));
        close(&out, &expected.out, 1e-5);
        close(&lse, &expected.lse, 1e-5);
    }
}

/// A row that reads nothing gives 0 and −∞, and so does one whose scores are all −∞.
pub fn rows_without_keys_are_zero<B: Backend>() {
    let mut problem = Problem::new([2, 1], 8, 16, &[(40, 40)]);
    problem.q[..8].fill(f32::MAX);
    problem.k[..8].fill(-f32::MAX);
    let mut selection = problem.some_blocks();
    selection.set_row(0, 1, 1, []);
    let (out, lse) = problem.attend::<B>(Some(&selection));
    for i in [0, 40 + 16, 40 + 31] {
        assert!(out[i * 8..][..8].iter().all(|&x| x == 0.0));
        assert_eq!(lse[i], f64::NEG_INFINITY);
    }
}

pub fn takes_half_precision<B: Backend>() {
    let device = Device::<B>::default();
    for (dtype, tolerance) in [(FloatDType::F16, 1e-3), (FloatDType::BF16, 8e-3)] {
        let mut problem = Problem::new([6, 2], 33, 16, &[(31, 64), (64, 31)]);
        let [q_dims, k_dims] = problem.dims();
        let [q, k, v] = [(&problem.q, q_dims), (&problem.k, k_dims), (&problem.v, k_dims)]
            .map(|(x, dims)| B::float_cast(float::<B>(x, &dims, &device), dtype));
        for (x, rounded) in [(&mut problem.q, &q), (&mut problem.k, &k), (&mut problem.v, &v)] {
            *x = read::<B>(rounded.clone()).into_iter().map(|x| x as f32).collect();
        }
        let pooled = fallback::pool::<B>(k.clone(), &problem.grids, Side::Keys);
        assert_eq!(pooled.dtype(), DType::F32);
        close(&read::<B>(pooled), &wide(&problem.pooled()[1]), 1e-5);
        let params = AttendParams::new(problem.grids.clone(), problem.scale());
        let (out, lse) = fallback::attend::<B>(q, k, v, None, &params);
        assert_eq!((out.dtype(), lse.dtype()), (DType::from(dtype), DType::F32));
        let expected = problem.oracle(None);
        close(&read::<B>(out), &expected.out, tolerance);
        close(&read::<B>(lse), &expected.lse, 1e-5);
    }
}

/// Gradients of Σ a·out + Σ b·lse against central differences of the oracle.
pub fn gradients_are_right<A: AutodiffBackend>() {
    let mut problem = Problem::new([3, 1], 4, 4, &[(9, 11), (9, 11), (5, 3)]);
    let selection = problem.some_blocks();
    let device = Device::<A>::default();
    let [q_dims, k_dims] = problem.dims();
    let mut noise = Noise(1);
    let a = noise.list(problem.q.len());
    // Rows without a key have no finite LSE to weigh.
    let b: Vec<f32> = problem
        .oracle(Some(&selection))
        .lse
        .iter()
        .map(|lse| if lse.is_finite() { noise.next() } else { 0.0 })
        .collect();
    let leaf =
        |x: &[f32], dims: &[usize]| A::float_set_require_grad(float::<A>(x, dims, &device), true);
    let leaves = [leaf(&problem.q, &q_dims), leaf(&problem.k, &k_dims), leaf(&problem.v, &k_dims)];
    let [q, k, v] = leaves.clone();
    let params = AttendParams::new(problem.grids.clone(), problem.scale());
    let selected = Some(words::<A>(&selection, &device));
    let (out, lse) = fallback::attend::<A>(q, k, v, selected, &params);
    let finite = A::float_clamp_min(lse, (-100.0).into());
    let out = A::float_mul(out, float::<A>(&a, &q_dims, &device));
    let lse = A::float_mul(finite, float::<A>(&b, &q_dims[..3], &device));
    let loss = A::float_add(A::float_sum(out), A::float_sum(lse));
    let grads = A::backward(loss);

    let value = |problem: &Problem| {
        let expected = problem.oracle(Some(&selection));
        let out: f64 = expected.out.iter().zip(&a).map(|(x, &a)| x * f64::from(a)).sum();
        let lse: f64 = expected
            .lse
            .iter()
            .zip(&b)
            .filter(|(lse, _)| lse.is_finite())
            .map(|(x, &b)| x * f64::from(b))
            .sum();
        out + lse
    };
    for (which, leaf) in leaves.iter().enumerate() {
        let grad = read::<A::InnerBackend>(A::grad(leaf, &grads).unwrap());
        assert!(grad.iter().all(|x| x.is_finite()));
        for i in (0..grad.len()).step_by(5) {
            let mut moved = |by: f32| {
                let x = [&mut problem.q, &mut problem.k, &mut problem.v];
                let x = &mut x.into_iter().nth(which).unwrap()[i];
                let before = *x;
                *x = before + by;
                let step = f64::from(*x) - f64::from(before);
                let got = value(&problem);
                let x = [&mut problem.q, &mut problem.k, &mut problem.v];
                x.into_iter().nth(which).unwrap()[i] = before;
                (got, step)
            };
            let ((up, right), (down, left)) = (moved(1e-3), moved(-1e-3));
            let expected = (up - down) / (right - left);
            let expected = if expected.is_nan() { 0.0 } else { expected };
            assert!((grad[i] - expected).abs() < 1e-4, "{which}, {i}: {} {expected}", grad[i]);
        }
    }
}
