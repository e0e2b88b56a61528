//! Question answering over passages, most of them others' (SQuAD and HotpotQA in the paper).

use std::path::Path;

use rand::seq::SliceRandom;
use serde::Deserialize;

use super::room;
use crate::error::{EvalError, Result};
use crate::lines;
use crate::task::{Draft, Prompting, fit};
use crate::words::{self, Random};

/// Tokens that the model may answer with.
pub const BUDGET: usize = 32;

/// A line of the file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    question: String,
    answers: Vec<String>,
    /// The passages that hold the answer.
    documents: Vec<String>,
}

/// Questions with their passages, each line's distractors those of the other lines.
#[derive(Debug, Clone)]
pub struct Passages {
    name: String,
    lines: Vec<Line>,
    /// All passages, each once.
    documents: Vec<String>,
}

impl Passages {
    /// From a file of lines like `{"question": "...", "answers": ["..."], "documents": ["..."]}`. The task is
    /// called `qa_` and the file's name.
    ///
    /// # Errors
    /// A file that can't be read, a line of another form, no line, a line without an answer or a passage.
    pub fn open(path: &Path) -> Result<Self> {
        let lines: Vec<Line> = lines::read(path, usize::MAX)?;
        let stem = path.file_stem().map_or("local".into(), |stem| stem.to_string_lossy());
        let name = format!("qa_{stem}");
        let empty =
            lines.iter().position(|line| line.answers.is_empty() || line.documents.is_empty());
        if let Some(index) = empty {
            let reason = format!("question {} has no answer or no document", index + 1);
            return Err(EvalError::task(name, reason));
        }
        if lines.is_empty() {
            return Err(EvalError::task(name, format!("{} holds no question", path.display())));
        }
        let mut documents: Vec<String> =
            lines.iter().flat_map(|line| line.documents.iter().cloned()).collect();
        documents.sort_unstable();
        documents.dedup();
        Ok(Self { name, lines, documents })
    }

    /// The name of the task.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Questions.
    pub fn len(&self) -> usize {
        self.lines.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// A question with as many passages as the length allows, at most all.
    ///
    /// # Errors
    /// A number past the last; a length that leaves no room.
    pub fn question(
        &self,
        seed: u64,
        length: usize,
        index: usize,
        prompting: Prompting,
    ) -> Result<Draft> {
        let limit = room(&self.name, length, BUDGET)?;
        let line = self.lines.get(index).ok_or_else(|| {
            EvalError::argument("question", format!("below {}", self.lines.len()), index)
        })?;
        let random = words::random(seed, &[&self.name, &length.to_string(), &index.to_string()]);
        let units = line.documents.len()..=self.documents.len().max(line.documents.len());
        fit(&self.name, limit, units, prompting, &|n| self.draft(line, random.clone(), n))
    }

    fn draft(&self, line: &Line, mut random: Random, n: usize) -> Draft {
        let mut others: Vec<&String> =
            self.documents.iter().filter(|document| !line.documents.contains(document)).collect();
        others.shuffle(&mut random);
        let mut shown: Vec<&String> = line.documents.iter().collect();
        shown.extend(others.into_iter().take(n - line.documents.len()));
        shown.shuffle(&mut random);
        let numbered = shown.iter().enumerate();
        let context: Vec<String> =
            numbered.map(|(i, document)| format!("Document {}:\n{document}", i + 1)).collect();
        let told = "Answer the question based on the given documents. Only give me the answer and \
                    do not output any other words.";
        Draft {
            user: format!(
                "{told}\n\nThe following are given documents.\n\n{}\n\n{told}\n\nQuestion: {}",
                context.join("\n\n"),
                line.question
            ),
            prefix: " Answer:".into(),
            references: line.answers.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::words_of;
    use super::*;

    #[test]
    fn are_the_passages_of_the_answer_among_as_many_as_fit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("squad.jsonl");
        let line = |i: usize| {
            format!(
                "{{\"question\": \"What is {i}?\", \"answers\": [\"v{i}\"], \"documents\": \
                 [\"The value of {i} is v{i}, as all know.\"]}}\n"
            )
        };
        std::fs::write(&path, (0..30).map(line).collect::<String>()).unwrap();
        let passages = Passages::open(&path).unwrap();
        assert_eq!((passages.name(), passages.len()), ("qa_squad", 30));
        let draft = passages.question(1, 200, 7, &words_of).unwrap();
        assert!(words_of(&draft.user, &draft.prefix).unwrap().len() + BUDGET <= 200);
        let shown = draft.user.matches("Document ").count();
        assert!(shown > 5 && shown < 30, "{shown}");
        assert!(draft.user.contains("The value of 7 is v7"));
        assert_eq!(draft.references, ["v7"]);
        let all = passages.question(1, 4000, 7, &words_of).unwrap();
        assert_eq!(all.user.matches("Document ").count(), 30);
        std::fs::write(&path, "{\"question\": \"?\"}").unwrap();
        assert!(Passages::open(&path).unwrap_err().to_string().contains("line 1"));
    }
}
