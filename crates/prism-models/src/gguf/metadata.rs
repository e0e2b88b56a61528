//! The key-value section of a GGUF file.

use std::collections::BTreeMap;

use super::error::GgufError;
use super::reader::Reader;

/// Why a metadata value could not be had.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum MetadataError {
    /// No value has this key.
    #[error("metadata `{key}` is missing")]
    Missing {
        /// The key.
        key: String,
    },
    /// The value has another type, or is a number outside the type's range.
    #[error("metadata `{key}` is {got}, not {expected}")]
    WrongType {
        /// The key.
        key: String,
        /// Type asked for.
        expected: &'static str,
        /// The value's type, and for numbers the value.
        got: String,
    },
}

/// Type of the elements of a metadata array, and of scalar values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Str,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    const ALL: [ValueType; 13] = {
        use ValueType::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, Str, Array, U64, I64, F64]
    };

    /// Bytes of the smallest value of the type.
    fn smallest(self) -> u64 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            // A string is a length and its bytes.
            Self::U64 | Self::I64 | Self::F64 | Self::Str => 8,
            // An array is a type, a count and its elements.
            Self::Array => 12,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Value {
    Int(i128),
    Float(f64),
    Bool(bool),
    Str(String),
    /// Numbers or booleans as they are in the file: decoding waits until somebody asks.
    Numbers(ValueType, Vec<u8>),
    Strings(Vec<String>),
}

impl Value {
    fn describe(&self) -> String {
        match self {
            Self::Int(value) => format!("the integer {value}"),
            Self::Float(value) => format!("the float {value}"),
            Self::Bool(value) => format!("the boolean {value}"),
            Self::Str(_) => "a string".into(),
            Self::Numbers(kind, _) => format!("an array of {kind:?}"),
            Self::Strings(_) => "an array of strings".into(),
        }
    }

    fn int<T: TryFrom<i128>>(&self) -> Option<T> {
        match self {
            Self::Int(value) => T::try_from(*value).ok(),
            _ => None,
        }
    }

    fn float(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            Self::Int(value) => Some(*value as f64),
            _ => None,
        }
    }

    /// The elements of an array of numbers, converted by `convert`.
    fn elements<T>(&self, convert: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
        match self {
            Self::Numbers(kind, bytes) => bytes
                .chunks_exact(kind.smallest() as usize)
                .map(|bytes| convert(&number(*kind, bytes)?))
                .collect(),
            _ => None,
        }
    }
}

/// The metadata of a GGUF file, by key.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    values: BTreeMap<String, Value>,
}

/// Defines the pair `find_x` and `get_x` for one type.
macro_rules! getters {
    ($find:ident, $get:ident, $type:ty, $what:literal, $convert:expr) => {
        #[doc = concat!("The value of `key` as ", $what, ", or `None` without such a key.")]
        ///
        /// # Errors
        ///
        /// The value has another type or range.
        pub fn $find(&self, key: &str) -> Result<Option<$type>, MetadataError> {
            self.find(key, $what, $convert)
        }

        #[doc = concat!("The value of `key` as ", $what, ".")]
        ///
        /// # Errors
        ///
        /// The key is missing, or its value has another type or range.
        pub fn $get(&self, key: &str) -> Result<$type, MetadataError> {
            self.$find(key)?.ok_or_else(|| MetadataError::Missing { key: key.into() })
        }
    };
}

impl Metadata {
    getters!(find_u32, get_u32, u32, "a 32-bit unsigned integer", Value::int);
    getters!(find_u64, get_u64, u64, "a 64-bit unsigned integer", Value::int);
    getters!(find_usize, get_usize, usize, "a size", Value::int);
    getters!(find_f64, get_f64, f64, "a number", Value::float);
    getters!(find_f32, get_f32, f32, "a number", |value| value.float().map(|value| value as f32));
    getters!(find_bool, get_bool, bool, "a boolean", |value| match value {
        Value::Bool(value) => Some(*value),
        _ => None,
    });
    getters!(find_i32_array, get_i32_array, Vec<i32>, "an array of 32-bit integers", |value| {
        value.elements(Value::int)
    });
    getters!(find_f32_array, get_f32_array, Vec<f32>, "an array of numbers", |value| {
        value.elements(|value| value.float().map(|value| value as f32))
    });
    getters!(find_bool_array, get_bool_array, Vec<bool>, "an array of booleans", |value| {
        value.elements(|value| match value {
            Value::Bool(value) => Some(*value),
            _ => None,
        })
    });

    /// The value of `key` as a string, or `None` without such a key.
    ///
    /// # Errors
    ///
    /// The value has another type.
    pub fn find_str(&self, key: &str) -> Result<Option<&str>, MetadataError> {
        self.find(key, "a string", |value| match value {
            Value::Str(value) => Some(value.as_str()),
            _ => None,
        })
    }

    /// The value of `key` as a string.
    ///
    /// # Errors
    ///
    /// The key is missing, or its value has another type.
    pub fn get_str(&self, key: &str) -> Result<&str, MetadataError> {
        self.find_str(key)?.ok_or_else(|| MetadataError::Missing { key: key.into() })
    }

    /// The value of `key` as an array of strings, or `None` without such a key.
    ///
    /// # Errors
    ///
    /// The value has another type.
    pub fn find_str_array(&self, key: &str) -> Result<Option<&[String]>, MetadataError> {
        self.find(key, "an array of strings", |value| match value {
            Value::Strings(values) => Some(values.as_slice()),
            _ => None,
        })
    }

    /// The value of `key` as an array of strings.
    ///
    /// # Errors
    ///
    /// The key is missing, or its value has another type.
    pub fn get_str_array(&self, key: &str) -> Result<&[String], MetadataError> {
        self.find_str_array(key)?.ok_or_else(|| MetadataError::Missing { key: key.into() })
    }

    /// The keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    fn find<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, MetadataError> {
        let Some(value) = self.values.get(key) else {
            return Ok(None);
        };
        match convert(value) {
            Some(value) => Ok(Some(value)),
            None => {
                let got = value.describe();
                Err(MetadataError::WrongType { key: key.into(), expected, got })
            }
        }
    }

    /// Reads `count` pairs.
    pub(super) fn read(reader: &mut Reader<'_>, count: u64) -> Result<Self, GgufError> {
        let mut values = BTreeMap::new();
        for _ in 0..count {
            let key = reader.string("metadata key")?.to_owned();
            let value = read_value(reader, &key)?;
            if values.contains_key(&key) {
                return Err(GgufError::DuplicateKey { key });
            }
            values.insert(key, value);
        }
        Ok(Self { values })
    }
}

fn read_type(reader: &mut Reader<'_>, key: &str) -> Result<ValueType, GgufError> {
    let got = reader.u32("metadata value type")?;
    let known = usize::try_from(got).ok().and_then(|index| ValueType::ALL.get(index));
    known.copied().ok_or_else(|| GgufError::UnknownValueType { key: key.into(), got })
}

fn read_value(reader: &mut Reader<'_>, key: &str) -> Result<Value, GgufError> {
    const WHAT: &str = "metadata value";
    match read_type(reader, key)? {
        ValueType::Str => Ok(Value::Str(reader.string(WHAT)?.to_owned())),
        ValueType::Array => read_array(reader, key),
        kind => {
            let offset = reader.position();
            let bytes = reader.take(kind.smallest(), WHAT)?;
            // Only a boolean can fail to decode.
            number(kind, bytes).ok_or(GgufError::BadBool { offset, got: bytes[0] })
        }
    }
}

fn read_array(reader: &mut Reader<'_>, key: &str) -> Result<Value, GgufError> {
    const WHAT: &str = "metadata array";
    let kind = read_type(reader, key)?;
    if kind == ValueType::Array {
        return Err(GgufError::NestedArray { key: key.into() });
    }
    let count = reader.count(kind.smallest(), WHAT)?;
    if kind == ValueType::Str {
        // Growing would ask for twice as much; the count is known to fit the file.
        let mut strings = Vec::with_capacity(count as usize);
        for _ in 0..count {
            strings.push(reader.string(WHAT)?.to_owned());
        }
        return Ok(Value::Strings(strings));
    }
    let start = reader.position();
    // `count` times the size fits, because the rest of the file is larger.
    let bytes = reader.take(count * kind.smallest(), WHAT)?;
    if kind == ValueType::Bool
        && let Some(index) = bytes.iter().position(|&byte| byte > 1)
    {
        return Err(GgufError::BadBool { offset: start + index, got: bytes[index] });
    }
    Ok(Value::Numbers(kind, bytes.to_vec()))
}

/// Decodes one number or boolean of exactly the type's size.
fn number(kind: ValueType, bytes: &[u8]) -> Option<Value> {
    Some(match kind {
        ValueType::U8 => Value::Int(u8::from_le_bytes(bytes.try_into().ok()?).into()),
        ValueType::I8 => Value::Int(i8::from_le_bytes(bytes.try_into().ok()?).into()),
        ValueType::U16 => Value::Int(u16::from_le_bytes(bytes.try_into().ok()?).into()),
        ValueType::I16 => Value::Int(i16::from_le_bytes(bytes.try_into().ok()?).into()),
        ValueType::U32 => Value::Int(u32::from_le_bytes(bytes.try_into().ok()?).into()),
        ValueType::I32 => Value::Int(i32::from_le_bytes(bytes.try_into().ok()?).into()),
        ValueType::U64 => Value::Int(u64::from_le_bytes(bytes.try_into().ok()?).into()),
        ValueType::I64 => Value::Int(i64::from_le_bytes(bytes.try_into().ok()?).into()),
        ValueType::F32 => Value::Float(f32::from_le_bytes(bytes.try_into().ok()?).into()),
        ValueType::F64 => Value::Float(f64::from_le_bytes(bytes.try_into().ok()?)),
        ValueType::Bool => match bytes {
            [0] => Value::Bool(false),
            [1] => Value::Bool(true),
            _ => return None,
        },
        ValueType::Str | ValueType::Array => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, u32, &[u8])]) -> Result<Metadata, GgufError> {
        let mut bytes = Vec::new();
        for (key, kind, value) in pairs {
            bytes.extend((key.len() as u64).to_le_bytes());
            bytes.extend(key.as_bytes());
            bytes.extend(kind.to_le_bytes());
            bytes.extend(*value);
        }
        Metadata::read(&mut Reader::new(&bytes), pairs.len() as u64)
    }

    #[test]
    fn does_every_scalar_type_decode() {
        let metadata = read(&[
            ("u8", 0, &[200]),
            ("i8", 1, &[0xff]),
            ("u16", 2, &[1, 2]),
            ("i16", 3, &[0xfe, 0xff]),
            ("u32", 4, &[1, 0, 0, 0]),
            ("f32", 6, &1.5f32.to_le_bytes()),
            ("bool", 7, &[1]),
            ("str", 8, &[2, 0, 0, 0, 0, 0, 0, 0, b'h', b'i']),
            ("u64", 10, &u64::MAX.to_le_bytes()),
            ("f64", 12, &0.25f64.to_le_bytes()),
        ])
        .unwrap();
        assert_eq!(metadata.get_u32("u8"), Ok(200));
        assert_eq!(metadata.get_f64("i8"), Ok(-1.0));
        assert_eq!(metadata.get_usize("u16"), Ok(513));
        assert_eq!(metadata.get_f32("i16"), Ok(-2.0));
        assert_eq!(metadata.get_u64("u32"), Ok(1));
        assert_eq!(metadata.get_f32("f32"), Ok(1.5));
        assert_eq!(metadata.get_bool("bool"), Ok(true));
        assert_eq!(metadata.get_str("str"), Ok("hi"));
        assert_eq!(metadata.get_u64("u64"), Ok(u64::MAX));
        assert_eq!(metadata.get_f64("f64"), Ok(0.25));
    }

    #[test]
    fn is_a_wrong_type_or_range_an_error_with_the_value() {
        let metadata = read(&[("x", 1, &[0xff])]).unwrap();
        let error = metadata.get_u32("x").unwrap_err();
        assert_eq!(
            error.to_string(),
            "metadata `x` is the integer -1, not a 32-bit unsigned integer"
        );
        assert!(matches!(metadata.get_str("x"), Err(MetadataError::WrongType { .. })));
        assert_eq!(metadata.find_str("y"), Ok(None));
        assert_eq!(metadata.get_str("y"), Err(MetadataError::Missing { key: "y".into() }));
    }

    #[test]
    fn do_arrays_decode() {
        let mut numbers = 5u32.to_le_bytes().to_vec();
        numbers.extend(2u64.to_le_bytes());
        numbers.extend((-3i32).to_le_bytes());
        numbers.extend(7i32.to_le_bytes());
        let mut strings = 8u32.to_le_bytes().to_vec();
        strings.extend(1u64.to_le_bytes());
        strings.extend(1u64.to_le_bytes());
        strings.push(b'a');
        let metadata = read(&[("n", 9, &numbers), ("s", 9, &strings)]).unwrap();
        assert_eq!(metadata.get_i32_array("n"), Ok(vec![-3, 7]));
        assert_eq!(metadata.get_f32_array("n"), Ok(vec![-3.0, 7.0]));
        assert_eq!(metadata.get_str_array("s"), Ok(&["a".to_owned()][..]));
        assert_eq!(metadata.keys().collect::<Vec<_>>(), ["n", "s"]);
    }
}
