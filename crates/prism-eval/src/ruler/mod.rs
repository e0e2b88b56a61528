//! RULER (arXiv 2404.06654): 11 tasks made here from any text, and question answering over local passages.
//!
//! Prompts, budgets and scores are the official ones (NVIDIA's repository, Apache-2.0). What differs: words come
//! from lists of its own, sentences end where [`Haystack`] says, and each question is as long as its own
//! length allows.

mod cwe;
mod fwe;
mod niah;
mod qa;
mod vt;

use std::str::FromStr;

use serde::Serialize;

pub use qa::Passages;

use crate::error::{EvalError, Result};
use crate::haystack::Haystack;
use crate::score::Metric;
use crate::task::{Asked, Case, Draft, Prompting, Question, fit};
use crate::words;

/// A task of RULER that needs no download.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// A number in repeated sentences.
    NiahSingle1,
    /// A number in a text.
    NiahSingle2,
    /// A UUID in a text.
    NiahSingle3,
    /// A number among four with other keys, in a text.
    NiahMultikey1,
    /// A number among nothing but others.
    NiahMultikey2,
    /// A UUID, by a UUID, among nothing but others.
    NiahMultikey3,
    /// Four numbers of one key.
    NiahMultivalue,
    /// The numbers of four keys.
    NiahMultiquery,
    /// Variables of one value, through a chain of assignments.
    Vt,
    /// The ten most common words of a list.
    Cwe,
    /// The three most frequent coded words.
    Fwe,
}

impl Task {
    /// All of them, in the official order.
    pub const ALL: [Self; 11] = [
        Self::NiahSingle1,
        Self::NiahSingle2,
        Self::NiahSingle3,
        Self::NiahMultikey1,
        Self::NiahMultikey2,
        Self::NiahMultikey3,
        Self::NiahMultivalue,
        Self::NiahMultiquery,
        Self::Vt,
        Self::Cwe,
        Self::Fwe,
    ];

    /// The official name.
    pub fn name(self) -> &'static str {
        match self {
            Self::NiahSingle1 => "niah_single_1",
            Self::NiahSingle2 => "niah_single_2",
            Self::NiahSingle3 => "niah_single_3",
            Self::NiahMultikey1 => "niah_multikey_1",
            Self::NiahMultikey2 => "niah_multikey_2",
            Self::NiahMultikey3 => "niah_multikey_3",
            Self::NiahMultivalue => "niah_multivalue",
            Self::NiahMultiquery => "niah_multiquery",
            Self::Vt => "vt",
            Self::Cwe => "cwe",
            Self::Fwe => "fwe",
        }
    }

    /// Tokens that the model may answer with.
    pub fn budget(self) -> usize {
        match self {
            Self::Vt => 30,
            Self::Cwe => 120,
            Self::Fwe => 50,
            _ => 128,
        }
    }

    /// Whether it hides things in a text.
    pub fn needs_haystack(self) -> bool {
        niah::Kind::of(self).is_some_and(|kind| kind.haystack == niah::Hay::Text)
    }

    /// The question of a seed, a length and a number, as long as the length allows.
    ///
    /// # Errors
    /// No haystack where one is needed; a length that leaves no room.
    pub fn question(
        self,
        seed: u64,
        length: usize,
        index: usize,
        haystack: Option<&Haystack>,
        prompting: Prompting,
    ) -> Result<Draft> {
        let name = self.name();
        let limit = room(name, length, self.budget())?;
        let random = words::random(seed, &[name, &length.to_string(), &index.to_string()]);
        if let Some(kind) = niah::Kind::of(self) {
            if kind.haystack == niah::Hay::Text && haystack.is_none() {
                return Err(EvalError::task(name, "hides things in a text: give it a haystack"));
            }
            let draft = |n| kind.draft(random.clone(), n, haystack);
            return fit(name, limit, kind.units(), prompting, &draft);
        }
        match self {
            Self::Vt => {
                let example = vt::example(random.clone(), length, prompting)?;
                let draft = |n| vt::draft(random.clone(), n, &example);
                fit(name, limit, vt::UNITS, prompting, &draft)
            }
            Self::Cwe => {
                let draft = |n| cwe::draft(random.clone(), n, length);
                fit(name, limit, cwe::units(), prompting, &draft)
            }
            _ => {
                let draft = |n| fwe::draft(random.clone(), n, length);
                fit(name, limit, fwe::UNITS, prompting, &draft)
            }
        }
    }
}

impl FromStr for Task {
    type Err = EvalError;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|task| task.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            EvalError::task(name, format!("no such task; there are {names}"))
        })
    }
}

/// Tokens that a length leaves for the prompt.
fn room(task: &str, length: usize, budget: usize) -> Result<usize> {
    length.checked_sub(budget).filter(|&room| room > 0).ok_or_else(|| {
        let reason = format!("a length of {length} leaves no room beside {budget} of the answer");
        EvalError::task(task, reason)
    })
}

/// What questions are made of.
pub struct Making<'a> {
    /// Seed of all of them.
    pub seed: u64,
    /// Tokens of prompt and answer together.
    pub lengths: &'a [usize],
    /// Questions of each task and length.
    pub samples: usize,
    /// A text to hide things in.
    pub haystack: Option<&'a Haystack>,
    /// Makes prompts.
    pub prompting: Prompting<'a>,
}

/// Every question of some tasks, and of question answering over some passages, by length.
///
/// # Errors
/// A task without the haystack that it needs.
pub fn questions<'a>(
    tasks: &[Task],
    passages: &'a [Passages],
    making: &'a Making<'a>,
) -> Result<Vec<Question<'a>>> {
    let Making { seed, lengths, samples, haystack, prompting } = *making;
    let missing = tasks.iter().find(|task| task.needs_haystack() && haystack.is_none());
    if let Some(task) = missing {
        let reason = "hides things in a text: give it a haystack";
        return Err(EvalError::task(task.name(), reason));
    }
    let mut questions = Vec::new();
    for &length in lengths {
        let asked = move |draft: Draft| {
            let ids = prompting(&draft.user, &draft.prefix)?;
            Ok(Asked { ids, references: draft.references })
        };
        for &task in tasks {
            questions.extend((0..samples).map(|index| Question {
                task: task.name().into(),
                case: length.to_string(),
                index,
                budget: task.budget(),
                metric: Metric::AllWithin,
                ask: Box::new(move || {
                    asked(task.question(seed, length, index, haystack, prompting)?)
                }),
            }));
        }
        for of in passages {
            let count = samples.min(of.len());
            questions.extend((0..count).map(|index| Question {
                task: of.name().into(),
                case: length.to_string(),
                index,
                budget: qa::BUDGET,
                metric: Metric::AnyWithin,
                ask: Box::new(move || asked(of.question(seed, length, index, prompting)?)),
            }));
        }
    }
    Ok(questions)
}

/// Mean of all tasks at a length.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Mean {
    /// How attention was computed.
    pub attend: String,
    /// Tokens of prompt and answer.
    pub length: String,
    /// Tasks.
    pub tasks: usize,
    /// Mean of their scores, in percent.
    pub score: f64,
    /// Selected over causal blocks, mean.
    pub density: f64,
}

/// Unweighted means of the tasks' cases at each length.
pub fn means(cases: &[Case]) -> Vec<Mean> {
    let mut means: Vec<Mean> = Vec::new();
    for case in cases {
        let same = |mean: &Mean| mean.attend == case.attend && mean.length == case.case;
        let at = means.iter().position(same).unwrap_or_else(|| {
            let (attend, length) = (case.attend.clone(), case.case.clone());
            means.push(Mean { attend, length, tasks: 0, score: 0.0, density: 0.0 });
            means.len() - 1
        });
        means[at].tasks += 1;
        means[at].score += case.score;
        means[at].density += case.density;
    }
    for mean in &mut means {
        mean.score /= mean.tasks as f64;
        mean.density /= mean.tasks as f64;
    }
    means
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn words_of(user: &str, prefix: &str) -> Result<Vec<u32>> {
        Ok(vec![1; user.split_whitespace().count() + prefix.split_whitespace().count()])
    }

    fn text() -> Haystack {
        Haystack::new("A plain tale of some length. It goes on! Does it end? Not soon.").unwrap()
    }

    #[test]
    fn is_every_task_findable_within_its_length_and_the_same_again() {
        let haystack = text();
        for task in Task::ALL {
            for length in [500, 2000, 5000] {
                let ask = |seed, index| {
                    task.question(seed, length, index, Some(&haystack), &words_of).unwrap()
                };
                let draft = ask(42, 0);
                let tokens = words_of(&draft.user, &draft.prefix).unwrap().len();
                let name = task.name();
                assert!(tokens + task.budget() <= length, "{name}: {tokens} of {length}");
                // No more than a few percent are left over.
                assert!(tokens + task.budget() + 60 + length / 20 > length, "{name}: {tokens}");
                assert!(!draft.references.is_empty());
                for reference in &draft.references {
                    assert!(draft.user.contains(reference), "{name}: {reference}");
                }
                assert_eq!(ask(42, 0), draft);
                assert_ne!(ask(42, 1), draft);
                assert_ne!(ask(43, 0), draft);
            }
        }
    }

    #[test]
    fn is_what_is_missing_said() {
        let says = |error: EvalError, what: &str| {
            let error = error.to_string();
            assert!(error.contains(what), "{error}");
        };
        let task = Task::NiahSingle2;
        says(task.question(1, 500, 0, None, &words_of).unwrap_err(), "give it a haystack");
        says(Task::Vt.question(1, 20, 0, None, &words_of).unwrap_err(), "leaves no room");
        says(Task::Vt.question(1, 60, 0, None, &words_of).unwrap_err(), "shortest prompt");
        says("vtt".parse::<Task>().unwrap_err(), "niah_single_1, ");
        let making =
            Making { seed: 1, lengths: &[500], samples: 1, haystack: None, prompting: &words_of };
        assert!(questions(&Task::ALL, &[], &making).is_err());
        assert_eq!(questions(&[Task::Vt, Task::Fwe], &[], &making).unwrap().len(), 2);
    }
}
