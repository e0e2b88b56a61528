//! JSON as Python writes it, for the filter `tojson`.
//!
//! The engine's own filter escapes for HTML, which would change the text that the model sees, and
//! pays for its work only when the text is complete, which may be never.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

/// Containers within containers; more could exhaust the stack.
const MAX_DEPTH: usize = 64;

/// `value | tojson` and `value | tojson(indent=n)`.
pub(super) fn tojson(state: &State, value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Non-ASCII characters are never escaped; a template that says so changes nothing.
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut writer = Writer { state, indent, json: String::new() };
    writer.value(value, 0)?;
    Ok(writer.json)
}

struct Writer<'a> {
    state: &'a State<'a, 'a>,
    indent: Option<usize>,
    json: String,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.state.consume_fuel(1)?;
        match value.kind() {
            ValueKind::Undefined | ValueKind::None => self.json.push_str("null"),
            ValueKind::Bool => self.json.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.json.push_str(&value.to_string()),
            ValueKind::String => self.string(value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                self.container(['[', ']'], value, depth, |writer, item| {
                    writer.value(&item, depth + 1)
                })?;
            }
            ValueKind::Map => self.container(['{', '}'], value, depth, |writer, key| {
                match key.as_str() {
                    Some(key) => writer.string(key)?,
                    None => writer.string(&key.to_string())?,
                }
                writer.json.push_str(": ");
                writer.value(&value.get_item(&key)?, depth + 1)
            })?,
            kind => return Err(invalid(format!("{kind} has no JSON"))),
        }
        Ok(())
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        self.state.consume_fuel(text.len() as u64 / 64)?;
        let json = serde_json::to_string(text).map_err(|error| invalid(error.to_string()))?;
        self.json.push_str(&json);
        Ok(())
    }

    /// Writes the items of a list, or those of a map for each of its keys.
    fn container(
        &mut self,
        [open, close]: [char; 2],
        value: &Value,
        depth: usize,
        item: impl Fn(&mut Self, Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if depth == MAX_DEPTH {
            return Err(invalid(format!("tojson is limited to a depth of {MAX_DEPTH}")));
        }
        self.json.push(open);
        let mut empty = true;
        for element in value.try_iter()? {
            self.separate(!empty, depth + 1);
            item(self, element)?;
            empty = false;
        }
        if !empty && self.indent.is_some() {
            self.separate(false, depth);
        }
        self.json.push(close);
        Ok(())
    }

    fn separate(&mut self, comma: bool, depth: usize) {
        if comma {
            self.json.push(',');
        }
        match self.indent {
            // A width of megabytes is no use to anybody.
            Some(width) => {
                self.json.push('\n');
                self.json.extend(std::iter::repeat_n(' ', width.min(16) * depth));
            }
            None if comma => self.json.push(' '),
            None => {}
        }
    }
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
