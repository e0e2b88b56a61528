//! One answer: the prompt is read, the answer streamed, and both are timed.

mod batch;

use std::io::Write;
use std::time::Instant;

use anyhow::{Result, bail};
use prism_models::{Checkpoint, Finish, LayerTrace, Llama, Sampler, Session, StopTexts, Tokenizer};
use serde::Serialize;

use crate::args::{AttentionArg, ReadArgs, ReportArg, SamplingArgs};
use crate::attention::{self, Attention};
use crate::interrupt::Interrupt;
use crate::memory::PeakMemory;
use crate::model::{self, Opened};
use crate::sampling::Choice;
use crate::{density, prefill, sampling};

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// By a token that ends a text.
    EndToken,
    /// By a text to stop at.
    StopText,
    /// By the limit of tokens.
    MaxTokens,
    /// By the room that is left.
    ContextFull,
    /// By Ctrl-C.
    Interrupted,
}

impl From<Finish> for Ending {
    fn from(finish: Finish) -> Self {
        match finish {
            Finish::EndToken(_) => Self::EndToken,
            Finish::Limit => Self::MaxTokens,
            Finish::CacheFull => Self::ContextFull,
            Finish::Stopped => Self::StopText,
        }
    }
}

impl Ending {
    fn describe(self) -> &'static str {
        match self {
            Self::EndToken => "by its end token",
            Self::StopText => "by a text to stop at",
            Self::MaxTokens => "by --max-tokens",
            Self::ContextFull => "by the full context",
            Self::Interrupted => "by Ctrl-C",
        }
    }
}

/// An answer, and what it took.
#[derive(Debug, Clone, Serialize)]
pub struct Answer {
    pub prompt_tokens: usize,
    /// Of those, held already.
    pub reused_tokens: usize,
    pub tokens: usize,
    pub text: String,
    pub ending: Ending,
    /// The text that was stopped at.
    pub stop: Option<String>,
    /// Of the prompt, to the logits of its last position.
    pub prefill_seconds: f64,
    pub attention_seconds: f64,
    /// From the start of the prompt to the text of the first token, `None` without one.
    pub first_token_seconds: Option<f64>,
    /// From the logits of the prompt's last position to the end.
    pub decode_seconds: f64,
    /// Without the tokens held already.
    pub prefill_tokens_per_second: f64,
    /// After the first token, the end token counted; `None` where none followed.
    pub decode_tokens_per_second: Option<f64>,
    /// `dense`, `sparse`, or `mixed` where layers or chunks differ.
    pub path: &'static str,
    /// Why the first layer took its path for the end of the prompt.
    pub reason: String,
    /// Selected over causal blocks of the part of the prompt that was read.
    pub density: f64,
    /// The same of each layer and head, where asked for.
    pub density_by_head: Option<Vec<Vec<f64>>>,
    pub peak_memory: PeakMemory,
    pub sampling: Choice,
}

/// Answers prompts, one after the other.
pub struct Answerer {
    pub llama: Llama,
    pub tokenizer: Tokenizer,
    attention: Attention,
    chunk: Option<usize>,
    report: Option<ReportArg>,
    max_tokens: usize,
    end: Vec<u32>,
    stops: StopTexts,
    stop_names: Vec<String>,
    choice: Choice,
    sampler: Sampler,
    memory: PeakMemory,
    /// Ends answers before they end by themselves.
    pub interrupt: Option<Interrupt>,
}

/// What answering needs of a model's files.
pub struct Settings {
    choice: Choice,
    end: Vec<u32>,
}

impl Settings {
    /// Of a model whose weights needn't be loaded yet.
    pub fn new(
        args: &SamplingArgs,
        checkpoint: &Checkpoint,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        let choice = Choice::new(args, &checkpoint.generation_config()?)?;
        Ok(Self { choice, end: checkpoint.end_ids(tokenizer)? })
    }
}

/// Refuses arguments that no model could make right, before one is opened.
pub fn check(args: &SamplingArgs, read: &ReadArgs) -> Result<()> {
    sampling::check(args)?;
    attention::check(read.attention, &read.settings)?;
    if read.report.is_some() && read.attention == AttentionArg::Dense {
        bail!("--report density needs --attention prism: dense attention reads everything");
    }
    Ok(())
}

impl Answerer {
    pub fn new(
        opened: Opened,
        settings: Settings,
        args: &SamplingArgs,
        read: &ReadArgs,
        max_tokens: usize,
    ) -> Result<Self> {
        let Opened { mut llama, tokenizer, .. } = opened;
        let attention = Attention::new(read.attention, &read.settings, &llama)?;
        attention.set(&mut llama)?;
        let Settings { choice, end } = settings;
        Ok(Self {
            llama,
            tokenizer,
            attention,
            chunk: read.chunk.map(usize::from),
            report: read.report,
            max_tokens,
            end,
            stops: StopTexts::new(&args.stop)?,
            stop_names: args.stop.clone(),
            sampler: Sampler::new(choice.sampling, choice.seed)?,
            choice,
            memory: PeakMemory::default(),
            interrupt: None,
        })
    }

    /// An empty session for `capacity` tokens.
    pub fn session(&self, capacity: usize) -> Result<Session> {
        self.warn_of(capacity);
        Ok(Session::new(self.llama.cache(capacity, self.attention.block())?))
    }

    /// Says so where a text may get longer than the model knows.
    fn warn_of(&self, tokens: usize) {
        let limit = self.llama.config().max_positions;
        if tokens > limit {
            eprintln!("prism: {tokens} tokens go past the {limit} that the model was trained for");
        }
    }

    /// Reads a prompt, of which the session may hold a part, and answers it. `shown` gets the text
    /// as it comes.
    pub fn answer(
        &mut self,
        session: &mut Session,
        ids: &[u32],
        shown: Option<&mut dyn Write>,
    ) -> Result<Answer> {
        let device = self.llama.device();
        let layers = self.llama.config().layers;
        let fresh = ids.len() - session.reusable(ids);
        let chunk = self.chunk.unwrap_or(fresh).max(1);
        let bar = model::bar("prefill", layers * fresh.div_ceil(chunk));
        let mut traces: Vec<LayerTrace> = Vec::new();
        let start = Instant::now();
        let prompted = session.prefill(
            &self.llama,
            ids,
            self.chunk,
            Some(&mut |trace| {
                bar.inc(1);
                traces.push(trace);
            }),
        )?;
        let prefill_seconds = start.elapsed().as_secs_f64();
        bar.finish_and_clear();
        self.memory.note(&device);

        self.sampler.set_context(ids);
        let mut written = Written::new(&self.tokenizer, &self.stops, shown);
        let decode = Instant::now();
        let mut first_token_seconds = None;
        let generated = session.generate(
            &self.llama,
            prompted.logits,
            self.max_tokens,
            &self.end,
            &mut self.sampler,
            &mut |token| {
                let more = written.push(token);
                first_token_seconds.get_or_insert_with(|| start.elapsed().as_secs_f64());
                more && !self.interrupt.as_ref().is_some_and(Interrupt::ends)
            },
        )?;
        let (text, found) = written.finish()?;
        let ending = match generated.finish {
            Finish::Stopped if found.is_none() => Ending::Interrupted,
            finish => finish.into(),
        };
        let decode_seconds = decode.elapsed().as_secs_f64();
        self.memory.note(&device);

        let reused = prompted.reused;
        let by_head = density::by_head(
            &self.llama,
            &traces,
            reused..ids.len(),
            chunk,
            self.attention.block(),
        )?;
        let last = &traces[traces.len() - layers];
        let ended = matches!(generated.finish, Finish::EndToken(_));
        let followed = (generated.tokens.len() + usize::from(ended)).saturating_sub(1);
        let after_first = first_token_seconds.map(|first| start.elapsed().as_secs_f64() - first);
        Ok(Answer {
            prompt_tokens: ids.len(),
            reused_tokens: reused,
            tokens: generated.tokens.len(),
            text,
            ending,
            stop: found.map(|index| self.stop_names[index].clone()),
            prefill_seconds,
            attention_seconds: traces.iter().map(|trace| trace.seconds).sum(),
            first_token_seconds,
            decode_seconds,
            prefill_tokens_per_second: fresh as f64 / prefill_seconds,
            decode_tokens_per_second: after_first
                .filter(|_| followed > 0)
                .map(|seconds| followed as f64 / seconds),
            path: prefill::path(&traces),
            reason: last.report.reason.to_string(),
            density: density::mean(&by_head),
            density_by_head: self.report.map(|ReportArg::Density| by_head),
            peak_memory: self.memory,
            sampling: self.choice.clone(),
        })
    }
}

impl Answer {
    /// Prints to standard error what the answer took.
    pub fn print(&self) {
        if let Some(by_head) = &self.density_by_head {
            eprintln!("{}", density::table(by_head));
        }
        let held = match self.reused_tokens {
            0 => String::new(),
            reused => format!(", {reused} of them held already"),
        };
        eprintln!(
            "prompt: {} tokens{held}, read in {:.2} s (attention {:.2} s), {:.1} tokens/s; {}: {}; \
             density {:.3}",
            self.prompt_tokens,
            self.prefill_seconds,
            self.attention_seconds,
            self.prefill_tokens_per_second,
            self.path,
            self.reason,
            self.density,
        );
        let first = match self.first_token_seconds {
            Some(seconds) => format!("first token after {seconds:.2} s, "),
            None => String::new(),
        };
        let rate = match self.decode_tokens_per_second {
            Some(rate) => format!(", {rate:.1} tokens/s"),
            None => String::new(),
        };
        eprintln!(
            "answer: {first}{} tokens in {:.2} s{rate}; ended {}",
            self.tokens,
            self.decode_seconds,
            self.ending.describe(),
        );
        eprintln!("sampling: {}", self.sampling.describe());
        eprintln!("peak memory: {}", self.peak_memory.describe());
    }
}

/// The text of an answer as it comes.
struct Written<'a, 'b> {
    stream: prism_models::DecodeStream<'a>,
    stops: StopTexts,
    text: String,
    shown: Option<&'b mut dyn Write>,
    found: Option<usize>,
    failed: Option<anyhow::Error>,
}

impl<'a, 'b> Written<'a, 'b> {
    fn new(tokenizer: &'a Tokenizer, stops: &StopTexts, shown: Option<&'b mut dyn Write>) -> Self {
        let (stream, stops) = (tokenizer.stream(true), stops.clone());
        Self { stream, stops, text: String::new(), shown, found: None, failed: None }
    }

    /// Takes a token and says whether to go on.
    fn push(&mut self, token: u32) -> bool {
        let result = self.stream.push(token).map_err(anyhow::Error::from).and_then(|piece| {
            let (text, found) = self.stops.push(&piece);
            self.found = found;
            self.show(&text)
        });
        self.failed = result.err();
        self.found.is_none() && self.failed.is_none()
    }

    fn show(&mut self, text: &str) -> Result<()> {
        self.text.push_str(text);
        if let Some(shown) = self.shown.as_mut().filter(|_| !text.is_empty()) {
            shown.write_all(text.as_bytes())?;
            shown.flush()?;
        }
        Ok(())
    }

    /// The text, and the index of the text to stop at that ended it.
    fn finish(mut self) -> Result<(String, Option<usize>)> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        if self.found.is_none() {
            let (mut rest, found) = self.stops.push(&self.stream.clone().finish());
            self.found = found;
            if found.is_none() {
                rest.push_str(&self.stops.clone().finish());
            }
            self.show(&rest)?;
        }
        if let Some(shown) = self.shown {
            shown.write_all(b"\n")?;
            shown.flush()?;
        }
        Ok((self.text, self.found))
    }
}
