//! `prism chat`: a conversation on one cache, of which each turn reads only what is new.

use std::io::{BufRead, IsTerminal, Write};

use anyhow::{Context, Result, bail};
use prism_models::{Message, Session};
use serde::Serialize;

use crate::answer::{self, Answer, Answerer, Ending, Settings};
use crate::args::ChatArgs;
use crate::interrupt::Interrupt;
use crate::model;
use crate::prompt::{self, Prompter};

/// Most tokens of a conversation unless asked for: caches of long contexts are large.
const CONTEXT: usize = 8192;

/// A turn that could not be answered, in JSON.
#[derive(Serialize)]
struct Refused {
    error: String,
}

pub fn run(args: &ChatArgs) -> Result<()> {
    answer::check(&args.sampling, &args.read)?;
    prompt::variables(&args.template)?;
    if args.max_tokens == 0 {
        bail!("--max-tokens must be at least 1 to talk");
    }
    let checkpoint = model::checkpoint(&args.model.model)?;
    let tokenizer = checkpoint.tokenizer()?;
    let prompter = Prompter::new(&args.template, &checkpoint, &tokenizer)?
        .context("the model has no chat template; `prism run --raw` continues a text")?;
    let settings = Settings::new(&args.sampling, &checkpoint, &tokenizer)?;
    let opened = model::load(&args.model, checkpoint, tokenizer)?;
    let mut answerer =
        Answerer::new(opened, settings, &args.sampling, &args.read, args.max_tokens)?;
    let interrupt = Interrupt::install()?;
    answerer.interrupt = Some(interrupt.clone());
    let limit = answerer.llama.config().max_positions;
    let context = args.context.map_or(limit.min(CONTEXT), usize::from);
    let session = answerer.session(context)?;
    let messages = prompter.beginning();
    let json = args.model.json;
    Chat { answerer, session, prompter, messages, interrupt, json }.talk()
}

struct Chat {
    answerer: Answerer,
    session: Session,
    prompter: Prompter,
    messages: Vec<Message>,
    interrupt: Interrupt,
    json: bool,
}

impl Chat {
    /// Answers the lines of standard input until it ends.
    fn talk(&mut self) -> Result<()> {
        let stdin = std::io::stdin();
        let prompted = stdin.is_terminal();
        if prompted {
            eprintln!(
                "One message a line, a context of {} tokens. /clear begins anew, /exit ends, \
                 Ctrl-C ends an answer.",
                self.session.capacity()
            );
        }
        let mut line = String::new();
        loop {
            if prompted {
                eprint!("> ");
            }
            line.clear();
            if stdin.lock().read_line(&mut line).context("can't read the message")? == 0 {
                return Ok(());
            }
            match line.trim() {
                "" => {}
                "/exit" => return Ok(()),
                "/clear" => {
                    self.messages = self.prompter.beginning();
                    self.session.reset();
                }
                message => self.turn(message)?,
            }
        }
    }

    fn turn(&mut self, message: &str) -> Result<()> {
        self.messages.push(Message::new("user", message));
        let ids = match self.prompt() {
            Ok(ids) => ids,
            // The conversation goes on without the message.
            Err(error) => {
                self.messages.pop();
                return self.refuse(format!("{error:#}"));
            }
        };
        let mut stdout = std::io::stdout();
        let shown: Option<&mut dyn Write> = (!self.json).then_some(&mut stdout as _);
        let answer =
            self.interrupt.answering(|| self.answerer.answer(&mut self.session, &ids, shown))?;
        self.messages.push(Message::new("assistant", answer.text.clone()));
        self.print(&answer)
    }

    /// The tokens of the conversation, where they fit.
    fn prompt(&self) -> Result<Vec<u32>> {
        let ids = self.prompter.ids(&self.answerer.tokenizer, &self.messages)?;
        let capacity = self.session.capacity();
        if ids.len() > capacity {
            bail!(
                "the context is full: with this message the conversation has {} tokens, the \
                 context {capacity}; /clear begins anew, --context allows more",
                ids.len()
            );
        }
        Ok(ids)
    }

    fn print(&self, answer: &Answer) -> Result<()> {
        if self.json {
            println!("{}", serde_json::to_string(answer)?);
            return Ok(());
        }
        answer.print();
        if answer.ending == Ending::ContextFull {
            eprintln!(
                "prism: the context of {} tokens is full; /clear begins anew",
                self.session.capacity()
            );
        }
        Ok(())
    }

    fn refuse(&self, error: String) -> Result<()> {
        if self.json {
            println!("{}", serde_json::to_string(&Refused { error })?);
        } else {
            eprintln!("prism: {error}");
        }
        Ok(())
    }
}
