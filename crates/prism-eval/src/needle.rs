//! Needle in a haystack: one sentence at every depth of texts of every length.

use crate::error::{EvalError, Result};
use crate::haystack::{Haystack, NOISE, hide};
use crate::plots::Heat;
use crate::score::Metric;
use crate::task::{Asked, Case, Draft, Prompting, Question, fit};
use crate::words;

/// Tokens that the model may answer with.
pub const BUDGET: usize = 30;

/// What questions are made of.
pub struct Making<'a> {
    /// Seed of all of them.
    pub seed: u64,
    /// Tokens of prompt and answer together.
    pub lengths: &'a [usize],
    /// Where the needle stands, in percent of the sentences.
    pub depths: &'a [f64],
    /// Questions of each length and depth.
    pub samples: usize,
    /// A text to hide it in; RULER's repeated sentences where `None`.
    pub haystack: Option<&'a Haystack>,
    /// Makes prompts.
    pub prompting: Prompting<'a>,
}

/// The question of a length, a depth and a number, as long as the length allows. The needle is RULER's: a
/// sentence with a number of seven digits.
///
/// # Errors
/// A depth outside 0 to 100; a length that leaves no room.
pub fn question(making: &Making, length: usize, depth: f64, index: usize) -> Result<Draft> {
    if !(0.0..=100.0).contains(&depth) {
        return Err(EvalError::argument("depth", "0 to 100 percent", depth));
    }
    let limit = length.checked_sub(BUDGET).filter(|&room| room > 0).ok_or_else(|| {
        EvalError::argument("length", format!("more than the {BUDGET} of the answer"), length)
    })?;
    let noise = Haystack::new(NOISE)?;
    let haystack = making.haystack.unwrap_or(&noise);
    // Of one length and number it is the same needle at every depth.
    let mut random =
        words::random(making.seed, &["needle", &length.to_string(), &index.to_string()]);
    let (key, value) = (words::pair(&mut random), words::number(&mut random, 7));
    let needle = format!("One of the special magic numbers for {key} is: {value}.");
    let draft = |n| {
        let context = hide(&haystack.sentences(n), std::slice::from_ref(&needle), &[depth]);
        Draft {
            user: format!(
                "A special magic number is hidden within the following text. Make sure to \
                 memorize it. I will quiz you about the number afterwards.\n{context}\nWhat is the \
                 special magic number for {key} mentioned in the provided text?"
            ),
            prefix: format!(
                " The special magic number for {key} mentioned in the provided text is"
            ),
            references: vec![value.clone()],
        }
    };
    fit("needle", limit, 1..=1 << 22, making.prompting, &draft)
}

/// Every question, by length and depth.
pub fn questions<'a>(making: &'a Making<'a>) -> Vec<Question<'a>> {
    let mut questions = Vec::new();
    for &length in making.lengths {
        for &depth in making.depths {
            questions.extend((0..making.samples).map(|index| Question {
                task: length.to_string(),
                case: depth.to_string(),
                index,
                budget: BUDGET,
                metric: Metric::AllWithin,
                ask: Box::new(move || {
                    let draft = question(making, length, depth, index)?;
                    let ids = (making.prompting)(&draft.user, &draft.prefix)?;
                    Ok(Asked { ids, references: draft.references })
                }),
            }));
        }
    }
    questions
}

/// The map of one way to attend: a column a length, a row a depth.
pub fn heat(cases: &[Case], attend: &str, making: &Making) -> Heat {
    let score = |length: usize, depth: f64| {
        let (length, depth) = (length.to_string(), depth.to_string());
        let same =
            |case: &&Case| (&*case.task, &*case.case, &*case.attend) == (&*length, &*depth, attend);
        cases.iter().find(same).map_or(f64::NAN, |case| case.score / 100.0)
    };
    Heat {
        columns: making.lengths.iter().map(usize::to_string).collect(),
        rows: making.depths.iter().map(|depth| format!("{depth} %")).collect(),
        values: (making.depths.iter())
            .map(|&depth| making.lengths.iter().map(|&length| score(length, depth)).collect())
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words_of(user: &str, prefix: &str) -> Result<Vec<u32>> {
        Ok(vec![1; user.split_whitespace().count() + prefix.split_whitespace().count()])
    }

    #[test]
    fn is_the_needle_at_the_depth_asked_for_and_the_text_as_long() {
        let text = Haystack::new("Alpha beta gamma. Delta, epsilon? Zeta eta theta iota.").unwrap();
        for haystack in [None, Some(&text)] {
            let making = Making {
                seed: 5,
                lengths: &[300, 2000],
                depths: &[0.0, 25.0, 50.0, 100.0],
                samples: 1,
                haystack,
                prompting: &words_of,
            };
            for &length in making.lengths {
                for &depth in making.depths {
                    let draft = question(&making, length, depth, 0).unwrap();
                    let tokens = words_of(&draft.user, &draft.prefix).unwrap().len() + BUDGET;
                    assert!(tokens <= length && tokens + 2 > length, "{tokens} of {length}");
                    let context = draft.user.split('\n').nth(1).unwrap();
                    let at = context.find("One of the special magic").unwrap();
                    let needle = format!(" is: {}.", draft.references[0]);
                    assert_eq!(context.matches(&needle).count(), 1);
                    let rest = context.len() - context[at..].find(&needle).unwrap() - needle.len();
                    let share = 100.0 * at as f64 / rest as f64;
                    assert!((share - depth).abs() < 6.0, "{share} %, not {depth}");
                    assert_eq!(question(&making, length, depth, 0).unwrap(), draft);
                }
            }
            assert_eq!(questions(&making).len(), 8);
            assert!(question(&making, 300, 101.0, 0).is_err());
            assert!(question(&making, 30, 50.0, 0).is_err());
        }
    }
}
