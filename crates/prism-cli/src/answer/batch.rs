//! Answers to several prompts at once.

use std::time::Instant;

use anyhow::Result;
use prism_models::{Batch, BatchTrace, LayerTrace, Sampler};
use serde::Serialize;

use super::{Answerer, Ending, Written};
use crate::args::ReportArg;
use crate::memory::PeakMemory;
use crate::sampling::Choice;
use crate::{density, model, prefill};

/// The answer to one of them.
#[derive(Debug, Clone, Serialize)]
pub struct OneOfMany {
    pub prompt_tokens: usize,
    pub tokens: usize,
    pub text: String,
    pub ending: Ending,
    /// The text that was stopped at.
    pub stop: Option<String>,
    /// `dense`, `sparse`, or `mixed` where layers or chunks differ.
    pub path: &'static str,
    /// Why the first layer took its path for the end of the prompt.
    pub reason: String,
    /// Selected over causal blocks of the prompt.
    pub density: f64,
    /// The same of each layer and head, where asked for.
    pub density_by_head: Option<Vec<Vec<f64>>>,
}

/// The answers, and what they took together.
#[derive(Debug, Clone, Serialize)]
pub struct Answers {
    pub answers: Vec<OneOfMany>,
    pub prompt_tokens: usize,
    pub tokens: usize,
    /// Of all prompts, to the logits of their last positions.
    pub prefill_seconds: f64,
    pub attention_seconds: f64,
    /// From these logits to the end of the last answer.
    pub decode_seconds: f64,
    pub prefill_tokens_per_second: f64,
    /// Of all answers together; `None` without any token.
    pub decode_tokens_per_second: Option<f64>,
    pub peak_memory: PeakMemory,
    /// Of each prompt: all begin with the same seed, as each would by itself.
    pub sampling: Choice,
}

impl Answerer {
    /// Reads prompts together and answers each as it would be answered alone.
    pub fn answer_all(&mut self, batch: &Batch) -> Result<Answers> {
        let device = self.llama.device();
        let layers = self.llama.config().layers;
        let longest = batch.prompts().map(<[u32]>::len).max().unwrap_or(0);
        self.warn_of(longest.saturating_add(self.max_tokens));
        let chunk = self.chunk.unwrap_or(longest).max(1);
        let mut caches = self.llama.batch_caches(batch, self.max_tokens, self.attention.block())?;
        let bar = model::bar("prefill", layers * longest.div_ceil(chunk));
        let mut traces: Vec<Vec<LayerTrace>> = vec![Vec::new(); batch.len()];
        let mut attention_seconds = 0.0;
        let start = Instant::now();
        let mut trace = |BatchTrace { layer, reports, parts }| {
            bar.inc(1);
            attention_seconds += parts.attention;
            for (prompt, report) in reports {
                let seconds = parts.attention;
                traces[prompt].push(LayerTrace { layer, report, seconds, parts });
            }
        };
        let logits = self.llama.batch_prefill(batch, self.chunk, &mut caches, Some(&mut trace))?;
        let prefill_seconds = start.elapsed().as_secs_f64();
        bar.finish_and_clear();
        self.memory.note(&device);

        let mut samplers = Vec::with_capacity(batch.len());
        for ids in batch.prompts() {
            let mut sampler = Sampler::new(self.choice.sampling, self.choice.seed)?;
            sampler.set_context(ids);
            samplers.push(sampler);
        }
        let written = || Written::new(&self.tokenizer, &self.stops, None);
        let mut texts: Vec<Written> = (0..batch.len()).map(|_| written()).collect();
        let decode = Instant::now();
        let all = self.llama.batch_generate(
            logits,
            self.max_tokens,
            &self.end,
            &mut samplers,
            &mut caches,
            &mut |prompt, token| texts[prompt].push(token),
        )?;
        let decode_seconds = decode.elapsed().as_secs_f64();
        let mut answers = Vec::with_capacity(batch.len());
        for (((ids, generated), written), traces) in
            batch.prompts().zip(all).zip(texts).zip(&traces)
        {
            let (text, found) = written.finish()?;
            let block = self.attention.block();
            let by_head = density::by_head(&self.llama, traces, 0..ids.len(), chunk, block)?;
            answers.push(OneOfMany {
                prompt_tokens: ids.len(),
                tokens: generated.tokens.len(),
                text,
                ending: generated.finish.into(),
                stop: found.map(|index| self.stop_names[index].clone()),
                path: prefill::path(traces),
                reason: traces[traces.len() - layers].report.reason.to_string(),
                density: density::mean(&by_head),
                density_by_head: self.report.map(|ReportArg::Density| by_head),
            });
        }
        self.memory.note(&device);
        let (prompt_tokens, tokens) =
            (batch.ids().len(), answers.iter().map(|answer| answer.tokens).sum());
        Ok(Answers {
            answers,
            prompt_tokens,
            tokens,
            prefill_seconds,
            attention_seconds,
            decode_seconds,
            prefill_tokens_per_second: prompt_tokens as f64 / prefill_seconds,
            decode_tokens_per_second: (tokens > 0).then(|| tokens as f64 / decode_seconds),
            peak_memory: self.memory,
            sampling: self.choice.clone(),
        })
    }
}

impl Answers {
    /// Prints each answer to standard output under its number, and to standard error what they took.
    pub fn print(&self) {
        for (prompt, answer) in self.answers.iter().enumerate() {
            println!("[{prompt}] {}", answer.text);
            if let Some(by_head) = &answer.density_by_head {
                eprintln!("{}", density::table(by_head));
            }
            eprintln!(
                "[{prompt}] prompt: {} tokens, {}: {}; density {:.3}; answer: {} tokens, ended {}",
                answer.prompt_tokens,
                answer.path,
                answer.reason,
                answer.density,
                answer.tokens,
                answer.ending.describe(),
            );
        }
        eprintln!(
            "prompts: {} tokens, read in {:.2} s (attention {:.2} s), {:.1} tokens/s",
            self.prompt_tokens,
            self.prefill_seconds,
            self.attention_seconds,
            self.prefill_tokens_per_second,
        );
        let rate = match self.decode_tokens_per_second {
            Some(rate) => format!(", {rate:.1} tokens/s"),
            None => String::new(),
        };
        eprintln!("answers: {} tokens in {:.2} s{rate}", self.tokens, self.decode_seconds);
        eprintln!("sampling: {}", self.sampling.describe());
        eprintln!("peak memory: {}", self.peak_memory.describe());
    }
}
