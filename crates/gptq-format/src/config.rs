//! Typed access to `config.json` and other JSON objects, with errors that name file and key.

use crate::error::{FormatError, Result};
use crate::fs::read_json;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// A JSON object and where it came from. A key whose value is `null` counts as absent.
#[derive(Clone, Debug)]
pub struct Config {
    path: PathBuf,
    /// Keys of the objects that this one is nested in, each followed by a dot.
    prefix: String,
    map: Map<String, Value>,
}

impl Config {
    /// An object that was read from (or rebuilt from the metadata of) `path`.
    pub fn new(path: &Path, map: Map<String, Value>) -> Self {
        Self { path: path.to_owned(), prefix: String::new(), map }
    }

    /// Reads a file that holds one JSON object.
    ///
    /// # Errors
    /// If the file cannot be read or is not a JSON object.
    pub fn load(path: &Path) -> Result<Self> {
        match read_json(path)? {
            Value::Object(map) => Ok(Self::new(path, map)),
            other => Err(FormatError::Config {
                path: path.to_owned(),
                key: "(the whole file)".to_owned(),
                expected: "an object".to_owned(),
                got: shorten(&other),
            }),
        }
    }

    /// The file it came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The object itself.
    pub fn map(&self) -> &Map<String, Value> {
        &self.map
    }

    /// The value of `key`; `None` if absent or `null`.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// A required integer that is not negative.
    ///
    /// # Errors
    /// If it is absent or something else.
    pub fn u64(&self, key: &str) -> Result<u64> {
        self.required(key, "an integer that is not negative", whole)
    }

    /// An optional integer that is not negative.
    ///
    /// # Errors
    /// If it is something else.
    pub fn opt_u64(&self, key: &str) -> Result<Option<u64>> {
        self.optional(key, "an integer that is not negative", whole)
    }

    /// A required count or size.
    ///
    /// # Errors
    /// If it is absent or something else.
    pub fn usize(&self, key: &str) -> Result<usize> {
        self.required(key, "an integer that is not negative", |v| whole(v)?.try_into().ok())
    }

    /// An optional count or size.
    ///
    /// # Errors
    /// If it is something else.
    pub fn opt_usize(&self, key: &str) -> Result<Option<usize>> {
        self.optional(key, "an integer that is not negative", |v| whole(v)?.try_into().ok())
    }

    /// A required number.
    ///
    /// # Errors
    /// If it is absent or something else.
    pub fn f64(&self, key: &str) -> Result<f64> {
        self.required(key, "a number", Value::as_f64)
    }

    /// An optional number.
    ///
    /// # Errors
    /// If it is something else.
    pub fn opt_f64(&self, key: &str) -> Result<Option<f64>> {
        self.optional(key, "a number", Value::as_f64)
    }

    /// A required boolean.
    ///
    /// # Errors
    /// If it is absent or something else.
    pub fn bool(&self, key: &str) -> Result<bool> {
        self.required(key, "true or false", Value::as_bool)
    }

    /// An optional boolean.
    ///
    /// # Errors
    /// If it is something else.
    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>> {
        self.optional(key, "true or false", Value::as_bool)
    }

    /// A required text.
    ///
    /// # Errors
    /// If it is absent or something else.
    pub fn str(&self, key: &str) -> Result<&str> {
        self.required(key, "text", Value::as_str)
    }

    /// An optional text.
    ///
    /// # Errors
    /// If it is something else.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>> {
        self.optional(key, "text", Value::as_str)
    }

    /// An optional list.
    ///
    /// # Errors
    /// If it is something else.
    pub fn opt_array(&self, key: &str) -> Result<Option<&[Value]>> {
        self.optional(key, "a list", |v| v.as_array().map(Vec::as_slice))
    }

    /// An optional nested object; errors of its keys name them as `key.nested`.
    ///
    /// # Errors
    /// If it is something else.
    pub fn section(&self, key: &str) -> Result<Option<Self>> {
        let map = self.optional(key, "an object", Value::as_object)?;
        Ok(map.map(|map| Self {
            path: self.path.clone(),
            prefix: format!("{}{key}.", self.prefix),
            map: map.clone(),
        }))
    }

    /// The error that `key` should hold `expected`, for checks that a type cannot express.
    pub fn error(&self, key: &str, expected: impl Into<String>) -> FormatError {
        FormatError::Config {
            path: self.path.clone(),
            key: format!("{}{key}", self.prefix),
            expected: expected.into(),
            got: self.map.get(key).map_or_else(|| "nothing".to_owned(), shorten),
        }
    }

    fn required<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<T> {
        self.value(key).and_then(read).ok_or_else(|| self.error(key, expected))
    }

    fn optional<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(v) => Ok(Some(v)),
                None => Err(self.error(key, expected)),
            },
        }
    }
}

/// Some writers spell integers as `4.0`.
fn whole(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| {
        let float = value.as_f64()?;
        // Above 2^53 a float no longer names one integer.
        (float >= 0.0 && float.fract() == 0.0 && float <= 9_007_199_254_740_992.0)
            .then_some(float as u64)
    })
}

fn shorten(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        None => text,
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(value: Value) -> Config {
        let Value::Object(map) = value else { panic!("not an object") };
        Config::new(Path::new("m/config.json"), map)
    }

    #[test]
    fn values_are_read_by_type() {
        let c = config(json!({"n": 3, "f": 2.0, "e": 1e-5, "b": true, "s": "x", "null": null}));
        assert_eq!(c.u64("n").unwrap(), 3);
        assert_eq!(c.usize("f").unwrap(), 2);
        assert_eq!(c.f64("n").unwrap(), 3.0);
        assert_eq!(c.opt_f64("e").unwrap(), Some(1e-5));
        assert!(c.bool("b").unwrap());
        assert_eq!(c.opt_str("s").unwrap(), Some("x"));
        assert_eq!(c.opt_u64("null").unwrap(), None);
        assert_eq!(c.opt_usize("absent").unwrap(), None);
    }

    #[test]
    fn errors_name_file_key_and_value() {
        let c = config(json!({"n": -3, "rope_scaling": {"factor": "many"}, "f": 1.5}));
        assert_eq!(
            c.u64("n").unwrap_err().to_string(),
            "`m/config.json`: key `n`: expected an integer that is not negative, found -3"
        );
        assert!(c.u64("f").is_err());
        assert!(c.u64("hidden_size").unwrap_err().to_string().ends_with("found nothing"));
        let nested = c.section("rope_scaling").unwrap().unwrap();
        let message = nested.f64("factor").unwrap_err().to_string();
        assert!(message.contains("`rope_scaling.factor`"), "{message}");
        assert!(c.section("n").is_err());
    }

    #[test]
    fn long_values_are_cut_at_a_character() {
        let c = config(json!({"s": "é".repeat(500)}));
        assert!(c.u64("s").unwrap_err().to_string().len() < 400);
    }
}
