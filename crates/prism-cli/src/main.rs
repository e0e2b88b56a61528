//! The program `prism`; what it does is in the library, for programs that hold it beside others.

use std::process::ExitCode;

fn main() -> ExitCode {
    prism_cli::run(std::env::args_os())
}
