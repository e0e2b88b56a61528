//! `prism eval`: what sparse attention keeps and loses.

mod questions;
mod texts;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use prism_eval::{Attend, Progress, Store, rows};
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::{EvalCommand, EvalCommonArgs, EvalWaysArgs};
use crate::model::bar;
use crate::output;

pub fn run(what: &EvalCommand) -> Result<()> {
    match what {
        EvalCommand::Perplexity(args) => texts::perplexity(args),
        EvalCommand::Needle(args) => questions::needle(args),
        EvalCommand::Ruler(args) => questions::ruler(args),
        EvalCommand::LongBench(args) => questions::long_bench(args),
        EvalCommand::InfiniteBench(args) => questions::infinite_bench(args),
        EvalCommand::Recall(args) => texts::recall(args),
        EvalCommand::Spectrum(args) => texts::spectrum(args),
        EvalCommand::Ablate(args) => texts::ablate(args),
    }
}

fn ways(args: &EvalWaysArgs) -> Result<Vec<Attend>> {
    Ok(Attend::parse_all(&args.selector, &args.mass)?)
}

/// The results of a study: in the folder that is asked for, or of this run alone. `settings` is what they
/// depend on besides the model, the device and their own keys.
fn store(common: &EvalCommonArgs, study: &str, settings: Value) -> Result<Store> {
    let Some(out) = &common.out else { return Ok(Store::in_memory()) };
    let settings = json!({
        "study": study,
        "model": common.model.model,
        "device": common.model.device,
        "settings": settings,
    });
    Ok(Store::open(out, &flat(settings))?)
}

/// The settings beside the rest, so that one that differs is named.
fn flat(mut all: Value) -> Value {
    let inner = all.as_object_mut().and_then(|all| all.remove("settings"));
    if let (Some(all), Some(Value::Object(inner))) = (all.as_object_mut(), inner) {
        all.extend(inner);
    }
    all
}

/// A named table.
struct Sheet {
    name: &'static str,
    cells: Vec<Vec<String>>,
    csv: String,
    markdown: String,
}

impl Sheet {
    fn new(name: &'static str, rows: &[impl Serialize]) -> Result<Self> {
        Ok(Self {
            name,
            cells: rows::cells(rows)?,
            csv: rows::csv(rows)?,
            markdown: rows::markdown(rows)?,
        })
    }
}

/// Prints a report as it is asked for, and writes it to the folder.
fn show(common: &EvalCommonArgs, report: &impl Serialize, sheets: &[Sheet]) -> Result<()> {
    if let Some(out) = &common.out {
        write(&out.join("report.json"), serde_json::to_string_pretty(report)?)?;
        let titled = |sheet: &Sheet| format!("## {}\n\n{}\n", sheet.name, sheet.markdown);
        write(&out.join("table.md"), sheets.iter().map(titled).collect())?;
        for sheet in sheets {
            write(&out.join(format!("{}.csv", sheet.name)), sheet.csv.clone())?;
        }
    }
    if common.model.json {
        return output::json(report);
    }
    for (index, sheet) in sheets.iter().enumerate() {
        if common.csv {
            let apart = if index > 0 { "\n" } else { "" };
            print!("{apart}{}", sheet.csv);
        } else if let Some((header, rows)) = sheet.cells.split_first() {
            let header: Vec<&str> = header.iter().map(String::as_str).collect();
            let mut table = output::table(&header);
            rows.iter().for_each(|row| {
                table.add_row(row);
            });
            println!("{}\n{table}", sheet.name);
        }
    }
    if let (Some(out), false) = (&common.out, common.csv) {
        println!("results.jsonl, report.json, tables and plots are in {}", out.display());
    }
    Ok(())
}

fn write(path: &Path, text: String) -> Result<()> {
    fs::write(path, text).with_context(|| format!("can't write {}", path.display()))
}

/// Progress bars on standard error.
#[derive(Default)]
struct Bars(Option<ProgressBar>);

impl Progress for Bars {
    fn start(&mut self, what: &'static str, steps: usize) {
        self.finish();
        self.0 = Some(bar(what, steps));
    }

    fn step(&mut self) {
        if let Some(bar) = &self.0 {
            bar.inc(1);
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.0.take() {
            bar.finish_and_clear();
        }
    }
}
