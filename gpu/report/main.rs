//! `report`: one report of what several programs measured on a GPU machine.

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use gpu::report::Run;

/// Makes reports of GPU runs.
#[derive(Parser)]
enum Report {
    /// Merges runs of one card into OUT: run.json, table.md, records.csv and two plots.
    Merge {
        /// The folder to write to.
        out: PathBuf,
        /// JSON files of the kernel runner and of peers.py.
        #[arg(required = true)]
        runs: Vec<PathBuf>,
    },
}

fn main() -> Result<()> {
    let Report::Merge { out, runs } = Report::parse();
    let runs = runs.iter().map(|path| Run::read(path)).collect::<Result<Vec<_>>>()?;
    let run = Run::merge(runs)?;
    run.write(&out)?;
    println!("{}", run.markdown());
    Ok(())
}
