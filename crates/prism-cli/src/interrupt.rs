//! Ctrl-C in a conversation: it ends the answer that is being given, or at the prompt the program.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use signal_hook::consts::SIGINT;
use signal_hook::flag;

/// What shells take a program ended by Ctrl-C for.
const EXIT_CODE: i32 = 130;

/// Whether an answer is being given that Ctrl-C has not ended yet. While none is, Ctrl-C ends the program;
/// so does a second one, where the prompt is still being read.
#[derive(Debug, Clone)]
pub struct Interrupt {
    /// Whether nothing is being said, or it shall end.
    quiet: Arc<AtomicBool>,
}

impl Interrupt {
    /// Takes over Ctrl-C.
    pub fn install() -> Result<Self> {
        let interrupt = Self { quiet: Arc::new(true.into()) };
        let quiet = || Arc::clone(&interrupt.quiet);
        // In this order: a signal ends the program if it was quiet before, and then makes it so.
        flag::register_conditional_shutdown(SIGINT, EXIT_CODE, quiet())
            .and_then(|_| flag::register(SIGINT, quiet()))
            .context("can't listen for Ctrl-C")?;
        Ok(interrupt)
    }

    /// Runs `work` as an answer that Ctrl-C [`ends`](Self::ends).
    pub fn answering<T>(&self, work: impl FnOnce() -> T) -> T {
        self.quiet.store(false, Ordering::SeqCst);
        let done = work();
        self.quiet.store(true, Ordering::SeqCst);
        done
    }

    /// Whether the answer shall end.
    pub fn ends(&self) -> bool {
        self.quiet.load(Ordering::SeqCst)
    }
}
