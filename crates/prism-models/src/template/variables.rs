//! What a template is given besides the conversation.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use minijinja::value::{Enumerator, Object, ObjectRepr, Value};
use serde::Serialize;
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

use super::TemplateError;

/// Variables that a template may read besides the conversation: `tools`, `enable_thinking`,
/// `date_string`, whatever its author thought of.
#[derive(Clone, Debug, Default)]
pub struct TemplateVariables {
    values: BTreeMap<String, Value>,
    /// Bytes of the values as JSON.
    bytes: usize,
}

impl TemplateVariables {
    /// Sets a variable. The fields of structures keep their order, which `tojson` shows.
    ///
    /// # Errors
    ///
    /// The value has no JSON.
    pub fn set(
        &mut self,
        name: impl Into<String>,
        value: &(impl Serialize + ?Sized),
    ) -> Result<(), TemplateError> {
        self.set_json(name, &serde_json::to_string(value)?)
    }

    /// Sets a variable to what a JSON text says.
    ///
    /// # Errors
    ///
    /// The text is not JSON.
    pub fn set_json(&mut self, name: impl Into<String>, json: &str) -> Result<(), TemplateError> {
        let Json(value) = serde_json::from_str(json)?;
        self.values.insert(name.into(), value);
        self.bytes += json.len();
        Ok(())
    }

    /// The names that are set, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// Takes over other variables.
    pub(super) fn extend(&mut self, other: &Self) {
        self.values.extend(other.values.iter().map(|(name, value)| (name.clone(), value.clone())));
        self.bytes += other.bytes;
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn into_context(self) -> Value {
        self.values.into()
    }
}

/// The members of a JSON object in their order: the engine's own maps are sorted.
#[derive(Debug)]
struct Members(Vec<(String, Value)>);

impl Object for Members {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Map
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        // Of members with one name the last counts, as in Python.
        let key = key.as_str()?;
        let found = self.0.iter().rev().find(|(name, _)| name == key);
        found.map(|(_, value)| value.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.0.iter().map(|(name, _)| Value::from(name.as_str())).collect())
    }
}

/// A value as JSON has it, the members of objects in their order.
struct Json(Value);

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Json;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("JSON")
            }

            fn visit_unit<E>(self) -> Result<Json, E> {
                Ok(Json(().into()))
            }

            fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
                Ok(Json(value.into()))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
                Ok(Json(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
                Ok(Json(value.into()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Json, E> {
                Ok(Json(value.into()))
            }

            fn visit_str<E>(self, value: &str) -> Result<Json, E> {
                Ok(Json(value.into()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Json, A::Error> {
                let mut values = Vec::new();
                while let Some(Json(value)) = items.next_element()? {
                    values.push(value);
                }
                Ok(Json(values.into()))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Json, A::Error> {
                let mut values = Vec::new();
                while let Some((key, Json(value))) = members.next_entry::<String, Json>()? {
                    values.push((key, value));
                }
                Ok(Json(Value::from_object(Members(values))))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::{ChatTemplate, Message};

    #[test]
    fn do_members_of_objects_keep_their_order() {
        let json = r#"{"type": "f", "name": [1, -2, 0.5, true, null, {"b": "é", "a": {}}]}"#;
        let mut variables = TemplateVariables::default();
        variables.set_json("tool", json).unwrap();
        let template = ChatTemplate::new("{{ tool | tojson }}").unwrap();
        let none: [Message; 0] = [];
        assert_eq!(template.render_with(&none, false, "", "", &variables).unwrap(), json);
        assert_eq!(variables.names().collect::<Vec<_>>(), ["tool"]);
        assert!(variables.set_json("tool", "{").is_err());
    }
}
