//! GPTQModel's `dynamic`: overrides of the quantization settings for modules whose names match a regular expression.

use crate::error::{FormatError, Result};
use crate::pack::Bits;
use regex::{RegexBuilder, RegexSet, RegexSetBuilder};
use serde_json::{Map, Value};

/// Memory that all compiled patterns together may take, in bytes.
const COMPILED_LIMIT: usize = 32 << 20;
/// Memory that one compiled pattern may take, in bytes.
const PATTERN_LIMIT: usize = 1 << 20;

/// An ordered list of rules: a pattern, with the prefix `-:` to leave matching modules unquantized or `+:` (or none) to
/// change their settings.
///
/// Patterns match from the start of the module name (`model.layers.0.mlp.down_proj`) but need not reach its end. Rules
/// with `-:` are tried first, then the others; in each kind the first match wins. Matching takes time linear in the name,
/// whatever the pattern.
#[derive(Clone, Debug)]
pub struct Dynamic {
    /// As given.
    source: Map<String, Value>,
    /// In the order in which they are tried.
    rules: Vec<Rule>,
    patterns: RegexSet,
}

/// Settings that a rule changes; `None` keeps the setting of the whole model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Overrides {
    /// Bits of a code.
    pub bits: Option<Bits>,
    /// Inputs per group, or -1 for all.
    pub group_size: Option<i64>,
    /// Symmetric grid.
    pub sym: Option<bool>,
    /// Activation order.
    pub desc_act: Option<bool>,
    /// Activation order inside and among groups, without run-time cost.
    pub act_group_aware: Option<bool>,
    /// Group scales found before the first column is quantized.
    pub static_groups: Option<bool>,
    /// Share of the mean diagonal that is added to the Hessian's diagonal.
    pub damp_percent: Option<f64>,
    /// Exponent of the error norm in the search for scales; 0 for none.
    pub mse: Option<f64>,
    /// Keys that are none of the above, kept for the config and otherwise ignored.
    pub unknown: Vec<String>,
}

/// What the rules say about a module.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Decision<'a> {
    /// No rule matches: the settings of the whole model hold.
    Default,
    /// A `-:` rule matches: the module is not quantized.
    Skip,
    /// A `+:` rule matches.
    Override(&'a Overrides),
}

#[derive(Clone, Debug)]
enum Rule {
    Skip,
    Override(Overrides),
}

impl Dynamic {
    /// Parses an object from pattern to settings.
    ///
    /// # Errors
    /// If a pattern is not a regular expression without look-around and back-references, is too large when compiled, or a
    /// setting has an impossible value.
    pub fn from_map(source: &Map<String, Value>) -> Result<Self> {
        let mut skips = Vec::new();
        let mut overrides = Vec::new();
        for (rule, settings) in source {
            if let Some(pattern) = rule.strip_prefix("-:") {
                skips.push((rule, pattern, Rule::Skip));
            } else {
                let pattern = rule.strip_prefix("+:").unwrap_or(rule);
                let settings = Overrides::parse(rule, settings)?;
                overrides.push((rule, pattern, Rule::Override(settings)));
            }
        }
        let mut patterns = Vec::with_capacity(source.len());
        let mut rules = Vec::with_capacity(source.len());
        for (rule, pattern, decision) in skips.into_iter().chain(overrides) {
            // The group keeps alternatives together: `a|b` must not become `^a` or `b` anywhere.
            let anchored = format!("^(?:{pattern})");
            check_pattern(rule, &anchored)?;
            patterns.push(anchored);
            rules.push(decision);
        }
        let patterns =
            RegexSetBuilder::new(&patterns).size_limit(COMPILED_LIMIT).build().map_err(|e| {
                FormatError::Dynamic {
                    rule: format!("{} rules together", source.len()),
                    reason: e.to_string(),
                }
            })?;
        Ok(Self { source: source.clone(), rules, patterns })
    }

    /// The object as it was given.
    pub fn source(&self) -> &Map<String, Value> {
        &self.source
    }

    /// The object with the rules that leave modules out in front, each kind in its order: these count first, but vLLM and
    /// SGLang take the first rule that matches.
    pub fn skips_first(&self) -> Map<String, Value> {
        let (skips, others): (Vec<_>, Vec<_>) =
            self.source.clone().into_iter().partition(|(rule, _)| rule.starts_with("-:"));
        skips.into_iter().chain(others).collect()
    }

    /// Whether there is no rule.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// What the rules say about the module of that name.
    pub fn decide(&self, module: &str) -> Decision<'_> {
        match self.patterns.matches(module).iter().next() {
            None => Decision::Default,
            Some(first) => match &self.rules[first] {
                Rule::Skip => Decision::Skip,
                Rule::Override(overrides) => Decision::Override(overrides),
            },
        }
    }

    /// Keys of rules that have no meaning here, each once, for a warning.
    pub fn unknown_keys(&self) -> Vec<&str> {
        let mut keys: Vec<&str> = self
            .rules
            .iter()
            .filter_map(|r| match r {
                Rule::Override(o) => Some(o.unknown.iter().map(String::as_str)),
                Rule::Skip => None,
            })
            .flatten()
            .collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }
}

impl Default for Dynamic {
    fn default() -> Self {
        Self { source: Map::new(), rules: Vec::new(), patterns: RegexSet::empty() }
    }
}

impl PartialEq for Dynamic {
    fn eq(&self, other: &Self) -> bool {
        // All else derives from the source.
        self.source == other.source
    }
}

impl Overrides {
    fn parse(rule: &str, settings: &Value) -> Result<Self> {
        let Value::Object(settings) = settings else {
            return Err(FormatError::Dynamic {
                rule: short(rule),
                reason: format!(
                    "expected an object of settings, found {}; to skip modules use the prefix `-:`",
                    short(&settings.to_string())
                ),
            });
        };
        let mut out = Self::default();
        for (key, value) in settings {
            if value.is_null() {
                continue;
            }
            let wrong = |expected: &str| FormatError::Dynamic {
                rule: short(rule),
                reason: format!(
                    "`{key}` should be {expected}, but is {}",
                    short(&value.to_string())
                ),
            };
            let boolean = || value.as_bool().ok_or_else(|| wrong("true or false")).map(Some);
            match key.as_str() {
                "bits" => {
                    let bits = value.as_u64().and_then(|b| Bits::try_from(b).ok());
                    out.bits = Some(bits.ok_or_else(|| wrong("2, 3, 4 or 8"))?);
                }
                "group_size" => {
                    let size = value.as_i64().filter(|&g| is_group_size(g));
                    out.group_size = Some(size.ok_or_else(|| wrong("-1 or a positive integer"))?);
                }
                "sym" => out.sym = boolean()?,
                "desc_act" => out.desc_act = boolean()?,
                "act_group_aware" => out.act_group_aware = boolean()?,
                "static_groups" => out.static_groups = boolean()?,
                "damp_percent" => {
                    let damp = value.as_f64().filter(|d| *d > 0.0 && *d < 1.0);
                    out.damp_percent = Some(damp.ok_or_else(|| wrong("between 0 and 1"))?);
                }
                "mse" => {
                    let mse = value.as_f64().filter(|m| *m >= 0.0);
                    out.mse = Some(mse.ok_or_else(|| wrong("0 or a positive exponent"))?);
                }
                _ => out.unknown.push(key.clone()),
            }
        }
        Ok(out)
    }
}

/// -1 (all inputs in one group) or a positive count that fits the counts of a file.
pub(crate) fn is_group_size(size: i64) -> bool {
    size == -1 || (1..=i64::from(u32::MAX)).contains(&size)
}

fn check_pattern(rule: &str, anchored: &str) -> Result<()> {
    RegexBuilder::new(anchored)
        .size_limit(PATTERN_LIMIT)
        .build()
        .map(drop)
        .map_err(|e| {
            let reason = match &e {
                regex::Error::Syntax(text) if text.contains("look-around") => {
                    "look-around (`(?=`, `(?!`, `(?<=`, `(?<!`) is not supported; skip modules by a rule with `-:` instead"
                        .to_owned()
                }
                regex::Error::Syntax(text) if text.contains("backreferences") => {
                    "back-references are not supported".to_owned()
                }
                regex::Error::CompiledTooBig(_) => {
                    format!("the pattern needs more than {PATTERN_LIMIT} bytes when compiled; simplify its repetitions")
                }
                // The last line is the reason; those above it repeat the pattern.
                regex::Error::Syntax(text) => {
                    let reason = text.lines().last().unwrap_or_default();
                    reason.strip_prefix("error: ").unwrap_or(reason).to_owned()
                }
                other => other.to_string(),
            };
            FormatError::Dynamic {
                rule: short(rule),
                reason,
            }
        })
}

/// A rule or value as it is shown: the start of a long one.
fn short(text: &str) -> String {
    const SHOWN: usize = 80;
    let length = text.chars().count();
    if length <= SHOWN {
        return text.to_owned();
    }
    text.chars().take(SHOWN).chain(format!("... ({length} characters)").chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn dynamic(value: &Value) -> Result<Dynamic> {
        Dynamic::from_map(value.as_object().unwrap())
    }

    fn bits(d: &Dynamic, module: &str) -> Option<Bits> {
        match d.decide(module) {
            Decision::Override(o) => o.bits,
            _ => None,
        }
    }

    #[test]
    fn first_match_wins_and_negative_rules_come_first() {
        let d = dynamic(&json!({
            r"+:.*\.down_proj": {"bits": 8},
            r".*\.layers\.1\..*": {"bits": 3, "group_size": -1, "sym": false},
            r"+:.*_proj": {"bits": 2},
            r"-:.*\.layers\.0\.mlp\.down_proj": {},
        }))
        .unwrap();
        assert_eq!(d.decide("model.layers.0.mlp.down_proj"), Decision::Skip);
        assert_eq!(bits(&d, "model.layers.1.mlp.down_proj"), Some(Bits::B8));
        assert_eq!(bits(&d, "model.layers.1.mlp.up_proj"), Some(Bits::B3));
        assert_eq!(bits(&d, "model.layers.2.mlp.up_proj"), Some(Bits::B2));
        assert_eq!(d.decide("lm_head"), Decision::Default);
    }

    #[test]
    fn patterns_match_from_the_start_but_need_not_reach_the_end() {
        let d = dynamic(&json!({r"layers\.0|lm_head": {"bits": 8}})).unwrap();
        assert_eq!(d.decide("model.layers.0.mlp.up_proj"), Decision::Default);
        assert_eq!(bits(&d, "layers.0.mlp.up_proj"), Some(Bits::B8));
        assert_eq!(d.decide("model.lm_head"), Decision::Default);
        assert_eq!(bits(&d, "lm_head"), Some(Bits::B8));
    }

    #[test]
    fn the_source_keeps_order_and_unknown_keys() {
        let source = json!({"b": {"bits": 4, "adapter": {"rank": 8}}, "a": {"adapter": 1}});
        let d = dynamic(&source).unwrap();
        assert_eq!(Value::Object(d.source().clone()), source);
        assert_eq!(d.source().keys().collect::<Vec<_>>(), ["b", "a"]);
        assert_eq!(d.unknown_keys(), ["adapter"]);
    }

    #[test]
    fn wrong_settings_are_refused_by_name() {
        for (settings, part) in [
            (json!({"bits": 5}), "`bits` should be 2, 3, 4 or 8, but is 5"),
            (json!({"group_size": 0}), "`group_size`"),
            (json!({"sym": "yes"}), "`sym`"),
            (json!({"damp_percent": 1.5}), "`damp_percent`"),
            (json!(false), "-:"),
        ] {
            let message = dynamic(&json!({ "+:x": settings })).unwrap_err().to_string();
            assert!(message.contains("`+:x`") && message.contains(part), "{message}");
        }
    }

    #[test]
    fn look_around_back_references_and_bombs_are_refused() {
        for (pattern, part) in [
            (r"^(?!.*mlp).*", "look-around"),
            (r"(a)\1", "back-references"),
            (r"(((\w{50}){50}){50}){50}", "bytes when compiled"),
            (r"(", "unclosed"),
        ] {
            let message = dynamic(&json!({ pattern: {} })).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
        let message = dynamic(&json!({ "(".repeat(10_000): {} })).unwrap_err().to_string();
        assert!(message.len() < 200 && message.contains("(10000 characters)"), "{message}");
    }

    #[test]
    fn nested_repetition_takes_linear_time() {
        let d = dynamic(&json!({r"(a+)+$": {"bits": 8}})).unwrap();
        assert_eq!(d.decide(&format!("{}b", "a".repeat(10_000))), Decision::Default);
    }
}
