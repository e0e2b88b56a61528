//! LongBench (arXiv 2308.14508) from local copies of its data: `DATASET.jsonl` in a folder.
//!
//! Prompts and budgets are the official ones (`data/longbench.json`), as is what is cut from the middle of a prompt
//! that is too long. Chinese data sets whose scores need a word segmenter are refused.

use std::path::Path;
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use crate::error::{EvalError, Result};
use crate::lines;
use crate::prompts::filled;
use crate::score::Metric;
use crate::task::{Asked, Case, Prompting, Question};

/// A data set as the official configuration has it.
#[derive(Debug, Clone, Deserialize)]
pub struct DataSet {
    /// Its name, and its file's.
    pub name: String,
    /// One of the six groups that the benchmark's mean is of.
    pub group: String,
    /// How it is scored.
    metric: String,
    /// Tokens that the model may answer with.
    pub budget: usize,
    /// Whether the prompt goes without a chat template.
    pub raw: bool,
    prompt: String,
}

/// The data sets.
pub static DATA_SETS: LazyLock<Vec<DataSet>> =
    LazyLock::new(|| serde_json::from_str(include_str!("data/longbench.json")).unwrap_or_default());

/// Data sets whose official scores need a segmenter of Chinese words.
const SEGMENTED: [&str; 3] = ["multifieldqa_zh", "dureader", "vcsum"];

/// A line of a data set.
#[derive(Debug, Clone, Deserialize)]
struct Line {
    #[serde(default)]
    input: String,
    context: String,
    answers: Vec<String>,
    #[serde(default)]
    all_classes: Option<Vec<String>>,
}

/// A data set by its name.
///
/// # Errors
/// No such data set, or one that can't be scored here.
pub fn data_set(name: &str) -> Result<&'static DataSet> {
    if SEGMENTED.contains(&name) {
        return Err(EvalError::task(name, "its score needs a segmenter of Chinese words"));
    }
    DATA_SETS.iter().find(|set| set.name == name).ok_or_else(|| {
        let names: Vec<&str> = DATA_SETS.iter().map(|set| set.name.as_str()).collect();
        EvalError::task(name, format!("no such data set; there are {}", names.join(", ")))
    })
}

impl DataSet {
    fn metric(&self, classes: Option<Vec<String>>) -> Metric {
        let first_line = |metric| Metric::FirstLine(Box::new(metric));
        match (self.metric.as_str(), self.name.as_str()) {
            ("f1", "triviaqa") => first_line(Metric::F1),
            ("f1", _) => Metric::F1,
            ("rouge_l", "samsum") => first_line(Metric::RougeL),
            ("rouge_l", _) => Metric::RougeL,
            ("class", _) => first_line(Metric::Class { classes: classes.unwrap_or_default() }),
            ("code", _) => Metric::CodeLine,
            _ => Metric::Numbers,
        }
    }
}

/// How prompts are made.
pub struct Making<'a> {
    /// Folder of the files.
    pub folder: &'a Path,
    /// Most questions of each data set, the first of its file.
    pub samples: usize,
    /// Most tokens of a prompt.
    pub length: usize,
    /// Makes prompts as a chat.
    pub prompting: Prompting<'a>,
    /// Makes prompts without a chat template.
    pub raw: Prompting<'a>,
    /// Cuts a text to so many tokens, half from each end.
    pub cut: &'a dyn Fn(&str, usize) -> Result<String>,
}

/// The questions of some data sets.
///
/// # Errors
/// A data set that can't be scored, a file that can't be read.
pub fn questions<'a>(
    sets: &[&'static DataSet],
    making: &'a Making<'a>,
) -> Result<Vec<Question<'a>>> {
    let mut questions = Vec::new();
    for &set in sets {
        let file = making.folder.join(format!("{}.jsonl", set.name));
        for (index, line) in lines::read::<Line>(&file, making.samples)?.into_iter().enumerate() {
            let Line { input, context, answers, all_classes } = line;
            questions.push(Question {
                task: set.name.clone(),
                case: set.group.clone(),
                index,
                budget: set.budget,
                metric: set.metric(all_classes),
                ask: Box::new(move || {
                    let text = filled(&set.prompt, &[("context", &context), ("input", &input)]);
                    let user = (making.cut)(&text, making.length)?;
                    let prompting = if set.raw { making.raw } else { making.prompting };
                    Ok(Asked { ids: prompting(&user, "")?, references: answers.clone() })
                }),
            });
        }
    }
    Ok(questions)
}

/// The score of one group, or of the whole.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Group {
    /// The group; `all` for the mean of the groups.
    pub group: String,
    /// How attention was computed.
    pub attend: String,
    /// Data sets, or groups.
    pub parts: usize,
    /// Mean of its data sets' scores, in percent; of the groups', unweighted, for the whole.
    pub score: f64,
}

/// Groups of the cases that [`cases`](crate::task::cases) makes of the answers.
pub fn groups(cases: &[Case]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut add = |group: &str, attend: &str, score: f64| {
        let same = |of: &Group| of.group == group && of.attend == attend;
        let at = groups.iter().position(same).unwrap_or_else(|| {
            let (group, attend) = (group.to_string(), attend.to_string());
            groups.push(Group { group, attend, parts: 0, score: 0.0 });
            groups.len() - 1
        });
        groups[at].parts += 1;
        groups[at].score += score;
    };
    cases.iter().for_each(|case| add(&case.case, &case.attend, case.score));
    let mean = |groups: &mut [Group]| {
        groups.iter_mut().for_each(|group| group.score /= group.parts as f64);
    };
    mean(&mut groups);
    let mut all: Vec<Group> = Vec::new();
    for group in &groups {
        match all.iter_mut().find(|all| all.attend == group.attend) {
            Some(all) => {
                all.parts += 1;
                all.score += group.score;
            }
            None => all.push(Group { group: "all".into(), parts: 1, ..group.clone() }),
        }
    }
    mean(&mut all);
    groups.extend(all);
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    fn letters(user: &str, _: &str) -> Result<Vec<u32>> {
        Ok(user.chars().map(|c| c as u32).collect())
    }

    fn raw(user: &str, prefix: &str) -> Result<Vec<u32>> {
        Ok([vec![7], letters(user, prefix)?].concat())
    }

    fn cut(text: &str, most: usize) -> Result<String> {
        let text: Vec<char> = text.chars().collect();
        let half = most / 2;
        Ok(match text.len() > most {
            true => text[..half].iter().chain(&text[text.len() - half..]).collect(),
            false => text.iter().collect(),
        })
    }

    fn write(folder: &Path, set: &str, lines: &[serde_json::Value]) {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(folder.join(format!("{set}.jsonl")), text).unwrap();
    }

    #[test]
    fn are_there_the_data_sets_of_the_benchmark_but_those_that_need_a_segmenter() {
        let mut groups: Vec<&str> = DATA_SETS.iter().map(|set| set.group.as_str()).collect();
        groups.sort_unstable();
        groups.dedup();
        assert_eq!((DATA_SETS.len(), groups.len()), (18, 6));
        for set in DATA_SETS.iter() {
            assert!(set.prompt.contains("{context}") && set.budget > 0, "{}", set.name);
            assert!(["f1", "rouge_l", "class", "code", "numbers"].contains(&set.metric.as_str()));
        }
        let refused = data_set("dureader").unwrap_err().to_string();
        assert!(refused.contains("segmenter"), "{refused}");
        assert!(data_set("hotpot").unwrap_err().to_string().contains("hotpotqa"));
    }

    #[test]
    fn are_lines_asked_and_scored_as_their_data_set_says() {
        let folder = tempfile::tempdir().unwrap();
        let line = |input: &str, context: &str, answer: &str, classes: serde_json::Value| {
            serde_json::json!({
                "input": input, "context": context, "answers": [answer], "length": 3,
                "dataset": "x", "language": "en", "all_classes": classes, "_id": "a",
            })
        };
        let null = serde_json::Value::Null;
        write(folder.path(), "hotpotqa", &[line("Who?", "{input} Ann did.", "Ann", null.clone())]);
        let classes = serde_json::json!(["City", "Person"]);
        write(folder.path(), "trec", &[line("Type:", "Examples", "City", classes)]);
        let code = "x = 1\n".repeat(400);
        write(folder.path(), "lcc", &[line("", &code, "x = 2", null)]);
        let making = Making {
            folder: folder.path(),
            samples: 5,
            length: 1000,
            prompting: &letters,
            raw: &raw,
            cut: &cut,
        };
        let sets = ["hotpotqa", "trec", "lcc"].map(|name| data_set(name).unwrap());
        let questions = questions(&sets, &making).unwrap();
        let text = |question: &Question| -> String {
            (question.ask)().unwrap().ids.into_iter().filter_map(char::from_u32).collect()
        };
        // Braces of the context are left alone.
        let asked = text(&questions[0]);
        assert!(
            asked.contains("passages.\n{input} Ann did.\n")
                && asked.ends_with("Question: Who?\nAnswer:")
        );
        assert_eq!(questions[0].metric.score("The Ann.", &["Ann".into()]), 1.0);
        assert_eq!(questions[1].metric.score("\nCity\nPerson", &["City".into()]), 1.0);
        assert!(text(&questions[1]).starts_with('\u{7}'));
        let long = text(&questions[2]);
        assert_eq!(long.chars().count(), 1001);
        assert!(long.ends_with("Next line of code:\n"));
        assert_eq!(questions[2].metric.score("x = 2", &["x = 2".into()]), 1.0);
    }

    #[test]
    fn is_the_whole_the_mean_of_the_groups() {
        let case = |set: &str, group: &str, score| Case {
            task: set.into(),
            case: group.into(),
            attend: "dense".into(),
            questions: 1,
            score,
            prompt_tokens: 1,
            density: 1.0,
            seconds: 0.0,
        };
        let groups = groups(&[
            case("a", "code", 10.0),
            case("b", "code", 30.0),
            case("c", "few-shot", 50.0),
        ]);
        let scores: Vec<_> = groups.iter().map(|g| (g.group.as_str(), g.parts, g.score)).collect();
        assert_eq!(scores, [("code", 2, 20.0), ("few-shot", 1, 50.0), ("all", 2, 35.0)]);
    }
}
