//! Damage to bytes and to JSON text.

use proptest::prelude::*;
use proptest::sample::Index;

/// One change. Positions are drawn without knowing the length.
#[derive(Clone, Debug)]
pub enum Edit {
    /// Overwrites one byte.
    Byte { at: Index, byte: u8 },
    /// Overwrites a little-endian number of 1 to 8 bytes.
    Number { at: Index, value: u64, bytes: usize },
    /// Removes a stretch.
    Remove { at: Index, length: usize },
    /// Inserts a copy of another stretch.
    Copy { from: Index, length: usize, to: Index },
    /// Inserts text.
    Text { at: Index, text: &'static str },
    /// Replaces the value behind one of the colons of JSON.
    Value { colon: Index, text: &'static str },
    /// Cuts off the end.
    Cut { at: Index },
}

const NUMBERS: [u64; 12] = [
    0,
    1,
    3,
    0x7f,
    0xff,
    1 << 16,
    (1 << 31) - 1,
    1 << 32,
    1 << 60,
    i64::MAX as u64,
    u64::MAX - 31,
    u64::MAX,
];

const TEXTS: [&str; 24] = [
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "1e-320",
    "0.5",
    "18446744073709551615",
    "99999999999999999999",
    "1048576",
    "\"\"",
    "\"\\ud800\"",
    "\"../../x\"",
    "\"yarn\"",
    "\"dynamic\"",
    "\"BF16\"",
    "[]",
    "[0,18446744073709551615]",
    "[0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0]",
    "{}",
    "{\"a\":{\"a\":{\"a\":[[[[[[[[[[]]]]]]]]]]}}}",
    "[[[[[[[[",
    "\"a\":1,",
    "\u{feff}",
];

/// A few changes, one after the other.
pub fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let at = any::<Index>;
    let edit = prop_oneof![
        (at(), any::<u8>()).prop_map(|(at, byte)| Edit::Byte { at, byte }),
        (at(), prop::sample::select(&NUMBERS[..]), 1usize..9)
            .prop_map(|(at, value, bytes)| Edit::Number { at, value, bytes }),
        (at(), 1usize..40).prop_map(|(at, length)| Edit::Remove { at, length }),
        (at(), 1usize..200, at()).prop_map(|(from, length, to)| Edit::Copy { from, length, to }),
        (at(), prop::sample::select(&TEXTS[..])).prop_map(|(at, text)| Edit::Text { at, text }),
        (at(), prop::sample::select(&TEXTS[..]))
            .prop_map(|(colon, text)| Edit::Value { colon, text }),
        (at(), prop::sample::select(&TEXTS[..]))
            .prop_map(|(colon, text)| Edit::Value { colon, text }),
        at().prop_map(|at| Edit::Cut { at }),
    ];
    prop::collection::vec(edit, 1..5)
}

/// `bytes` with all the changes.
pub fn damage(bytes: &[u8], edits: &[Edit]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for edit in edits {
        if bytes.is_empty() {
            break;
        }
        apply(&mut bytes, edit);
    }
    bytes
}

fn apply(bytes: &mut Vec<u8>, edit: &Edit) {
    let length = bytes.len();
    match edit {
        Edit::Byte { at, byte } => bytes[at.index(length)] = *byte,
        Edit::Number { at, value, bytes: count } => {
            let at = at.index(length);
            let count = (*count).min(length - at);
            bytes[at..at + count].copy_from_slice(&value.to_le_bytes()[..count]);
        }
        Edit::Remove { at, length: count } => {
            let at = at.index(length);
            bytes.drain(at..(at + count).min(length));
        }
        Edit::Copy { from, length: count, to } => {
            let from = from.index(length);
            let copy = bytes[from..(from + count).min(length)].to_vec();
            let to = to.index(length);
            bytes.splice(to..to, copy);
        }
        Edit::Text { at, text } => {
            let at = at.index(length);
            bytes.splice(at..at, text.bytes());
        }
        Edit::Value { colon, text } => {
            let colons: Vec<usize> = (0..length).filter(|&i| bytes[i] == b':').collect();
            if colons.is_empty() {
                return;
            }
            let start = colons[colon.index(colons.len())] + 1;
            let ends = |byte: &u8| matches!(byte, b',' | b'}' | b']');
            let end = bytes[start..].iter().position(ends).map_or(length, |end| start + end);
            bytes.splice(start..end, text.bytes());
        }
        Edit::Cut { at } => bytes.truncate(at.index(length)),
    }
}
