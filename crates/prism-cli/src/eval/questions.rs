//! Studies of what a model answers: needles, RULER, LongBench, InfiniteBench.

use std::path::Path;

use anyhow::{Result, bail};
use prism_eval::plots::heat_map;
use prism_eval::ruler::{self as rules, Passages, Task};
use prism_eval::store::fingerprint;
use prism_eval::task::{Answering, Question, Scored, ask, cases};
use prism_eval::{Attend, EvalError, Haystack, Store, infinitebench, longbench, needle as needles};
use prism_models::{Message, Tokenizer};
use serde_json::{Value, json};

use super::{Bars, Sheet, show, store, ways};
use crate::args::{
    EvalAnswersArgs, InfiniteBenchArgs, LongBenchArgs, ModelArgs, NeedleArgs, RulerArgs,
};
use crate::model::{self, Opened};
use crate::prompt::{self, Prompter};

/// A model that answers.
struct Talker {
    opened: Opened,
    prompter: Option<Prompter>,
    end: Vec<u32>,
}

/// Makes prompts; apart from the model, which answers while they are made.
struct Prompts<'a> {
    tokenizer: &'a Tokenizer,
    prompter: Option<&'a Prompter>,
}

impl Talker {
    /// As a chat where the model has a template and `answers` doesn't forbid it.
    fn open(args: &ModelArgs, answers: Option<&EvalAnswersArgs>) -> Result<Self> {
        if let Some(answers) = answers {
            prompt::variables(&answers.template)?;
        }
        let checkpoint = model::checkpoint(&args.model)?;
        let tokenizer = checkpoint.tokenizer()?;
        let prompter = match answers {
            Some(answers) if !answers.raw => {
                Prompter::new(&answers.template, &checkpoint, &tokenizer)?
            }
            _ => None,
        };
        let end = checkpoint.end_ids(&tokenizer)?;
        let opened = model::load(args, checkpoint, tokenizer)?;
        Ok(Self { opened, prompter, end })
    }

    fn answer(
        &mut self,
        questions: &[Question],
        ways: &[Attend],
        chunk: Option<std::num::NonZeroUsize>,
        store: &mut Store,
    ) -> Result<Vec<Scored>> {
        let mut who = Answering {
            llama: &mut self.opened.llama,
            tokenizer: &self.opened.tokenizer,
            end: &self.end,
            chunk: chunk.map(usize::from),
        };
        Ok(ask(&mut who, questions, ways, store, &mut Bars::default())?)
    }
}

impl Prompts<'_> {
    fn chat(&self, user: &str, prefix: &str) -> Result<Vec<u32>, EvalError> {
        let Some(prompter) = self.prompter else { return self.raw(user, prefix) };
        let mut messages = prompter.beginning();
        messages.push(Message::new("user", user));
        let text = prompter.text(&messages).map_err(|error| EvalError::Task {
            task: "prompt".into(),
            reason: format!("{error:#}; --raw goes without the chat template"),
        })?;
        Ok(self.tokenizer.encode(&(text + prefix.trim_start()), false)?)
    }

    fn raw(&self, user: &str, prefix: &str) -> Result<Vec<u32>, EvalError> {
        Ok(self.tokenizer.encode(&format!("{user}{prefix}"), true)?)
    }

    /// A text of at most so many tokens: half of them from each end.
    fn cut(&self, text: &str, most: usize) -> Result<String, EvalError> {
        let ids = self.tokenizer.encode(text, false)?;
        if ids.len() <= most {
            return Ok(text.into());
        }
        let (first, last) = (most.div_ceil(2), most / 2);
        let part = |ids: &[u32]| self.tokenizer.decode(ids, true);
        Ok(part(&ids[..first])? + &part(&ids[ids.len() - last..])?)
    }
}

/// What answers depend on besides the question.
fn settings(answers: &EvalAnswersArgs, chat: bool) -> Value {
    json!({
        "chat": chat,
        "system": answers.template.system,
        "template_arg": answers.template.template_arg,
        "chunk": answers.chunk.map(usize::from),
    })
}

/// A text to hide things in, and what tells it apart.
fn haystack(file: Option<&Path>) -> Result<(Option<Haystack>, Value)> {
    let Some(file) = file else { return Ok((None, Value::Null)) };
    let text = model::read_text(file)?;
    Ok((Some(Haystack::new(&text)?), fingerprint(text.as_bytes()).into()))
}

fn joined(mut settings: Value, more: Value) -> Value {
    if let (Some(settings), Value::Object(more)) = (settings.as_object_mut(), more) {
        settings.extend(more);
    }
    settings
}

pub fn needle(args: &NeedleArgs) -> Result<()> {
    let ways = ways(&args.ways)?;
    let (haystack, text) = haystack(args.haystack.as_deref())?;
    let mut talker = Talker::open(&args.common.model, Some(&args.answers))?;
    let (tokenizer, prompter) = (talker.opened.tokenizer.clone(), talker.prompter.take());
    let prompts = Prompts { tokenizer: &tokenizer, prompter: prompter.as_ref() };
    let prompting = |user: &str, prefix: &str| prompts.chat(user, prefix);
    let making = needles::Making {
        seed: args.seed,
        lengths: &args.lengths,
        depths: &args.depths,
        samples: args.samples,
        haystack: haystack.as_ref(),
        prompting: &prompting,
    };
    let more = json!({"seed": args.seed, "haystack": text});
    let settings = joined(settings(&args.answers, prompter.is_some()), more);
    let mut store = store(&args.common, "needle", settings)?;
    let questions = needles::questions(&making);
    let scored = talker.answer(&questions, &ways, args.answers.chunk, &mut store)?;
    let cases = cases(&scored);
    if let Some(out) = &args.common.out {
        for attend in &ways {
            let heat = needles::heat(&cases, attend.name(), &making);
            let name: String =
                attend.name().chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).collect();
            let caption = format!("needles found, {}", attend.name());
            heat_map(
                &out.join(format!("needle-{name}.svg")),
                &caption,
                ["tokens", "depth"],
                &heat,
            )?;
        }
    }
    let sheets = [Sheet::new("lengths-and-depths", &cases)?];
    show(&args.common, &json!({"cases": cases, "answers": scored}), &sheets)
}

pub fn ruler(args: &RulerArgs) -> Result<()> {
    let ways = ways(&args.ways)?;
    let tasks: Vec<Task> = match args.tasks.as_slice() {
        [] => Task::ALL.to_vec(),
        [none] if none == "none" => Vec::new(),
        tasks => tasks.iter().map(|name| name.parse()).collect::<Result<_, _>>()?,
    };
    if tasks.is_empty() && args.qa.is_empty() {
        bail!("--tasks none leaves nothing to ask without --qa");
    }
    let (haystack, text) = haystack(args.haystack.as_deref())?;
    if let (None, Some(task)) = (&haystack, tasks.iter().find(|task| task.needs_haystack())) {
        bail!("{} hides things in a text: give --haystack, or other --tasks", task.name());
    }
    let passages: Vec<Passages> =
        args.qa.iter().map(|file| Passages::open(file)).collect::<Result<_, _>>()?;
    let mut talker = Talker::open(&args.common.model, Some(&args.answers))?;
    let (tokenizer, prompter) = (talker.opened.tokenizer.clone(), talker.prompter.take());
    let prompts = Prompts { tokenizer: &tokenizer, prompter: prompter.as_ref() };
    let prompting = |user: &str, prefix: &str| prompts.chat(user, prefix);
    let making = rules::Making {
        seed: args.seed,
        lengths: &args.lengths,
        samples: args.samples,
        haystack: haystack.as_ref(),
        prompting: &prompting,
    };
    let more = json!({"seed": args.seed, "haystack": text});
    let settings = joined(settings(&args.answers, prompter.is_some()), more);
    let mut store = store(&args.common, "ruler", settings)?;
    let questions = rules::questions(&tasks, &passages, &making)?;
    let scored = talker.answer(&questions, &ways, args.answers.chunk, &mut store)?;
    let cases = cases(&scored);
    let means = rules::means(&cases);
    let sheets = [Sheet::new("tasks", &cases)?, Sheet::new("means", &means)?];
    show(&args.common, &json!({"means": means, "cases": cases, "answers": scored}), &sheets)
}

/// Names asked for, or those of the benchmark that have a file in the folder.
fn present<'a>(
    asked: &'a [String],
    folder: &Path,
    all: impl Iterator<Item = &'a str>,
) -> Result<Vec<&'a str>> {
    if !asked.is_empty() {
        return Ok(asked.iter().map(String::as_str).collect());
    }
    let found: Vec<&str> =
        all.filter(|name| folder.join(format!("{name}.jsonl")).is_file()).collect();
    if found.is_empty() {
        bail!("{} holds no data of this benchmark: files are called NAME.jsonl", folder.display());
    }
    Ok(found)
}

pub fn long_bench(args: &LongBenchArgs) -> Result<()> {
    let ways = ways(&args.ways)?;
    let all = longbench::DATA_SETS.iter().map(|set| set.name.as_str());
    let sets: Vec<_> = present(&args.datasets, &args.data, all)?
        .into_iter()
        .map(longbench::data_set)
        .collect::<Result<_, _>>()?;
    let mut talker = Talker::open(&args.common.model, Some(&args.answers))?;
    let (tokenizer, prompter) = (talker.opened.tokenizer.clone(), talker.prompter.take());
    let prompts = Prompts { tokenizer: &tokenizer, prompter: prompter.as_ref() };
    let making = longbench::Making {
        folder: &args.data,
        samples: args.samples.unwrap_or(usize::MAX),
        length: args.length,
        prompting: &|user: &str, prefix: &str| prompts.chat(user, prefix),
        raw: &|user: &str, prefix: &str| prompts.raw(user, prefix),
        cut: &|text: &str, most| prompts.cut(text, most),
    };
    let more = json!({"length": args.length, "data": args.data});
    let settings = joined(settings(&args.answers, prompter.is_some()), more);
    let mut store = store(&args.common, "longbench", settings)?;
    let questions = longbench::questions(&sets, &making)?;
    let scored = talker.answer(&questions, &ways, args.answers.chunk, &mut store)?;
    let cases = cases(&scored);
    let groups = longbench::groups(&cases);
    let sheets = [Sheet::new("datasets", &cases)?, Sheet::new("groups", &groups)?];
    show(&args.common, &json!({"groups": groups, "cases": cases, "answers": scored}), &sheets)
}

pub fn infinite_bench(args: &InfiniteBenchArgs) -> Result<()> {
    let ways = ways(&args.ways)?;
    let all = infinitebench::TASKS.iter().map(|task| task.name.as_str());
    let tasks: Vec<_> = present(&args.tasks, &args.data, all)?
        .into_iter()
        .map(infinitebench::task)
        .collect::<Result<_, _>>()?;
    let mut talker = Talker::open(&args.common.model, None)?;
    let tokenizer = talker.opened.tokenizer.clone();
    let prompts = Prompts { tokenizer: &tokenizer, prompter: None };
    let making = infinitebench::Making {
        folder: &args.data,
        samples: args.samples.unwrap_or(usize::MAX),
        length: args.length,
        answer: args.answer_tokens,
        prompting: &|user: &str, prefix: &str| prompts.raw(user, prefix),
        cut: &|text: &str, most| prompts.cut(text, most),
    };
    let settings = json!({
        "length": args.length,
        "answer_tokens": args.answer_tokens,
        "data": args.data,
        "chunk": args.chunk.map(usize::from),
    });
    let mut store = store(&args.common, "infinitebench", settings)?;
    let questions = infinitebench::questions(&tasks, &making)?;
    let scored = talker.answer(&questions, &ways, args.chunk, &mut store)?;
    let cases = cases(&scored);
    let sheets = [Sheet::new("tasks", &cases)?];
    show(&args.common, &json!({"cases": cases, "answers": scored}), &sheets)
}
