//! Typed access to the fields of a JSON object that nobody vouches for.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::out_of_range;
use crate::error::ConfigError;

/// Longest list. A parsed element takes many times the bytes of its text.
const MAX_LIST: usize = 4096;

/// Parses an object.
pub(super) fn parse(json: &[u8]) -> Result<Map<String, Value>, ConfigError> {
    serde_json::from_slice::<ShortLists>(json)?;
    match serde_json::from_slice(json)? {
        Value::Object(object) => Ok(object),
        _ => Err(ConfigError::NotAnObject),
    }
}

/// Typed access to the fields of a JSON object; null counts as absent.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub &'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub fn find(self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    pub fn find_usize(self, field: &str) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.find(field) else {
            return Ok(None);
        };
        let Value::Number(number) = value else {
            return Err(wrong_type(field, "a number"));
        };
        match number.as_u64().and_then(|number| usize::try_from(number).ok()) {
            Some(size) => Ok(Some(size)),
            // Negative, fractional, or beyond 64 bits.
            None => Err(out_of_range(field, "a non-negative 64-bit integer", number)),
        }
    }

    pub fn usize(self, field: &'static str) -> Result<usize, ConfigError> {
        self.find_usize(field)?.ok_or(ConfigError::Missing { field })
    }

    pub fn find_f64(self, field: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.find(field) else {
            return Ok(None);
        };
        value.as_f64().map(Some).ok_or_else(|| wrong_type(field, "a number"))
    }

    pub fn f64(self, field: &'static str) -> Result<f64, ConfigError> {
        self.find_f64(field)?.ok_or(ConfigError::Missing { field })
    }

    pub fn find_bool(self, field: &str) -> Result<Option<bool>, ConfigError> {
        let Some(value) = self.find(field) else {
            return Ok(None);
        };
        value.as_bool().map(Some).ok_or_else(|| wrong_type(field, "a boolean"))
    }

    pub fn find_str(self, field: &str) -> Result<Option<&'a str>, ConfigError> {
        let Some(value) = self.find(field) else {
            return Ok(None);
        };
        value.as_str().map(Some).ok_or_else(|| wrong_type(field, "a string"))
    }

    pub fn find_object(self, field: &str) -> Result<Option<&'a Map<String, Value>>, ConfigError> {
        let Some(value) = self.find(field) else {
            return Ok(None);
        };
        value.as_object().map(Some).ok_or_else(|| wrong_type(field, "an object"))
    }

    pub fn find_list(self, field: &str) -> Result<Option<&'a [Value]>, ConfigError> {
        let Some(value) = self.find(field) else {
            return Ok(None);
        };
        match value {
            Value::Array(values) => Ok(Some(values)),
            _ => Err(wrong_type(field, "a list")),
        }
    }

    /// A token id, a list of them, or none.
    pub fn token_ids(self, field: &str) -> Result<Vec<u32>, ConfigError> {
        let values = match self.find(field) {
            None => return Ok(Vec::new()),
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        let id = |value: &Value| match value {
            Value::Number(number) => number
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| out_of_range(field, "a non-negative 32-bit integer", number)),
            _ => Err(wrong_type(field, "a token id or a list of them")),
        };
        values.iter().map(id).collect()
    }
}

fn wrong_type(field: &str, expected: &'static str) -> ConfigError {
    ConfigError::WrongType { field: field.into(), expected }
}

/// Any JSON without long lists, read without keeping anything.
struct ShortLists;

impl<'de> Deserialize<'de> for ShortLists {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for ShortLists {
    type Value = Self;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("JSON")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self, A::Error> {
        let mut length = 0;
        while list.next_element::<Self>()?.is_some() {
            length += 1;
            if length > MAX_LIST {
                let limit = format!("a list has more than {MAX_LIST} elements");
                return Err(A::Error::custom(limit));
            }
        }
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        while map.next_entry::<Self, Self>()?.is_some() {}
        Ok(self)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }
}
