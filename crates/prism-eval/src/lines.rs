//! Files of one JSON object a line.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::{EvalError, Result};

/// The first `limit` lines of a file; empty ones don't count.
///
/// # Errors
/// A file that can't be read, a line of another form.
pub fn read<T: DeserializeOwned>(path: &Path, limit: usize) -> Result<Vec<T>> {
    let at = |source| EvalError::File { path: path.to_path_buf(), source };
    let file = BufReader::new(File::open(path).map_err(at)?);
    let mut all = Vec::new();
    for (index, line) in file.lines().enumerate() {
        let line = line.map_err(at)?;
        if all.len() == limit {
            break;
        }
        if line.trim().is_empty() {
            continue;
        }
        all.push(serde_json::from_str(&line).map_err(|error| EvalError::Line {
            path: path.to_path_buf(),
            line: index + 1,
            reason: error.to_string(),
        })?);
    }
    Ok(all)
}
