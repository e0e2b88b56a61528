//! Which products the Hopper kernel takes, what it says of the others, that its source holds what it
//! is for, and how weights for SwiGLU are interleaved: all without a GPU.
#![cfg(all(feature = "offline", feature = "cpu"))]

use cubecl::client::Client;
use prism_kernels::matmul::{
    Epilogue, Half, MatmulError, MatmulProblem, check, interleave, interleaved, matmul, matmul_into,
};
use prism_kernels::offline::{hopper, sources};
use prism_kernels::{Element, Matrix};
use rstest::rstest;

const BF16: Element = Element::BF16;

fn client() -> Client {
    cubecl::Device::Cpu(Default::default()).client()
}

fn matrix(shape: [usize; 2], strides: [usize; 2]) -> Matrix {
    Matrix::new(client().empty(64), shape, strides, BF16)
}

fn rows(shape: [usize; 2]) -> Matrix {
    matrix(shape, [shape[1], 1])
}

fn columns(shape: [usize; 2]) -> Matrix {
    matrix(shape, [1, shape[0]])
}

fn checked(x: &Matrix, w: &Matrix, epilogue: Epilogue) -> Result<(), MatmulError> {
    check(&hopper(), &MatmulProblem::new(x, w, epilogue))
}

#[rstest]
#[case([900, 200], 520)]
#[case([130, 72], 264)]
#[case([1, 4096], 4096)]
#[case([131_072, 14_336], 4096)]
fn takes_multiples_of_eight_in_both_orders(#[case] x: [usize; 2], #[case] n: usize) {
    let (x, k) = (rows(x), x[1]);
    for w in [rows([k, n]), columns([k, n])] {
        assert_eq!(checked(&x, &w, Epilogue::Plain), Ok(()));
    }
}

#[test]
fn takes_views_whose_rows_lie_apart() {
    let x = matrix([900, 200], [208, 1]);
    let w = matrix([200, 528], [1, 256]);
    let residual = matrix([900, 528], [1024, 1]);
    assert_eq!(checked(&x, &w, Epilogue::Residual(&residual)), Ok(()));
    // The stride of a single row doesn't matter.
    assert_eq!(checked(&matrix([1, 200], [3, 1]), &w, Epilogue::SwiGlu), Ok(()));
}

#[test]
fn says_what_it_does_not_take() {
    let (x, w) = (rows([300, 128]), columns([128, 256]));
    let plain = Epilogue::Plain;
    let mut older = hopper();
    older.hopper = false;
    let problem = MatmulProblem::new(&x, &w, plain);
    assert_eq!(check(&older, &problem), Err(MatmulError::NoHopper));
    let mut smaller = hopper();
    smaller.shared_memory = 100_000;
    let error = MatmulError::SharedMemory { needs: 213_120, has: 100_000 };
    assert_eq!(check(&smaller, &problem), Err(error));

    let float = Matrix { element: Element::F32, ..x.clone() };
    assert_eq!(checked(&float, &w, plain), Err(MatmulError::Element(Element::F32)));
    let half = Matrix { element: Element::F16, ..w.clone() };
    let error = MatmulError::Elements { operand: "w", got: Element::F16, expected: BF16 };
    assert_eq!(checked(&x, &half, plain), Err(error));
    let inner = checked(&x, &columns([136, 256]), plain);
    assert_eq!(inner, Err(MatmulError::Inner { x: 128, w: 136 }));
    let none = checked(&rows([0, 128]), &w, plain);
    assert_eq!(none, Err(MatmulError::Range { extent: "M", got: 0 }));
    let odd = checked(&rows([300, 100]), &columns([100, 256]), plain);
    assert_eq!(odd, Err(MatmulError::Multiple { extent: "K", multiple: 8, got: 100 }));
    let odd = checked(&x, &columns([128, 264]), Epilogue::SwiGlu);
    assert_eq!(odd, Err(MatmulError::Multiple { extent: "N", multiple: 16, got: 264 }));
    let order = checked(&columns([300, 128]), &w, plain);
    let error = MatmulError::Order { operand: "x", order: "row-major", got: [1, 300] };
    assert_eq!(order, Err(error));
    let gaps = checked(&x, &matrix([128, 256], [512, 2]), plain);
    assert!(matches!(gaps, Err(MatmulError::Order { operand: "w", .. })));
    for stride in [132, 64, 0] {
        let error = MatmulError::Stride { operand: "x", least: 128, got: stride };
        assert_eq!(checked(&matrix([300, 128], [stride, 1]), &w, plain), Err(error));
    }
    let shifted = Matrix { handle: x.handle.clone().offset_start(8), ..x.clone() };
    let error = MatmulError::Offset { operand: "x", got: 8 };
    assert_eq!(checked(&shifted, &w, plain), Err(error));
    let residual = checked(&x, &w, Epilogue::Residual(&rows([300, 128])));
    let error =
        MatmulError::Shape { operand: "the residual", got: [300, 128], expected: [300, 256] };
    assert_eq!(residual, Err(error));
    let message = MatmulError::Multiple { extent: "N", multiple: 16, got: 264 }.to_string();
    assert_eq!(message, "N must be a multiple of 16, got 264");
}

#[test]
fn an_output_of_another_shape_is_refused_and_nothing_launched() {
    let (x, w) = (rows([300, 128]), columns([128, 256]));
    let problem = MatmulProblem::new(&x, &w, Epilogue::SwiGlu);
    assert_eq!(problem.out_shape(), [300, 128]);
    let recorded = sources(|| {
        let result = matmul_into(&client(), &hopper(), &problem, &rows([300, 256]));
        assert!(matches!(result, Err(MatmulError::Shape { operand: "the output", .. })));
    });
    assert!(recorded.is_empty());
}

#[rstest]
#[case(128, "matmul_alone", false)]
#[case(129, "matmul_paired", true)]
fn the_source_multiplies_by_wgmma(#[case] m: usize, #[case] name: &str, #[case] shares: bool) {
    let (x, w) = (rows([m, 128]), columns([128, 256]));
    let residual = rows([m, 256]);
    for epilogue in [Epilogue::Plain, Epilogue::Residual(&residual), Epilogue::SwiGlu] {
        let problem = MatmulProblem::new(&x, &w, epilogue);
        let recorded = sources(|| {
            matmul(&client(), &hopper(), &problem).expect("a product it takes");
        });
        let [(kernel, source)] = &recorded[..] else { panic!("{} kernels", recorded.len()) };
        assert_eq!(kernel, name);
        assert!(source.contains("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16"));
        assert_eq!(source.contains("multicast::cluster"), shares);
        assert_eq!(source.contains("__cluster_dims__(2, 1, 1)"), shares);
        let silu = matches!(epilogue, Epilogue::SwiGlu);
        assert_eq!(source.contains("ex2.approx"), silu);
    }
}

/// Views included: a gate and an up projection of one fused weight, row-major.
#[test]
fn interleaved_weights_hold_every_column_where_the_rule_says() {
    let client = client();
    let (k, f) = (24, 40);
    // Element [k, n] of both side by side is k · 80 + n.
    let both: Vec<u16> = (0..k * 2 * f).map(|i| i as u16).collect();
    let transposed: Vec<u16> = (0..2 * f * k).map(|i| both[i % k * 2 * f + i / k]).collect();
    for along in [true, false] {
        let values = if along { &both } else { &transposed };
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_ne_bytes()).collect();
        let handle = client.create_from_slice(&bytes);
        let (strides, ahead) = if along { ([2 * f, 1], 2 * f) } else { ([1, k], 2 * f * k) };
        let half = |start: usize| {
            let handle = handle.clone().offset_start(start as u64);
            Matrix::new(handle, [k, f], strides, BF16)
        };
        let (gate, up) = (half(0), half(ahead));
        let out = interleave(&client, &gate, &up).expect("weights in eights");
        assert_eq!(out.shape, [k, 2 * f]);
        let bytes = client.read_one(out.handle.clone()).expect("the kernel ran");
        let out_at = |row: usize, column: usize| {
            let at = 2 * (row * out.strides[0] + column * out.strides[1]);
            u16::from_ne_bytes([bytes[at], bytes[at + 1]])
        };
        for row in 0..k {
            for column in 0..2 * f {
                let (half, source) = interleaved(column);
                let source = source + if half == Half::Up { f } else { 0 };
                assert_eq!(out_at(row, column), both[row * 2 * f + source], "{row}, {column}");
            }
        }
    }
    let error = interleave(&client, &rows([24, 40]), &columns([24, 40]));
    assert!(matches!(error, Err(MatmulError::Order { operand: "up", .. })));
}
