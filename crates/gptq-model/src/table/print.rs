//! A description as the file that says the same.

use std::fmt::Write;

use serde_json::Value;

use super::describe::{Description, Key, sections};
use crate::fields::ONLY;

impl Description {
    /// The family as a file for `--family`; what the config decides is told in comments.
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        for line in self.family.about().lines() {
            let _ = writeln!(text, "# {line}");
        }
        let name = self.family.model_type;
        let _ = write!(text, "model_type = \"{name}\"\nbase = \"{name}\"\n");
        text.push_str("\n# Key that the base reads = key of this model's config.json.\n[config]\n");
        for key in &self.keys {
            let _ = writeln!(text, "{} = \"{}\" # {}", key.name, key.name, key.about());
        }
        for (section, value) in sections(&self.table) {
            let Value::Object(values) = value else { continue };
            if section == "config" || section == "defaults" {
                continue;
            }
            let prefix = format!("{section}.");
            let decided = self.decided.iter().filter_map(|(path, keys)| {
                let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
                Some((path.strip_prefix(&prefix)?, keys.join(", ")))
            });
            let decided: Vec<_> = decided.collect();
            if values.is_empty() && decided.is_empty() {
                continue;
            }
            let _ = writeln!(text, "\n[{section}]");
            for (key, value) in values {
                let _ = writeln!(text, "{key} = {}", literal(&value));
            }
            for (key, keys) in decided {
                let _ = writeln!(text, "# {key}: decided by {keys}");
            }
        }
        text
    }
}

impl Key {
    /// Kind and default in words.
    pub fn about(&self) -> String {
        match (&self.default, self.required) {
            (Some(default), _) if self.kind == ONLY => format!("only {default}"),
            (Some(default), _) => format!("{}, default {default}", self.kind),
            (None, true) => format!("{}, required", self.kind),
            (None, false) => self.kind.to_owned(),
        }
    }
}

/// A value in TOML, whose strings, numbers, booleans and lists of these are written as JSON's.
fn literal(value: &Value) -> String {
    match value {
        Value::Array(items) => {
            format!("[{}]", items.iter().map(literal).collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}
