//! `gptq families`.

use std::io::{IsTerminal, Write};

use anyhow::{Context, bail};
use gptq_model::FAMILIES;
use gptq_model::table::{Description, describe};
use serde_json::{Value, json};

use crate::output::json as json_output;
use crate::output::table::{Align, Table, colour_allowed};

/// List the supported architectures, or print one as a file for --family.
///
/// A model whose config.json has another model_type but which is like one of these can be described
/// in a file: `gptq families llama > mine.toml`, change names and switches, and give it to any
/// command as `--family mine.toml`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// model_type of a config.json.
    name: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let text = match &args.name {
        Some(name) => {
            let Some(family) = describe(name) else {
                let names: Vec<&str> = FAMILIES.iter().map(|family| family.model_type).collect();
                bail!("no family is called \"{name}\"; there are {}", names.join(", "));
            };
            if args.json {
                return json_output::print(&as_json(&family));
            }
            family.to_toml()
        }
        None if args.json => {
            let all: Vec<Value> = described().map(|family| as_json(&family)).collect();
            return json_output::print(&all);
        }
        None => {
            let mut table = Table::new([
                ("family", Align::Left),
                ("reads", Align::Left),
                ("what it is", Align::Left),
            ]);
            for family in described() {
                let reads = if family.causal { "forward" } else { "both ways" };
                let about = family.family.about().replace('\n', " ");
                let about = about.split_once(". ").map_or(about.as_str(), |(first, _)| first);
                table.row([family.family.model_type, reads, about.trim_end_matches('.')]);
            }
            table.render(std::io::stdout().is_terminal() && colour_allowed(&std::io::stdout()))
        }
    };
    std::io::stdout().lock().write_all(text.as_bytes()).context("cannot write to stdout")
}

fn described() -> impl Iterator<Item = Description> {
    FAMILIES.iter().filter_map(|family| describe(family.model_type))
}

fn as_json(family: &Description) -> Value {
    let keys: Vec<Value> = family
        .keys
        .iter()
        .map(|key| {
            json!({
                "name": key.name, "kind": key.kind, "default": key.default, "required": key.required
            })
        })
        .collect();
    json!({
        "model_type": family.family.model_type,
        "about": family.family.about(),
        "causal": family.causal,
        "config_keys": keys,
        "table": family.table,
        "decided_by_config": family.decided,
    })
}
