//! InfiniteBench (arXiv 2402.13718) from local copies of its data: `TASK.jsonl` in a folder.
//!
//! Prompts and budgets are those of its programs for models that continue a text (`data/infinitebench.json`);
//! scores are its own, but for ROUGE.

use std::path::Path;
use std::sync::LazyLock;

use serde::Deserialize;
use serde_json::Value;

use crate::error::{EvalError, Result};
use crate::lines;
use crate::prompts::filled;
use crate::score::Metric;
use crate::task::{Asked, Prompting, Question};

/// A task as its programs have it.
#[derive(Debug, Clone, Deserialize)]
pub struct Task {
    /// Its name, and its file's.
    pub name: String,
    metric: String,
    /// Tokens that the model may answer with.
    pub budget: usize,
    prompt: String,
}

/// The tasks.
pub static TASKS: LazyLock<Vec<Task>> = LazyLock::new(|| {
    serde_json::from_str(include_str!("data/infinitebench.json")).unwrap_or_default()
});

/// A line of a task.
#[derive(Debug, Clone, Deserialize)]
struct Line {
    #[serde(alias = "content")]
    context: String,
    #[serde(default, alias = "question")]
    input: String,
    answer: Value,
    #[serde(default)]
    options: Vec<String>,
}

/// A task by its name.
///
/// # Errors
/// No such task.
pub fn task(name: &str) -> Result<&'static Task> {
    TASKS.iter().find(|task| task.name == name).ok_or_else(|| {
        let names: Vec<&str> = TASKS.iter().map(|task| task.name.as_str()).collect();
        EvalError::task(name, format!("no such task; there are {}", names.join(", ")))
    })
}

impl Task {
    fn metric(&self) -> Metric {
        match self.metric.as_str() {
            "first_integer" => Metric::FirstInteger,
            "first_number" => Metric::FirstNumber,
            "last_integer" => Metric::LastInteger,
            "numbers_in_order" => Metric::NumbersInOrder,
            "word" => Metric::Word,
            "capital_word" => Metric::CapitalWord,
            "letter" => Metric::Letter,
            "debug" => Metric::Debug,
            "character_f1" => Metric::CharacterF1,
            "f1" => Metric::F1,
            _ => Metric::RougeL,
        }
    }

    /// The right answers as the metric wants them.
    fn references(&self, line: &Line) -> Result<Vec<String>> {
        let text = |value: &Value| match value {
            Value::String(text) => Ok(text.clone()),
            Value::Number(number) => Ok(number.to_string()),
            other => Err(EvalError::task(
                &self.name,
                format!("an answer is text or a number, got {other}"),
            )),
        };
        let answers = match &line.answer {
            Value::Array(all) => all.iter().map(text).collect::<Result<Vec<_>>>()?,
            one => vec![text(one)?],
        };
        let first = answers.first().cloned().unwrap_or_default();
        let letter = || {
            let at = line.options.iter().position(|option| *option == first);
            at.filter(|&at| at < 4).map(|at| char::from(b'A' + at as u8).to_string()).ok_or_else(
                || EvalError::task(&self.name, format!("{first:?} is none of the four options")),
            )
        };
        Ok(match self.metric.as_str() {
            "letter" => vec![letter()?, first],
            "debug" => vec![first.clone(), letter()?],
            "capital_word" => vec![first.to_uppercase()],
            _ => answers,
        })
    }

    fn prompt(&self, line: &Line) -> Result<String> {
        let option = |i: usize| line.options.get(i).map_or("", String::as_str);
        let (mut target, mut call) = (String::new(), String::new());
        if self.name == "math_find" {
            // "The largest number" and the like.
            let words: Vec<&str> = line.input.split_whitespace().collect();
            let of =
                words.windows(3).find(|w| w[0] == "The" && w[2].trim_end_matches('.') == "number");
            target =
                of.map(|w| format!("the {} number", w[1].to_lowercase())).ok_or_else(|| {
                    EvalError::task(&self.name, format!("{:?} asks for no number", line.input))
                })?;
        }
        if self.name == "code_run" {
            call = call_in(&line.input).ok_or_else(|| {
                EvalError::task(&self.name, format!("{:?} names no call", line.input))
            })?;
        }
        let func = call.split('(').next().unwrap_or("");
        let fields = [
            ("context", line.context.as_str()),
            ("input", line.input.as_str()),
            ("a", option(0)),
            ("b", option(1)),
            ("c", option(2)),
            ("d", option(3)),
            ("target", target.as_str()),
            ("func", func),
            ("call", call.as_str()),
        ];
        Ok(filled(&self.prompt, &fields))
    }
}

/// The call within a sentence, as `func_3(-7)` of "the return value of func_3(-7).".
fn call_in(text: &str) -> Option<String> {
    let start = text.find("func_")?;
    let end = start + text[start..].find(')')?;
    Some(text[start..=end].to_string())
}

/// How prompts are made.
pub struct Making<'a> {
    /// Folder of the files.
    pub folder: &'a Path,
    /// Most questions of each task, the first of its file.
    pub samples: usize,
    /// Most tokens of a prompt.
    pub length: usize,
    /// Most tokens of an answer, where the task allows more.
    pub answer: usize,
    /// Makes prompts.
    pub prompting: Prompting<'a>,
    /// Cuts a text to so many tokens, half from each end.
    pub cut: &'a dyn Fn(&str, usize) -> Result<String>,
}

/// The questions of some tasks.
///
/// # Errors
/// A file that can't be read, a line that the task can't ask.
pub fn questions<'a>(tasks: &[&'static Task], making: &'a Making<'a>) -> Result<Vec<Question<'a>>> {
    let mut questions = Vec::new();
    for &task in tasks {
        let file = making.folder.join(format!("{}.jsonl", task.name));
        for (index, line) in lines::read::<Line>(&file, making.samples)?.into_iter().enumerate() {
            let references = task.references(&line)?;
            questions.push(Question {
                task: task.name.clone(),
                case: "all".into(),
                index,
                budget: task.budget.min(making.answer),
                metric: task.metric(),
                ask: Box::new(move || {
                    let user = (making.cut)(&task.prompt(&line)?, making.length)?;
                    let ids = (making.prompting)(&user, "")?;
                    Ok(Asked { ids, references: references.clone() })
                }),
            });
        }
    }
    Ok(questions)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn letters(user: &str, _: &str) -> Result<Vec<u32>> {
        Ok(user.chars().map(|c| c as u32).collect())
    }

    fn whole(text: &str, _: usize) -> Result<String> {
        Ok(text.into())
    }

    /// The prompt of a line of a task, and the score of an answer.
    fn asked(name: &str, line: Value, answer: &str) -> Result<(String, f64)> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(format!("{name}.jsonl")), format!("{line}\n")).unwrap();
        let making = Making {
            folder: folder.path(),
            samples: 3,
            length: 9999,
            answer: 100,
            prompting: &letters,
            cut: &whole,
        };
        let questions = questions(&[task(name)?], &making)?;
        assert!(questions[0].budget <= 100);
        let Asked { ids, references } = (questions[0].ask)()?;
        let text = ids.into_iter().filter_map(char::from_u32).collect();
        Ok((text, questions[0].metric.score(answer, &references)))
    }

    #[test]
    fn is_every_task_asked_and_scored_as_its_programs_do() {
        use serde_json::json;
        let none = json!([]);
        let line = |context: &str, input: &str, answer: Value, options: &Value| json!({"id": 0, "context": context, "input": input, "answer": answer, "options": options});
        let four = json!(["Ann", "Bob", "Cy", "Di"]);
        for (name, line, part, right, wrong) in [
            (
                "passkey",
                line("c", "What is the pass key?", json!("71432"), &none),
                "c\n\nWhat is the pass key?\n\nThe pass key is",
                " 71432.",
                "7143",
            ),
            (
                "number_string",
                line("c", "q", json!(["11"]), &none),
                "The sequence of digits is",
                "11",
                "1",
            ),
            (
                "kv_retrieval",
                line("{\"a\": \"b\"}", "Key: a", json!("b"), &none),
                "{\"a\": \"b\"}\n\nKey: a",
                "{\"b\"}",
                "bb",
            ),
            (
                "longbook_choice_eng",
                line("book", "Who?", json!(["Bob"]), &four),
                "Question: Who?\nA. Ann\nB. Bob\n",
                "B",
                "A",
            ),
            (
                "longbook_qa_eng",
                line("book", "Who?", json!(["Bob", "Robert"]), &none),
                "Question: Who?\nAnswer:",
                "Robert",
                "Al",
            ),
            (
                "longbook_qa_chn",
                line("书", "谁？", json!("北京"), &none),
                "问题：谁？\n答案：",
                "北京。",
                "南",
            ),
            (
                "longbook_sum_eng",
                line("book", "", json!("A man sails."), &none),
                "Summary:",
                "a man sails",
                "x",
            ),
            (
                "longdialogue_qa_eng",
                line("$$MASK$$: hi", "", json!(["Ann"]), &none),
                "$$MASK$$: hi\n\nThe name",
                "It is Ann.",
                "Anne",
            ),
            (
                "math_find",
                line(
                    "[3, 9]",
                    "You should answer with only one number. The largest number of the list is:",
                    json!(9),
                    &none,
                ),
                "What is the largest number in the following list?\n\n[3, 9]",
                " 9",
                "3",
            ),
            (
                "math_calc",
                line("1 + 2 - 4", "", json!([1, 3, -1]), &none),
                "Expression: 1 + 2 - 4\nValues:",
                "[1, 3, -1]",
                "3",
            ),
            (
                "code_run",
                line(
                    "def func_1(x)",
                    "Please give me the exact number of the return value of func_1(-2).",
                    json!(-14),
                    &none,
                ),
                "function called func_1 in the following Python code.\n\ndef func_1(x)\n\nPlease compute the exact value of func_1(-2).",
                " -14",
                "14",
            ),
            ("code_debug", line("code", "", json!(["Cy"]), &four), "C. Cy\nD. Di\n", "C.", "A."),
        ] {
            let (text, score) = asked(name, line.clone(), right).unwrap();
            assert!(text.contains(part), "{name}: {text}");
            assert!((score - 1.0).abs() < 1e-12, "{name}: {score} of {right:?}");
            assert_eq!(asked(name, line, wrong).unwrap().1, 0.0, "{name}");
        }
        assert_eq!(TASKS.len(), 12);
    }

    #[test]
    fn are_lines_that_cannot_be_asked_refused() {
        let line = |input: &str, answer: &str| serde_json::json!({"context": "", "input": input, "answer": [answer], "options": ["a"]});
        for (name, line, says) in [
            ("code_debug", line("", "b"), "none of the four options"),
            ("code_run", line("run it", "1"), "names no call"),
            ("math_find", line("find it", "1"), "asks for no number"),
        ] {
            let error = asked(name, line, "").unwrap_err().to_string();
            assert!(error.contains(says), "{name}: {error}");
        }
        assert!(task("pass").unwrap_err().to_string().contains("passkey, "));
    }
}
