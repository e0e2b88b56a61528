//! Results that outlive a run: what was measured is written at once, and isn't measured again.
//!
//! `results.jsonl` of a folder begins with a line of the settings; every other line is one result with its key.
//! A run with other settings is refused. A last line that was cut short is dropped.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{EvalError, Result};

/// The results of one evaluation, by key.
#[derive(Debug, Default)]
pub struct Store {
    held: HashMap<String, Value>,
    file: Option<(PathBuf, File)>,
}

/// A number that tells contents apart, in hex: 64-bit FNV-1a.
pub fn fingerprint(bytes: &[u8]) -> String {
    format!("{:016x}", fnv(0xcbf2_9ce4_8422_2325, bytes.iter().copied()))
}

pub(crate) fn fnv(start: u64, bytes: impl IntoIterator<Item = u8>) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.into_iter().fold(start, step)
}

#[derive(Serialize, Deserialize)]
struct Entry {
    key: String,
    result: Value,
}

impl Store {
    /// Results that are forgotten with the program.
    pub fn in_memory() -> Self {
        Self::default()
    }

    /// Results in `results.jsonl` of `folder`, which is made if it isn't there. `settings` is all that the
    /// results depend on, besides their keys.
    ///
    /// # Errors
    /// Files that can't be read or written; results of other settings; a line that is no result.
    pub fn open(folder: &Path, settings: &impl Serialize) -> Result<Self> {
        let settings = serde_json::to_value(settings).map_err(unwritable)?;
        let path = folder.join("results.jsonl");
        let at = |source| EvalError::File { path: path.clone(), source };
        fs::create_dir_all(folder)
            .map_err(|source| EvalError::File { path: folder.to_path_buf(), source })?;
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(at(error)),
        };
        // A line without an end was cut short.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let mut lines = text[..whole].lines().enumerate();
        let line = |number: usize, error: serde_json::Error| EvalError::Line {
            path: path.clone(),
            line: number + 1,
            reason: error.to_string(),
        };
        if let Some((number, first)) = lines.next() {
            let held = serde_json::from_str(first).map_err(|error| line(number, error))?;
            same(&path, &held, &settings)?;
        }
        let mut held = HashMap::new();
        for (number, text) in lines {
            let entry: Entry = serde_json::from_str(text).map_err(|error| line(number, error))?;
            held.insert(entry.key, entry.result);
        }
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(at)?;
        file.set_len(whole as u64).map_err(at)?;
        let mut store = Self { held, file: Some((path.clone(), file)) };
        if whole == 0 {
            store.write(&settings)?;
        }
        Ok(store)
    }

    /// How many results there are.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// The result of a key: the one held, or what `measure` finds, which is then held.
    ///
    /// # Errors
    /// Of `measure`; a held result of another form; a file that can't be written.
    pub fn get_or<T: Serialize + DeserializeOwned>(
        &mut self,
        key: &str,
        measure: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if let Some(value) = self.held.get(key) {
            return T::deserialize(value).map_err(|error| EvalError::Results {
                reason: format!("the result held for {key:?} has another form: {error}"),
            });
        }
        let result = measure()?;
        let value = serde_json::to_value(&result).map_err(unwritable)?;
        self.write(&Entry { key: key.into(), result: value.clone() })?;
        self.held.insert(key.into(), value);
        Ok(result)
    }

    /// Whether a key has a result.
    pub fn has(&self, key: &str) -> bool {
        self.held.contains_key(key)
    }

    fn write(&mut self, line: &impl Serialize) -> Result<()> {
        let Some((path, file)) = &mut self.file else { return Ok(()) };
        let mut text = serde_json::to_string(line).map_err(unwritable)?;
        text.push('\n');
        let written = file.write_all(text.as_bytes()).and_then(|()| file.flush());
        written.map_err(|source| EvalError::File { path: path.clone(), source })
    }
}

/// The first setting in which two differ.
fn same(path: &Path, held: &Value, got: &Value) -> Result<()> {
    if held == got {
        return Ok(());
    }
    let empty = serde_json::Map::new();
    let (a, b) = (held.as_object().unwrap_or(&empty), got.as_object().unwrap_or(&empty));
    let differs = a.keys().chain(b.keys()).find(|&name| a.get(name) != b.get(name));
    let setting = differs.map_or("the whole", String::as_str);
    let shown = |values: &serde_json::Map<_, Value>, whole: &Value| match differs {
        Some(name) => values.get(name).map_or("absent".into(), Value::to_string),
        None => whole.to_string(),
    };
    Err(EvalError::OtherResults {
        path: path.to_path_buf(),
        setting: setting.into(),
        held: shown(a, held),
        got: shown(b, got),
    })
}

fn unwritable(error: serde_json::Error) -> EvalError {
    EvalError::Results { reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(seed: u64) -> Value {
        serde_json::json!({"study": "needle", "seed": seed})
    }

    fn put(store: &mut Store, key: &str, value: f64) -> f64 {
        store.get_or(key, || Ok(value)).unwrap()
    }

    #[test]
    fn is_what_was_measured_kept_and_not_measured_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), &settings(1)).unwrap();
        assert_eq!((put(&mut store, "a", 0.1), put(&mut store, "b", 2.0)), (0.1, 2.0));
        drop(store);
        let mut store = Store::open(folder.path(), &settings(1)).unwrap();
        assert_eq!(store.len(), 2);
        assert_eq!((put(&mut store, "a", 7.0), put(&mut store, "c", 3.0)), (0.1, 3.0));
    }

    #[test]
    fn is_a_line_that_was_cut_short_measured_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("results.jsonl");
        let mut store = Store::open(folder.path(), &settings(1)).unwrap();
        put(&mut store, "a", 1.0);
        put(&mut store, "b", 2.0);
        drop(store);
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, &text[..text.len() - 5]).unwrap();
        let mut store = Store::open(folder.path(), &settings(1)).unwrap();
        assert_eq!((put(&mut store, "a", 7.0), put(&mut store, "b", 3.0)), (1.0, 3.0));
        drop(store);
        assert_eq!(Store::open(folder.path(), &settings(1)).unwrap().len(), 2);
        // Of a whole line that is no result, too, but not silently.
        fs::write(&file, format!("{text}oops\n")).unwrap();
        let error = Store::open(folder.path(), &settings(1)).unwrap_err().to_string();
        assert!(error.contains("line 4"), "{error}");
    }

    /// The published value of "foobar".
    #[test]
    fn is_the_fingerprint_fnv() {
        assert_eq!(fingerprint(b"foobar"), "85944171f73967e8");
    }

    #[test]
    fn are_results_of_other_settings_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        drop(Store::open(folder.path(), &settings(1)).unwrap());
        let error = Store::open(folder.path(), &settings(2)).unwrap_err().to_string();
        assert!(error.contains("seed was 1, is 2"), "{error}");
    }
}
