//! `gptq inspect`.

use std::collections::BTreeMap;

use gptq_format::{Checkpoint, CheckpointKind, hub};
use gptq_model::Spec;
use serde_json::{Value, json};

use crate::output::table::{Align, Table, colour_allowed};
use crate::output::{json as json_output, size};

/// Show what a checkpoint holds, from its headers alone.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory, .gguf file or hub id.
    model: String,
    /// List every quantized module.
    #[arg(long)]
    modules: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&hub::resolve(&args.model, &|_, _, _| {})?)?;
    let spec = Spec::for_checkpoint(&checkpoint)?;
    let facts = Facts::collect(&checkpoint)?;
    let format = match (&checkpoint.kind, &checkpoint.quantize_config) {
        (CheckpointKind::Gguf(_), _) => "gguf",
        (_, Some(_)) => "gptq",
        _ => "safetensors",
    };
    let quantization = checkpoint.quantize_config.as_ref().map(|c| {
        json!({
            "bits": c.bits.as_u32(),
            "group_size": c.group_size,
            "sym": c.sym,
            "desc_act": c.desc_act,
            "checkpoint_format": c.format.as_str(),
            "quantizer": c.meta.get("quantizer"),
            "bits_per_weight": facts.bits_per_weight(),
        })
    });
    if args.json {
        return json_output::print(&json!({
            "model": args.model,
            "format": format,
            "family": spec.family,
            "blocks": spec.layer_count(),
            "parameters": facts.parameters,
            "file_bytes": facts.file_bytes,
            "f16_bytes": 2 * facts.parameters,
            "dtypes": facts.dtypes,
            "quantization": quantization,
            "modules": facts.modules,
            "not_quantized": facts.others,
        }));
    }
    let mut table = Table::new([("", Align::Left), ("value", Align::Left)]);
    let mut row = |label: &str, value: String| table.row([label.to_owned(), value]);
    row("format", format.to_owned());
    row("family", format!("{}, {} blocks", spec.family, spec.layer_count()));
    row("parameters", format!("{:.1} M", facts.parameters as f64 / 1e6));
    row(
        "size",
        format!(
            "{} ({:.0} % of f16)",
            size::bytes(facts.file_bytes),
            100.0 * facts.file_bytes as f64 / (2.0 * facts.parameters.max(1) as f64)
        ),
    );
    let dtypes: Vec<String> =
        facts.dtypes.iter().map(|(t, n)| format!("{t} {:.1} M", *n as f64 / 1e6)).collect();
    row("types", dtypes.join(", "));
    if let Some(q) = &quantization {
        let text = |key: &str| q[key].as_str().map_or_else(|| q[key].to_string(), str::to_owned);
        row(
            "quantization",
            format!(
                "{} bits, group {}, sym {}, desc_act {}, {}",
                text("bits"),
                text("group_size"),
                text("sym"),
                text("desc_act"),
                text("checkpoint_format")
            ),
        );
        row("quantizer", text("quantizer"));
        row("bits per weight", format!("{:.3}", facts.bits_per_weight()));
        row("quantized modules", facts.modules.len().to_string());
    }
    let mut text = table.render(colour_allowed(&std::io::stdout()));
    if args.modules {
        let mut table = Table::new([
            ("module", Align::Left),
            ("out x in", Align::Right),
            ("bits", Align::Right),
            ("group", Align::Right),
        ]);
        for m in &facts.modules {
            let shape = format!("{} x {}", m["shape"][0], m["shape"][1]);
            let name = m["module"].as_str().unwrap_or_default().to_owned();
            table.row([name, shape, m["bits"].to_string(), m["group_size"].to_string()]);
        }
        text.push('\n');
        text.push_str(&table.render(colour_allowed(&std::io::stdout())));
    }
    crate::output::print(&text)
}

/// What the headers tell.
#[derive(Default)]
struct Facts {
    parameters: u64,
    file_bytes: u64,
    dtypes: BTreeMap<String, u64>,
    modules: Vec<Value>,
    others: Vec<String>,
    quantized_weights: u64,
    quantized_bytes: u64,
}

impl Facts {
    fn collect(checkpoint: &Checkpoint) -> anyhow::Result<Self> {
        let store = &checkpoint.tensors;
        let mut facts = Self { file_bytes: store.total_bytes(), ..Self::default() };
        for name in store.names() {
            let info = store.info(name)?;
            let part = name.rsplit_once('.');
            let module = part.map_or("", |(module, _)| module);
            let packed = store.contains(&format!("{module}.qweight"));
            if packed
                && matches!(part, Some((_, "qweight" | "qzeros" | "scales" | "g_idx" | "bias")))
            {
                facts.quantized_bytes += info.bytes as u64;
                if !name.ends_with(".qweight") {
                    continue;
                }
                let settings =
                    checkpoint.quantize_config.as_ref().and_then(|c| c.settings_for(module));
                let (&[words, outputs], Some(settings)) = (info.shape.as_slice(), settings) else {
                    facts.others.push(name.to_owned());
                    continue;
                };
                let bits = settings.bits.as_u32();
                let inputs = words * 32 / bits as usize;
                let weights = (inputs * outputs) as u64;
                facts.quantized_weights += weights;
                facts.parameters += weights;
                *facts.dtypes.entry(format!("{bits}-bit")).or_default() += weights;
                facts.modules.push(json!({
                    "module": module,
                    "shape": [outputs, inputs],
                    "bits": bits,
                    "group_size": settings.group_size,
                }));
                continue;
            }
            let elements = info.elements() as u64;
            facts.parameters += elements;
            *facts.dtypes.entry(info.dtype.to_string()).or_default() += elements;
            facts.others.push(name.to_owned());
        }
        Ok(facts)
    }

    fn bits_per_weight(&self) -> f64 {
        8.0 * self.quantized_bytes as f64 / self.quantized_weights.max(1) as f64
    }
}
