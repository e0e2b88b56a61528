//! Needles in a haystack.

use std::ops::RangeInclusive;

use super::Task;
use crate::haystack::{Haystack, NOISE, hide};
use crate::task::Draft;
use crate::words::{self, Random};
use rand::seq::SliceRandom;

/// What needles are hidden in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hay {
    /// Repeated sentences.
    Noise,
    /// A text.
    Text,
    /// Other needles.
    Needles,
}

/// What keys and values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value {
    Words,
    Numbers,
    Uuids,
}

/// One of the tasks with needles.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    pub haystack: Hay,
    key: Value,
    value: Value,
    keys: usize,
    values: usize,
    queries: usize,
}

/// Depths that a text's needles are at, in percent: 40 of them, equally spaced and rounded.
const DEPTHS: usize = 40;

impl Value {
    fn draw(self, random: &mut Random) -> String {
        match self {
            Self::Words => words::pair(random),
            Self::Numbers => words::number(random, 7),
            Self::Uuids => words::uuid(random),
        }
    }

    fn plural(self) -> &'static str {
        match self {
            Self::Words => "words",
            Self::Numbers => "numbers",
            Self::Uuids => "uuids",
        }
    }
}

impl Kind {
    /// The needles of a task, if it has any.
    pub fn of(task: Task) -> Option<Self> {
        use Value::{Numbers, Uuids, Words};
        let kind = |haystack, key, value, [keys, values, queries]: [usize; 3]| {
            Some(Self { haystack, key, value, keys, values, queries })
        };
        match task {
            Task::NiahSingle1 => kind(Hay::Noise, Words, Numbers, [1, 1, 1]),
            Task::NiahSingle2 => kind(Hay::Text, Words, Numbers, [1, 1, 1]),
            Task::NiahSingle3 => kind(Hay::Text, Words, Uuids, [1, 1, 1]),
            Task::NiahMultikey1 => kind(Hay::Text, Words, Numbers, [4, 1, 1]),
            Task::NiahMultikey2 => kind(Hay::Needles, Words, Numbers, [1, 1, 1]),
            Task::NiahMultikey3 => kind(Hay::Needles, Uuids, Uuids, [1, 1, 1]),
            Task::NiahMultivalue => kind(Hay::Text, Words, Numbers, [1, 4, 1]),
            Task::NiahMultiquery => kind(Hay::Text, Words, Numbers, [4, 1, 4]),
            Task::Vt | Task::Cwe | Task::Fwe => None,
        }
    }

    /// Units of haystack that there may be: at least as many as needles.
    pub fn units(self) -> RangeInclusive<usize> {
        self.keys * self.values..=1 << 22
    }

    /// The question with `n` units of haystack: words, repeats or needles.
    pub fn draft(self, mut random: Random, n: usize, haystack: Option<&Haystack>) -> Draft {
        let random = &mut random;
        let keys = words::distinct(random, self.keys, |random| self.key.draw(random));
        let values = words::distinct(random, self.keys * self.values, |r| self.value.draw(r));
        let mut needles: Vec<String> = (keys.iter().zip(values.chunks(self.values)))
            .flat_map(|(key, values)| values.iter().map(|value| self.needle(key, value)))
            .collect();
        needles.shuffle(random);
        let context = match (self.haystack, haystack) {
            (Hay::Text, Some(haystack)) => {
                let depths = words::places(random, needles.len(), DEPTHS);
                let percent = |&at: &usize| (100.0 * at as f64 / (DEPTHS - 1) as f64).round();
                let depths: Vec<f64> = depths.iter().map(percent).collect();
                hide(&haystack.sentences(n), &needles, &depths)
            }
            (Hay::Needles, _) => {
                let mut places = words::places(random, needles.len(), n);
                let mut lines = Vec::with_capacity(n + needles.len());
                while lines.len() < n {
                    let key = self.key.draw(random);
                    if !keys.contains(&key) {
                        lines.push(self.needle(&key, &self.value.draw(random)));
                    }
                }
                insert(&mut lines, &mut places, needles);
                lines.join("\n")
            }
            _ => {
                let mut places = words::places(random, needles.len(), n);
                let mut lines = vec![NOISE.to_string(); n];
                insert(&mut lines, &mut places, needles);
                lines.join("\n")
            }
        };
        let mut asked: Vec<usize> = (0..self.keys).collect();
        asked.shuffle(random);
        asked.truncate(self.queries);
        let references = asked
            .iter()
            .flat_map(|&key| values[key * self.values..][..self.values].to_vec())
            .collect();
        let asked: Vec<&str> = asked.iter().map(|&key| keys[key].as_str()).collect();
        let (user, prefix) = self.words(&context, &asked);
        Draft { user, prefix, references }
    }

    fn needle(self, key: &str, value: &str) -> String {
        format!("One of the special magic {} for {key} is: {value}.", self.value.plural())
    }

    fn words(self, context: &str, asked: &[&str]) -> (String, String) {
        let plural = self.value.plural();
        if self.values * self.queries == 1 {
            let (of, key) = (&plural[..plural.len() - 1], asked[0]);
            return (
                format!(
                    "A special magic {of} is hidden within the following text. Make sure to \
                     memorize it. I will quiz you about the {of} afterwards.\n{context}\nWhat is \
                     the special magic {of} for {key} mentioned in the provided text?"
                ),
                format!(" The special magic {of} for {key} mentioned in the provided text is"),
            );
        }
        let keys = match asked {
            [all @ .., last] if !all.is_empty() => format!("{}, and {last}", all.join(", ")),
            all => all.concat(),
        };
        (
            format!(
                "Some special magic {plural} are hidden within the following text. Make sure to \
                 memorize it. I will quiz you about the {plural} afterwards.\n{context}\nWhat are \
                 all the special magic {plural} for {keys} mentioned in the provided text?"
            ),
            format!(" The special magic {plural} for {keys} mentioned in the provided text are"),
        )
    }
}

/// Inserts needles before the lines at increasing places.
fn insert(lines: &mut Vec<String>, places: &mut Vec<usize>, needles: Vec<String>) {
    for (place, needle) in places.drain(..).zip(needles).rev() {
        lines.insert(place, needle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(task: Task, n: usize) -> Draft {
        let haystack = Haystack::new("Once upon a time. The end!").unwrap();
        Kind::of(task).unwrap().draft(words::random(3, &["x"]), n, Some(&haystack))
    }

    #[test]
    fn are_the_prompts_the_official_ones() {
        let one = draft(Task::NiahSingle1, 6);
        assert!(
            one.user.starts_with("A special magic number is hidden within the following text.")
        );
        assert_eq!(one.user.matches(NOISE).count(), 6);
        assert_eq!(one.user.matches("One of the special magic numbers for ").count(), 1);
        let asked = one.user.lines().last().unwrap();
        assert!(asked.starts_with("What is the special magic number for "), "{asked}");
        assert!(one.prefix.ends_with("mentioned in the provided text is"));

        let many = draft(Task::NiahMultiquery, 60);
        assert!(many.user.starts_with("Some special magic numbers are hidden"));
        assert_eq!(many.user.matches("One of the special magic numbers for ").count(), 4);
        assert!(many.prefix.contains(", and ") && many.prefix.ends_with("provided text are"));
        assert_eq!(many.references.len(), 4);
        assert_eq!(draft(Task::NiahMultivalue, 60).references.len(), 4);
        assert_eq!(draft(Task::NiahMultikey1, 60).references.len(), 1);
    }

    #[test]
    fn is_the_key_that_is_asked_for_there_once_with_its_value() {
        for task in [Task::NiahMultikey1, Task::NiahMultikey2, Task::NiahMultikey3] {
            let draft = draft(task, 90);
            let key = draft.prefix.split(" for ").nth(1).unwrap().split(' ').next().unwrap();
            let needle = format!(" for {key} is: {}.", draft.references[0]);
            assert_eq!(draft.user.matches(&needle).count(), 1, "{task:?}");
            assert_eq!(draft.user.matches(&format!(" for {key} is: ")).count(), 1, "{task:?}");
        }
        let lines = draft(Task::NiahMultikey3, 90).user;
        assert_eq!(lines.matches("One of the special magic uuids for ").count(), 91);
    }
}
