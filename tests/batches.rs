//! Do prompts of different lengths, run together, each give what they give alone? Hidden states and
//! logits within rounding, selections block by block, tokens exactly; however they came, and whatever
//! their padding held.

use burn::tensor::{DType, Device, Tensor};
use burn_prism::{AttentionOptions, BlockSelection, Calibration, Path, PrismConfig, Scoring};
use prism_models::{
    Batch, BatchError, Checkpoint, Finish, Generated, Llama, LlamaCache, ModelError, Sampler,
    Sampling,
};
use rstest::rstest;
use tests::{all_devices, devices, fixtures, has_exact_products, values};

const BLOCK: usize = 16;
/// Shorter than a block, ends on a block boundary, ends within one, a single token, longest.
const LENGTHS: [usize; 5] = [9, 64, 151, 1, 203];

fn open(name: &str, device: &Device) -> Llama {
    let checkpoint = Checkpoint::open(fixtures().join("models").join(name)).unwrap();
    Llama::load(&checkpoint, DType::F32, device, &mut |_, _| {}).unwrap()
}

fn prompts() -> Vec<Vec<u32>> {
    prompts_of(&LENGTHS)
}

fn prompts_of(lengths: &[usize]) -> Vec<Vec<u32>> {
    let prompt =
        |(i, len): (usize, usize)| (0..len).map(|at| ((at * at + 31 * i) % 509) as u32).collect();
    lengths.iter().copied().enumerate().map(prompt).collect()
}

/// Mass .7; all of it where rounding would decide between blocks as heavy as each other, and one block makes
/// 3 of hidden states of RMS 5.
fn unbanded(llama: &Llama) -> PrismConfig {
    let mass = if has_exact_products(&llama.device()) { 0.7 } else { 1.0 };
    llama.prism_config().with_block(BLOCK).with_mass(mass).with_dense_below(32)
}

fn prism(llama: &Llama) -> PrismConfig {
    unbanded(llama).with_bands(16, 24)
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let off = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    off.fold(0.0, |worst, off| if off.is_nan() { f32::NAN } else { worst.max(off) })
}

/// How far a batch may be from its prompts one by one. These models of random weights make .77 of rounding to
/// 11 bits (as f16 and TF32 do), in hidden states of RMS 5.
fn allowed(device: &Device) -> f32 {
    if has_exact_products(device) { 1e-4 } else { 1.0 }
}

/// What each layer did to a prompt: the path, and the blocks that were read.
type Done = Vec<(Path, Option<BlockSelection>)>;

/// Hidden states, and what was done, of each prompt by itself.
fn alone(llama: &Llama, prompts: &[Vec<u32>]) -> Vec<(Vec<f32>, Done)> {
    let one = |ids: &Vec<u32>| {
        let mut cache = llama.cache(ids.len(), BLOCK).unwrap();
        let mut done = Vec::new();
        let mut trace = |trace: prism_models::LayerTrace| {
            let selected = trace.report.selected.map(|selected| selected.to_host().unwrap());
            done.push((trace.report.path, selected));
        };
        let options = AttentionOptions::default();
        let hidden = llama.hidden(ids, &mut cache, &options, Some(&mut trace)).unwrap();
        (values(hidden), done)
    };
    prompts.iter().map(one).collect()
}

/// The same of all prompts together.
fn together(llama: &Llama, batch: &Batch) -> Vec<(Vec<f32>, Done)> {
    let mut caches = llama.batch_caches(batch, 0, BLOCK).unwrap();
    let mut done = vec![Vec::new(); batch.len()];
    let mut trace = |trace: prism_models::BatchTrace| {
        assert_eq!(trace.layer, done[0].len());
        for (prompt, report) in trace.reports {
            let selected = report.selected.map(|selected| selected.to_host().unwrap());
            done[prompt].push((report.path, selected));
        }
    };
    let options = AttentionOptions::default();
    let hidden = llama.batch_hidden(batch, &mut caches, &options, Some(&mut trace)).unwrap();
    assert_eq!(hidden.dims()[1], batch.ids().len());
    let lengths = batch.prompts().map(<[u32]>::len);
    assert!(caches.iter().map(LlamaCache::len).eq(lengths));
    let of = |range| values(hidden.clone().slice_dim(1, range));
    batch.ranges().map(of).zip(done).collect()
}

fn assert_equal(llama: &Llama, prompts: &[Vec<u32>], what: &str) -> Vec<Path> {
    let batch = Batch::new(prompts).unwrap();
    let (right, got) = (alone(llama, prompts), together(llama, &batch));
    let layers = llama.config().layers;
    for (prompt, (got, right)) in got.iter().zip(&right).enumerate() {
        let off = apart(&got.0, &right.0);
        assert!(off < allowed(&llama.device()), "{what}, prompt {prompt}: off by {off}");
        // Of all elements together rounding to 11 bits makes .072: a single wrong row makes more.
        let square: f32 = got.0.iter().zip(&right.0).map(|(a, b)| (a - b).powi(2)).sum();
        let rms = (square / got.0.len() as f32).sqrt();
        assert!(rms < 0.1, "{what}, prompt {prompt}: RMS of the difference {rms}");
        assert_eq!((got.1.len(), right.1.len()), (layers, layers));
        for (layer, (got, right)) in got.1.iter().zip(&right.1).enumerate() {
            assert_eq!(got, right, "{what}, prompt {prompt}, layer {layer}");
        }
    }
    got.iter().map(|(_, done)| done[0].0).collect()
}

#[rstest]
fn a_batch_equals_its_prompts_one_by_one(
    #[values("tiny-llama31", "tiny-qwen2", "tiny-qwen3-yarn")] name: &str,
) {
    for device in devices() {
        let mut llama = open(name, &device);
        assert_equal(&llama, &prompts(), &format!("{name} on {device:?}, dense"));
        let prism = prism(&llama);
        for config in [
            prism.clone(),
            prism.with_calibration(Calibration::Causal),
            unbanded(&llama).with_scoring(Scoring::SecondOrder { query_sub: 16, key_sub: 16 }),
        ] {
            llama.set_attention(Some(&config)).unwrap();
            assert_equal(&llama, &prompts(), &format!("{name} on {device:?}, {config:?}"));
        }
    }
}

/// Paths are chosen prompt by prompt: a short one stays dense beside a long one.
#[test]
fn a_batch_equals_its_prompts_one_by_one_on_every_device() {
    for device in all_devices() {
        let mut llama = open("tiny-qwen3-yarn", &device);
        llama.set_attention(Some(&prism(&llama))).unwrap();
        let paths = assert_equal(&llama, &prompts_of(&[3, 40]), &format!("{device:?}"));
        assert_eq!(paths, [Path::Dense, Path::Sparse]);
    }
}

/// Chunks of a batch begin at the same positions as those of a prompt alone, and a prompt's last
/// chunk is its last, whichever others go on.
#[rstest]
fn chunks_of_a_batch_equal_those_of_its_prompts(
    #[values(None, Some(1000), Some(64), Some(13))] chunk: Option<usize>,
    #[values(Calibration::Global, Calibration::Causal)] calibration: Calibration,
) {
    for device in devices() {
        let mut llama = open("tiny-llama31", &device);
        llama.set_attention(Some(&prism(&llama).with_calibration(calibration))).unwrap();
        let prompts = prompts();
        let batch = Batch::new(&prompts).unwrap();
        let mut caches = llama.batch_caches(&batch, 0, BLOCK).unwrap();
        let got = llama.batch_prefill(&batch, chunk, &mut caches, None).unwrap();
        assert_eq!(got.len(), prompts.len());
        for (prompt, ids) in prompts.iter().enumerate() {
            let mut cache = llama.cache(ids.len(), BLOCK).unwrap();
            let right = llama.prefill(ids, chunk, &mut cache, None).unwrap();
            let off = apart(&got[prompt], &right);
            let what = format!("{device:?}, prompt {prompt}, chunk {chunk:?}");
            assert!(off < allowed(&device), "{what}: off by {off}");
        }
    }
}

/// Dynamic scaling depends on the capacity of a cache, which each prompt has its own of.
#[test]
fn prompts_of_a_batch_keep_their_own_frequencies() {
    let source = fixtures().join("models/tiny-qwen2");
    let folder = tempfile::tempdir().unwrap();
    let weights = "model.safetensors";
    std::fs::copy(source.join(weights), folder.path().join(weights)).unwrap();
    let json = std::fs::read(source.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&json).unwrap();
    config["max_position_embeddings"] = 100.into();
    config["rope_parameters"] =
        serde_json::json!({ "rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4 });
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for device in devices() {
        let llama = Llama::load(&checkpoint, DType::F32, &device, &mut |_, _| {}).unwrap();
        assert_equal(&llama, &prompts(), &format!("{device:?}"));
    }
}

#[test]
fn predictions_of_a_batch_are_those_of_its_prompts() {
    let llama = open("tiny-llama31", &Device::flex());
    let (prompts, options) = (prompts(), AttentionOptions::default());
    let batch = Batch::new(&prompts).unwrap();
    let mut caches = llama.batch_caches(&batch, 0, BLOCK).unwrap();
    let hidden = llama.batch_hidden(&batch, &mut caches, &options, None).unwrap();
    let got = llama.batch_predictions(&hidden, &batch).unwrap();
    for (ids, got) in prompts.iter().zip(&got) {
        let mut cache = llama.cache(ids.len(), BLOCK).unwrap();
        let hidden = llama.hidden(ids, &mut cache, &options, None).unwrap();
        let right = llama.predictions(&hidden, ids).unwrap();
        assert_eq!(got.nll.len(), ids.len() - 1);
        assert!(apart(&got.nll, &right.nll) < 1e-4);
        assert_eq!(got.top1, right.top1);
    }
    let fewer = Batch::new(&prompts[1..]).unwrap();
    let error = llama.batch_predictions(&hidden, &fewer).unwrap_err();
    assert!(matches!(error, ModelError::Lengths { hidden: 428, ids: 419 }), "{error}");
}

fn samplers() -> Vec<Sampler> {
    let sampled = Sampling { temperature: 1.0, ..Sampling::GREEDY };
    let of = |seed| if seed % 2 == 0 { Sampler::greedy() } else { sampler(sampled, seed) };
    (0..LENGTHS.len() as u64).map(of).collect()
}

fn sampler(sampling: Sampling, seed: u64) -> Sampler {
    Sampler::new(sampling, seed).unwrap()
}

/// Each prompt has a sampler and a cache of its own, ends by itself, and the others go on.
#[test]
fn a_batch_generates_what_its_prompts_generate_one_by_one() {
    const ROOM: usize = 12;
    for device in devices() {
        if !has_exact_products(&device) {
            // Of these the first logits are compared elsewhere.
            eprintln!(
                "{device:?}: rounding decides between tokens as likely as each other: not tested"
            );
            continue;
        }
        let llama = open("tiny-llama31", &device);
        let prompts = prompts();
        let batch = Batch::new(&prompts).unwrap();
        // As far as any goes, to find tokens to end by.
        let alone = |limit: usize, end: &[u32], stopped: Option<usize>, caches: &[LlamaCache]| {
            let each = prompts.iter().zip(samplers()).zip(caches).enumerate();
            each.map(|(prompt, ((ids, mut sampler), cache))| {
                let mut cache = cache.clone();
                let logits = llama.prefill(ids, None, &mut cache, None).unwrap();
                let mut heard = 0;
                let mut visit = |_| {
                    heard += 1;
                    stopped != Some(prompt) || heard < 3
                };
                llama
                    .generate_until(logits, limit, end, &mut sampler, &mut cache, &mut visit)
                    .unwrap()
            })
            .collect::<Vec<Generated>>()
        };
        let roomy = llama.batch_caches(&batch, ROOM, BLOCK).unwrap();
        let free = alone(ROOM, &[], None, &roomy);
        let end = [free[0].tokens[4], free[1].tokens[7]];
        // One ends by its cache, one because nobody listens.
        let mut caches = roomy.clone();
        caches[4] = llama.cache(LENGTHS[4] + 2, BLOCK).unwrap();
        for (limit, end) in [(ROOM, &end[..]), (5, &[]), (0, &[])] {
            let right = alone(limit, end, Some(3), &caches);
            let mut caches = caches.clone();
            let logits = llama.batch_prefill(&batch, None, &mut caches, None).unwrap();
            let mut heard = vec![Vec::new(); prompts.len()];
            let mut visit = |prompt: usize, token| {
                heard[prompt].push(token);
                prompt != 3 || heard[prompt].len() < 3
            };
            let got = llama
                .batch_generate(logits, limit, end, &mut samplers(), &mut caches, &mut visit)
                .unwrap();
            assert_eq!(got, right, "{device:?}, limit {limit}");
            for ((got, heard), (cache, len)) in
                got.iter().zip(heard).zip(caches.iter().zip(LENGTHS))
            {
                assert_eq!(got.tokens, heard);
                let ended = matches!(got.finish, Finish::EndToken(_));
                let run = got.tokens.len().saturating_sub(usize::from(!ended));
                assert_eq!(cache.len(), len + run);
            }
            if limit == ROOM {
                assert_eq!(got[0].finish, Finish::EndToken(end[0]));
                assert_eq!(got[3].finish, Finish::Stopped);
                assert_eq!(got[4].finish, Finish::CacheFull);
            }
        }
    }
}

/// Padding is never looked at: not even ids that no vocabulary has.
#[test]
fn nothing_depends_on_how_prompts_were_padded() {
    let llama = open("tiny-llama31", &Device::flex());
    let prompts = prompts();
    let packed = Batch::new(&prompts).unwrap();
    let right = together(&llama, &packed);
    const WIDTH: usize = 210;
    for garbage in [0, 7, u32::MAX] {
        let (mut ids, mut mask) = (vec![garbage; 5 * WIDTH], vec![false; 5 * WIDTH]);
        for (prompt, tokens) in prompts.iter().enumerate() {
            // Right, left, and on both sides.
            let space = WIDTH - tokens.len();
            let first = prompt * WIDTH + [0, space, space / 2][prompt % 3];
            ids[first..first + tokens.len()].copy_from_slice(tokens);
            mask[first..first + tokens.len()].fill(true);
        }
        let masked = Batch::masked(&ids, WIDTH, &mask).unwrap();
        assert_eq!(masked, packed);
        assert_eq!(together(&llama, &masked), right);

        let row = |tokens: &Vec<u32>| {
            let mut row = tokens.clone();
            row.resize(WIDTH, garbage);
            row
        };
        let ids: Vec<u32> = prompts.iter().flat_map(row).collect();
        assert_eq!(Batch::padded(&ids, WIDTH, &LENGTHS).unwrap(), packed);
    }
    assert_eq!(Batch::packed(prompts.concat(), &[0, 9, 73, 224, 225, 428]).unwrap(), packed);
}

#[test]
fn what_is_no_batch_is_refused_by_name() {
    let none: [&[u32]; 0] = [];
    for (result, says) in [
        (Batch::new(&none), "at least 1 prompt, got 0"),
        (Batch::new(&[&[1, 2][..], &[]]), "prompt 1 must hold at least 1 token, got 0"),
        (Batch::packed(vec![], &[]), "at least 1 prompt, got 0"),
        (Batch::packed(vec![], &[0]), "at least 1 prompt, got 0"),
        (Batch::packed(vec![1], &[1]), "the first offset must be 0, got 1"),
        (Batch::packed(vec![1, 2], &[0, 2, 1]), "offset 2 is 1 after 2"),
        (Batch::packed(vec![1, 2], &[0, 1, 1, 2]), "prompt 1 must hold at least 1 token"),
        (Batch::packed(vec![1, 2, 3], &[0, 2]), "the number of tokens, 3, got 2"),
        (Batch::packed(vec![1, 2, 3], &[0, 4]), "the number of tokens, 3, got 4"),
        (Batch::padded(&[1, 2, 3, 4], 2, &[2, 3]), "prompt 1 must have at most the width of 2"),
        (Batch::padded(&[1, 2, 3, 4], 2, &[2, 0]), "prompt 1 must hold at least 1 token"),
        (Batch::padded(&[1, 2, 3], 2, &[2, 1]), "2 prompts of width 2 must have as many ids"),
        (Batch::padded(&[], usize::MAX, &[1, 1]), "must have as many ids"),
        (Batch::padded(&[], 4, &[]), "at least 1 prompt, got 0"),
        (Batch::masked(&[1, 2, 3], 2, &[true; 3]), "1 prompts of width 2"),
        (Batch::masked(&[1, 2], 2, &[true; 3]), "entries of the mask"),
        (Batch::masked(&[1, 2], 0, &[]), "of width 0"),
        (Batch::masked(&[], 0, &[]), "at least 1 prompt, got 0"),
        (Batch::masked(&[1, 2], 2, &[false; 2]), "prompt 0 must hold at least 1 token"),
        (Batch::masked(&[1, 2, 3], 3, &[true, false, true]), "a hole at 1"),
    ] {
        let error: BatchError = result.unwrap_err();
        assert!(error.to_string().contains(says), "{error}, not {says}");
    }
}

/// Every prompt is checked before the first cache changes.
#[test]
fn batches_that_do_not_fit_change_nothing() {
    let llama = open("tiny-llama31", &Device::flex());
    let batch = |second: Vec<u32>| Batch::new(&[vec![1, 2, 3], second]).unwrap();
    let good = batch(vec![4, 5]);
    let mut caches = llama.batch_caches(&good, 0, BLOCK).unwrap();
    for (batch, says) in [
        (batch(vec![4, 512]), "prompt 1: token id 512 is past the vocabulary of 512"),
        (batch(vec![4, 5, 6]), "prompt 1: 3 more tokens don't fit the cache: 2 positions are free"),
    ] {
        let options = AttentionOptions::default();
        let hidden = llama.batch_hidden(&batch, &mut caches, &options, None);
        for error in [
            hidden.unwrap_err(),
            llama.batch_prefill(&batch, Some(1), &mut caches, None).unwrap_err(),
        ] {
            assert_eq!(error.to_string(), says);
            assert!(caches.iter().all(LlamaCache::is_empty));
        }
    }
    let error = llama.batch_prefill(&good, Some(0), &mut caches, None).unwrap_err();
    assert!(matches!(error, ModelError::ChunkSize));
    let error = llama.batch_prefill(&good, None, &mut caches[..1], None).unwrap_err();
    assert_eq!(error.to_string(), "a batch of 2 prompts needs as many caches, got 1");
    let logits = llama.batch_prefill(&good, None, &mut caches, None).unwrap();
    let mut one = [Sampler::greedy()];
    let error =
        llama.batch_generate(logits, 1, &[], &mut one, &mut caches, &mut |_, _| true).unwrap_err();
    assert_eq!(error.to_string(), "a batch of 2 prompts needs as many samplers, got 1");
    assert!(llama.batch_caches(&good, 0, 0).is_err());
}

/// A prompt goes on where its cache ends, be the others new or not.
#[test]
fn prompts_of_a_batch_may_continue_what_their_caches_hold() {
    for device in devices() {
        let mut llama = open("tiny-llama31", &device);
        let config = prism(&llama).with_calibration(Calibration::Causal);
        llama.set_attention(Some(&config)).unwrap();
        let ids = &prompts()[4];
        let mut caches = [200, 300].map(|capacity| llama.cache(capacity, BLOCK).unwrap());
        let options = AttentionOptions::default().with_more_follows(true);
        llama.hidden(&ids[..96], &mut caches[1], &options, None).unwrap();
        let batch = Batch::new(&[&ids[..50], &ids[96..]]).unwrap();
        let options = AttentionOptions::default();
        let hidden = llama.batch_hidden(&batch, &mut caches, &options, None).unwrap();
        let mut cache = llama.cache(300, BLOCK).unwrap();
        let whole = llama.hidden(ids, &mut cache, &options, None).unwrap();
        let rest = |x: Tensor<3>, first: usize| values(x.slice_dim(1, first..first + 107));
        let off = apart(&rest(hidden, 50), &rest(whole, 96));
        assert!(off < allowed(&device), "{device:?}: off by {off}");
    }
}
