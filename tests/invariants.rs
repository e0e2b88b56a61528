//! What must hold whatever the numbers: mass 1 is dense, heads don't mix, grouped heads equal
//! expanded ones, padding is never read, the same input gives the same bits.

use burn::tensor::{DType, Device, Tensor};
use burn_prism::{
    AttentionOptions, AttentionShape, PrismConfig, SelectedBlocks, SequenceLengths,
    block_sparse_attention, dense_attention, prism_attention, select_blocks,
};
use proptest::prelude::*;
use tests::{
    Inputs, Kind, assert_right, devices, devices_and_wgpu, grids, random_selection, tensor, values,
};

fn config() -> PrismConfig {
    PrismConfig::llama3().with_block(32).with_bands(32, 48).with_dense_below(0)
}

fn shape(batch: usize, heads: usize, kv_heads: usize, len: usize, d: usize) -> AttentionShape {
    let kv = [batch, kv_heads, len, d];
    AttentionShape::new([batch, heads, len, d], kv, kv).unwrap()
}

#[test]
fn mass_one_equals_dense() {
    let shape = shape(1, 4, 2, 300, 64);
    let inputs = Inputs::random(shape, Kind::HeavyTailed, DType::F32, 1);
    for device in devices_and_wgpu() {
        let [q, k, v] = inputs.tensors(DType::F32, &device);
        let options = AttentionOptions::default();
        let dense = dense_attention(q.clone(), k.clone(), v.clone(), &options).unwrap();
        let prism = prism_attention(q, k, v, &config().with_mass(1.0), &options).unwrap();
        assert_eq!(prism.report.density().unwrap(), 1.0);
        let grids = grids(&shape, 32);
        let naive = inputs.naive(&grids, None, DType::F32);
        let right = inputs.oracle(&grids, None).out;
        assert_right("mass 1", &values(prism.output), &right, &naive, 64, 300, DType::F32);
        assert_right("dense", &values(dense.output), &right, &naive, 64, 300, DType::F32);
    }
}

#[test]
fn permuting_heads_permutes_outputs() {
    let shape = shape(1, 6, 3, 200, 64);
    let inputs = Inputs::random(shape, Kind::Normal, DType::F32, 2);
    for device in devices() {
        let [q, k, v] = inputs.tensors(DType::F32, &device);
        let options = AttentionOptions::default();
        let right = prism_attention(q.clone(), k.clone(), v.clone(), &config(), &options).unwrap();
        // kv heads in the order 2, 0, 1, and their groups of two query heads with them.
        let pick = |x: Tensor<4>, order: &[usize]| {
            let heads = order.iter().map(|&h| x.clone().narrow(1, h, 1)).collect();
            Tensor::cat(heads, 1)
        };
        let groups = [4, 5, 0, 1, 2, 3];
        let (k, v) = (pick(k, &[2, 0, 1]), pick(v, &[2, 0, 1]));
        let got = prism_attention(pick(q, &groups), k, v, &config(), &options).unwrap();
        assert_eq!(values(got.output), values(pick(right.output, &groups)));
    }
}

#[test]
fn grouped_heads_equal_expanded_heads() {
    let shape = shape(2, 6, 2, 150, 64);
    let inputs = Inputs::random(shape, Kind::Normal, DType::F32, 3);
    for device in devices_and_wgpu() {
        let [q, k, v] = inputs.tensors(DType::F32, &device);
        let options = AttentionOptions::default();
        let grouped =
            prism_attention(q.clone(), k.clone(), v.clone(), &config(), &options).unwrap();
        let expand = |x: Tensor<4>| {
            let [b, h, n, d] = x.dims();
            x.unsqueeze_dim::<5>(2).expand([b, h, 3, n, d]).reshape([b, h * 3, n, d])
        };
        let expanded = prism_attention(q, expand(k), expand(v), &config(), &options).unwrap();
        let close = |a: Vec<f32>, b: Vec<f32>| {
            a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.0))
        };
        assert!(close(values(grouped.output), values(expanded.output)));
    }
}

#[test]
fn padding_is_never_read() {
    let (len, d) = (200, 64);
    let shape = shape(3, 4, 2, len, d);
    let lengths = vec![200, 1, 77];
    for device in devices_and_wgpu() {
        let clean = Inputs::random(shape, Kind::Normal, DType::F32, 4);
        let mut dirty = clean.clone();
        let soil = |x: &mut Vec<f32>, heads: usize| {
            for (line, row) in x.chunks_mut(d).enumerate() {
                if line % len >= lengths[line / (heads * len)] {
                    row.fill(f32::NAN);
                }
            }
        };
        soil(&mut dirty.q, 4);
        soil(&mut dirty.k, 2);
        soil(&mut dirty.v, 2);
        let options =
            AttentionOptions::default().with_lengths(SequenceLengths::prefill(lengths.clone()));
        for options in [options.clone(), options.clone().with_lse()] {
            let run = |inputs: &Inputs| {
                let [q, k, v] = inputs.tensors(DType::F32, &device);
                let sparse =
                    prism_attention(q.clone(), k.clone(), v.clone(), &config(), &options).unwrap();
                let dense = dense_attention(q, k, v, &options).unwrap();
                let lse = sparse.lse.map(values).unwrap_or_default();
                (values(sparse.output), values(dense.output), lse)
            };
            let (dirty, clean) = (run(&dirty), run(&clean));
            assert_eq!(dirty, clean, "{device:?}");
            // Rows of padding are 0.
            let row = |b: usize, i: usize| &dirty.0[((b * 4) * len + i) * d..][..d];
            assert!(row(1, 1).iter().all(|&x| x == 0.0) && row(2, 77).iter().all(|&x| x == 0.0));
            assert!(row(2, 76).iter().any(|&x| x != 0.0));
        }
    }
}

#[test]
fn a_ragged_batch_equals_its_sequences() {
    let (len, d) = (150, 64);
    let shape3 = shape(3, 4, 2, len, d);
    let inputs = Inputs::random(shape3, Kind::Normal, DType::F32, 5);
    let (q_lens, kv_lens) = ([150, 40, 20], [150, 100, 10]);
    for device in devices_and_wgpu() {
        let lengths = SequenceLengths::new(q_lens.to_vec(), kv_lens.to_vec());
        let options = AttentionOptions::default().with_lengths(lengths);
        let [q, k, v] = inputs.tensors(DType::F32, &device);
        let batch = prism_attention(q.clone(), k.clone(), v.clone(), &config(), &options).unwrap();
        for b in 0..3 {
            let cut = |x: &Tensor<4>, n: usize| x.clone().narrow(0, b, 1).narrow(2, 0, n);
            let (q, k) = (cut(&q, q_lens[b]), cut(&k, kv_lens[b]));
            let v = cut(&v, kv_lens[b]);
            let one = prism_attention(q, k, v, &config(), &AttentionOptions::default()).unwrap();
            let (got, right) = (values(cut(&batch.output, q_lens[b])), values(one.output));
            let off = got.iter().zip(&right).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off <= 1e-5, "{device:?}: sequence {b} is off by {off}");
        }
    }
}

#[test]
fn strided_views_are_read_in_place() {
    let shape = shape(2, 4, 2, 150, 64);
    let inputs = Inputs::random(shape, Kind::Normal, DType::F32, 6);
    for device in devices_and_wgpu() {
        let [q, k, v] = inputs.tensors(DType::F32, &device);
        let options = AttentionOptions::default().with_lse();
        let right = prism_attention(q.clone(), k.clone(), v.clone(), &config(), &options).unwrap();
        let right = (values(right.output), values(right.lse.unwrap()));
        // [batch, length, heads, dim] permuted, a slice of a larger cache, and a flipped copy
        // flipped back.
        let permuted = |x: &Tensor<4>| {
            let [b, h, n, d] = x.dims();
            let contiguous = x.clone().swap_dims(1, 2).reshape([b, n, h * d]);
            contiguous.reshape([b, n, h, d]).swap_dims(1, 2)
        };
        let cached = |x: &Tensor<4>| {
            let pad = x.clone().mul_scalar(f32::NAN);
            let n = x.dims()[2];
            Tensor::cat(vec![pad.clone(), x.clone(), pad], 2).narrow(2, n, n)
        };
        let flipped = |x: &Tensor<4>| x.clone().flip([2]).flip([2]);
        let views: [&dyn Fn(&Tensor<4>) -> Tensor<4>; 3] = [&permuted, &cached, &flipped];
        for (i, view) in views.iter().enumerate() {
            let got = prism_attention(view(&q), view(&k), view(&v), &config(), &options).unwrap();
            assert_eq!(
                (values(got.output), values(got.lse.unwrap())),
                right,
                "{device:?} view {i}"
            );
        }
        // Broadcast heads: one kv head expanded to two with stride 0.
        let one = |x: &Tensor<4>| x.clone().narrow(1, 0, 1);
        let [b, _, n, d] = k.dims();
        let two = |x: &Tensor<4>| one(x).expand([b, 2, n, d]);
        let right = dense_attention(q.clone(), one(&k), one(&v), &options).unwrap();
        let got = dense_attention(q, two(&k), two(&v), &options).unwrap();
        let (got, right) = (values(got.output), values(right.output));
        assert!(got.iter().zip(&right).all(|(a, b)| (a - b).abs() < 1e-5), "{device:?} broadcast");
    }
}

#[test]
fn same_input_gives_the_same_bits() {
    let shape = shape(1, 6, 2, 500, 64);
    let inputs = Inputs::random(shape, Kind::HeavyTailed, DType::F32, 7);
    for device in devices_and_wgpu() {
        let run = || {
            let [q, k, v] = inputs.tensors(DType::F32, &device);
            let options = AttentionOptions::default().with_lse();
            let result = prism_attention(q, k, v, &config(), &options).unwrap();
            let bits = |x: Vec<f32>| x.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            (bits(values(result.output)), bits(values(result.lse.unwrap())))
        };
        let first = run();
        assert!((0..4).all(|_| run() == first), "{device:?}");
    }
}

#[test]
fn two_threads_share_one_module() {
    let attention = config().init();
    let shape = shape(1, 4, 2, 300, 64);
    let inputs = Inputs::random(shape, Kind::Normal, DType::F32, 8);
    let run = || {
        let [q, k, v] = inputs.tensors(DType::F32, &Device::flex());
        values(attention.forward(q, k, v).unwrap())
    };
    let right = run();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(run)).collect();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), right);
        }
    });
}

#[test]
fn a_selection_of_ones_own_is_obeyed() {
    let shape = shape(1, 2, 1, 256, 32);
    let grids = grids(&shape, 32);
    let selection = random_selection(&grids, 2, 0.2, 9);
    let inputs = Inputs::random(shape, Kind::Normal, DType::F32, 9);
    for device in devices_and_wgpu() {
        let selected = SelectedBlocks::from_host(&selection, &shape, 32, None, &device).unwrap();
        assert_eq!(selected.to_host().unwrap(), selection);
        let density = selected.density().unwrap();
        assert_eq!(density, selection.density(&grids));
        // Blocks that nobody selected may hold anything.
        let mut soiled = inputs.clone();
        for v in 0..8 {
            let read = (0..2).any(|h| (0..8).any(|row| selection.contains(0, h, row, v)));
            if !read {
                soiled.k[v * 32 * 32..][..32 * 32].fill(f32::NAN);
                soiled.v[v * 32 * 32..][..32 * 32].fill(f32::NAN);
            }
        }
        let [q, k, v] = soiled.tensors(DType::F32, &device);
        let options = AttentionOptions::default();
        let got = block_sparse_attention(q, k, v, &selected, &options).unwrap();
        let naive = inputs.naive(&grids, Some(&selection), DType::F32);
        let right = inputs.oracle(&grids, Some(&selection)).out;
        assert_right("own", &values(got.output), &right, &naive, 32, 256, DType::F32);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Every row reads at least one block and none past its diagonal, whatever the rule.
    #[test]
    fn selections_are_always_valid(
        q_len in 1usize..120, kv_len in 1usize..120, block in 1usize..40, mass in 0.05f64..1.0,
        sink in 0usize..3, recent in 0usize..3, dense_last in 0usize..3, seed in 0u64..1000,
    ) {
        let kv = [1, 1, kv_len, 16];
        let shape = AttentionShape::new([1, 2, q_len, 16], kv, kv).unwrap();
        let mut config = PrismConfig::llama3().with_block(block).with_mass(mass);
        config.selection.sink_blocks = sink;
        config.selection.recent_blocks = recent;
        config.selection.dense_last_blocks = dense_last;
        let inputs = Inputs::random(shape, Kind::Normal, DType::F32, seed);
        let [q, k, _] = inputs.tensors(DType::F32, &Device::flex());
        let got = select_blocks(q, k, &config, &AttentionOptions::default()).unwrap();
        let grids = grids(&shape, block);
        let host = got.to_host().unwrap();
        host.validate(&grids, 2).unwrap();
        let density = host.density(&grids);
        prop_assert!(density > 0.0 && density <= 1.0);
        for row in grids[0].rows().saturating_sub(dense_last)..grids[0].rows() {
            prop_assert_eq!(host.count(0, 0, row), grids[0].causal_blocks(row));
        }
    }
}

#[test]
fn test_tensors_hold_what_they_are_given() {
    // A helper that changed its values would weaken every test above.
    let data = [1.5f32, -2.25, 0.0, 3e-8];
    let got = values(tensor(&data, [1, 1, 1, 4], DType::F32, &Device::flex()));
    assert_eq!(got, data);
}
