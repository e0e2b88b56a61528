//! Is attention right? Every device, element type, head size, group size and length of the
//! catalogue against the f64 oracle, dense and over random selections.

use burn::tensor::{DType, Device};
use burn_prism::plan::{Kernel, kernel};
use burn_prism::{
    AttentionOptions, AttentionShape, BlockGrid, BlockSelection, Calibration, PrismConfig, Rope,
    Scoring, SelectedBlocks, block_sparse_attention, dense_attention, select_blocks,
};
use prism_core::oracle;
use prism_core::second_order::SubBlocks;
use rstest::rstest;
use tests::{
    Inputs, Kind, all_devices, assert_lse, assert_right, devices, devices_and_wgpu, grids, has,
    random_selection, values,
};

fn shape(q_heads: usize, kv_heads: usize, q_len: usize, kv_len: usize, d: usize) -> AttentionShape {
    let kv = [1, kv_heads, kv_len, d];
    AttentionShape::new([1, q_heads, q_len, d], kv, kv).unwrap()
}

fn check(shape: AttentionShape, kind: Kind, block: usize, seed: u64) {
    check_on(devices(), shape, kind, block, seed);
}

fn check_on(devices: Vec<Device>, shape: AttentionShape, kind: Kind, block: usize, seed: u64) {
    for device in devices {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            if !has(&device, dtype) {
                continue;
            }
            let what = format!("{device:?} {dtype:?} {kind:?} {shape:?}");
            let inputs = Inputs::random(shape, kind, dtype, seed);
            let options = AttentionOptions::default().with_lse();
            let (d, len) = (shape.head_dim, shape.q_len);

            let dense_grids = grids(&shape, block);
            let [q, k, v] = inputs.tensors(dtype, &device);
            let right = inputs.oracle(&dense_grids, None);
            let judged = rounding(&device, dtype, d);
            let naive = inputs.naive(&dense_grids, None, judged);
            let got = dense_attention(q.clone(), k.clone(), v.clone(), &options).unwrap();
            assert_eq!(got.output.dtype(), dtype);
            assert_right(
                &format!("dense {what}"),
                &values(got.output),
                &right.out,
                &naive,
                d,
                len,
                judged,
            );
            // The LSE's rule knows no rounding of the scores.
            if judged == dtype {
                assert_lse(&format!("dense {what}"), &values(got.lse.unwrap()), &right.lse);
            }

            let selection = random_selection(&dense_grids, shape.q_heads, 0.3, seed);
            let selected =
                SelectedBlocks::from_host(&selection, &shape, block, None, &device).unwrap();
            let right = inputs.oracle(&dense_grids, Some(&selection));
            let naive = inputs.naive(&dense_grids, Some(&selection), judged);
            let got = block_sparse_attention(q, k, v, &selected, &options).unwrap();
            assert_right(
                &format!("sparse {what}"),
                &values(got.output),
                &right.out,
                &naive,
                d,
                len,
                judged,
            );
            if judged == dtype {
                assert_lse(&format!("sparse {what}"), &values(got.lse.unwrap()), &right.lse);
            }
        }
    }
}

/// Heads wider than the kernels go through Burn's matrix products, which on tensor cores cut f32 to
/// the ten bits of a mantissa that f16 has.
fn rounding(device: &Device, dtype: DType, head_dim: usize) -> DType {
    let tensor_cores = matches!(kernel(device), Kernel::CubeMma | Kernel::CubeHopper);
    let wide = head_dim > 256 && dtype == DType::F32 && tensor_cores;
    if wide { DType::F16 } else { dtype }
}

#[rstest]
fn for_every_head_dim(#[values(8, 32, 33, 40, 64, 80, 96, 112, 128, 192, 256, 512)] d: usize) {
    check(shape(2, 1, 150, 150, d), Kind::Normal, 32, d as u64);
}

#[rstest]
fn for_every_group_size(#[values(1, 3, 4, 5, 6, 7, 8, 14, 16, 32)] group: usize) {
    check(shape(group, 1, 70, 70, 64), Kind::Normal, 32, group as u64);
    check(shape(2 * group, 2, 70, 70, 32), Kind::Normal, 16, group as u64);
}

#[rstest]
fn for_every_length(#[values(1, 2, 127, 128, 129, 255, 256, 257, 400)] len: usize) {
    check(shape(3, 1, len, len, 64), Kind::Normal, 128, len as u64);
}

#[rstest]
fn for_every_block_size(#[values(1, 2, 16, 33, 64, 100, 128, 1000)] block: usize) {
    check(shape(2, 1, 130, 130, 64), Kind::Normal, block, block as u64);
}

#[rstest]
#[case(1, 300)]
#[case(100, 300)]
#[case(44, 300)]
#[case(300, 100)]
#[case(129, 128)]
#[case(20, 45)]
fn for_chunks_and_for_more_queries_than_keys(#[case] q_len: usize, #[case] kv_len: usize) {
    let devices = match (q_len, kv_len) {
        (20, 45) => all_devices(),
        (100, 300) | (300, 100) => devices_and_wgpu(),
        _ => devices(),
    };
    check_on(devices, shape(3, 1, q_len, kv_len, 64), Kind::Normal, 64, 7);
}

#[rstest]
fn for_every_kind_of_input(
    #[values(Kind::Normal, Kind::HeavyTailed, Kind::Spikes, Kind::Constant, Kind::Large)]
    kind: Kind,
) {
    check(shape(4, 2, 260, 260, 64), kind, 64, 11);
    check(shape(4, 2, 260, 260, 128), kind, 128, 12);
}

/// The selection of every device is the oracle's, but for blocks whose cumulative mass lies within
/// 1e-4 of the threshold: with random inputs there are next to none, so sets must be equal.
#[rstest]
fn selection_is_the_oracles(
    #[values(Calibration::Global, Calibration::Causal, Calibration::Off)] calibration: Calibration,
    #[values(0.5, 0.9, 0.95)] mass: f64,
) {
    let config = PrismConfig::new(Rope::new(1e5))
        .with_block(16)
        .with_bands(32, 48)
        .with_mass(mass)
        .with_calibration(calibration);
    for (q_len, kv_len) in [(300, 300), (100, 300), (48, 300), (300, 100)] {
        let shape = shape(6, 2, q_len, kv_len, 64);
        let inputs = Inputs::random(shape, Kind::Normal, DType::F32, 5);
        let grids = grids(&shape, 16);
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let right = oracle::select(
            &oracle::pool_queries(&wide(&inputs.q), 6, q_len, 64, &grids),
            &oracle::pool_keys(&wide(&inputs.k), 2, kv_len, 64, &grids),
            &shape,
            &grids,
            &config.validate(64).unwrap(),
            calibration,
            &config.selection,
        );
        let stands_for_others = calibration == Calibration::Causal && mass == 0.9;
        let devices = if stands_for_others { all_devices() } else { devices() };
        assert_selects(&devices, &inputs, &config, &grids, &right);
    }
}

/// The same with second-order scores.
#[rstest]
fn second_order_selection_is_the_oracles(
    #[values((16, 16, 16), (32, 16, 16), (64, 32, 16), (96, 48, 96))] (block, query_sub, key_sub): (
        usize,
        usize,
        usize,
    ),
    #[values(0.5, 0.9, 0.95)] mass: f64,
) {
    let config = PrismConfig::new(Rope::new(1e5))
        .with_block(block)
        .with_scoring(Scoring::SecondOrder { query_sub, key_sub })
        .with_mass(mass);
    for (q_len, kv_len) in [(300, 300), (100, 300), (48, 300), (300, 100), (1000, 1000)] {
        let shape = shape(6, 2, q_len, kv_len, 64);
        let inputs = Inputs::random(shape, Kind::HeavyTailed, DType::F32, 5);
        let grids = grids(&shape, block);
        let subs = [SubBlocks::new(grids[0], query_sub, key_sub)];
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let (means, variances) =
            oracle::pool_moments(&wide(&inputs.k), 2, kv_len, 64, &[*subs[0].keys()]);
        let right = oracle::select_second_order(
            &oracle::pool_queries(&wide(&inputs.q), 6, q_len, 64, &[*subs[0].queries()]),
            (&means, &variances),
            &shape,
            &subs,
            &config.selection,
        );
        assert_selects(&devices(), &inputs, &config, &grids, &right);
    }
}

/// Every device selects what the oracle does but for one block in a thousand.
fn assert_selects(
    devices: &[Device],
    inputs: &Inputs,
    config: &PrismConfig,
    grids: &[BlockGrid],
    right: &BlockSelection,
) {
    for device in devices {
        let [q, k, _] = inputs.tensors(DType::F32, device);
        let got = select_blocks(q, k, config, &AttentionOptions::default()).unwrap();
        let got = got.to_host().unwrap();
        got.validate(grids, inputs.shape.q_heads).unwrap();
        let (a, b) = (got.to_bools(), right.to_bools());
        let differing = a.iter().zip(&b).filter(|(a, b)| a != b).count();
        assert!(
            differing * 1000 <= a.len(),
            "{device:?} {:?}: {differing} of {} blocks differ",
            inputs.shape,
            a.len()
        );
    }
}
