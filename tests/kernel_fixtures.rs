//! Do kernels reproduce the published implementation? Golden masks, temperatures, probabilities,
//! outputs and LSEs of `kernels/*.safetensors`, on every device.

use burn::tensor::{DType, Device};
use burn_prism::{
    AttentionOptions, AttentionShape, BlockGrid, BlockSelection, PrismConfig, Rope, RopeLayout,
    SelectedBlocks, block_sparse_attention, dense_attention, select_blocks,
};
use prism_core::oracle;
use prism_core::scores::{BandEnergy, PooledHead, for_each_row, temperatures};
use prism_core::select::{MASS_ONE, integer_masses};
use tests::{Fixture, Inputs, assert_lse, assert_right, devices, fixture_files, values};

struct Case {
    name: String,
    file: Fixture,
    shape: AttentionShape,
    block: usize,
    config: PrismConfig,
}

fn cases() -> Vec<Case> {
    fixture_files("kernels", ".safetensors")
        .into_iter()
        .map(|path| {
            let file = Fixture::open(&path);
            let shape =
                AttentionShape::new(file.shape("q"), file.shape("k"), file.shape("v")).unwrap();
            let block = file.number("block_size") as usize;
            let layout = match file.metadata["rope_layout"].as_str() {
                "rotate_half" => RopeLayout::RotateHalf,
                "interleaved" => RopeLayout::Interleaved,
                other => panic!("{}: RoPE layout {other:?}", path.display()),
            };
            let rope = Rope { layout, ..Rope::new(file.number("rope_theta")) };
            // The published masks force the sink and the diagonal and nothing else.
            let config = PrismConfig::new(rope)
                .with_block(block)
                .with_bands(file.number("high_dims") as usize, file.number("low_dims") as usize)
                .with_dense_last_blocks(0)
                .with_dense_below(0);
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            Case { name, file, shape, block, config }
        })
        .collect()
}

impl Case {
    fn inputs(&self, q_len: usize) -> Inputs {
        let AttentionShape { batch, q_heads, q_len: all, head_dim: d, .. } = self.shape;
        let q = self.file.values("q").chunks(all * d).take(batch * q_heads);
        let q = q.flat_map(|head| &head[(all - q_len) * d..]).copied().collect();
        let shape = AttentionShape { q_len, ..self.shape };
        Inputs { shape, q, k: self.file.values("k").to_vec(), v: self.file.values("v").to_vec() }
    }

    fn grids(&self, q_len: usize) -> Vec<BlockGrid> {
        let grid = BlockGrid::new(self.block, q_len, self.shape.kv_len).unwrap();
        vec![grid; self.shape.batch]
    }

    fn mask(&self, name: &str) -> BlockSelection {
        let bools = self.file.values(name).iter().map(|&x| x != 0.0);
        BlockSelection::from_bools(self.file.shape(name), bools).unwrap()
    }
}

/// Our own oracle against the published numbers: band rule, inverse frequencies, temperatures and
/// probabilities. What follows may then lean on it.
#[test]
fn oracle_agrees_with_published_temperatures_and_probabilities() {
    for case in cases() {
        let AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim: d } = case.shape;
        let auto = PrismConfig::new(case.config.rope).with_block(case.block).validate(d).unwrap();
        let bands = case.config.validate(d).unwrap();
        // Where the published bands are the rule's; other files may set theirs by hand.
        let ruled = [(128, 5e5), (128, 1e6), (64, 1e5)];
        if case.block == 128 && ruled.contains(&(d, case.config.rope.theta)) {
            assert_eq!(auto, bands, "{}: the band rule gives the published bands", case.name);
        }
        let inv_freq = case.config.rope.inv_freq(d).unwrap();
        for (a, &b) in inv_freq.iter().zip(case.file.values("inv_freq")) {
            assert!((a - f64::from(b)).abs() < 1e-6 * a, "{}: inv_freq {a} {b}", case.name);
        }
        let grids = case.grids(q_len);
        let wide = |name| case.file.values(name).iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let q_bar = oracle::pool_queries(&wide("q"), q_heads, q_len, d, &grids);
        let k_bar = oracle::pool_keys(&wide("k"), kv_heads, kv_len, d, &grids);
        let (rows, blocks) = (grids[0].rows(), grids[0].key_blocks());
        for line in 0..batch * q_heads {
            let kv = line / q_heads * kv_heads + line % q_heads / case.shape.group();
            let q = &q_bar[line * rows * d..][..rows * d];
            let k = &k_bar[kv * blocks * d..][..blocks * d];
            let energy = |x: &[f32]| {
                let mut energy = BandEnergy::default();
                x.chunks(d).for_each(|row| energy.add(row, &bands));
                energy
            };
            let tau = temperatures(&energy(q), &energy(k), &bands);
            for (tau, name) in tau.into_iter().zip(["tau_high", "tau_low"]) {
                let right = f64::from(case.file.values(name)[line]);
                // The published code pools and calibrates in its own precision.
                assert!((tau / right - 1.0).abs() < 1e-2, "{}: {name} {tau} {right}", case.name);
            }
            let head = PooledHead { q, k, history: BandEnergy::default() };
            for_each_row(head, &grids[0], &bands, case.config.calibration, |row, scores| {
                for (scores, name) in scores.iter().zip(["probs_high", "probs_low"]) {
                    let mut masses = Vec::new();
                    integer_masses(scores, &mut masses);
                    let right = &case.file.values(name)[(line * rows + row) * blocks..][..blocks];
                    for (v, &mass) in masses.iter().enumerate() {
                        let p = f64::from(mass) / f64::from(MASS_ONE);
                        let off = (p - f64::from(right[v])).abs();
                        assert!(off < 2e-3, "{}: {name}[{line}, {row}, {v}]", case.name);
                    }
                }
            });
        }
    }
}

/// Masks as sets: a block may differ only where its cumulative mass lies within 1e-4 of the
/// threshold by the published probabilities.
fn assert_mask(case: &Case, got: &BlockSelection, name: &str, mass: f64, device: &Device) {
    let right = case.mask(name);
    assert_eq!(got.shape(), right.shape(), "{} {name}", case.name);
    let [batch, heads, rows, blocks] = right.shape();
    let all_rows = case.grids(case.shape.q_len)[0].rows();
    for b in 0..batch {
        for h in 0..heads {
            for row in 0..rows {
                for v in 0..blocks {
                    if got.contains(b, h, row, v) == right.contains(b, h, row, v) {
                        continue;
                    }
                    assert_eq!(rows, all_rows, "{} {name}: a chunk's mask differs", case.name);
                    let near = ["probs_high", "probs_low"].iter().any(|probs| {
                        let line = (b * heads + h) * rows + row;
                        let p = &case.file.values(probs)[line * blocks..][..blocks];
                        let before: f64 = (0..blocks)
                            .filter(|&w| p[w] > p[v] || (p[w] == p[v] && w < v))
                            .map(|w| f64::from(p[w]))
                            .sum();
                        (before - mass).abs() < 1e-4
                    });
                    assert!(near, "{} {name} on {device:?}: [{b}, {h}, {row}, {v}]", case.name);
                }
            }
        }
    }
}

#[test]
fn masks_are_the_published_ones() {
    for case in cases() {
        for device in devices() {
            let chunk = case.file.number("chunk_queries") as usize;
            for (name, mass, q_len) in [
                ("mask_p95", 0.95, case.shape.q_len),
                ("mask_p90", 0.90, case.shape.q_len),
                ("chunk_mask_p95", 0.95, chunk),
            ] {
                let [q, k, _] = case.inputs(q_len).tensors(DType::F32, &device);
                let config = case.config.clone().with_mass(mass);
                let got = select_blocks(q, k, &config, &AttentionOptions::default()).unwrap();
                assert_mask(&case, &got.to_host().unwrap(), name, mass, &device);
            }
        }
    }
}

#[test]
fn outputs_and_lse_are_the_golden_ones() {
    for case in cases() {
        let chunk = case.file.number("chunk_queries") as usize;
        let (d, len) = (case.shape.head_dim, case.shape.q_len);
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (suffix, lse, mask, q_len) in [
                ("out_dense", "lse_dense", None, len),
                ("out_p95", "lse_p95", Some("mask_p95"), len),
                ("chunk_out_p95", "chunk_lse_p95", Some("chunk_mask_p95"), chunk),
            ] {
                let mut inputs = case.inputs(q_len);
                for x in [&mut inputs.q, &mut inputs.k, &mut inputs.v] {
                    x.iter_mut().for_each(|x| *x = tests::round(*x, dtype));
                }
                let grids = case.grids(q_len);
                let mask = mask.map(|name| case.mask(name));
                let naive = inputs.naive(&grids, mask.as_ref(), dtype);
                let wide = |name: &str| {
                    case.file.values(name).iter().map(|&x| f64::from(x)).collect::<Vec<_>>()
                };
                let (right, right_lse) = (wide(suffix), wide(lse));
                for device in devices() {
                    if !device.supports_dtype(dtype) {
                        continue;
                    }
                    let what = format!("{} {suffix} {device:?} {dtype:?}", case.name);
                    let [q, k, v] = inputs.tensors(dtype, &device);
                    let options = AttentionOptions::default().with_lse();
                    let got = match &mask {
                        None => dense_attention(q, k, v, &options).unwrap(),
                        Some(mask) => {
                            let shape = &inputs.shape;
                            let selected =
                                SelectedBlocks::from_host(mask, shape, case.block, None, &device)
                                    .unwrap();
                            block_sparse_attention(q, k, v, &selected, &options).unwrap()
                        }
                    };
                    assert_right(&what, &values(got.output), &right, &naive, d, q_len, dtype);
                    assert_lse(&what, &values(got.lse.unwrap()), &right_lse);
                }
            }
        }
    }
}
