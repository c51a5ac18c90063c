//! `gptq bench`.

use std::sync::Arc;
use std::time::Instant;

use anyhow::bail;
use gptq_compute::{argmax, read_bandwidth};
use gptq_model::{Model, Rows, Sequence, Session};
use gptq_quantize::rss;
use serde_json::json;

use super::{load, pool, progress};
use crate::Global;
use crate::output::table::{Align, Table, colour_allowed};
use crate::output::{json as json_output, size};

/// Measure loading, prefill and decoding, and how much of this machine's memory bandwidth decoding
/// reaches.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory, .gguf file or hub id.
    model: String,
    /// Tokens of the prompt of each sequence.
    #[arg(long, default_value_t = 512, value_name = "N")]
    prompt_tokens: usize,
    /// Tokens to decode for each sequence.
    #[arg(long, default_value_t = 128, value_name = "N")]
    new_tokens: usize,
    /// Sequences that are decoded at once.
    #[arg(long, default_value_t = 1, value_name = "N")]
    batch: usize,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Token ids that are spread over the vocabulary; what they say does not matter for speed.
fn prompt(model: &Model, sequence: usize, tokens: usize) -> Vec<u32> {
    let vocab = model.spec().vocab as u64;
    (0..tokens as u64)
        .map(|i| {
            ((i + 1 + sequence as u64 * 7_919).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 33) % vocab
        })
        .map(|id| id as u32)
        .collect()
}

pub(crate) fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    if args.prompt_tokens == 0 || args.new_tokens < 2 || args.batch == 0 {
        bail!("nothing to measure: needs --prompt-tokens 1, --new-tokens 2 and --batch 1 or more");
    }
    let start = Instant::now();
    let view = progress(global);
    let (_, model) = load(&args.model, &view)?;
    let load_seconds = start.elapsed().as_secs_f64();
    view.finish();
    let pool = pool(global);
    let mut session = Session::new(Arc::clone(&pool));
    let prompts: Vec<Vec<u32>> =
        (0..args.batch).map(|i| prompt(&model, i, args.prompt_tokens)).collect();

    // The first forward call grows buffers and touches the weights.
    let mut warm = [Sequence::new(model.spec())];
    model.forward(&mut session, &mut warm, &[&prompts[0][..1]])?;
    model.logits(&mut session, Rows::Last);
    drop(warm);

    let mut sequences: Vec<Sequence> =
        prompts.iter().map(|_| Sequence::new(model.spec())).collect();
    let mut last: Vec<[u32; 1]> = Vec::new();
    let start = Instant::now();
    for (sequence, prompt) in sequences.iter_mut().zip(&prompts) {
        model.forward(&mut session, std::slice::from_mut(sequence), &[prompt])?;
        last.push([next(&model, &mut session, 0)]);
    }
    let prefill_seconds = start.elapsed().as_secs_f64();

    let mut steps = Vec::with_capacity(args.new_tokens);
    for _ in 1..args.new_tokens {
        let start = Instant::now();
        let new: Vec<&[u32]> = last.iter().map(|t| &t[..]).collect();
        model.forward(&mut session, &mut sequences, &new)?;
        let logits = model.logits(&mut session, Rows::Last);
        let tokens: Vec<u32> =
            (0..args.batch).map(|i| argmax(logits.row(i)).unwrap_or(0) as u32).collect();
        last = tokens.into_iter().map(|t| [t]).collect();
        steps.push(start.elapsed().as_secs_f64());
    }
    let decode_seconds: f64 = steps.iter().sum();
    steps.sort_by(f64::total_cmp);
    let percentile =
        |p: f64| 1e3 * steps[((p * steps.len() as f64).ceil() as usize).clamp(1, steps.len()) - 1];
    let peak = rss::peak_bytes();
    // Measured after the run: its buffer must not count as the model's memory.
    let bandwidth = read_bandwidth(&pool);

    let context = args.prompt_tokens + args.new_tokens / 2;
    let cache = args.batch * context * model.spec().kv_bytes_per_token();
    let bytes_per_step = model.weight_bytes() + cache;
    let reached = bytes_per_step as f64 / (percentile(0.5) / 1e3);
    let prefill_rate = (args.batch * args.prompt_tokens) as f64 / prefill_seconds;
    let decode_rate = (args.batch * steps.len()) as f64 / decode_seconds;
    if args.json {
        return json_output::print(&json!({
            "model": args.model,
            "threads": pool.threads(),
            "isa": format!("{:?}", gptq_compute::arch::isa()).to_lowercase(),
            "batch": args.batch,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "load_seconds": load_seconds,
            "prefill_tokens_per_second": prefill_rate,
            "decode_tokens_per_second": decode_rate,
            "per_token_ms_p50": percentile(0.5),
            "per_token_ms_p95": percentile(0.95),
            "peak_rss_bytes": peak,
            "read_bandwidth_bytes_per_second": bandwidth,
            "bytes_per_token": bytes_per_step,
            "bandwidth_fraction": reached / bandwidth,
        }));
    }
    let mut table = Table::new([("", Align::Left), ("value", Align::Right)]);
    for (label, value) in [
        ("load", format!("{load_seconds:.2} s")),
        ("prefill", format!("{prefill_rate:.1} tokens/s")),
        ("decode", format!("{decode_rate:.1} tokens/s")),
        ("step, median", format!("{:.2} ms", percentile(0.5))),
        ("step, 95 %", format!("{:.2} ms", percentile(0.95))),
        ("peak memory", peak.map_or_else(|| "unknown".into(), size::bytes)),
        ("read per step", size::bytes(bytes_per_step as u64)),
        ("read bandwidth of this machine", format!("{:.1} GB/s", bandwidth / 1e9)),
        ("share of it reached", format!("{:.0} %", 100.0 * reached / bandwidth)),
    ] {
        table.row([label.to_owned(), value]);
    }
    crate::output::print(&table.render(colour_allowed(&std::io::stdout())))
}

fn next(model: &Model, session: &mut Session, row: usize) -> u32 {
    argmax(model.logits(session, Rows::Last).row(row)).unwrap_or(0) as u32
}
