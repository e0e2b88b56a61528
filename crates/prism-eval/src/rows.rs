//! Results as rows of named columns: CSV, and Markdown for people.

use serde::Serialize;

use crate::error::{EvalError, Result};

/// Rows as CSV with a header, quoted where needed.
///
/// # Errors
/// Rows that aren't flat.
pub fn csv(rows: &[impl Serialize]) -> Result<String> {
    let failed = |reason: String| EvalError::Results { reason };
    let mut writer = csv::Writer::from_writer(Vec::new());
    for row in rows {
        writer.serialize(row).map_err(|error| failed(error.to_string()))?;
    }
    let bytes = writer.into_inner().map_err(|error| failed(error.to_string()))?;
    String::from_utf8(bytes).map_err(|error| failed(error.to_string()))
}

/// The header and the cells of rows, numbers with at most four decimals.
///
/// # Errors
/// Rows that aren't flat.
pub fn cells(rows: &[impl Serialize]) -> Result<Vec<Vec<String>>> {
    let text = csv(rows)?;
    let mut reader = csv::ReaderBuilder::new().has_headers(false).from_reader(text.as_bytes());
    let mut table = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|error| EvalError::Results { reason: error.to_string() })?;
        table.push(record.iter().map(shortened).collect());
    }
    Ok(table)
}

/// A table in Markdown.
///
/// # Errors
/// Rows that aren't flat.
pub fn markdown(rows: &[impl Serialize]) -> Result<String> {
    let mut text = String::new();
    for (index, row) in cells(rows)?.iter().enumerate() {
        text += &format!("| {} |\n", row.join(" | "));
        if index == 0 {
            text += &format!("|{}\n", "---|".repeat(row.len()));
        }
    }
    Ok(text)
}

fn shortened(cell: &str) -> String {
    match cell.parse::<f64>() {
        Ok(number) if cell.contains('.') || cell.contains('e') => format!("{number:.4}"),
        _ => cell.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Row {
        name: &'static str,
        share: f64,
        count: usize,
        gain: Option<f64>,
    }

    #[test]
    fn are_rows_quoted_and_shortened_where_they_must_be() {
        let rows = [
            Row { name: "a, b", share: 1.0 / 3.0, count: 12, gain: None },
            Row { name: "c", share: 1e-9, count: 0, gain: Some(-0.5) },
        ];
        let text = csv(&rows).unwrap();
        assert_eq!(text.lines().next(), Some("name,share,count,gain"));
        assert!(text.contains("\"a, b\",0.3333333333333333,12,\n"), "{text}");
        assert_eq!(
            markdown(&rows).unwrap(),
            "| name | share | count | gain |\n|---|---|---|---|\n| a, b | 0.3333 | 12 |  |\n\
             | c | 0.0000 | 0 | -0.5000 |\n"
        );
        assert_eq!(csv(&rows[..0]).unwrap(), "");
    }
}
