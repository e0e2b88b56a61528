//! Questions that a model answers with text, and how they are asked of every way to attend.

use std::time::Instant;

use prism_core::BlockGrid;
use prism_models::{LayerTrace, Llama, Sampler, Tokenizer};
use serde::{Deserialize, Serialize};

use crate::attend::Attend;
use crate::error::{EvalError, Result};
use crate::progress::Progress;
use crate::score::Metric;
use crate::store::Store;

/// Turns what the user says, and the words that the answer begins with, into the tokens of a prompt.
pub type Prompting<'a> = &'a dyn Fn(&str, &str) -> Result<Vec<u32>>;

/// A question as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    /// What the user says.
    pub user: String,
    /// The words that the answer begins with.
    pub prefix: String,
    /// Right answers.
    pub references: Vec<String>,
}

/// A question as tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    /// The prompt.
    pub ids: Vec<u32>,
    /// Right answers.
    pub references: Vec<String>,
}

/// A question that is made when it is asked.
pub struct Question<'a> {
    /// The task, or the data set.
    pub task: String,
    /// Where it belongs within the task: a length, a depth.
    pub case: String,
    /// Its number there.
    pub index: usize,
    /// Most tokens of the answer.
    pub budget: usize,
    /// How the answer is scored.
    pub metric: Metric,
    /// Makes it.
    pub ask: Box<dyn Fn() -> Result<Asked> + 'a>,
}

/// An answer, with all that its score needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Right answers.
    pub references: Vec<String>,
    /// What the model said.
    pub prediction: String,
    /// Selected over causal blocks of the prompt, mean over layers.
    pub density: f64,
    /// Seconds, the making of the question not among them.
    pub seconds: f64,
}

/// A scored answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scored {
    /// The task, or the data set.
    pub task: String,
    /// Where it belongs within the task.
    pub case: String,
    /// How attention was computed.
    pub attend: String,
    /// Its number.
    pub index: usize,
    /// 0 to 1.
    pub score: f64,
    /// The answer.
    pub answer: Answer,
}

/// Scores of one case of a task, attending one way.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Case {
    /// The task, or the data set.
    pub task: String,
    /// Where within the task.
    pub case: String,
    /// How attention was computed.
    pub attend: String,
    /// Questions.
    pub questions: usize,
    /// Mean score, in percent.
    pub score: f64,
    /// Tokens of the longest prompt.
    pub prompt_tokens: usize,
    /// Selected over causal blocks, mean.
    pub density: f64,
    /// Seconds of all.
    pub seconds: f64,
}

/// Who answers.
pub struct Answering<'a> {
    /// The model.
    pub llama: &'a mut Llama,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Tokens that end an answer.
    pub end: &'a [u32],
    /// Tokens of the prompt to run at a time; all at once where `None`.
    pub chunk: Option<usize>,
}

impl Answering<'_> {
    /// The likeliest answer of at most `budget` tokens. Only the prompt is read as `attend` says: decoding is
    /// exact.
    fn answer(&mut self, asked: Asked, attend: &Attend, budget: usize) -> Result<Answer> {
        let Asked { ids, references } = asked;
        let chunk = self.chunk.unwrap_or(ids.len().max(1));
        if chunk == 0 {
            return Err(EvalError::argument("chunk", "at least 1 token", 0));
        }
        attend.set(self.llama)?;
        let layers = self.llama.config().layers;
        let mut cache = self.llama.cache(ids.len() + budget, attend.block())?;
        let mut traces: Vec<LayerTrace> = Vec::new();
        let start = Instant::now();
        let mut trace = |trace| traces.push(trace);
        let logits = self.llama.prefill(&ids, Some(chunk), &mut cache, Some(&mut trace))?;
        let generated = self.llama.generate_until(
            logits,
            budget,
            self.end,
            &mut Sampler::greedy(),
            &mut cache,
            &mut |_| true,
        )?;
        let seconds = start.elapsed().as_secs_f64();
        let density = density(&traces, layers, ids.len(), chunk, attend.block())?;
        let prediction = self.tokenizer.decode(&generated.tokens, true)?;
        Ok(Answer { prompt_tokens: ids.len(), references, prediction, density, seconds })
    }
}

/// Selected over causal blocks of a prompt of `n` tokens in chunks, mean over layers; `traces` hold every
/// layer of the first chunk, then of the next.
pub(crate) fn density(
    traces: &[LayerTrace],
    layers: usize,
    n: usize,
    chunk: usize,
    block: usize,
) -> Result<f64> {
    let (mut selected, mut causal) = (0.0, 0.0);
    for (index, traces) in traces.chunks(layers).enumerate() {
        let end = ((index + 1) * chunk).min(n);
        let pairs = BlockGrid::new(block, end - index * chunk, end)?.causal_pairs() as f64;
        causal += pairs * traces.len() as f64;
        for trace in traces {
            selected += trace.report.density()? * pairs;
        }
    }
    Ok(selected / causal)
}

/// Asks every question of every way to attend.
///
/// # Errors
/// Settings that don't fit the model, a question that can't be made, a failing model or store.
pub fn ask(
    who: &mut Answering,
    questions: &[Question],
    ways: &[Attend],
    store: &mut Store,
    progress: &mut dyn Progress,
) -> Result<Vec<Scored>> {
    for attend in ways {
        attend.check(who.llama.config())?;
    }
    progress.start("questions", questions.len() * ways.len());
    let mut all = Vec::new();
    for question in questions {
        let Question { task, case, index, budget, metric, ask } = question;
        let mut asked = None;
        for attend in ways {
            let key = format!("{task}|{case}|{index}|{}", attend.name());
            let answer = store.get_or(&key, || {
                let asked = match &asked {
                    Some(asked) => asked,
                    None => asked.insert(ask()?),
                };
                who.answer(Asked::clone(asked), attend, *budget)
            })?;
            let score = metric.score(&answer.prediction, &answer.references);
            let (task, case) = (task.clone(), case.clone());
            let attend = attend.name().into();
            all.push(Scored { task, case, attend, index: *index, score, answer });
            progress.step();
        }
    }
    progress.finish();
    Ok(all)
}

/// Means of each case of each task and way to attend, in the order they first appear.
pub fn cases(scored: &[Scored]) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for Scored { task, case, attend, score, answer, .. } in scored {
        let same = |of: &Case| of.task == *task && of.case == *case && of.attend == *attend;
        let index = cases.iter().position(same).unwrap_or_else(|| {
            cases.push(Case {
                task: task.clone(),
                case: case.clone(),
                attend: attend.clone(),
                questions: 0,
                score: 0.0,
                prompt_tokens: 0,
                density: 0.0,
                seconds: 0.0,
            });
            cases.len() - 1
        });
        let of = &mut cases[index];
        of.questions += 1;
        of.score += 100.0 * score;
        of.prompt_tokens = of.prompt_tokens.max(answer.prompt_tokens);
        of.density += answer.density;
        of.seconds += answer.seconds;
    }
    for of in &mut cases {
        of.score /= of.questions as f64;
        of.density /= of.questions as f64;
    }
    cases
}

/// The largest of the questions that `draft` makes of so many `units` whose prompt has at most `limit`
/// tokens; more units must make no shorter prompt.
///
/// # Errors
/// That of the least units is longer than the limit; the tokenizer fails.
pub fn fit(
    task: &str,
    limit: usize,
    units: std::ops::RangeInclusive<usize>,
    prompting: Prompting,
    draft: &dyn Fn(usize) -> Draft,
) -> Result<Draft> {
    let tokens = |draft: &Draft| Ok::<_, EvalError>(prompting(&draft.user, &draft.prefix)?.len());
    let (least, most) = units.into_inner();
    let mut best = draft(least);
    let needed = tokens(&best)?;
    if needed > limit {
        let reason = format!("its shortest prompt has {needed} tokens, the length leaves {limit}");
        return Err(EvalError::task(task, reason));
    }
    // Doubles until it is too long, then halves the step.
    let (mut low, mut step) = (least, 1);
    let mut growing = true;
    while step > 0 {
        let next = (step <= most - low).then(|| draft(low + step));
        let fits = |next: &Draft| Ok::<_, EvalError>(tokens(next)? <= limit);
        if let Some(next) = next
            && fits(&next)?
        {
            (best, low) = (next, low + step);
            if growing {
                step *= 2;
            }
        } else {
            growing = false;
        }
        if !growing {
            step /= 2;
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(user: &str, prefix: &str) -> Result<Vec<u32>> {
        Ok(vec![0; user.split_whitespace().count() + prefix.split_whitespace().count()])
    }

    fn draft(n: usize) -> Draft {
        Draft { user: "w ".repeat(3 * n), prefix: "the answer".into(), references: vec![] }
    }

    #[test]
    fn is_the_longest_that_fits_found() {
        for limit in [5, 8, 9, 10, 50, 101, 1000, 1001] {
            let found = fit("t", limit, 1..=5000, &words, &draft).unwrap();
            let tokens = words(&found.user, &found.prefix).unwrap().len();
            assert!(tokens <= limit && tokens + 3 > limit, "{tokens} of {limit}");
        }
        let most = fit("t", 1000, 1..=7, &words, &draft).unwrap();
        assert_eq!(words(&most.user, "").unwrap().len(), 21);
        let error = fit("vt", 4, 1..=9, &words, &draft).unwrap_err().to_string();
        assert_eq!(error, "vt: its shortest prompt has 5 tokens, the length leaves 4");
    }

    #[test]
    fn are_cases_means_of_their_answers() {
        let scored = |case: &str, score, density| Scored {
            task: "vt".into(),
            case: case.into(),
            attend: "dense".into(),
            index: 0,
            score,
            answer: Answer {
                prompt_tokens: 7,
                references: vec![],
                prediction: String::new(),
                density,
                seconds: 1.0,
            },
        };
        let cases = cases(&[scored("a", 1.0, 0.5), scored("b", 0.25, 1.0), scored("a", 0.5, 0.25)]);
        let found: Vec<_> =
            cases.iter().map(|c| (c.case.as_str(), c.questions, c.score, c.density)).collect();
        assert_eq!(found, [("a", 2, 75.0, 0.375), ("b", 1, 25.0, 1.0)]);
    }
}
