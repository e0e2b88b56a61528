//! Random words, numbers and ids, the same for the same seed on every machine.

use std::collections::HashSet;
use std::sync::LazyLock;

use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use crate::store::fnv;

/// The generator of all tasks: its algorithm is fixed.
pub type Random = Xoshiro256PlusPlus;

static ADJECTIVES: LazyLock<Vec<&'static str>> =
    LazyLock::new(|| include_str!("words/adjectives.txt").lines().collect());
static NOUNS: LazyLock<Vec<&'static str>> =
    LazyLock::new(|| include_str!("words/nouns.txt").lines().collect());

/// A generator for one question: of a seed, and of what tells the question from others.
pub fn random(seed: u64, question: &[&str]) -> Random {
    // With a byte between the parts that UTF-8 never has.
    let parts = question.iter().flat_map(|part| part.bytes().chain([0xff]));
    Random::seed_from_u64(fnv(seed ^ 0xcbf2_9ce4_8422_2325, parts))
}

/// A number below `n`, which is at least 1. Indices are drawn as u64, so that 32-bit machines agree.
pub fn below(random: &mut Random, n: usize) -> usize {
    random.random_range(0..n as u64) as usize
}

/// An adjective and a noun, as `brave-otter`.
pub fn pair(random: &mut Random) -> String {
    let adjective = ADJECTIVES[below(random, ADJECTIVES.len())];
    format!("{adjective}-{}", NOUNS[below(random, NOUNS.len())])
}

/// A number of `digits` digits, the first not 0.
pub fn number(random: &mut Random, digits: u32) -> String {
    let least = 10_u64.pow(digits - 1);
    random.random_range(least..10 * least).to_string()
}

/// A random UUID (version 4).
pub fn uuid(random: &mut Random) -> String {
    let mut bytes: [u8; 16] = random.random();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut text = String::with_capacity(36);
    for (index, byte) in bytes.iter().enumerate() {
        if [4, 6, 8, 10].contains(&index) {
            text.push('-');
        }
        text += &format!("{byte:02x}");
    }
    text
}

/// `n` letters of an alphabet that begins with `first`.
pub fn letters(random: &mut Random, first: u8, n: usize) -> String {
    (0..n).map(|_| char::from(first + below(random, 26) as u8)).collect()
}

/// `n` that differ.
pub fn distinct(
    random: &mut Random,
    n: usize,
    draw: impl Fn(&mut Random) -> String,
) -> Vec<String> {
    let mut seen = HashSet::new();
    let mut all = Vec::with_capacity(n);
    while all.len() < n {
        let one = draw(random);
        if seen.insert(one.clone()) {
            all.push(one);
        }
    }
    all
}

/// `n` words that differ: single words while there are enough, pairs after them.
pub fn vocabulary(random: &mut Random, n: usize) -> Vec<String> {
    let mut single: Vec<&str> = ADJECTIVES.iter().chain(NOUNS.iter()).copied().collect();
    single.sort_unstable();
    single.dedup();
    single.shuffle(random);
    let mut all: Vec<String> = single.into_iter().take(n).map(str::to_string).collect();
    let missing = n - all.len();
    all.extend(distinct(random, missing, pair));
    all
}

/// Pairs of words that there are.
pub fn pairs() -> usize {
    ADJECTIVES.len() * NOUNS.len()
}

/// `n` indices below `of` that differ, in order.
pub fn places(random: &mut Random, n: usize, of: usize) -> Vec<usize> {
    let mut all: Vec<usize> = (0..of).collect();
    all.shuffle(random);
    all.truncate(n);
    all.sort_unstable();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    /// These words are in published results' prompts: another generator would make other tasks.
    #[test]
    fn are_words_the_same_on_every_machine() {
        let mut random = random(42, &["niah_single_1", "4096", "0"]);
        let made = (pair(&mut random), number(&mut random, 7), uuid(&mut random));
        let id = "7eec2a4d-1b87-49d9-bb14-9798e90a5357";
        assert_eq!(made, ("pure-cactus".into(), "7043698".into(), id.into()));
    }

    #[test]
    fn are_words_distinct_and_well_formed() {
        let mut random = random(1, &["a"]);
        let words = vocabulary(&mut random, 3000);
        assert_eq!(words.iter().collect::<HashSet<_>>().len(), 3000);
        assert!(words[..500].iter().all(|word| !word.contains('-')));
        assert!(words[2500].contains('-'));
        let id = uuid(&mut random);
        let parts: Vec<usize> = id.split('-').map(str::len).collect();
        assert_eq!(parts, [8, 4, 4, 4, 12]);
        assert_eq!(&id[14..15], "4");
        assert_eq!(number(&mut random, 7).len(), 7);
        assert_eq!(places(&mut random, 5, 5), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn do_seeds_and_questions_differ() {
        let word = |seed, question: &[&str]| number(&mut random(seed, question), 7);
        assert_eq!(word(1, &["a", "b"]), word(1, &["a", "b"]));
        assert_ne!(word(1, &["a", "b"]), word(2, &["a", "b"]));
        assert_ne!(word(1, &["a", "b"]), word(1, &["ab"]));
    }
}
