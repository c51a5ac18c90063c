//! `gptq inspect`.

use std::collections::BTreeMap;

use gptq_checkpoint::inspect::TensorRow;
use gptq_checkpoint::{Inspection, ModuleInfo, TensorStats};
use serde_json::{Value, json};

use super::{open, progress};
use crate::Global;
use crate::output::table::{Align, Table, colour_allowed};
use crate::output::{json as json_output, size};

/// Show what a checkpoint holds, from its headers alone, or the values of one tensor.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory, .gguf file or hub id.
    model: String,
    /// List every quantized module and every other tensor instead of one line for each kind.
    #[arg(long)]
    modules: bool,
    /// Read this tensor (of a quantized module: its weights) and describe its values.
    #[arg(long, value_name = "NAME", conflicts_with = "modules")]
    tensor: Option<String>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let view = progress(global);
    let checkpoint = open(&args.model, &view)?;
    view.finish();
    if let Some(name) = &args.tensor {
        let stats = gptq_checkpoint::tensor_stats(&checkpoint, name)?;
        if args.json {
            return json_output::print(&with_model(args, &stats)?);
        }
        return crate::output::print(&describe(&stats));
    }
    let seen = gptq_checkpoint::inspect(&checkpoint)?;
    if args.json {
        return json_output::print(&with_model(args, &seen)?);
    }
    let colour = colour_allowed(&std::io::stdout());
    let mut text = summary(&seen).render(colour);
    if !seen.modules.is_empty() {
        text.push('\n');
        text.push_str(&modules(&seen.modules, args.modules).render(colour));
    }
    text.push('\n');
    text.push_str(&tensors(&seen.tensors, args.modules).render(colour));
    crate::output::print(&text)
}

/// The object with the model's name in front.
fn with_model(args: &Args, value: &impl serde::Serialize) -> anyhow::Result<Value> {
    let mut out = json!({ "model": args.model });
    if let (Value::Object(out), Value::Object(rest)) = (&mut out, serde_json::to_value(value)?) {
        out.extend(rest);
    }
    Ok(out)
}

fn summary(seen: &Inspection) -> Table {
    let mut table = Table::new([("", Align::Left), ("value", Align::Left)]);
    let mut row = |label: &str, value: String| table.row([label.to_owned(), value]);
    row("format", seen.format.to_owned());
    let blocks = seen.blocks.map_or("family not known".into(), |n| format!("{n} blocks"));
    row("model", format!("{}, {blocks}", seen.family.as_deref().unwrap_or("?")));
    row("parameters", millions(seen.parameters));
    let share = 100.0 * seen.file_bytes as f64 / seen.f16_bytes.max(1) as f64;
    row("size", format!("{} ({share:.0} % of f16)", size::bytes(seen.file_bytes)));
    let types: Vec<String> =
        seen.dtypes.iter().map(|(name, count)| format!("{name} {}", millions(*count))).collect();
    row("types", types.join(", "));
    if let Some(q) = &seen.quantization {
        let settings = format!(
            "{} bits, group {}, sym {}, desc_act {}, {}",
            q.bits, q.group_size, q.sym, q.desc_act, q.checkpoint_format
        );
        row("quantization", settings);
        row("quantizer", q.quantizer.as_ref().map_or("not told".into(), plain));
        if !q.dynamic.is_empty() {
            let rules: Vec<String> = q.dynamic.iter().map(|(k, v)| format!("{k} {v}")).collect();
            row("dynamic", rules.join("; "));
        }
        row("bits per weight", format!("{:.3}", q.bits_per_weight));
    }
    table
}

/// The texts of a value without quotes.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(plain).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// One line per module, or per kind: the same name, settings and shape in several blocks.
fn modules(modules: &[ModuleInfo], each: bool) -> Table {
    let mut table = Table::new([
        ("quantized", Align::Left),
        ("count", Align::Right),
        ("out x in", Align::Right),
        ("bits", Align::Right),
        ("group", Align::Right),
        ("sym", Align::Left),
        ("desc_act", Align::Left),
        ("bits per weight", Align::Right),
    ]);
    let cells = |m: &ModuleInfo| {
        [
            format!("{} x {}", m.shape[0], m.shape[1]),
            m.bits.to_string(),
            m.group_size.to_string(),
            m.sym.to_string(),
            m.desc_act.to_string(),
            format!("{:.3}", m.bits_per_weight),
        ]
    };
    for (name, count, cells) in kinds(modules, each, |m| &m.module, cells) {
        table.row([name, count].into_iter().chain(cells));
    }
    table
}

fn tensors(tensors: &[TensorRow], each: bool) -> Table {
    let mut table = Table::new([
        ("not quantized", Align::Left),
        ("count", Align::Right),
        ("shape", Align::Right),
        ("type", Align::Left),
    ]);
    let cells = |t: &TensorRow| {
        let shape: Vec<String> = t.shape.iter().map(usize::to_string).collect();
        [shape.join(" x "), t.dtype.clone()]
    };
    for (name, count, cells) in kinds(tensors, each, |t| &t.tensor, cells) {
        table.row([name, count].into_iter().chain(cells));
    }
    table
}

/// Rows in the order of their first member: name, count and cells.
fn kinds<'a, T, const N: usize>(
    items: &'a [T],
    each: bool,
    name: impl Fn(&'a T) -> &'a String,
    cells: impl Fn(&'a T) -> [String; N],
) -> Vec<(String, String, [String; N])> {
    let mut rows: Vec<(String, usize, [String; N])> = Vec::new();
    let mut known: BTreeMap<(String, [String; N]), usize> = BTreeMap::new();
    for item in items {
        let shown = if each { name(item).clone() } else { without_numbers(name(item)) };
        let cells = cells(item);
        let index = *known.entry((shown.clone(), cells.clone())).or_insert(rows.len());
        match rows.get_mut(index) {
            Some(row) => row.1 += 1,
            None => rows.push((shown, 1, cells)),
        }
    }
    rows.into_iter().map(|(name, count, cells)| (name, count.to_string(), cells)).collect()
}

/// `model.layers.*.mlp.up_proj` for block 3's.
fn without_numbers(name: &str) -> String {
    let part = |part: &str| {
        let number = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        if number { "*".to_owned() } else { part.to_owned() }
    };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

fn describe(stats: &TensorStats) -> String {
    let mut table = Table::new([("", Align::Left), ("value", Align::Left)]);
    let mut row = |label: &str, value: String| table.row([label.to_owned(), value]);
    let number = |x: Option<f64>| x.map_or("none".into(), |x| format!("{x:.6e}"));
    row("tensor", stats.tensor.clone());
    row("shape", format!("{:?}", stats.shape));
    row("type", stats.dtype.clone());
    row("min", number(stats.min));
    row("max", number(stats.max));
    row("mean", number(stats.mean));
    row("std", number(stats.std));
    row("NaN", stats.nan.to_string());
    row("infinite", stats.infinite.to_string());
    row("zero", stats.zero.to_string());
    table.render(colour_allowed(&std::io::stdout()))
}

fn millions(count: u64) -> String {
    format!("{:.1} M", count as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_counted_in_order_of_appearance() {
        let names = ["a.0.q", "a.0.k", "a.1.q", "a.1.k", "head"].map(str::to_owned);
        let rows = |each| -> Vec<(String, String)> {
            let rows = kinds(&names, each, |name| name, |name| [name.len().to_string()]);
            rows.into_iter().map(|(name, count, _)| (name, count)).collect()
        };
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(rows(false), [pair("a.*.q", "2"), pair("a.*.k", "2"), pair("head", "1")]);
        assert_eq!(rows(true).len(), 5);
    }
}
