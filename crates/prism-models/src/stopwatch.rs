//! Where the time of a layer goes.

use std::time::Instant;

use burn::tensor::Device;

/// Seconds of a layer, or of several, in each of its parts.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PartSeconds {
    /// Linear layers, with their residuals and SwiGLU; with them on the CPU the norms and the rotary
    /// embedding too, which its threads do between.
    pub linear: f64,
    /// Attention: the rotary embedding unless on the CPU, pooling, selection, and attention itself.
    pub attention: f64,
    /// What is left: norms.
    pub rest: f64,
}

/// Takes the times of a device's work; does nothing unless asked to.
pub(crate) struct Stopwatch<'a> {
    /// The device, whose work is waited for.
    device: Option<&'a Device>,
    last: Instant,
}

impl<'a> Stopwatch<'a> {
    /// Starts, if `timed`.
    pub(crate) fn start(device: &'a Device, timed: bool) -> Self {
        let mut watch = Self { device: timed.then_some(device), last: Instant::now() };
        watch.lap();
        watch
    }

    /// Seconds since the last lap, of all work given to the device since; 0 where nothing is timed.
    pub(crate) fn lap(&mut self) -> f64 {
        let Some(device) = self.device else { return 0.0 };
        // A failed device reports at the next read; here only the clock matters.
        let _ = device.sync();
        let now = Instant::now();
        let seconds = (now - self.last).as_secs_f64();
        self.last = now;
        seconds
    }
}
