//! How far an evaluation has come, for whoever shows it.

/// Hears of every step.
pub trait Progress {
    /// Something of so many steps begins.
    fn start(&mut self, what: &'static str, steps: usize);
    /// A step is done.
    fn step(&mut self);
    /// All are done.
    fn finish(&mut self);
}

/// Shows nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn start(&mut self, _: &'static str, _: usize) {}
    fn step(&mut self) {}
    fn finish(&mut self) {}
}
