//! `prism run`: generate text from a prompt.

use std::io::Write;

use anyhow::{Context, Result, bail};
use prism_models::{Checkpoint, Message, Tokenizer};
use serde::Serialize;

use crate::answer::{self, Answer, Answerer, Settings};
use crate::args::RunArgs;
use crate::prompt::{self, Prompter};
use crate::{model, output};

#[derive(Debug, Serialize)]
struct Report {
    load_seconds: f64,
    #[serde(flatten)]
    answer: Answer,
}

pub fn run(args: &RunArgs) -> Result<()> {
    answer::check(&args.sampling, &args.read)?;
    prompt::variables(&args.template)?;
    let checkpoint = model::checkpoint(&args.model.model)?;
    let tokenizer = checkpoint.tokenizer()?;
    let ids = prompt_ids(args, &checkpoint, &tokenizer)?;
    let settings = Settings::new(&args.sampling, &checkpoint, &tokenizer)?;
    let opened = model::load(&args.model, checkpoint, tokenizer)?;
    let load_seconds = opened.load_seconds;
    let mut answerer =
        Answerer::new(opened, settings, &args.sampling, &args.read, args.max_tokens)?;
    let mut session = answerer.session(ids.len().saturating_add(args.max_tokens))?;

    let mut stdout = std::io::stdout();
    let shown: Option<&mut dyn Write> = (!args.model.json).then_some(&mut stdout as _);
    let answer = answerer.answer(&mut session, &ids, shown)?;
    if args.model.json {
        return output::json(&Report { load_seconds, answer });
    }
    answer.print();
    Ok(())
}

fn prompt_ids(args: &RunArgs, checkpoint: &Checkpoint, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let prompt = match (&args.prompt, &args.prompt_file) {
        (Some(prompt), _) => prompt.clone(),
        (None, Some(file)) => model::read_text(file)?,
        (None, None) => bail!("give --prompt or --prompt-file"),
    };
    let prompter = match args.raw {
        true => None,
        false => Prompter::new(&args.template, checkpoint, tokenizer)?,
    };
    let ids = match prompter {
        Some(prompter) => {
            let mut messages = prompter.beginning();
            messages.push(Message::new("user", prompt));
            prompter.ids(tokenizer, &messages).context("--raw goes without the chat template")?
        }
        None => {
            if !args.raw {
                eprintln!("prism: the model has no chat template: the prompt is taken as it is");
            }
            tokenizer.encode(&prompt, true)?
        }
    };
    if ids.is_empty() {
        bail!("the prompt is empty");
    }
    Ok(ids)
}
