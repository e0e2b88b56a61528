//! Does each of several sequences that lie end to end give what it gives alone, and what it gives in a padded
//! batch? Outputs within rounding, LSEs, paths and selections exactly; and are offsets that don't fit refused?

use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_prism::{
    AttentionOptions, AttentionShape, PackedOutput, Path, PrismConfig, PrismOutput, Rope,
    SequenceLengths, prism_attention, prism_attention_packed,
};
use rstest::rstest;
use tests::{Inputs, Kind, all_devices, devices, tensor, values};

const D: usize = 32;
const HEADS: [usize; 3] = [4, 2, 2];

fn config() -> PrismConfig {
    let config = PrismConfig::new(Rope::new(1e4)).with_block(16).with_mass(0.7);
    config.with_bands(16, 24).with_dense_below(48)
}

/// Sequences of so many queries and keys.
struct Case {
    each: Vec<Inputs>,
}

impl Case {
    fn new(lengths: &[(usize, usize)]) -> Self {
        let one = |(seed, &(queries, keys)): (usize, &(usize, usize))| {
            let [q_heads, kv_heads, _] = HEADS;
            let kv = [1, kv_heads, keys, D];
            let shape = AttentionShape::new([1, q_heads, queries, D], kv, kv).unwrap();
            Inputs::random(shape, Kind::Normal, DType::F32, 10 * seed as u64)
        };
        Self { each: lengths.iter().enumerate().map(one).collect() }
    }

    /// Cumulative queries, or keys.
    fn offsets(&self, rows: fn(&AttentionShape) -> usize) -> Vec<usize> {
        let ends = self.each.iter().scan(0, |end, inputs| {
            *end += rows(&inputs.shape);
            Some(*end)
        });
        [0].into_iter().chain(ends).collect()
    }

    /// Q, K and V of all sequences, `[rows, heads, head_dim]`.
    fn packed(&self, device: &Device) -> [Tensor<3>; 3] {
        let mut packed = [vec![], vec![], vec![]];
        for inputs in &self.each {
            let parts = [&inputs.q, &inputs.k, &inputs.v];
            for ((packed, part), heads) in packed.iter_mut().zip(parts).zip(HEADS) {
                let rows = part.len() / (heads * D);
                for row in 0..rows {
                    for head in 0..heads {
                        packed.extend_from_slice(&part[(head * rows + row) * D..][..D]);
                    }
                }
            }
        }
        let mut heads = HEADS.into_iter();
        packed.map(|packed| {
            let heads = heads.next().unwrap();
            let dims = [packed.len() / (heads * D), heads, D];
            Tensor::from_data(TensorData::new(packed, dims), (device, DType::F32))
        })
    }

    /// Q, K and V of all sequences, `[sequences, heads, longest, head_dim]`.
    fn padded(&self, device: &Device) -> [Tensor<4>; 3] {
        let longest = |rows: fn(&AttentionShape) -> usize| {
            self.each.iter().map(|inputs| rows(&inputs.shape)).max().unwrap()
        };
        let [queries, keys] = [longest(|shape| shape.q_len), longest(|shape| shape.kv_len)];
        let mut padded = [vec![], vec![], vec![]];
        for inputs in &self.each {
            let parts = [(&inputs.q, queries), (&inputs.k, keys), (&inputs.v, keys)];
            for ((padded, (part, longest)), heads) in padded.iter_mut().zip(parts).zip(HEADS) {
                let rows = part.len() / (heads * D);
                for head in 0..heads {
                    padded.extend_from_slice(&part[head * rows * D..][..rows * D]);
                    padded.resize(padded.len() + (longest - rows) * D, 0.0);
                }
            }
        }
        let [q, k, v] = padded;
        let n = self.each.len();
        [
            tensor(&q, [n, HEADS[0], queries, D], DType::F32, device),
            tensor(&k, [n, HEADS[1], keys, D], DType::F32, device),
            tensor(&v, [n, HEADS[2], keys, D], DType::F32, device),
        ]
    }

    fn run(
        &self,
        device: &Device,
        config: &PrismConfig,
        options: &AttentionOptions,
    ) -> PackedOutput {
        let [q, k, v] = self.packed(device);
        let (queries, keys) =
            (self.offsets(|shape| shape.q_len), self.offsets(|shape| shape.kv_len));
        prism_attention_packed(q, k, v, &queries, &keys, config, options).unwrap()
    }

    /// Checks what came of all against what comes of each; returns the paths.
    fn check(&self, device: &Device, config: &PrismConfig) -> Vec<Path> {
        let options = AttentionOptions::default().with_lse();
        let got = self.run(device, config, &options);
        let offsets = self.offsets(|shape| shape.q_len);
        let total = offsets[self.each.len()];
        assert_eq!(got.output.dims(), [total, HEADS[0], D]);
        let lse = got.lse.unwrap();
        assert_eq!(lse.dims(), [total, HEADS[0]]);
        assert_eq!(got.reports.len(), self.each.len());
        for (sequence, (inputs, report)) in self.each.iter().zip(&got.reports).enumerate() {
            let what = format!("{device:?}, sequence {sequence}");
            let [q, k, v] = inputs.tensors(DType::F32, device);
            let one: PrismOutput = prism_attention(q, k, v, config, &options).unwrap();
            assert_eq!(
                (report.path, report.reason),
                (one.report.path, one.report.reason),
                "{what}"
            );
            let selected = |report: &burn_prism::Report| {
                report.selected.as_ref().map(|selected| selected.to_host().unwrap())
            };
            assert_eq!(selected(report), selected(&one.report), "{what}");
            let (first, len) = (offsets[sequence], inputs.shape.q_len);
            if len == 0 {
                continue;
            }
            let rows = values(got.output.clone().narrow(0, first, len));
            close(&rows, &values(one.output.swap_dims(1, 2)), &what);
            let rows = values(lse.clone().narrow(0, first, len));
            close(&rows, &values(one.lse.unwrap().swap_dims(1, 2)), &what);
        }
        got.reports.iter().map(|report| report.path).collect()
    }
}

fn close(got: &[f32], right: &[f32], what: &str) {
    assert_eq!(got.len(), right.len(), "{what}");
    for (got, right) in got.iter().zip(right) {
        assert!(got == right || (got - right).abs() <= 1e-5, "{what}: {got}, not {right}");
    }
}

#[rstest]
#[case::whole_prompts(&[(150, 150), (1, 1), (16, 16), (77, 77)])]
#[case::chunks(&[(40, 100), (100, 100), (3, 64), (1, 90)])]
#[case::one(&[(130, 130)])]
#[case::fewer_keys_than_queries(&[(20, 10), (60, 50)])]
#[case::without_queries_or_keys(&[(0, 0), (60, 60), (0, 30), (5, 0), (70, 70), (0, 0)])]
#[case::no_rows_at_all(&[(0, 0), (0, 5)])]
fn packed_sequences_give_what_they_give_alone(#[case] lengths: &[(usize, usize)]) {
    for device in devices() {
        Case::new(lengths).check(&device, &config());
    }
}

#[test]
fn packed_sequences_take_their_own_paths_on_every_device() {
    for device in all_devices() {
        let paths = Case::new(&[(20, 20), (50, 64)]).check(&device, &config());
        assert_eq!(paths, [Path::Dense, Path::Sparse], "{device:?}");
    }
}

/// Of a padded batch all take one path, so here both take it.
#[test]
fn packed_and_padded_input_give_the_same() {
    let config = config().with_dense_below(0);
    let case = Case::new(&[(40, 60), (90, 90), (2, 33)]);
    for device in devices() {
        let got = case.run(&device, &config, &AttentionOptions::default());
        assert!(got.lse.is_none());
        let lengths = SequenceLengths::new(vec![40, 90, 2], vec![60, 90, 33]);
        let options = AttentionOptions::default().with_lengths(lengths);
        let [q, k, v] = case.padded(&device);
        let padded = prism_attention(q, k, v, &config, &options).unwrap().output;
        for (sequence, (first, len)) in [(0, 40), (40, 90), (130, 2)].into_iter().enumerate() {
            let right = padded.clone().narrow(0, sequence, 1).narrow(2, 0, len).swap_dims(1, 2);
            let rows = values(got.output.clone().narrow(0, first, len));
            close(&rows, &values(right), &format!("{device:?}, sequence {sequence}"));
        }
    }
}

#[test]
fn the_module_takes_packed_sequences_too() {
    let (device, case) = (Device::flex(), Case::new(&[(60, 60), (10, 10)]));
    let [q, k, v] = case.packed(&device);
    let options = AttentionOptions::default();
    let offsets = [0, 60, 70];
    let got = config().init().forward_packed(q, k, v, &offsets, &offsets, &options).unwrap();
    assert_eq!(values(got.output), values(case.run(&device, &config(), &options).output));
}

/// A tracked tensor takes the way of tensor ops, and what a sequence gives depends on no other's rows.
#[test]
fn gradients_reach_the_sequence_they_come_from() {
    let device = Device::flex().autodiff();
    let case = Case::new(&[(60, 60), (10, 10)]);
    let [q, k, v] = case.packed(&device).map(Tensor::require_grad);
    let options = AttentionOptions::default();
    let offsets = [0, 60, 70];
    let of = [q.clone(), k.clone(), v.clone()];
    let got = prism_attention_packed(q, k, v, &offsets, &offsets, &config(), &options).unwrap();
    let gradients = got.output.narrow(0, 60, 10).sum().backward();
    for x in of {
        let heads = x.dims()[1];
        let gradient = values(x.grad(&gradients).unwrap());
        let (first, second) = gradient.split_at(60 * heads * D);
        assert!(first.iter().all(|&x| x == 0.0) && second.iter().any(|&x| x != 0.0));
    }
}

#[rstest]
#[case::first(&[1, 8], &[0, 8], "cumulative query lengths must start with 0, got 1")]
#[case::first_key(&[0, 8], &[2, 8], "cumulative key lengths must start with 0, got 2")]
#[case::none(&[], &[0, 8], "cumulative query lengths must start with 0, got none")]
#[case::decreasing(&[0, 6, 5, 8], &[0, 6, 7, 8], "cumulative query lengths must not decrease, got 5 after 6")]
#[case::short(&[0, 3, 7], &[0, 3, 8], "cumulative query lengths must end with the number of rows, 8, got 7")]
#[case::long(&[0, 3, 8], &[0, 3, 9], "cumulative key lengths must end with the number of rows, 8, got 9")]
#[case::beyond(&[0, 9, 8], &[0, 8, 8], "must not decrease, got 8 after 9")]
#[case::count(&[0, 3, 8], &[0, 8], "expected one key length for each of 2 sequences, got 1")]
#[case::no_sequences(&[0], &[0, 8], "must end with the number of rows, 8, got 0")]
fn offsets_that_do_not_fit_are_refused(
    #[case] queries: &[usize],
    #[case] keys: &[usize],
    #[case] says: &str,
) {
    let [q, k, v] = Case::new(&[(8, 8)]).packed(&Device::flex());
    let options = AttentionOptions::default();
    let error = prism_attention_packed(q, k, v, queries, keys, &config(), &options).unwrap_err();
    assert!(error.to_string().contains(says), "{error}");
}

#[test]
fn what_else_does_not_fit_packed_input_is_refused() {
    let zeros = |dims: [usize; 3]| Tensor::<3>::zeros(dims, &Device::flex());
    let run = |q, k, v, offsets: &[usize], options: &AttentionOptions| {
        let result = prism_attention_packed(q, k, v, offsets, offsets, &config(), options);
        result.unwrap_err().to_string()
    };
    let options = AttentionOptions::default();
    let kv = || zeros([8, 2, D]);
    let error = run(zeros([8, 3, D]), kv(), kv(), &[0, 8], &options);
    assert!(error.contains("got 3 query and 2 kv"), "{error}");
    let error = run(zeros([8, 0, D]), kv(), kv(), &[0, 8], &options);
    assert!(error.contains("query heads must be at least 1, got 0"), "{error}");
    let error = run(zeros([8, 4, D]), kv(), zeros([7, 2, D]), &[0, 8], &options);
    assert!(error.contains("length of k is 8, but v has 7"), "{error}");
    let error = run(zeros([8, 4, D]), kv(), kv().cast(DType::F16), &[0, 8], &options);
    assert!(error.contains("the element type of q"), "{error}");
    let none = || zeros([0, 2, D]);
    let error = run(none(), none(), none(), &[0], &options);
    assert!(error.contains("at least 1 sequence, got 0"), "{error}");
    let lengths = options.with_lengths(SequenceLengths::prefill(vec![8]));
    let error = run(zeros([8, 4, D]), kv(), kv(), &[0, 8], &lengths);
    assert!(error.contains("offsets in place of lengths, got both"), "{error}");
}
