//! Does a session on one cache give what a single run over the same tokens gives?

use std::path::Path;

use burn::tensor::{DType, Device};
use burn_prism::Calibration;
use prism_models::{Checkpoint, Finish, Llama, ModelError, Sampler, Session};

const CAPACITY: usize = 200;

fn tiny() -> Llama {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/models/tiny-llama31");
    let checkpoint = Checkpoint::open(root).unwrap();
    Llama::load(&checkpoint, DType::F32, &Device::flex(), &mut |_, _| {}).unwrap()
}

fn ids(n: usize) -> Vec<u32> {
    (0..n).map(|i| (i * i % 509 + 3) as u32).collect()
}

/// Other tokens than [`ids`] from the first on.
fn other(n: usize) -> Vec<u32> {
    ids(n).into_iter().map(|id| (id + 250) % 509 + 3).collect()
}

fn session(llama: &Llama) -> Session {
    Session::new(llama.cache(CAPACITY, 16).unwrap())
}

/// Logits after `ids` and the greedy tokens that follow, in a session of their own.
fn whole(llama: &Llama, ids: &[u32], limit: usize) -> (Vec<f32>, Vec<u32>) {
    let mut session = session(llama);
    let logits = session.prefill(llama, ids, None, None).unwrap().logits;
    let tokens = greedy(llama, &mut session, logits.clone(), limit);
    (logits, tokens)
}

fn greedy(llama: &Llama, session: &mut Session, logits: Vec<f32>, limit: usize) -> Vec<u32> {
    let mut sampler = Sampler::greedy();
    session.generate(llama, logits, limit, &[], &mut sampler, &mut |_| true).unwrap().tokens
}

fn close(got: &[f32], right: &[f32]) {
    let worst = got.iter().zip(right).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(got.len() == right.len() && worst < 1e-4, "logits differ by {worst}");
}

#[test]
fn do_several_turns_equal_one_run_over_the_same_tokens() {
    let llama = tiny();
    let mut session = session(&llama);
    let mut prompt = ids(40);
    for turn in 0..3 {
        let prompted = session.prefill(&llama, &prompt, Some(7), None).unwrap();
        // All but the last token of the answer before was run already.
        assert_eq!(prompted.reused, if turn == 0 { 0 } else { prompt.len() - 11 });
        let (right, tokens) = whole(&llama, &prompt, 9);
        close(&prompted.logits, &right);
        assert_eq!(greedy(&llama, &mut session, prompted.logits, 9), tokens);
        assert_eq!(session.tokens(), [&prompt[..], &tokens[..8]].concat());
        prompt.extend(tokens);
        prompt.extend(&ids(10)[..10]);
    }
}

#[test]
fn is_the_cache_rolled_back_to_the_common_prefix() {
    let mut llama = tiny();
    let config = llama.prism_config().with_block(16).with_mass(0.6).with_dense_below(0);
    let config = config.with_bands(16, 24).with_calibration(Calibration::Off);
    for prism in [None, Some(config)] {
        llama.set_attention(prism.as_ref()).unwrap();
        // On block boundaries and off them: the pooled keys of a cut block must be made anew.
        for kept in [100, 96, 33, 1] {
            let changed = [&ids(120)[..kept], &other(80)].concat();
            let mut session = session(&llama);
            session.prefill(&llama, &ids(kept), None, None).unwrap();
            session.prefill(&llama, &ids(120), None, None).unwrap();
            let prompted = session.prefill(&llama, &changed, None, None).unwrap();
            assert_eq!((prompted.reused, session.tokens()), (kept, &changed[..]));
            // Against a session that never read anything else.
            let mut fresh = self::session(&llama);
            fresh.prefill(&llama, &ids(kept), None, None).unwrap();
            close(&prompted.logits, &fresh.prefill(&llama, &changed, None, None).unwrap().logits);
        }
    }
}

#[test]
fn is_the_last_token_of_a_prompt_run_again_for_its_logits() {
    let llama = tiny();
    let mut session = session(&llama);
    let right = session.prefill(&llama, &ids(30), None, None).unwrap().logits;
    let again = session.prefill(&llama, &ids(30), None, None).unwrap();
    assert_eq!(again.reused, 29);
    close(&again.logits, &right);
    let shorter = session.prefill(&llama, &ids(20), None, None).unwrap();
    assert_eq!((shorter.reused, session.tokens().len()), (19, 20));
    close(&shorter.logits, &whole(&llama, &ids(20), 0).0);
}

#[test]
fn is_a_prompt_longer_than_the_cache_refused_without_a_change() {
    let llama = tiny();
    let mut session = session(&llama);
    session.prefill(&llama, &ids(50), None, None).unwrap();
    let error = session.prefill(&llama, &ids(CAPACITY + 1), None, None).unwrap_err();
    assert!(matches!(error, ModelError::CacheFull { tokens: 151, free: 150 }), "{error}");
    assert_eq!(session.tokens(), ids(50));
    assert!(session.prefill(&llama, &[1000], None, None).is_err());
    assert!(session.tokens().is_empty(), "after another error it starts anew");
    assert!(matches!(session.prefill(&llama, &[], None, None), Err(ModelError::NoTokens)));
}

#[test]
fn does_generation_say_why_it_ended() {
    let llama = tiny();
    let run = |end: &[u32], limit: usize, more: usize| {
        let mut session = session(&llama);
        let logits = session.prefill(&llama, &ids(CAPACITY - 5), None, None).unwrap().logits;
        let (mut sampler, mut seen) = (Sampler::greedy(), 0);
        let mut visit = |_| {
            seen += 1;
            seen < more
        };
        session.generate(&llama, logits, limit, end, &mut sampler, &mut visit).unwrap()
    };
    let free = run(&[], 100, 100);
    assert_eq!((free.finish, free.tokens.len()), (Finish::CacheFull, 6));
    let limited = run(&[], 2, 100);
    assert_eq!((limited.finish, &limited.tokens[..]), (Finish::Limit, &free.tokens[..2]));
    assert_eq!(run(&[], 0, 100).finish, Finish::Limit);
    let stopped = run(&[], 100, 3);
    assert_eq!((stopped.finish, &stopped.tokens[..]), (Finish::Stopped, &free.tokens[..3]));
    let first = free.tokens[0];
    let ended = run(&[7000, first], 100, 100);
    assert_eq!((ended.finish, ended.tokens.len()), (Finish::EndToken(first), 0));
}
