//! `prism`: run Llama models with Prism attention, and measure what it saves and costs.

mod answer;
mod args;
mod attention;
mod bench;
mod chat;
mod compare;
#[cfg(feature = "cuda")]
mod cuda;
mod density;
mod device;
mod doctor;
mod eval;
mod heatmap;
#[cfg(feature = "hub")]
mod hub;
mod interrupt;
mod memory;
mod model;
mod output;
mod plan;
mod ppl;
mod prefill;
mod prompt;
mod run;
mod sampling;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};

/// Runs the program with these arguments, the first of them its name.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = Cli::parse_from(args);
    let result = match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Ppl(args) => ppl::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Eval(args) => eval::run(&args.what),
        Command::Bench(args) => bench::run(&args.what),
        Command::Doctor(args) => doctor::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("prism: {error:#}");
            ExitCode::FAILURE
        }
    }
}
