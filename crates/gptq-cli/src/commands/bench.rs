//! `gptq bench`.

mod report;
mod synthetic;

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use gptq_compute::{Activations, BandwidthProbe, argmax, gemm_peak_rate, int8_peak_rate};
use gptq_format::Bits;
use gptq_model::{Model, Op, OpCost, Profile, Rows, Sequence, Session};
use gptq_quantize::{Progress, rss};

use super::runtime::RuntimeArgs;
use super::{load, pool, progress};
use crate::Global;

/// Measure speed and memory: loading, prompt processing and decoding, and the share of this
/// machine's memory bandwidth that decoding reaches.
///
/// The limits of the machine (read bandwidth, rates of f32 and int8 products) are measured in the
/// same run, the bandwidth in turns with decoding steps.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory, .gguf file or hub id.
    #[arg(required_unless_present = "synthetic")]
    model: Option<String>,
    /// Random symmetric GPTQ weights in the shape of a known model, written to a temporary
    /// directory: 135m and 360m (SmolLM2), 1.1b (TinyLlama), 3b (Llama 3.2), 8b (Llama 3.1).
    #[arg(long, value_name = "SHAPE", conflicts_with = "model", value_parser = clap::builder::PossibleValuesParser::new(synthetic::NAMES))]
    synthetic: Option<String>,
    /// Bits of --synthetic: 2, 3, 4 or 8.
    #[arg(long, default_value = "4", value_parser = super::quantize::parse_bits, requires = "synthetic")]
    bits: Bits,
    /// Group size of --synthetic; -1 for one group.
    #[arg(
        long,
        default_value_t = 128,
        value_name = "N",
        allow_negative_numbers = true,
        requires = "synthetic"
    )]
    group_size: i64,
    /// Tokens of the prompt of each sequence.
    #[arg(long, default_value_t = 512, value_name = "N")]
    prompt_tokens: usize,
    /// Tokens to decode for each sequence.
    #[arg(long, default_value_t = 128, value_name = "N")]
    new_tokens: usize,
    /// Sequences that are decoded at once; several numbers, separated by commas, are run one after
    /// the other.
    #[arg(long, value_delimiter = ',', default_values_t = [1], value_name = "N")]
    batch: Vec<usize>,
    #[command(flatten)]
    runtime: RuntimeArgs,
    /// Also measure where the time of a decoding step goes, with the first --batch.
    #[arg(long)]
    profile: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// What one number of sequences gave.
struct Run {
    batch: usize,
    prefill_tokens_per_second: f64,
    decode_tokens_per_second: f64,
    p50_ms: f64,
    p95_ms: f64,
    bytes_per_step: usize,
}

/// Rounds of decoding steps and one pass over memory, and the steps of each.
const ROUNDS: usize = 12;
const STEPS: usize = 8;

/// Everything that is reported.
struct Report {
    model: String,
    load_seconds: f64,
    peak_rss_bytes: Option<u64>,
    weight_bytes: usize,
    /// Multiplications with the blocks' weights for one token of a prompt.
    products_per_token: usize,
    runs: Vec<Run>,
    profile: Vec<(Op, OpCost)>,
    /// Steps that `profile` adds up.
    profile_steps: usize,
    bandwidth: f64,
    /// Share of it that the steps of the first run reach, each compared with the pass beside it.
    bandwidth_fraction: f64,
    activations: Activations,
    f32_rate: f64,
    int8_rate: f64,
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
    if args.prompt_tokens == 0 || args.new_tokens < 2 || args.batch.contains(&0) {
        bail!("nothing to measure: needs --prompt-tokens 1, --new-tokens 2 and --batch 1 or more");
    }
    let view = progress(global);
    // Removed when it goes out of scope.
    let directory;
    let (name, path) = match (&args.synthetic, &args.model) {
        (Some(shape), _) => {
            directory = tempfile::Builder::new()
                .prefix("gptq-bench-")
                .tempdir()
                .context("no temporary directory")?;
            // The parser has checked the name.
            let shape_of = synthetic::named(shape).context("unknown shape")?;
            synthetic::write(shape_of, args.bits, args.group_size, directory.path(), &view)?;
            let group =
                if args.group_size < 0 { "all".into() } else { args.group_size.to_string() };
            let name = format!("synthetic {shape}, {} bits, groups of {group}", args.bits);
            (name, directory.path().to_string_lossy().into_owned())
        }
        (None, model) => {
            let model = model.clone().unwrap_or_default();
            (model.clone(), model)
        }
    };
    let pool = pool(global);
    let start = Instant::now();
    let (_, model) = load(&path, args.runtime.lm_head_bits.into(), &pool, &view)?;
    let load_seconds = start.elapsed().as_secs_f64();
    let mut session = Session::new(Arc::clone(&pool));
    session.ctx.scratch.set_activations(args.runtime.activations.into());
    let cache = args.runtime.kv_cache.into();

    // The first forward call grows buffers and touches the weights.
    let mut warm = [Sequence::with_cache(model.spec(), cache)];
    model.forward(&mut session, &mut warm, &[&prompt(&model, 0, 1)])?;
    model.logits(&mut session, Rows::Last);
    drop(warm);

    let (mut runs, mut profile, mut profile_steps) = (Vec::new(), Vec::new(), 0);
    let mut first = None;
    for (index, &batch) in args.batch.iter().enumerate() {
        view.phase(&format!("batch of {batch}"));
        let mut bench = Bench::prefill(args, &model, &mut session, batch)?;
        runs.push(bench.decode(args, &model, &mut session)?);
        if args.profile && index == 0 {
            bench.rewind(args, &model, args.new_tokens);
            session.ctx.profile = Some(Box::default());
            let steps = bench.steps(args.new_tokens, &model, &mut session)?;
            profile_steps = steps.len();
            let done: Profile = session.ctx.profile.take().map(|p| *p).unwrap_or_default();
            profile = Op::ALL.map(|op| (op, done.cost(op))).into();
        }
        first.get_or_insert(bench);
    }
    // Before the probe, which must not count as the model's memory.
    let peak_rss_bytes = rss::peak_bytes();
    view.phase("bandwidth");
    let probe = BandwidthProbe::new(model.weight_bytes());
    let (mut bandwidths, mut fractions) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let Some(bench) = &mut first else { break };
        bench.rewind(args, &model, STEPS);
        let seconds = median(bench.steps(STEPS, &model, &mut session)?);
        let bandwidth = probe.measure(&pool);
        fractions.push(runs[0].bytes_per_step as f64 / seconds / bandwidth);
        bandwidths.push(bandwidth);
    }
    view.finish();
    let report = Report {
        model: name,
        load_seconds,
        peak_rss_bytes,
        weight_bytes: model.weight_bytes(),
        products_per_token: model.products_per_token(),
        runs,
        profile,
        profile_steps,
        bandwidth: median(bandwidths),
        bandwidth_fraction: median(fractions),
        activations: args.runtime.activations.into(),
        f32_rate: gemm_peak_rate(&pool, 1536),
        int8_rate: int8_peak_rate(&pool),
    };
    if args.json { report.print_json(args, &pool) } else { report.print_tables() }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Sequences that have read their prompts.
struct Bench {
    sequences: Vec<Sequence>,
    last: Vec<[u32; 1]>,
    prefill_seconds: f64,
}

impl Bench {
    fn prefill(
        args: &Args,
        model: &Model,
        session: &mut Session,
        batch: usize,
    ) -> anyhow::Result<Self> {
        let prompts: Vec<Vec<u32>> =
            (0..batch).map(|i| prompt(model, i, args.prompt_tokens)).collect();
        let cache = args.runtime.kv_cache.into();
        let sequence = |_: &Vec<u32>| Sequence::with_cache(model.spec(), cache);
        let mut sequences: Vec<Sequence> = prompts.iter().map(sequence).collect();
        let mut last = Vec::new();
        let start = Instant::now();
        for (sequence, prompt) in sequences.iter_mut().zip(&prompts) {
            model.forward(session, std::slice::from_mut(sequence), &[prompt])?;
            let logits = model.logits(session, Rows::Last);
            last.push([argmax(logits.row(0)).unwrap_or(0) as u32]);
        }
        Ok(Self { sequences, last, prefill_seconds: start.elapsed().as_secs_f64() })
    }

    /// Forgets what was decoded behind the prompts, and of these what leaves no room for `count` tokens.
    fn rewind(&mut self, args: &Args, model: &Model, count: usize) {
        let limit = model.spec().length_limit().unwrap_or(usize::MAX);
        let kept = args.prompt_tokens.min(limit.saturating_sub(count)).max(1);
        self.sequences.iter_mut().for_each(|sequence| sequence.truncate(kept));
    }

    /// Decodes `count` tokens of each sequence, greedily; seconds of each step.
    fn steps(
        &mut self,
        count: usize,
        model: &Model,
        session: &mut Session,
    ) -> anyhow::Result<Vec<f64>> {
        let mut seconds = Vec::with_capacity(count);
        for _ in 0..count {
            let start = Instant::now();
            let new: Vec<&[u32]> = self.last.iter().map(|t| &t[..]).collect();
            model.forward(session, &mut self.sequences, &new)?;
            let logits = model.logits(session, Rows::Last);
            for (row, last) in self.last.iter_mut().enumerate() {
                *last = [argmax(logits.row(row)).unwrap_or(0) as u32];
            }
            seconds.push(start.elapsed().as_secs_f64());
        }
        Ok(seconds)
    }

    fn decode(&mut self, args: &Args, model: &Model, session: &mut Session) -> anyhow::Result<Run> {
        let batch = self.sequences.len();
        let mut steps = self.steps(args.new_tokens - 1, model, session)?;
        let total: f64 = steps.iter().sum();
        steps.sort_by(f64::total_cmp);
        let percentile = |p: f64| {
            1e3 * steps[((p * steps.len() as f64).ceil() as usize).clamp(1, steps.len()) - 1]
        };
        let context = args.prompt_tokens + args.new_tokens / 2;
        let cache = model.spec().kv_bytes_per_token(args.runtime.kv_cache.into());
        Ok(Run {
            batch,
            prefill_tokens_per_second: (batch * args.prompt_tokens) as f64 / self.prefill_seconds,
            decode_tokens_per_second: (batch * steps.len()) as f64 / total,
            p50_ms: percentile(0.5),
            p95_ms: percentile(0.95),
            bytes_per_step: model.weight_bytes() + batch * context * cache,
        })
    }
}
