//! The rows of a sweep: every combination of what the flags and the file of rows list, each a
//! command line of `gptq quantize`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, bail};
use clap::{ArgAction, CommandFactory, FromArgMatches};
use serde_json::{Map, Value};

use super::super::quantize;

/// Alternatives for one option of `gptq quantize`: name without dashes, and value, of each. Bits and
/// sizes to reach are alternatives for each other.
pub(super) type Axis = Vec<(String, String)>;

/// Option and value of each option of a row.
pub(super) type Settings = Vec<(String, String)>;

/// One run.
#[derive(Debug)]
pub(super) struct Row {
    /// Unique in the sweep, and a file name.
    pub(super) name: String,
    /// What rows that differ in size alone have in common.
    pub(super) series: String,
    /// Option and value, sorted by option.
    pub(super) settings: Settings,
    /// The options as `gptq quantize` takes them.
    pub(super) line: Vec<String>,
    /// The same, read.
    pub(super) args: quantize::Args,
}

/// `gptq quantize` as a parser of its own.
#[derive(Debug, clap::Parser)]
#[command(name = "gptq quantize")]
struct Line {
    #[command(flatten)]
    args: quantize::Args,
}

/// A group of axes whose combinations are rows, and the name that they were given.
#[derive(Debug, Default)]
pub(super) struct Matrix {
    pub(super) name: Option<String>,
    pub(super) axes: Vec<Axis>,
}

impl Matrix {
    /// Adds `axis` unless there is one for the same option.
    pub(super) fn add_default(&mut self, axis: &Axis) {
        let role = |axis: &Axis| axis.first().map(|(option, _)| role(option).to_owned());
        if !self.axes.iter().any(|own| role(own) == role(axis)) {
            self.axes.push(axis.clone());
        }
    }
}

/// All combinations of the matrices as rows for `model`, in order, each once.
///
/// # Errors
/// An option that `gptq quantize` does not have, that a sweep decides itself, or a value out of
/// range; the message names the row.
pub(super) fn rows(model: &str, matrices: &[Matrix]) -> anyhow::Result<Vec<Row>> {
    let command = Line::command();
    let mut found: Vec<(Option<String>, Settings)> = Vec::new();
    for matrix in matrices {
        let mut combinations = vec![Vec::new()];
        for axis in &matrix.axes {
            combinations = combinations
                .iter()
                .flat_map(|row: &Settings| {
                    axis.iter()
                        .map(|option| [row.as_slice(), std::slice::from_ref(option)].concat())
                })
                .collect();
        }
        for mut settings in combinations {
            drop_unused(&mut settings);
            settings.sort();
            if !found.iter().any(|(_, other)| *other == settings) {
                found.push((matrix.name.clone(), settings));
            }
        }
    }
    let varied: BTreeMap<Option<String>, BTreeSet<String>> = found
        .iter()
        .map(|(name, _)| {
            let of = found.iter().filter(|(other, _)| other == name);
            (name.clone(), varied(&of.map(|(_, settings)| settings).collect::<Vec<_>>()))
        })
        .collect();
    let mut names = BTreeSet::new();
    let row = |(given, settings): (Option<String>, Settings)| {
        // A name tells rows from those of other names.
        let varied = &varied[&given];
        let parts: Vec<String> = label(&settings, varied, given.is_some());
        let mut name = file_name(&match &given {
            Some(given) if !parts.is_empty() => format!("{given}-{}", parts.join("-")),
            Some(given) => given.clone(),
            None => parts.join("-"),
        });
        while !names.insert(name.clone()) {
            name.push('_');
        }
        let fixed: Settings = settings.iter().filter(|(o, _)| role(o) != "bits").cloned().collect();
        let named = given.is_some();
        let series = given.unwrap_or_default();
        let series =
            [series].into_iter().filter(|s| !s.is_empty()).chain(label(&fixed, varied, named));
        let series = series.collect::<Vec<_>>().join(" ");
        let line = line(&command, &settings).with_context(|| format!("row {name}"))?;
        // A sweep gives each row its place.
        let all = ["gptq quantize", model, "--output", "row"].into_iter().map(str::to_owned);
        let matches = Line::command().try_get_matches_from(all.chain(line.iter().cloned()));
        let args = matches.and_then(|matches| Line::from_arg_matches(&matches));
        let args = args.map_err(|error| {
            let text = error.to_string();
            let reason = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
            anyhow::anyhow!("row {name}: {reason}")
        })?;
        Ok(Row { name, series, settings, line, args: args.args })
    };
    found.into_iter().map(row).collect()
}

/// Reads rows from a TOML or JSON file: `defaults` for all, and `row`, a list of tables from options
/// to values. A list of values stands for alternatives, a list in it for sources that are mixed.
///
/// # Errors
/// If it cannot be read or has another form.
pub(super) fn read(path: &Path) -> anyhow::Result<Vec<Matrix>> {
    let text = super::super::read_text(path)?;
    let json = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("json"));
    let value: anyhow::Result<Value> = if json {
        serde_json::from_str(&text).map_err(anyhow::Error::from)
    } else {
        // Its own message shows the whole line.
        toml::from_str(&text).map_err(|error| {
            let before = text.as_bytes().iter().take(error.span().map_or(0, |span| span.start));
            let line = before.filter(|&&byte| byte == b'\n').count() + 1;
            anyhow::anyhow!("line {line}: {}", error.message())
        })
    };
    let value = value.with_context(|| format!("cannot read rows from {}", path.display()))?;
    parse(&value).with_context(|| format!("rows of {}", path.display()))
}

fn parse(value: &Value) -> anyhow::Result<Vec<Matrix>> {
    let Value::Object(map) = value else { bail!("expected a table with `row`") };
    if let Some(odd) = map.keys().find(|key| !["defaults", "row"].contains(&key.as_str())) {
        bail!("unknown key `{odd}`; expected `defaults` and `row`");
    }
    let table = |value: &Value| -> anyhow::Result<(Option<String>, Vec<Axis>)> {
        let Value::Object(map) = value else { bail!("expected a table of options, not {value}") };
        let name = map.get("name").map(|name| match name {
            Value::String(name) => Ok(name.clone()),
            other => bail!("`name` is {other}, not a string"),
        });
        Ok((name.transpose()?, axes(map)?))
    };
    let defaults = map.get("defaults").map(&table).transpose()?.unwrap_or_default().1;
    let Some(Value::Array(rows)) = map.get("row") else { bail!("`row` is not a list of tables") };
    let matrix = |row: &Value| {
        let (name, axes) = table(row)?;
        let mut matrix = Matrix { name, axes };
        for axis in &defaults {
            matrix.add_default(axis);
        }
        Ok(matrix)
    };
    rows.iter().map(matrix).collect()
}

fn axes(map: &Map<String, Value>) -> anyhow::Result<Vec<Axis>> {
    let scalar = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(_) | Value::Bool(_) => Ok(value.to_string()),
        other => bail!("{other} is no value of an option"),
    };
    let alternative = |value: &Value| match value {
        Value::Array(parts) => {
            let parts = parts.iter().map(scalar).collect::<anyhow::Result<Vec<_>>>()?;
            if let Some(odd) = parts.iter().find(|part| part.contains(MIX)) {
                bail!("`{odd}` cannot be mixed with others: `{MIX}` stands between sources");
            }
            Ok(parts.join(MIX))
        }
        other => scalar(other),
    };
    let mut found: Vec<Axis> = Vec::new();
    for (option, value) in map.iter().filter(|(option, _)| *option != "name") {
        let values = match value {
            Value::Array(values) => values.iter().map(alternative).collect(),
            other => scalar(other).map(|value| vec![value]),
        };
        let values = values.with_context(|| format!("option `{option}`"))?;
        let axis = values.into_iter().map(|value| (option.replace('_', "-"), value));
        match found.iter_mut().find(|own| own.first().is_some_and(|(o, _)| role(o) == role(option)))
        {
            Some(own) => own.extend(axis),
            None => found.push(axis.collect()),
        }
    }
    Ok(found)
}

/// Bits and sizes to reach say the same: how large the result is.
fn role(option: &str) -> &str {
    if option.replace('_', "-") == "target-bpw" { "bits" } else { option }
}

/// Leaves out what the method of a row has no use for: rows that differ in nothing else would be the same.
fn drop_unused(settings: &mut Settings) {
    let all = settings.clone();
    settings.retain(|(option, _)| !is_unused(&all, option));
}

/// Whether a row has no use for an option: its method, grids that are all asymmetric for the sign of scales, or no
/// correction for its strength.
fn is_unused(settings: &[(String, String)], option: &str) -> bool {
    let is = |option: &str, value: &str| settings.iter().any(|(o, v)| o == option && v == value);
    let corrects = match settings.iter().find(|(o, _)| o == "correction") {
        Some((_, correction)) => correction != "none",
        None => !is("method", "obq") && !is("awq-scales", "true"),
    };
    let rounds = is("method", "rtn") || is("method", "awq");
    rounds && OF_SOLVERS.contains(&option)
        || (rounds || is("method", "obq")) && OF_ORDER.contains(&option)
        || is("method", "rtn") && OF_DATA.contains(&option)
        || is("method", "awq") && OF_SCALES.contains(&option)
        // Weighed by the sweep.
        || (is("method", "rtn") || is("method", "obq")) && option == "scale-search" && is(option, "hessian")
        // Rules may make grids symmetric; that of the head is.
        || is("sym", "false")
            && option == "signed-scales"
            && !is("lm-head", "true")
            && !settings.iter().any(|(o, _)| o == "dynamic")
        || !corrects && option == "correction-strength"
}

/// The options that are not the same in all rows.
fn varied(rows: &[&Settings]) -> BTreeSet<String> {
    let options: BTreeSet<&(String, String)> = rows.iter().copied().flatten().collect();
    let in_all = |(option, value): &(String, String)| {
        rows.iter().all(|row| {
            let own = row.iter().find(|(o, _)| o == option);
            // What a method has no use for makes no difference.
            own.map_or_else(|| is_unused(row, option), |(_, v)| v == value)
        })
    };
    options.into_iter().filter(|pair| !in_all(pair)).map(|(option, _)| option.clone()).collect()
}

/// What a row is called by: method and what varies.
fn label(settings: &[(String, String)], varied: &BTreeSet<String>, named: bool) -> Vec<String> {
    let value =
        |option: &str| settings.iter().find(|(o, _)| o == option).map(|(_, value)| value.as_str());
    let mut parts = Vec::new();
    if varied.contains("method") || (value("method").is_some() && !named) {
        parts.push(value("method").unwrap_or("gptq").to_owned());
    }
    parts.extend(value("bits").map(|bits| format!("{bits}bit")));
    parts.extend(value("target-bpw").map(|bits| format!("{bits}bpw")));
    for (option, value) in settings.iter().filter(|(option, _)| varied.contains(option)) {
        parts.push(match option.as_str() {
            "method" | "bits" | "target-bpw" => continue,
            "group-size" => format!("g{value}"),
            "sym" => (if value == "true" { "sym" } else { "asym" }).to_owned(),
            "damp-percent" => format!("damp{value}"),
            "order" | "scale-search" | "token-weights" => value.clone(),
            "calibration" => {
                let stem = |source: &str| {
                    let (file, weight) = gptq_quantize::calibration::split_weight(source);
                    let stem = Path::new(file).file_stem().unwrap_or_default().to_string_lossy();
                    let share = if weight == 1.0 { String::new() } else { format!("@{weight}") };
                    format!("{stem}{share}")
                };
                sources(value).into_iter().map(stem).collect::<Vec<_>>().join(MIX)
            }
            other if value == "true" => other.to_owned(),
            other if value == "false" => format!("no-{other}"),
            other => format!("{other}={value}"),
        });
    }
    parts
}

/// The text as a file name: other characters than letters, digits and `._+=@-` become `_`.
fn file_name(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._+=@-".contains(c);
    let name: String = text.chars().map(|c| if plain(c) { c } else { '_' }).collect();
    let name = name.trim_start_matches(['.', '-']);
    let name: String = name.chars().take(LONGEST_NAME).collect();
    if name.is_empty() { "default".to_owned() } else { name }
}

/// The settings as arguments of `gptq quantize`.
fn line(command: &clap::Command, settings: &[(String, String)]) -> anyhow::Result<Vec<String>> {
    let find = |name: &str| command.get_arguments().find(|arg| arg.get_long() == Some(name));
    let mut line = Vec::new();
    for (option, value) in settings {
        if OF_THE_SWEEP.contains(&option.as_str()) {
            bail!("the sweep itself decides on --{option}");
        }
        let Some(arg) = find(option) else { bail!("`gptq quantize` has no option --{option}") };
        if arg.get_action().takes_values() {
            let many = matches!(arg.get_action(), ArgAction::Append);
            let values: Vec<&str> = if many { sources(value) } else { vec![value] };
            line.extend(values.into_iter().map(|value| format!("--{option}={value}")));
            continue;
        }
        let opposite = format!("no-{option}");
        match value.as_str() {
            "true" => line.push(format!("--{option}")),
            "false" if find(&opposite).is_some() => line.push(format!("--{opposite}")),
            "false" => {}
            other => bail!("--{option} is a switch: true or false, not `{other}`"),
        }
    }
    Ok(line)
}

/// Between calibration sources that are mixed.
const MIX: &str = "+";

/// The sources of a mixture. A file whose name has a `+` is one, by itself.
pub(super) fn sources(value: &str) -> Vec<&str> {
    let file = gptq_quantize::calibration::split_weight(value).0;
    if Path::new(file).exists() { vec![value] } else { value.split(MIX).collect() }
}

/// Options of the sweep over columns from left to right, which the methods `rtn`, `awq` and `obq` do not make.
const OF_ORDER: [&str; 5] =
    ["order", "desc-act", "act-group-aware", "no-act-group-aware", "static-groups"];

/// Options of solvers, which the methods `rtn` and `awq` have no use for.
const OF_SOLVERS: [&str; 5] =
    ["damp-percent", "damp-auto-increment", "correction", "correction-strength", "awq-scales"];

/// Options of the search for scales; that of the method `awq` is its own.
const OF_SCALES: [&str; 2] = ["scale-search", "mse"];

/// Options of calibration data, which the method `rtn` does not read.
const OF_DATA: [&str; 13] = [
    "token-weights",
    "activations",
    "activation-dtype",
    "no-true-sequential",
    "moe-fallback",
    "refine",
    "tune-blocks",
    "calibration",
    "nsamples",
    "seqlen",
    "seed",
    "calibration-temperature",
    "calibration-top-k",
];

/// What a sweep decides itself.
const OF_THE_SWEEP: [&str; 5] = ["output", "overwrite", "resume", "dry-run", "json"];

const LONGEST_NAME: usize = 120;

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(option: &str, values: &[&str]) -> Axis {
        values.iter().map(|value| (option.to_owned(), (*value).to_owned())).collect()
    }

    fn names(axes: Vec<Axis>) -> Vec<String> {
        let rows = rows("model", &[Matrix { name: None, axes }]).unwrap();
        rows.into_iter().map(|row| row.name).collect()
    }

    fn message(axes: Vec<Axis>) -> String {
        rows("model", &[Matrix { name: None, axes }]).unwrap_err().to_string()
    }

    #[test]
    fn the_rows_of_the_documentation_are_rows() {
        // Of the checkout that is tested, whatever was built before.
        let here = std::env::var_os("CARGO_MANIFEST_DIR").unwrap();
        let concepts = Path::new(&here).join("../../docs/concepts");
        for (file, count) in [("options.toml", 218), ("overfitting.toml", 13), ("results.toml", 40)]
        {
            let rows = rows("model", &read(&concepts.join(file)).unwrap()).unwrap();
            assert_eq!(rows.len(), count, "{file}");
            for row in rows {
                row.args.options().unwrap().check().unwrap();
            }
        }
    }

    #[test]
    fn rows_are_all_combinations_each_once() {
        let axes = || {
            vec![
                axis("method", &["gptq", "rtn"]),
                axis("bits", &["4", "3"]),
                axis("order", &["natural", "group-aware"]),
                axis("sym", &["true"]),
            ]
        };
        assert_eq!(
            names(axes()),
            [
                "gptq-4bit-natural",
                "gptq-4bit-group-aware",
                "gptq-3bit-natural",
                "gptq-3bit-group-aware",
                "rtn-4bit",
                "rtn-3bit"
            ],
            "rounding has no order"
        );
        let rows = rows("model", &[Matrix { name: None, axes: axes() }]).unwrap();
        assert_eq!(rows[0].series, "gptq natural");
        assert_eq!(rows[0].line, ["--bits=4", "--method=gptq", "--order=natural", "--sym"]);
    }

    #[test]
    fn options_that_a_method_has_no_use_for_make_no_rows() {
        let axes = vec![
            axis("method", &["gptq", "awq", "rtn"]),
            axis("correction", &["none", "qep"]),
            axis("damp-percent", &["0.01", "auto"]),
        ];
        assert_eq!(
            names(axes),
            [
                "gptq-correction=none-damp0.01",
                "gptq-correction=none-dampauto",
                "gptq-correction=qep-damp0.01",
                "gptq-correction=qep-dampauto",
                "awq",
                "rtn"
            ]
        );
        let searches = vec![
            axis("method", &["rtn", "awq"]),
            axis("scale-search", &["mse", "hessian"]),
            axis("token-weights", &["balanced", "uniform"]),
        ];
        assert_eq!(names(searches), ["rtn-mse", "rtn", "awq-balanced", "awq-uniform"]);
        let orders = vec![
            axis("method", &["gptq", "obq"]),
            axis("static-groups", &["true", "false"]),
            axis("activations", &["f32"]),
        ];
        assert_eq!(names(orders), ["gptq-static-groups", "gptq-no-static-groups", "obq"]);
        let signs =
            vec![axis("sym", &["true", "false"]), axis("signed-scales", &["true", "false"])];
        assert_eq!(names(signs), ["signed-scales-sym", "no-signed-scales-sym", "asym"]);
    }

    #[test]
    fn mixtures_and_switches_become_options() {
        let axes = vec![
            axis("calibration", &["a/x.txt+self@0.5"]),
            axis("signed-scales", &["true", "false"]),
            axis("static-groups", &["false"]),
        ];
        let rows = rows("model", &[Matrix { name: Some("mine".into()), axes }]).unwrap();
        assert_eq!(
            rows[1].line,
            ["--calibration=a/x.txt", "--calibration=self@0.5", "--no-signed-scales"]
        );
        assert_eq!(
            (&*rows[1].name, &*rows[1].series),
            ("mine-no-signed-scales", "mine no-signed-scales")
        );
    }

    #[test]
    fn a_plus_in_a_name_is_no_mixture() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a+b.txt");
        std::fs::write(&file, "text").unwrap();
        let name = file.to_str().unwrap();
        let line = |value: &str| {
            let axes = vec![axis("calibration", &[value])];
            rows("model", &[Matrix { name: None, axes }]).unwrap().remove(0).line
        };
        assert_eq!(line(name), [format!("--calibration={name}")]);
        assert_eq!(line(&format!("{name}@2")), [format!("--calibration={name}@2")]);
        assert_eq!(line("a.txt+self").len(), 2);
        let list = toml::from_str("[[row]]\ncalibration = [[\"a+b.txt\", \"self\"]]").unwrap();
        assert!(format!("{:?}", parse(&list).unwrap_err()).contains("cannot be mixed"));
    }

    #[test]
    fn wrong_rows_are_named() {
        assert!(message(vec![axis("bits", &["5"])]).contains("5bit"));
        assert!(
            format!("{:?}", rows("m", &[Matrix { name: None, axes: vec![axis("bitz", &["5"])] }]))
                .contains("no option --bitz")
        );
        let of_the_sweep =
            rows("m", &[Matrix { name: None, axes: vec![axis("resume", &["true"])] }]);
        assert!(format!("{of_the_sweep:?}").contains("sweep itself"));
    }

    #[test]
    fn files_of_rows_have_defaults_and_alternatives() {
        let text = r#"
            defaults = { group_size = 64, bits = [4, 3] }
            [[row]]
            name = "paper"
            scale-search = "minmax"
            signed-scales = false
            [[row]]
            target-bpw = 3.5
            calibration = [["a.txt", "b.txt@0.3"], "self"]
        "#;
        let matrices = parse(&toml::from_str(text).unwrap()).unwrap();
        let rows = rows("model", &matrices).unwrap();
        let names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["paper-4bit", "paper-3bit", "3.5bpw-a+b@0.3", "3.5bpw-self"]);
        assert!(rows[2].line.contains(&"--group-size=64".to_owned()));
        assert_eq!(rows[2].settings.iter().find(|(o, _)| o == "bits"), None);
        for bad in ["row = 1", "rows = []", "[[row]]\nbits = {}", "[[row]]\nname = 1"] {
            assert!(parse(&toml::from_str(bad).unwrap()).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_file_names() {
        assert_eq!(file_name("a/b c:d"), "a_b_c_d");
        assert_eq!(file_name("../../x"), "_.._x");
        assert_eq!(file_name(""), "default");
        assert_eq!(file_name(&"x".repeat(500)).len(), LONGEST_NAME);
    }
}
