//! `prism run`: generate text from a prompt.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use prism_models::{Batch, Checkpoint, Message, Tokenizer};
use serde::Serialize;

use crate::answer::{self, Answerer, Settings};
use crate::args::RunArgs;
use crate::prompt::{self, Prompter};
use crate::{model, output};

#[derive(Debug, Serialize)]
struct Report<A> {
    load_seconds: f64,
    #[serde(flatten)]
    answer: A,
}

pub fn run(args: &RunArgs) -> Result<()> {
    answer::check(&args.sampling, &args.read)?;
    prompt::variables(&args.template)?;
    let checkpoint = model::checkpoint(&args.model.model)?;
    let tokenizer = checkpoint.tokenizer()?;
    let prompts = prompts(args, &checkpoint, &tokenizer)?;
    let settings = Settings::new(&args.sampling, &checkpoint, &tokenizer)?;
    let opened = model::load(&args.model, checkpoint, tokenizer)?;
    let load_seconds = opened.load_seconds;
    let mut answerer =
        Answerer::new(opened, settings, &args.sampling, &args.read, args.max_tokens)?;
    let json = args.model.json;
    let ids = match prompts {
        Prompts::Many(batch) => {
            let answer = answerer.answer_all(&batch)?;
            if json {
                return output::json(&Report { load_seconds, answer });
            }
            answer.print();
            return Ok(());
        }
        Prompts::One(ids) => ids,
    };
    let mut session = answerer.session(ids.len().saturating_add(args.max_tokens))?;

    let mut stdout = std::io::stdout();
    let shown: Option<&mut dyn Write> = (!json).then_some(&mut stdout as _);
    let answer = answerer.answer(&mut session, &ids, shown)?;
    if json {
        return output::json(&Report { load_seconds, answer });
    }
    answer.print();
    Ok(())
}

/// What is to be answered.
enum Prompts {
    One(Vec<u32>),
    Many(Batch),
}

fn prompts(args: &RunArgs, checkpoint: &Checkpoint, tokenizer: &Tokenizer) -> Result<Prompts> {
    let prompter = match args.raw {
        true => None,
        false => Prompter::new(&args.template, checkpoint, tokenizer)?,
    };
    if prompter.is_none() && !args.raw {
        eprintln!("prism: the model has no chat template: the prompt is taken as it is");
    }
    let ids = |prompt: String| match &prompter {
        Some(prompter) => {
            let mut messages = prompter.beginning();
            messages.push(Message::new("user", prompt));
            prompter.ids(tokenizer, &messages).context("--raw goes without the chat template")
        }
        None => Ok(tokenizer.encode(&prompt, true)?),
    };
    let prompt = match (&args.prompt, &args.prompt_file, &args.prompts) {
        (Some(prompt), ..) => prompt.clone(),
        (_, Some(file), _) => model::read_text(file)?,
        (.., Some(file)) => {
            let texts = texts(file)?;
            let ids = texts.into_iter().map(ids).collect::<Result<Vec<_>>>()?;
            let batch = Batch::new(&ids).with_context(|| file.display().to_string())?;
            return Ok(Prompts::Many(batch));
        }
        (None, None, None) => bail!("give --prompt, --prompt-file or --prompts"),
    };
    let ids = ids(prompt)?;
    if ids.is_empty() {
        bail!("the prompt is empty");
    }
    Ok(Prompts::One(ids))
}

/// The JSON strings of a file, one a line; empty lines don't count.
fn texts(file: &Path) -> Result<Vec<String>> {
    let text = model::read_text(file)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(index, line)| {
            serde_json::from_str(line).with_context(|| {
                format!("{}, line {}: not a JSON string", file.display(), index + 1)
            })
        })
        .collect()
}
