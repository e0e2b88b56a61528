//! Variable tracking: one chain of assignments in repeated sentences, with an example before it.

use std::ops::RangeInclusive;

use crate::error::Result;
use crate::haystack::NOISE;
use crate::task::{Draft, Prompting, fit};
use crate::words::{self, Random};

/// Variables of a chain.
const CHAIN: usize = 5;
/// Most tokens of the example.
const EXAMPLE: usize = 500;
/// Repeats of the sentences that there may be: at least as many as assignments.
pub const UNITS: RangeInclusive<usize> = CHAIN..=1 << 22;

/// A question with variables of so many letters, among `n` repeats.
fn chain(random: &mut Random, n: usize, letters: usize) -> Draft {
    let names = words::distinct(random, CHAIN, |random| words::letters(random, b'A', letters));
    let value = words::number(random, 5);
    let mut lines = vec![NOISE.to_string(); n];
    let places = words::places(random, CHAIN, n);
    for (link, place) in places.into_iter().enumerate().rev() {
        let assignment = match link {
            0 => format!("VAR {} = {value}", names[0]),
            _ => format!("VAR {} = VAR {} ", names[link], names[link - 1]),
        };
        lines.insert(place, assignment);
    }
    let context = lines.join("\n");
    Draft {
        user: format!(
            "Memorize and track the chain(s) of variable assignment hidden in the following \
             text.\n\n{context}\nQuestion: Find all variables that are assigned the value {value} \
             in the text above."
        ),
        prefix: format!(
            " Answer: According to the chain(s) of variable assignment in the text above, {CHAIN} \
             variables are assigned the value {value}, they are: "
        ),
        references: names,
    }
}

/// An answered question of at most 500 tokens, or a quarter of a shorter length.
///
/// # Errors
/// A length that leaves no room for one.
pub fn example(random: Random, length: usize, prompting: Prompting) -> Result<String> {
    let draft = |n| {
        // The question itself draws from the same generator: this one is drawn elsewhere.
        let mut random = random.clone();
        words::number(&mut random, 9);
        chain(&mut random, n, 3)
    };
    let least = prompting(&draft(CHAIN).user, &draft(CHAIN).prefix)?.len();
    let limit = EXAMPLE.min(length / 4).max(least);
    let Draft { user, prefix, references } =
        fit("vt, its example", limit, CHAIN..=100, prompting, &draft)?;
    Ok(format!("{user}{prefix} {}\n", references.join(" ")))
}

/// The question with `n` repeats, after an example.
pub fn draft(mut random: Random, n: usize, example: &str) -> Draft {
    let draft = chain(&mut random, n, 5);
    Draft { user: format!("{example}\n{}", draft.user), ..draft }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn does_the_chain_lead_from_the_value_to_every_variable() {
        let example = example(words::random(1, &[]), 4096, &super::super::tests::words_of).unwrap();
        let draft = draft(words::random(1, &[]), 9, &example);
        let question = draft.user.strip_prefix(&example).unwrap();
        let value = draft.prefix.split("the value ").nth(1).unwrap().split(',').next().unwrap();
        assert_eq!(question.matches(NOISE).count(), 9);
        let mut held = vec![value.to_string()];
        for line in question.lines().filter(|line| line.starts_with("VAR ")) {
            let (name, of) = line.trim_end()[4..].split_once(" = ").unwrap();
            assert_eq!(of.trim_start_matches("VAR "), held.last().unwrap());
            held.push(name.into());
        }
        assert_eq!(held[1..], draft.references);
        assert!(draft.references.iter().all(|name| name.len() == 5 && !example.contains(name)));
        let answered = example.trim_end().rsplit("they are:  ").next().unwrap();
        assert_eq!(answered.split(' ').count(), CHAIN);
    }
}
