//! A run that grows.

use anyhow::Result;

use super::{Check, Record, Run};

/// Takes what is measured into a run, and tells of each addition, so that a run cut short keeps what it has.
pub struct Log<'a> {
    run: &'a mut Run,
    tell: &'a mut dyn FnMut(&Run, &str) -> Result<()>,
}

impl<'a> Log<'a> {
    /// `tell` gets the run after each addition, and a line about what was added.
    pub fn new(run: &'a mut Run, tell: &'a mut dyn FnMut(&Run, &str) -> Result<()>) -> Self {
        Self { run, tell }
    }

    /// Adds what was timed.
    ///
    /// # Errors
    /// Those of `tell`, as below.
    pub fn record(&mut self, record: Record) -> Result<()> {
        let line = record.to_string();
        self.run.records.push(record);
        (self.tell)(self.run, &line)
    }

    /// Adds what was checked.
    ///
    /// # Errors
    /// Those of `tell`.
    pub fn check(&mut self, check: Check) -> Result<()> {
        let line = format!(
            "{} {}: {}",
            if check.passed { "passed" } else { "FAILED" },
            check.name,
            check.detail
        );
        self.run.checks.push(check);
        (self.tell)(self.run, &line)
    }

    /// Adds what a reader must know.
    ///
    /// # Errors
    /// Those of `tell`.
    pub fn note(&mut self, note: String) -> Result<()> {
        self.run.notes.push(note.clone());
        (self.tell)(self.run, &note)
    }
}

impl Record {
    /// Length and head_dim, or M×N×K of a product.
    pub fn size(&self) -> String {
        if self.is_product() {
            format!("{}×{}×{}", self.q_len, self.kv_len, self.head_dim)
        } else {
            format!("{} tokens, d={}", self.kv_len, self.head_dim)
        }
    }
}

impl std::fmt::Display for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:>9} {:>12} {} {}", self.what, self.rung, self.dtype, self.size())?;
        if self.density < 1.0 {
            write!(f, " density {:.3}", self.density)?;
        }
        write!(f, ": {:.4} ms", self.ms)?;
        if let Some(burst) = self.ms_burst {
            write!(f, " (burst {burst:.4})")?;
        }
        match (self.tflops, self.gbps) {
            (Some(rate), _) => write!(f, " {rate:.0} TFLOP/s"),
            (None, Some(rate)) => write!(f, " {rate:.0} GB/s"),
            (None, None) => Ok(()),
        }
    }
}
