//! Does a prompt in chunks take more memory the longer it is, beside its cache? Counted by the allocator,
//! on Flex, whose tensors it holds. The cache is made beforehand for the longest prompt, so that all that
//! is counted comes on top of it. And does the cache take what `Memory` and `docs/models.md` say?

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::{DType, Device};
use burn_prism::{Calibration, Scoring};
use prism_models::{Llama, Memory, ModelConfig};

/// The system's allocator, with the bytes that are held and the most that were.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn took(size: usize) {
    let held = HELD.fetch_add(size, Ordering::SeqCst) + size;
    PEAK.fetch_max(held, Ordering::SeqCst);
}

// SAFETY: every call goes to the system's allocator unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

const KIB: usize = 1 << 10;
const CAPACITY: usize = 8192;
const CHUNK: usize = 256;
const BLOCK: usize = 64;
/// Bytes of the keys of a layer, a token: 2 heads of 32 in f32.
const KEYS: usize = 2 * 32 * 4;

fn model() -> Llama {
    let config =
        br#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64,
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "hidden_act": "silu",
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "tie_word_embeddings": false, "bos_token_id": 0,
        "eos_token_id": 1, "rope_theta": 10000.0}"#;
    let config = ModelConfig::from_hugging_face(config).unwrap();
    Llama::random(config, DType::F32, &Device::flex(), 1).unwrap()
}

/// Most bytes held beside the model and the cache while `n` tokens are read.
fn peak(llama: &Llama, n: usize, chunk: usize) -> usize {
    let ids: Vec<u32> = (0..n as u32).map(|i| i * i % 61).collect();
    let mut cache = llama.cache(CAPACITY, BLOCK).unwrap();
    let before = HELD.load(Ordering::SeqCst);
    PEAK.store(before, Ordering::SeqCst);
    let logits = llama.prefill(&ids, Some(chunk), &mut cache, None).unwrap();
    assert!(logits.iter().all(|logit| logit.is_finite()));
    PEAK.load(Ordering::SeqCst) - before
}

/// The allocator counts for the whole program, so one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn does_the_memory_of_a_chunk_grow_with_the_prompt() {
    let _alone = ALONE.lock().unwrap();
    let mut llama = model();
    let prism = llama.prism_config().with_block(BLOCK).with_dense_below(0);
    let causal = prism.clone().with_calibration(Calibration::Causal);
    let second = prism.with_scoring(Scoring::SecondOrder { query_sub: 32, key_sub: 32 });
    for config in [None, Some(causal), Some(second)] {
        llama.set_attention(config.as_ref()).unwrap();
        let _ = peak(&llama, 2 * CHUNK, CHUNK); // Threads take their stacks and buffers.
        let (short, long) = (peak(&llama, 1024, CHUNK), peak(&llama, CAPACITY, CHUNK));
        let whole = peak(&llama, CAPACITY, CAPACITY);
        let scoring = config.map(|config| config.scoring);
        eprintln!(
            "{scoring:?}: {} KiB for 1024 tokens, {} KiB for {CAPACITY}; {} KiB in one piece",
            short / KIB,
            long / KIB,
            whole / KIB
        );
        // The keys of one layer alone grew by this much; copied once, they would show.
        let grown = (CAPACITY - 1024) * KEYS;
        assert!(long < short + grown / 16, "{scoring:?}: {short} bytes, then {long}");
        // And the count counts.
        assert!(whole > 4 * long, "{scoring:?}: {whole} bytes in one piece, {long} in chunks");
    }
}

#[test]
fn does_a_cache_take_what_is_said() {
    let _alone = ALONE.lock().unwrap();
    let mut llama = model();
    let memory = Memory::of(llama.config(), CAPACITY, BLOCK, 4).unwrap();
    let bands = (memory.kv_cache + memory.pooled_keys) as usize;
    // Second order adds means and variances of sub-blocks.
    let key_sub = 16;
    let second = bands + 2 * memory.pooled_keys as usize * BLOCK / key_sub;
    let prism = llama.prism_config().with_block(BLOCK).with_dense_below(0);
    let scoring = Scoring::SecondOrder { query_sub: 32, key_sub };
    for (config, right) in [(prism.clone(), bands), (prism.with_scoring(scoring), second)] {
        llama.set_attention(Some(&config)).unwrap();
        let _ = peak(&llama, 2 * CHUNK, CHUNK);
        let before = HELD.load(Ordering::SeqCst);
        let mut cache = llama.cache(CAPACITY, BLOCK).unwrap();
        llama.prefill(&[1; 2 * CHUNK], Some(CHUNK), &mut cache, None).unwrap();
        let held = HELD.load(Ordering::SeqCst) - before;
        // Beside the tensors, what says where they lie.
        assert!(held.abs_diff(right) < 8 * KIB, "{:?}: {held} bytes, not {right}", config.scoring);
    }
}
