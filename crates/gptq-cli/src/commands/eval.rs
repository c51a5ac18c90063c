//! `gptq eval`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::ValueEnum;
use gptq_compute::Activations;
use gptq_eval::{EvalError, EvalOptions, Protocol, Reference, evaluate};
use gptq_format::Tokenizer;
use gptq_model::{HeadBits, Session};
use gptq_quantize::{Progress, rss};
use serde_json::{Value, json};

use super::runtime::{ActivationsArg, HeadBitsArg};
use super::{bos_of, explain, load, pool, progress, read_text};
use crate::Global;
use crate::output::json as json_output;
use crate::output::table::{Align, Table, colour_allowed};

/// Measure perplexity on a text and, with --reference, the divergence from another model.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory, .gguf file or hub id.
    model: String,
    /// Text file.
    #[arg(long, value_name = "FILE")]
    perplexity: PathBuf,
    /// gptq: non-overlapping windows, all tokens; llama.cpp: second half of each window. The two
    /// numbers cannot be compared with each other.
    #[arg(long, value_enum, default_value_t = ProtocolArg::Gptq)]
    protocol: ProtocolArg,
    /// Tokens per window; 2048 for gptq, 512 for llama.cpp.
    #[arg(long, value_name = "N")]
    seqlen: Option<usize>,
    /// Only the first N windows.
    #[arg(long, value_name = "N")]
    max_windows: Option<usize>,
    /// Model to compare with, as a rule the original: adds KL divergence and top-1 agreement.
    #[arg(long, value_name = "MODEL")]
    reference: Option<String>,
    /// Bits of the projection to logits where the checkpoint has floats; the reference keeps its own.
    #[arg(long, value_enum, default_value_t = HeadBitsArg::Stored, value_name = "BITS")]
    lm_head_bits: HeadBitsArg,
    /// How quantized linears take their input; those of the reference take 32-bit floats.
    #[arg(long, value_enum, default_value_t = ActivationsArg::F32, value_name = "TYPE")]
    activations: ActivationsArg,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum ProtocolArg {
    Gptq,
    #[value(name = "llama.cpp")]
    LlamaCpp,
}

impl From<ProtocolArg> for Protocol {
    fn from(arg: ProtocolArg) -> Self {
        match arg {
            ProtocolArg::Gptq => Self::Gptq,
            ProtocolArg::LlamaCpp => Self::LlamaCpp,
        }
    }
}

/// The tokens of as much of a text as is scored.
pub(super) fn tokenize(
    tokenizer: &Tokenizer,
    text: &str,
    options: &EvalOptions,
) -> anyhow::Result<Vec<u32>> {
    let most = options.max_windows.map_or(usize::MAX, |n| n.saturating_mul(options.seqlen));
    // llama.cpp's text begins with it; the first token of every other window is replaced by it.
    let bos = options.bos.filter(|_| options.protocol == Protocol::LlamaCpp);
    let mut tokens = Vec::from_iter(bos);
    for part in tokenizer.encode_long(text) {
        tokens.extend(part?);
        if tokens.len() >= most {
            break;
        }
    }
    Ok(tokens)
}

pub(crate) fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let start = Instant::now();
    let view = progress(global);
    let text = read_text(&args.perplexity)?;
    let pool = pool(global);
    let (checkpoint, model) = load(&args.model, args.lm_head_bits.into(), &pool, &view)?;
    let tokenizer = checkpoint.tokenizer().context("the text cannot be tokenized")?;
    let reference =
        args.reference.as_deref().map(|r| load(r, HeadBits::Stored, &pool, &view)).transpose()?;
    let protocol: Protocol = args.protocol.into();
    let options = EvalOptions {
        protocol,
        seqlen: args.seqlen.unwrap_or(protocol.default_seqlen()),
        max_windows: args.max_windows,
        bos: bos_of(&tokenizer),
    };
    if options.max_windows == Some(0) {
        bail!("--max-windows 0 leaves nothing to score");
    }
    view.phase("tokenize");
    let tokens = tokenize(&tokenizer, &text, &options)?;
    drop(text);
    let mut session = Session::new(Arc::clone(&pool));
    session.ctx.scratch.set_activations(args.activations.into());
    let mut reference_session = Session::new(pool);
    view.phase("evaluate");
    let result = evaluate(
        &model,
        &mut session,
        reference.as_ref().map(|(_, model)| Reference::Model(model, &mut reference_session)),
        &tokens,
        &options,
        |done, total| view.phase_progress(done, total),
    )
    .map_err(|error| {
        let of_reference = matches!(error, EvalError::NotFinite { which: "reference", .. });
        let blamed = reference.as_ref().filter(|_| of_reference).map_or(&checkpoint, |(c, _)| c);
        explain(blamed, error)
    })?;
    view.finish();
    let mut value = json!(result);
    if let Value::Object(map) = &mut value {
        map.insert("model".into(), json!(args.model));
        map.insert("text".into(), json!(args.perplexity));
        map.insert("lm_head_bits".into(), json!(args.lm_head_bits.bits()));
        map.insert("activations".into(), json!(Activations::from(args.activations).name()));
        map.insert("reference".into(), json!(args.reference));
        map.insert("seconds".into(), json!(start.elapsed().as_secs_f64()));
        map.insert("peak_rss_bytes".into(), json!(rss::peak_bytes()));
        for key in ["kl_mean", "kl_median", "kl_99", "kl_99_9", "kl_max", "top1_agreement"] {
            map.entry(key).or_insert(Value::Null);
        }
    }
    if args.json {
        return json_output::print(&value);
    }
    let mut table = Table::new([("", Align::Left), ("value", Align::Right)]);
    let label = format!("perplexity ({}, {} x {})", name(protocol), result.windows, result.seqlen);
    table.row([label, format!("{:.4} ± {:.4}", result.perplexity, result.perplexity_stderr)]);
    table.row(["tokens scored".to_owned(), result.tokens.to_string()]);
    if let Some(reference) = result.reference_perplexity {
        table.row(["perplexity of the reference".to_owned(), format!("{reference:.4}")]);
    }
    if let Some(d) = &result.divergence {
        for (label, value) in [
            ("KL mean", d.kl_mean),
            ("KL median", d.kl_median),
            ("KL 99 %", d.kl_99),
            ("KL 99.9 %", d.kl_99_9),
            ("KL largest", d.kl_max),
        ] {
            table.row([label.to_owned(), format!("{value:.6}")]);
        }
        table.row(["same top token".to_owned(), format!("{:.2} %", 100.0 * d.top1_agreement)]);
    }
    crate::output::print(&table.render(colour_allowed(&std::io::stdout())))
}

fn name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Gptq => "gptq",
        Protocol::LlamaCpp => "llama.cpp",
    }
}
