//! A deserializer for TOML values that knows the path of each fault and finds all faults.
//!
//! serde ends at the first fault. [`read`] notes it, leaves the faulty value out and begins again: its default stands in, so the
//! rest is read too.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{DeserializeOwned, DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, forward_to_deserialize_any};
use toml::Value;

use crate::problem::Wrong;

/// A value that does not fit the schema.
#[derive(Debug)]
pub(crate) struct Failure {
    /// The value's path, for example `application[0].upload`; empty until a table or a list that holds it adds it.
    pub(crate) path: String,
    pub(crate) wrong: Wrong,
    /// The keys that a table has, where the fault is a key that it has not.
    pub(crate) known: Option<&'static [&'static str]>,
}

impl Failure {
    fn at(mut self, path: &str) -> Self {
        if self.path.is_empty() {
            path.clone_into(&mut self.path);
        }
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.wrong)
    }
}

impl std::error::Error for Failure {}

impl serde::de::Error for Failure {
    fn custom<T: fmt::Display>(text: T) -> Self {
        Self {
            path: String::new(),
            wrong: Wrong::from_text(&text.to_string()),
            known: None,
        }
    }

    fn missing_field(field: &'static str) -> Self {
        Self::custom(format!("lacks its {field} → add {field} = \"…\""))
    }
}

/// Reads `table` as `T`. Each fault goes to `report`; the default of the faulty value stands in for it.
pub(crate) fn read<T: DeserializeOwned + Default>(
    table: &Value,
    mut report: impl FnMut(Failure),
) -> T {
    let mut skipped = BTreeSet::new();
    loop {
        match T::deserialize(Reader {
            value: table,
            path: "",
            skipped: &skipped,
        }) {
            Ok(value) => return value,
            Err(failure) => {
                let is_new = skipped.insert(failure.path.clone());
                report(failure);
                if !is_new {
                    return T::default();
                }
            }
        }
    }
}

/// The path of a key in the table at `path`.
pub(crate) fn child(path: &str, key: &str) -> String {
    match path {
        "" => key.to_owned(),
        "registries" => format!("registries.\"{key}\""),
        _ => format!("{path}.{key}"),
    }
}

#[derive(Clone, Copy)]
struct Reader<'a> {
    value: &'a Value,
    path: &'a str,
    skipped: &'a BTreeSet<String>,
}

impl<'de> Deserializer<'de> for Reader<'_> {
    type Error = Failure;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
        match self.value {
            Value::String(text) => visitor.visit_str(text),
            Value::Integer(number) => visitor.visit_i64(*number),
            Value::Float(number) => visitor.visit_f64(*number),
            Value::Boolean(truth) => visitor.visit_bool(*truth),
            Value::Datetime(time) => visitor.visit_str(&time.to_string()),
            Value::Array(items) => visitor.visit_seq(Items {
                reader: self,
                items: items.iter().enumerate(),
            }),
            Value::Table(table) => visitor.visit_map(Fields {
                reader: self,
                fields: table.iter(),
                known: None,
                next: None,
            }),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
        visitor.visit_some(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
        if self.value.is_array() {
            return self.deserialize_any(visitor);
        }
        Err(Failure::custom(format!(
            "is no list of tables → write each entry as [[{}]]",
            self.path
        )))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
        if self.value.is_table() {
            return self.deserialize_any(visitor);
        }
        Err(Failure::custom(format!(
            "is no table → write [{}.\"HOST\"]",
            self.path
        )))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        known: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Failure> {
        match self.value {
            Value::Table(table) => visitor.visit_map(Fields {
                reader: self,
                fields: table.iter(),
                known: Some(known),
                next: None,
            }),
            _ => {
                let table = self
                    .path
                    .split('[')
                    .next()
                    .filter(|table| *table != self.path);
                let table = table.map_or_else(
                    || format!("[{}]", self.path),
                    |table| format!("[[{table}]]"),
                );
                Err(Failure::custom(format!(
                    "is no table → write it as {table} with {} below it",
                    known[0]
                )))
            }
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Failure> {
        visitor.visit_newtype_struct(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple
        tuple_struct enum identifier ignored_any
    }
}

struct Items<'a> {
    reader: Reader<'a>,
    items: std::iter::Enumerate<std::slice::Iter<'a, Value>>,
}

impl<'de> SeqAccess<'de> for Items<'_> {
    type Error = Failure;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Failure> {
        for (at, value) in self.items.by_ref() {
            let path = format!("{}[{at}]", self.reader.path);
            if !self.reader.skipped.contains(&path) {
                let reader = Reader {
                    value,
                    path: &path,
                    ..self.reader
                };
                return seed
                    .deserialize(reader)
                    .map(Some)
                    .map_err(|failure| failure.at(&path));
            }
        }
        Ok(None)
    }
}

struct Fields<'a> {
    reader: Reader<'a>,
    fields: toml::map::Iter<'a, String, Value>,
    known: Option<&'static [&'static str]>,
    next: Option<(String, &'a Value)>,
}

impl<'de> MapAccess<'de> for Fields<'_> {
    type Error = Failure;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Failure> {
        for (key, value) in self.fields.by_ref() {
            let path = child(self.reader.path, key);
            if self.reader.skipped.contains(&path) {
                continue;
            }
            if let Some(known) = self.known.filter(|known| !known.contains(&key.as_str())) {
                let wrong = Wrong {
                    what: "is an unknown key".to_owned(),
                    cure: String::new(),
                };
                return Err(Failure {
                    path,
                    wrong,
                    known: Some(known),
                });
            }
            let read: Result<K::Value, Failure> = seed.deserialize(StrDeserializer::new(key));
            let read = read.map_err(|failure| failure.at(&path))?;
            self.next = Some((path, value));
            return Ok(Some(read));
        }
        Ok(None)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Failure> {
        let Some((path, value)) = self.next.take() else {
            return Err(Failure::custom("has no value"));
        };
        let reader = Reader {
            value,
            path: &path,
            ..self.reader
        };
        seed.deserialize(reader)
            .map_err(|failure| failure.at(&path))
    }
}

/// Reads one value that a text stands for.
pub(crate) fn from_text<'de, T: Deserialize<'de>>(text: &'de str) -> Result<T, Failure> {
    T::deserialize(StrDeserializer::<Failure>::new(text))
}
