//! All that is carried to a GPU machine in one program, of which LLVM would otherwise be the most, twice:
//! the tests of `tests/`, and the runner as one more.

#[path = "../tests/main.rs"]
mod cases;

use std::process::ExitCode;

/// The runner, with the arguments that stand in `RUNNER`, one a line: those of the command line are the
/// test harness's.
#[test]
#[ignore = "does what RUNNER says: see gpu/run.sh"]
fn runner() -> ExitCode {
    let args = std::env::var("RUNNER").unwrap_or_default();
    gpu::run(std::iter::once("runner").chain(args.lines()).map(Into::into))
}
