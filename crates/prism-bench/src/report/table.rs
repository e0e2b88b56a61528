//! A run as Markdown and as CSV.

use super::{CUBLAS, CUDNN, FLASH_ATTENTION_3, PARTS, Record, Run};

impl Run {
    /// The checks that failed, the notes, and every record with its ratios.
    pub fn markdown(&self) -> String {
        let date = if self.date.is_empty() { "" } else { ", " };
        let mut text = format!("{}{date}{}: `{}`\n\n", self.gpu, self.date, self.command);
        let failed: Vec<_> = self.checks.iter().filter(|check| !check.passed).collect();
        if !self.checks.is_empty() {
            let passed = self.checks.len() - failed.len();
            text += &format!("{passed} of {} checks passed.\n\n", self.checks.len());
        }
        for check in failed {
            text += &format!("- failed: {}: {}\n", check.name, check.detail);
        }
        for note in &self.notes {
            text += &format!("- {note}\n");
        }
        text += "
| what | by | type | B, heads | length | d | density | ms | burst ms | TFLOP/s | GB/s | × FA3 | × cuDNN | × cuBLAS | note |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
";
        for record in self.sorted() {
            text += &format!(
                "| {} | {} | {} | {}, {}/{} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |\n",
                record.what,
                record.rung,
                record.dtype,
                record.batch,
                record.q_heads,
                record.kv_heads,
                lengths(record),
                record.head_dim,
                if record.density == 1.0 { "all".into() } else { digits(record.density) },
                digits(record.ms),
                optional(record.ms_burst),
                optional(record.tflops),
                optional(record.gbps),
                optional(self.ratio(record, FLASH_ATTENTION_3)),
                optional(self.ratio(record, CUDNN)),
                optional(self.ratio(record, CUBLAS)),
                record.note,
            );
        }
        let wholes = self.wholes();
        text.extend(wholes.iter().map(|whole| format!("\n- {whole}")));
        text += if wholes.is_empty() { "" } else { "\n" };
        text += "\nms: sustained; × FA3, × cuDNN: how many times as long their dense attention of \
                 the same size takes, timed in the same run; × cuBLAS: likewise of matrix products \
                 M×N, K under d.\n";
        text
    }

    /// Every record with its ratios, one a line.
    pub fn csv(&self) -> String {
        let mut text = "what,rung,dtype,batch,q_heads,kv_heads,q_len,kv_len,head_dim,density,ms,\
                        ms_burst,tflops,gbps,peer,times_flash_attention_3,times_cudnn,times_cublas,note\n"
            .to_string();
        for record in self.sorted() {
            let plain = |number: Option<f64>| number.map(|n| n.to_string()).unwrap_or_default();
            let cells = [
                quoted(&record.what),
                quoted(&record.rung),
                quoted(&record.dtype),
                record.batch.to_string(),
                record.q_heads.to_string(),
                record.kv_heads.to_string(),
                record.q_len.to_string(),
                record.kv_len.to_string(),
                record.head_dim.to_string(),
                record.density.to_string(),
                record.ms.to_string(),
                plain(record.ms_burst),
                plain(record.tflops),
                plain(record.gbps),
                record.peer.to_string(),
                plain(self.ratio(record, FLASH_ATTENTION_3)),
                plain(self.ratio(record, CUDNN)),
                plain(self.ratio(record, CUBLAS)),
                quoted(&record.note),
            ];
            text += &cells.join(",");
            text.push('\n');
        }
        text
    }

    /// What compares stands together: by shape, then part by part, peers first.
    pub fn sorted(&self) -> Vec<&Record> {
        let mut records: Vec<_> = self.records.iter().collect();
        records.sort_by_cached_key(|record| {
            let part = PARTS.iter().position(|&part| part == record.what);
            let shape = (record.head_dim, record.batch, record.kv_len, record.q_len);
            (shape, part, record.what.clone(), !record.peer, record.rung.clone())
        });
        records
    }
}

/// A length as people say it: 32K.
pub fn tokens(length: usize) -> String {
    if length >= 1024 && length.is_multiple_of(1024) {
        format!("{}K", length / 1024)
    } else {
        length.to_string()
    }
}

fn lengths(record: &Record) -> String {
    if record.is_product() {
        format!("{}×{}", tokens(record.q_len), tokens(record.kv_len))
    } else if record.q_len == record.kv_len {
        tokens(record.kv_len)
    } else {
        format!("{} of {}", tokens(record.q_len), tokens(record.kv_len))
    }
}

fn optional(number: Option<f64>) -> String {
    number.map(digits).unwrap_or_default()
}

/// Three significant digits, none of them lost before the point.
pub fn digits(number: f64) -> String {
    let before = if number == 0.0 { 1 } else { number.abs().log10().floor() as i32 + 1 };
    let decimals = (3 - before).clamp(0, 6) as usize;
    format!("{number:.decimals$}")
}

fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Check;
    use super::super::tests::{record, run};
    use super::*;

    #[test]
    fn numbers_keep_three_digits() {
        let shown = [0.0, 0.01234, 0.999, 1.5, 12.34, 741.2, 4123.0].map(digits);
        assert_eq!(shown, ["0.00", "0.0123", "0.999", "1.50", "12.3", "741", "4123"]);
    }

    #[test]
    fn the_table_orders_and_compares() {
        let mut run = run(vec![
            record("attend", "hopper", 32768, 1.5),
            record("dense", "hopper", 32768, 10.0),
            record("dense", FLASH_ATTENTION_3, 32768, 12.0),
            record("pool", "plane", 32768, 0.08),
        ]);
        run.checks.push(Check { name: "a".into(), passed: true, detail: String::new() });
        run.checks.push(Check { name: "b".into(), passed: false, detail: "1 > 0".into() });
        let text = run.markdown();
        assert!(text.contains("1 of 2 checks passed") && text.contains("- failed: b: 1 > 0"));
        let rows: Vec<_> = text.lines().filter(|line| line.contains("| bf16 |")).collect();
        assert!(rows[0].starts_with("| dense | flash-attention-3 |"), "{text}");
        assert!(rows[1].contains("| 32K | 128 | all | 10.0 |  |  |  | 1.20 |  |  |"), "{text}");
        assert!(rows[2].starts_with("| pool |") && rows[2].ends_with("|  |  |  |  |"), "{text}");
        assert!(rows[3].contains("| 0.100 | 1.50 |  |  |  | 8.00 |  |  |"), "{text}");
    }

    #[test]
    fn csv_quotes_what_needs_it() {
        let mut noted = record("dense", "hopper", 1000, 2.0);
        noted.note = "a, \"b\"".into();
        let text = run(vec![noted]).csv();
        let columns = text.lines().next().unwrap().split(',').count();
        let row = text.lines().nth(1).unwrap();
        assert!(row.ends_with(",false,,,,\"a, \"\"b\"\"\""), "{row}");
        assert_eq!(row.replace("a, ", "a").split(',').count(), columns);
    }
}
