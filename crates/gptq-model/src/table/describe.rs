//! What a built-in family reads and does, found by asking it: its function is run on a made-up config and on changes of
//! that config, and what stays the same is the family's, what changes is the config's.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::FamilyTable;
use crate::families::{FAMILIES, Family};
use crate::fields::{Asked, FLAG, Fields, TEXT};
use crate::spec::Spec;
use crate::{ModelError, Result};

/// What a family reads and does.
#[derive(Debug, Clone)]
pub struct Description {
    /// The family.
    pub family: &'static Family,
    /// The keys of config.json that it reads, in alphabetical order.
    pub keys: Vec<Key>,
    /// What it does whatever the config says.
    pub table: FamilyTable,
    /// What the config decides: path in the table, for example `attention.qkv_bias`, to the keys that change it.
    pub decided: BTreeMap<String, BTreeSet<String>>,
    /// Tokens see only what is before them.
    pub causal: bool,
}

/// A key of config.json.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// Its name.
    pub name: String,
    /// Kind of its value, for example `number`; `fixed`: only the default is implemented, other values are refused.
    pub kind: &'static str,
    /// What it stands for when absent, where that is a fixed value.
    pub default: Option<String>,
    /// It must be there.
    pub required: bool,
}

/// What a family wants to know of each key.
type AskedKeys = BTreeMap<String, Asked>;

/// The description of a built-in family.
pub fn describe(model_type: &str) -> Option<Description> {
    let family = FAMILIES.iter().find(|family| family.model_type == model_type)?;
    let (config, spec, mut asked) = sample(family)?;
    let original = leaves(&spec);
    let mut decided: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut keys: AskedKeys = asked.clone();
    let mut queue: Vec<(Vec<String>, Map<String, Value>)> = Vec::new();
    for (key, about) in &asked {
        for value in others(key, about, config.get(key)) {
            let mut changed = config.clone();
            changed.insert(key.clone(), value);
            queue.push((vec![key.clone()], changed));
        }
    }
    // Two switches at once, for what takes both.
    let flags: Vec<&String> =
        asked.iter().filter(|(_, a)| a.kind == FLAG).map(|(k, _)| k).collect();
    for (index, one) in flags.iter().enumerate() {
        for two in &flags[index + 1..] {
            for values in [[true, true], [true, false], [false, true], [false, false]] {
                let mut changed = config.clone();
                changed.insert((*one).clone(), Value::from(values[0]));
                changed.insert((*two).clone(), Value::from(values[1]));
                queue.push((vec![(*one).clone(), (*two).clone()], changed));
            }
        }
    }
    asked.clear();
    for (names, changed) in queue {
        let (spec, new) = read(family, &changed);
        for (key, about) in new {
            let known = keys.entry(key).or_insert_with(|| about.clone());
            // A default that follows other keys is none to tell.
            if known.default != about.default {
                known.default = None;
            }
        }
        let Ok(spec) = spec else { continue };
        let leaves = leaves(&spec);
        let paths: BTreeSet<&String> = original.keys().chain(leaves.keys()).collect();
        for path in paths.into_iter().filter(|path| original.get(*path) != leaves.get(*path)) {
            let known = decided.entry(path.clone()).or_default();
            if !names.iter().any(|name| known.contains(name)) {
                known.extend(names.iter().cloned());
            }
        }
    }
    let table = without(&FamilyTable::of(&spec), &decided)?;
    let table = FamilyTable {
        model_type: Some(model_type.to_owned()),
        base: model_type.to_owned(),
        ..table
    };
    let keys = keys
        .into_iter()
        .filter(|(name, about)| !about.kind.is_empty() && name != "model_type")
        .map(|(name, Asked { kind, default, required })| Key { name, kind, default, required });
    let causal = spec.attention.causal;
    Some(Description { family, keys: keys.collect(), table, decided, causal })
}

/// The smallest config that the family accepts, what it makes of it, and the keys that it asked for.
fn sample(family: &Family) -> Option<(Map<String, Value>, Spec, AskedKeys)> {
    const MOST_KEYS: usize = 32;
    let mut config = Map::new();
    for _ in 0..MOST_KEYS {
        match read(family, &config) {
            (Ok(spec), asked) => return Some((config, spec, asked)),
            (Err(ModelError::MissingField { key, .. }), _) => {
                let value = value_of(&key);
                config.insert(key, value);
            }
            (Err(_), _) => return None,
        }
    }
    None
}

fn read(family: &Family, config: &Map<String, Value>) -> (Result<Spec>, AskedKeys) {
    let fields = Fields::new(Path::new("config.json"), config);
    let spec = family.build(&fields);
    (spec, fields.asked())
}

/// A value for a key that must be there. All sizes fit together: 8 heads of 64 columns.
fn value_of(key: &str) -> Value {
    match key {
        "vocab_size" => json!(64_000),
        "num_hidden_layers" | "n_layer" | "n_layers" | "num_layers" => json!(4),
        "num_attention_heads"
        | "n_head"
        | "n_heads"
        | "num_heads"
        | "num_experts"
        | "num_local_experts" => json!(8),
        "num_experts_per_tok" => json!(2),
        "sliding_window" | "window_size" => json!(64),
        "attention_types" => json!([[["global", "local"], 2]]),
        "intermediate_size" | "ffn_dim" | "hidden_dim" => json!(1024),
        _ => json!(512),
    }
}

/// Other values of a key than the one that it has.
fn others(key: &str, about: &Asked, old: Option<&Value>) -> Vec<Value> {
    let candidates = match about.kind {
        FLAG => vec![json!(true), json!(false)],
        TEXT => vec![json!("relu"), json!("silu"), json!("gelu")],
        "" => Vec::new(),
        _ => match old.and_then(Value::as_f64) {
            Some(number) => vec![json!(number * 2.0)],
            None => vec![value_of(key), json!(2), json!(0.5)],
        },
    };
    candidates.into_iter().filter(|value| Some(value) != old).collect()
}

/// Every value of the table of `spec`, by its path.
fn leaves(spec: &Spec) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    for (section, value) in sections(&FamilyTable::of(spec)) {
        if let Value::Object(values) = value {
            found
                .extend(values.into_iter().map(|(key, value)| (format!("{section}.{key}"), value)));
        }
    }
    found
}

/// The table as an object of sections; it consists of names, numbers and lists only, so that nothing can fail.
pub(super) fn sections(table: &FamilyTable) -> Map<String, Value> {
    match serde_json::to_value(table) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

/// The table without what the config decides.
fn without(
    table: &FamilyTable,
    decided: &BTreeMap<String, BTreeSet<String>>,
) -> Option<FamilyTable> {
    let mut map = sections(table);
    for path in decided.keys() {
        let (section, key) = path.split_once('.')?;
        if let Some(Value::Object(values)) = map.get_mut(section) {
            values.shift_remove(key);
        }
    }
    serde_json::from_value(Value::Object(map)).ok()
}
