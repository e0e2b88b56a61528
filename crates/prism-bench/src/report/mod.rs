//! What was timed and checked on one device: the schema that the programs here and `gpu/peers.py` write,
//! and the report made of it.

mod log;
mod plots;
mod table;
mod whole;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

pub use log::Log;
pub use table::{digits, tokens};
pub use whole::Whole;

/// The rung of the peer that ratios are given to first: FlashAttention-3, dense.
pub const FLASH_ATTENTION_3: &str = "flash-attention-3";
/// The rung of the second such peer: torch's cuDNN attention, dense.
pub const CUDNN: &str = "cudnn";
/// Matrix products: the record's `q_len`, `kv_len` and `head_dim` are M, N and K. With an epilogue, what
/// it is follows the name.
pub const MATMUL: &str = "matmul";
/// The rung of their peer: torch's product of matrices.
pub const CUBLAS: &str = "cublas";
/// The parts of one sparse call, in the order they run.
pub const PARTS: [&str; 5] = ["pool", "calibrate", "select", "schedule", "attend"];
/// The rung of pooling and selecting by second-order scores, which has other parts.
pub const SECOND_ORDER: &str = "second order";

/// One thing timed at one shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What was timed: one of [`PARTS`], `dense` (attention that reads everything), `prism` (a
    /// whole sparse call), or another name, which gets no ratios.
    pub what: String,
    /// How: a rung of the kernel ladder, or the peer's name.
    pub rung: String,
    /// Element type of Q, K and V: `bf16`, `f16`, `f32`.
    pub dtype: String,
    /// Sequences.
    pub batch: usize,
    /// Query heads.
    pub q_heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Tokens in Q.
    pub q_len: usize,
    /// Tokens in K and V.
    pub kv_len: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Share of the causal blocks that is read; 1 where everything is.
    pub density: f64,
    /// Milliseconds a call, sustained: the median of windows of back-to-back calls long enough for
    /// the card to settle at its power limit.
    pub ms: f64,
    /// Milliseconds a call in a short burst after idling.
    #[serde(default)]
    pub ms_burst: Option<f64>,
    /// Arithmetic rate of the sustained time, in 10¹² operations a second; blocks that aren't read
    /// don't count.
    #[serde(default)]
    pub tflops: Option<f64>,
    /// Memory rate of the sustained time, in 10⁹ bytes a second.
    #[serde(default)]
    pub gbps: Option<f64>,
    /// Whether this is another's kernel.
    #[serde(default)]
    pub peer: bool,
    /// Anything a reader must know.
    #[serde(default)]
    pub note: String,
}

impl Record {
    /// Whether `other` computes attention of the same size, whatever share of it.
    pub fn same_shape(&self, other: &Self) -> bool {
        let shape = |r: &Self| (r.batch, r.q_heads, r.kv_heads, r.q_len, r.kv_len, r.head_dim);
        self.dtype == other.dtype && shape(self) == shape(other)
    }

    fn same_measurement(&self, other: &Self) -> bool {
        let kind = |r: &Self| (r.what.clone(), r.rung.clone(), r.density.to_bits(), r.peer);
        self.same_shape(other) && kind(self) == kind(other)
    }

    /// Whether the record does all of what a dense attention does, so that a ratio means something.
    fn is_attention(&self) -> bool {
        ["dense", "attend", "prism"].contains(&self.what.as_str())
    }

    fn is_product(&self) -> bool {
        self.what.starts_with(MATMUL)
    }
}

/// One thing that had to hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// What was checked, at which shape.
    pub name: String,
    /// Whether it held.
    pub passed: bool,
    /// The numbers.
    #[serde(default)]
    pub detail: String,
}

/// What one or more programs measured in one stay on one machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// The card as its driver names it; more may follow the name.
    pub gpu: String,
    /// Year-month-day.
    pub date: String,
    /// The commands that made this.
    pub command: String,
    /// What was timed.
    #[serde(default)]
    pub records: Vec<Record>,
    /// What was checked.
    #[serde(default)]
    pub checks: Vec<Check>,
    /// What a reader must know of the whole: what was skipped, and why.
    #[serde(default)]
    pub notes: Vec<String>,
}

impl Run {
    /// Reads a run from a JSON file.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is no run", path.display()))
    }

    /// One run of several: all of one card, else their ratios mean nothing. What was measured more
    /// than once becomes one record of the median, with the extremes in its note.
    pub fn merge(runs: impl IntoIterator<Item = Self>) -> Result<Self> {
        let mut runs = runs.into_iter();
        let mut all = runs.next().context("there is no run to merge")?;
        for run in runs {
            let same = run.gpu.starts_with(&all.gpu) || all.gpu.starts_with(&run.gpu);
            ensure!(same, "{:?} and {:?} are two cards", all.gpu, run.gpu);
            all.gpu = std::cmp::max_by_key(all.gpu, run.gpu, String::len);
            if !all.command.split("; ").any(|command| command == run.command) {
                all.command = format!("{}; {}", all.command, run.command);
            }
            all.records.extend(run.records);
            all.checks.extend(run.checks);
            all.notes.extend(run.notes);
        }
        let mut groups: Vec<Vec<Record>> = Vec::new();
        for record in all.records {
            match groups.iter_mut().find(|group| group[0].same_measurement(&record)) {
                Some(group) => group.push(record),
                None => groups.push(vec![record]),
            }
        }
        all.records = groups.into_iter().map(median).collect();
        Ok(all)
    }

    /// Writes `run.json`, `table.md`, `records.csv` and the plots `latency.svg`, `breakdown.svg`,
    /// `speedup.svg` and `rates.svg`; a plot that would show nothing is left out.
    pub fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("can't create {}", folder.display()))?;
        let write = |name: &str, text: String| {
            let path = folder.join(name);
            fs::write(&path, text).with_context(|| format!("can't write {}", path.display()))
        };
        write("run.json", serde_json::to_string_pretty(self)?)?;
        write("table.md", self.markdown())?;
        write("records.csv", self.csv())?;
        plots::latency(&folder.join("latency.svg"), self)?;
        plots::breakdown(&folder.join("breakdown.svg"), self)?;
        plots::speedup(&folder.join("speedup.svg"), self)?;
        plots::rates(&folder.join("rates.svg"), self)
    }

    /// How many times as long the dense attention of `peer` takes at the shape of `record`; of a matrix
    /// product, with whatever epilogue, how many times as long the product alone takes [`CUBLAS`].
    pub fn ratio(&self, record: &Record, peer: &str) -> Option<f64> {
        let (what, comparable) = match peer {
            CUBLAS => (MATMUL, record.is_product()),
            _ => ("dense", record.is_attention()),
        };
        let other = self.records.iter().find(|other| {
            other.peer && other.what == what && other.rung == peer && other.same_shape(record)
        })?;
        comparable.then(|| other.ms / record.ms)
    }
}

/// One record of several of the same measurement.
fn median(mut group: Vec<Record>) -> Record {
    let times = group.len();
    group.sort_by(|a, b| a.ms.total_cmp(&b.ms));
    let (fastest, slowest) = (group[0].ms, group[times - 1].ms);
    // Of an even number of ours the slower middle, of a peer's the faster: no ratio is flattered.
    let at = if group[0].peer { (times - 1) / 2 } else { times / 2 };
    let mut middle = group.swap_remove(at);
    if times > 1 {
        let spread = format!("{times} times, {fastest:.4}–{slowest:.4} ms");
        middle.note =
            if middle.note.is_empty() { spread } else { format!("{}; {spread}", middle.note) };
    }
    middle
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn record(what: &str, rung: &str, length: usize, ms: f64) -> Record {
        Record {
            what: what.into(),
            rung: rung.into(),
            dtype: "bf16".into(),
            batch: 1,
            q_heads: 32,
            kv_heads: 8,
            q_len: length,
            kv_len: length,
            head_dim: 128,
            density: if what == "dense" { 1.0 } else { 0.1 },
            ms,
            ms_burst: None,
            tflops: None,
            gbps: None,
            peer: [FLASH_ATTENTION_3, CUDNN].contains(&rung),
            note: String::new(),
        }
    }

    pub(crate) fn run(records: Vec<Record>) -> Run {
        Run {
            gpu: "H200".into(),
            date: "2026-11-22".into(),
            command: "runner time".into(),
            records,
            checks: vec![],
            notes: vec![],
        }
    }

    #[test]
    fn ratios_are_to_the_same_length_only() {
        let run = run(vec![
            record("dense", FLASH_ATTENTION_3, 8192, 0.9),
            record("dense", FLASH_ATTENTION_3, 32768, 12.0),
        ]);
        let attend = record("attend", "hopper", 32768, 1.5);
        assert_eq!(run.ratio(&attend, FLASH_ATTENTION_3), Some(8.0));
        assert_eq!(run.ratio(&attend, CUDNN), None);
        assert_eq!(run.ratio(&record("attend", "hopper", 65536, 5.0), FLASH_ATTENTION_3), None);
        assert_eq!(run.ratio(&record("pool", "plane", 32768, 0.1), FLASH_ATTENTION_3), None);
    }

    #[test]
    fn products_compare_with_products_of_their_size() {
        let mut peer = record(MATMUL, CUBLAS, 4096, 1.0);
        peer.peer = true;
        let run = run(vec![peer, record("dense", FLASH_ATTENTION_3, 4096, 2.0)]);
        for what in [MATMUL, "matmul + swiglu"] {
            let ours = record(what, "hopper", 4096, 0.5);
            assert_eq!(run.ratio(&ours, CUBLAS), Some(2.0));
            assert_eq!(run.ratio(&ours, FLASH_ATTENTION_3), None);
        }
        assert_eq!(run.ratio(&record("dense", "hopper", 4096, 0.5), CUBLAS), None);
        assert_eq!(run.ratio(&record(MATMUL, "hopper", 8192, 0.5), CUBLAS), None);
    }

    #[test]
    fn of_two_times_ours_is_the_slower_and_the_peers_the_faster() {
        let mut peers = run(vec![record("dense", CUDNN, 8192, 1.2)]);
        peers.command = "peers.py".into();
        let ours = run(vec![
            record("dense", "hopper", 8192, 0.8),
            record("dense", "hopper", 8192, 0.9),
            record("attend", "hopper", 8192, 0.1),
        ]);
        let again = run(vec![record("dense", CUDNN, 8192, 1.0)]);
        let merged = Run::merge([peers, ours, again]).unwrap();
        assert_eq!(merged.command, "peers.py; runner time");
        let times: Vec<_> = merged.records.iter().map(|record| record.ms).collect();
        assert_eq!(times, [1.0, 0.9, 0.1]);
        assert_eq!(merged.records[0].note, "2 times, 1.0000–1.2000 ms");
        assert_eq!(merged.records[2].note, "");
    }

    #[test]
    fn two_cards_are_refused() {
        let mut other = run(vec![]);
        other.gpu = "H200 with driver 580".into();
        other.notes.push("cudnn skipped".into());
        let merged = Run::merge([run(vec![]), other.clone()]).unwrap();
        assert_eq!((merged.gpu, merged.notes), (other.gpu.clone(), other.notes.clone()));
        other.gpu = "H100".into();
        assert!(Run::merge([run(vec![]), other]).is_err());
        assert!(Run::merge([]).is_err());
    }

    #[test]
    fn what_was_written_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut run = run(vec![
            record("dense", FLASH_ATTENTION_3, 8192, 0.9),
            record("dense", FLASH_ATTENTION_3, 16384, 3.0),
            record("pool", "plane", 8192, 0.05),
            record("select", "plane", 8192, 0.02),
            record("calibrate", "unit", 8192, 0.01),
            record("schedule", "unit", 8192, 0.01),
            record("attend", "hopper", 8192, 0.3),
        ]);
        run.records[0].tflops = Some(650.0);
        run.records[6].tflops = Some(600.0);
        run.checks.push(Check { name: "attend".into(), passed: true, detail: "1e-3".into() });
        run.write(folder.path()).unwrap();
        assert_eq!(Run::read(&folder.path().join("run.json")).unwrap(), run);
        for plot in ["latency", "breakdown", "speedup", "rates"] {
            let svg = fs::read_to_string(folder.path().join(format!("{plot}.svg"))).unwrap();
            assert!(svg.starts_with("<svg") && svg.contains("8K"), "{plot}: {svg}");
        }
    }

    #[test]
    fn fields_that_may_be_absent_are() {
        let text = r#"{"gpu": "H200", "date": "", "command": "", "records": [{"what": "dense",
            "rung": "cudnn", "dtype": "bf16", "batch": 1, "q_heads": 32, "kv_heads": 8,
            "q_len": 8, "kv_len": 8, "head_dim": 64, "density": 1, "ms": 0.5}]}"#;
        let run: Run = serde_json::from_str(text).unwrap();
        assert_eq!(run.records[0].ms_burst, None);
        assert!(run.checks.is_empty());
    }
}
