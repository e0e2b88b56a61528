//! How long a call takes, by the device's own clock where it has one.
//!
//! Sustained: the median of windows of back-to-back calls, after one in which the card's clock settles: a
//! card at its power limit is slower than one that just woke. Burst: a few calls after idling. `gpu/peers.py`
//! times others in the same way.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::Gpu;

/// Windows whose median counts.
const WINDOWS: usize = 3;
/// Milliseconds of a burst, and the most calls in it.
const BURST: f64 = 15.0;
const BURST_CALLS: usize = 200;
/// The most calls in a window.
const WINDOW_CALLS: usize = 20_000;

/// What is timed, and for how long.
#[derive(Debug, Clone)]
pub struct Budget {
    /// Seconds in all: nothing is begun after them.
    pub seconds: f64,
    /// Milliseconds of a window; idling before a burst takes twice as long.
    pub window: f64,
    /// Milliseconds of a call from which on longer prompts are left out.
    pub slowest: f64,
    /// Steps to time, as the records name them; all if empty.
    pub only: Vec<String>,
    /// Rungs to time, likewise.
    pub rungs: Vec<String>,
}

impl Default for Budget {
    fn default() -> Self {
        Self { seconds: 120.0, window: 350.0, slowest: 2000.0, only: Vec::new(), rungs: Vec::new() }
    }
}

impl Budget {
    /// Whether the numbers make sense, and only known steps and rungs are asked for.
    ///
    /// # Errors
    /// What doesn't.
    pub fn check(&self, steps: &[&str], rungs: &[&str]) -> Result<()> {
        for (name, got) in
            [("seconds", self.seconds), ("window", self.window), ("slowest", self.slowest)]
        {
            ensure!(
                got > 0.0 && got <= 1e6,
                "{name} must be above 0 and at most 1000000, got {got}"
            );
        }
        for (kind, asked, known) in [("step", &self.only, steps), ("rung", &self.rungs, rungs)] {
            for one in asked {
                ensure!(
                    known.contains(&one.as_str()),
                    "there is no {kind} {one:?}, there are {}",
                    known.join(", ")
                );
            }
        }
        Ok(())
    }

    /// Whether a step is to be timed on a rung.
    pub(crate) fn asks(&self, what: &str, rung: &str) -> bool {
        let among = |list: &[String], name| list.is_empty() || list.iter().any(|one| one == name);
        among(&self.only, what) && among(&self.rungs, rung)
    }
}

/// Milliseconds a call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Time {
    /// The median of windows.
    pub sustained: f64,
    /// In a burst after idling.
    pub burst: f64,
}

/// Takes times, as long as the budget lasts.
pub struct Clock<'a> {
    /// Whose time it is.
    pub gpu: &'a Gpu,
    budget: &'a Budget,
    end: Instant,
}

impl<'a> Clock<'a> {
    /// Starts now.
    pub fn new(gpu: &'a Gpu, budget: &'a Budget) -> Self {
        let end = Instant::now() + Duration::from_secs_f64(budget.seconds.clamp(0.0, 1e6));
        Self { gpu, budget, end }
    }

    /// Whether the budget is used up.
    pub fn over(&self) -> bool {
        Instant::now() > self.end
    }

    /// The time of a step on a rung; `None` when nobody asked, or time is up.
    ///
    /// # Errors
    /// The call failed, or the device measured no time.
    pub fn time(
        &self,
        what: &str,
        rung: &str,
        call: &dyn Fn() -> Result<()>,
    ) -> Result<Option<Time>> {
        if self.over() || !self.budget.asks(what, rung) {
            Ok(None)
        } else {
            self.measure(call).map(Some)
        }
    }

    fn measure(&self, call: &dyn Fn() -> Result<()>) -> Result<Time> {
        let window = self.budget.window;
        // Kernels are compiled by the first.
        call()?;
        self.gpu.sync()?;
        // The card's clock settles while the number of calls that fill a window is found, step by step: where
        // calls queue up, one alone may be many times as quick.
        let mut calls = 1;
        let mut once = self.batch(calls, call)?;
        while calls < WINDOW_CALLS && once * (calls as f64) < 0.9 * window {
            calls = ((window / once) as usize + 1).min(8 * calls).min(WINDOW_CALLS);
            once = self.batch(calls, call)?;
        }
        let calls = ((window / once) as usize + 1).min(WINDOW_CALLS);
        let mut windows = [0.0; WINDOWS];
        for window in &mut windows {
            *window = self.batch(calls, call)?;
        }
        windows.sort_by(f64::total_cmp);
        let sustained = windows[WINDOWS / 2];
        std::thread::sleep(Duration::from_secs_f64(2.0 * window / 1e3));
        let burst = self.batch(((BURST / sustained) as usize).clamp(1, BURST_CALLS), call)?;
        Ok(Time { sustained, burst })
    }

    /// Milliseconds a call, of `calls` back to back.
    fn batch(&self, calls: usize, call: &dyn Fn() -> Result<()>) -> Result<f64> {
        let client = &self.gpu.client;
        let profile = client.profile_start()?;
        let called = (0..calls).try_for_each(|_| call());
        let ticks = client.profile_end(profile)?.into_future();
        called?;
        let ticks = cubecl::future::block_on(ticks).context("the device measured no time")?;
        Ok((ticks.duration().as_secs_f64() * 1e3 / calls as f64).max(1e-6))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_out_of_range_are_refused() {
        let refused =
            |budget: Budget| budget.check(&["pool", "dense"], &["unit"]).unwrap_err().to_string();
        for seconds in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let says = refused(Budget { seconds, ..Budget::default() });
            assert!(
                says.contains("seconds must be above 0") && says.contains(&seconds.to_string())
            );
        }
        let says = refused(Budget { only: vec!["poll".into()], ..Budget::default() });
        assert_eq!(says, "there is no step \"poll\", there are pool, dense");
        let says = refused(Budget { rungs: vec!["mma".into()], ..Budget::default() });
        assert_eq!(says, "there is no rung \"mma\", there are unit");
    }

    #[test]
    fn nothing_asked_for_is_everything() {
        let all = Budget::default();
        assert!(all.asks("pool", "unit"));
        let some = Budget { only: vec!["pool".into()], rungs: vec!["mma".into()], ..all };
        assert!(
            some.asks("pool", "mma") && !some.asks("pool", "unit") && !some.asks("dense", "mma")
        );
    }
}
