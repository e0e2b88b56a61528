//! `prism`: run Llama models with Prism attention, and measure what it saves and costs.

mod args;
mod compare;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod doctor;
mod heatmap;
#[cfg(feature = "hub")]
mod hub;
mod model;
mod output;
mod plan;
mod ppl;
mod prefill;
mod run;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Ppl(args) => ppl::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Plan(args) => plan::run(&args),
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
