//! `gptq generate`.

use std::ops::ControlFlow;
use std::time::SystemTime;

use anyhow::Context;
use gptq_compute::Activations;
use gptq_format::Checkpoint;
use gptq_format::chat::Message;
use gptq_model::{FinishReason, GenerateOptions, Sampling, Session, generate};
use serde_json::json;

use super::runtime::RuntimeArgs;
use super::{eos_ids, explain, load, pool, progress};
use crate::Global;
use crate::output::json as json_output;

/// Write text with a model.
///
/// Options that are not given come from the model's generation_config.json where it has them: the repetition penalty
/// always, what concerns sampling where it says do_sample.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory, .gguf file or hub id.
    model: String,
    /// Text to continue, as it is.
    #[arg(long, value_name = "TEXT", required_unless_present = "chat")]
    prompt: Option<String>,
    /// Message of a user, put into the model's chat template.
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt")]
    chat: Option<String>,
    /// System message before --chat.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Most tokens to write.
    #[arg(long, default_value_t = 128, value_name = "N")]
    max_new_tokens: usize,
    /// Logits are divided by this; 0 always takes the most likely token. [default: the model's, else 1 where it says do_sample and 0.7 where not]
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Sample among the K most likely tokens; 0 for all. [default: the model's, else 50]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Sample among the most likely tokens that sum up to this probability. [default: the model's, else 1]
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Drop tokens less likely than this share of the most likely one. [default: the model's, else 0]
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Make tokens that occurred before less likely; 1 is off. [default: the model's, else 1]
    #[arg(long, value_name = "R")]
    repetition_penalty: Option<f32>,
    /// Seed of the sampling.
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    #[command(flatten)]
    runtime: RuntimeArgs,
    /// Print the result as JSON instead of streaming the text.
    #[arg(long)]
    json: bool,
}

impl Args {
    fn sampling(&self, checkpoint: &Checkpoint) -> Sampling {
        let config = checkpoint.generation_config.as_ref();
        // A model that is not meant to be sampled states no useful numbers for it; a penalty holds for any choice.
        let sampled = config
            .filter(|c| c.get("do_sample").and_then(serde_json::Value::as_bool) == Some(true));
        let of = |config: Option<&serde_json::Value>, key: &str| {
            config.and_then(|c| c.get(key)?.as_f64())
        };
        let number = |key: &str| of(sampled, key);
        // What transformers takes for a temperature that is not stated.
        let temperature = if sampled.is_some() { 1.0 } else { 0.7 };
        Sampling {
            temperature: self
                .temperature
                .or(number("temperature").map(|x| x as f32))
                .unwrap_or(temperature),
            top_k: self.top_k.or(number("top_k").map(|x| x as usize)).unwrap_or(50),
            top_p: self.top_p.or(number("top_p").map(|x| x as f32)).unwrap_or(1.0),
            min_p: self.min_p.or(number("min_p").map(|x| x as f32)).unwrap_or(0.0),
            repetition_penalty: self
                .repetition_penalty
                .or(of(config, "repetition_penalty").map(|x| x as f32))
                .unwrap_or(1.0),
            seed: self.seed,
        }
    }
}

pub(crate) fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let view = progress(global);
    let pool = pool(global);
    let head = args.runtime.lm_head_bits.into();
    let (checkpoint, model) = load(&args.model, head, &pool, &view)?;
    let tokenizer = checkpoint.tokenizer().context("the prompt cannot be tokenized")?;
    view.finish();
    let prompt = match (&args.chat, &args.prompt) {
        (Some(text), _) => {
            let system = args.system.iter().map(|s| Message::new("system", s.clone()));
            let messages: Vec<Message> =
                system.chain([Message::new("user", text.clone())]).collect();
            // Templates contain their special tokens.
            tokenizer.encode(
                &tokenizer.apply_chat_template(&messages, true, SystemTime::now())?,
                false,
            )?
        }
        (None, prompt) => tokenizer.encode(prompt.as_deref().unwrap_or_default(), true)?,
    };
    let options = GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        sampling: args.sampling(&checkpoint),
        eos_ids: eos_ids(&checkpoint, Some(&tokenizer)),
        stop: Vec::new(),
        kv_cache: args.runtime.kv_cache.into(),
    };
    let mut session = Session::new(pool);
    session.ctx.scratch.set_activations(args.runtime.activations.into());
    let mut stream = tokenizer.decode_stream();
    let (mut text, mut failed) = (String::new(), None);
    let done = generate(&model, &mut session, &prompt, &options, |token| {
        let shown = stream.push(token).map_err(anyhow::Error::from).and_then(|piece| {
            let piece = piece.unwrap_or_default();
            text.push_str(&piece);
            if args.json { Ok(()) } else { crate::output::print(&piece) }
        });
        match shown {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        }
    })
    .map_err(|error| explain(&checkpoint, error))?;
    if let Some(error) = failed {
        return Err(error);
    }
    let rest = stream.flush()?.unwrap_or_default();
    text.push_str(&rest);
    let decode_seconds: f64 = done.token_seconds.iter().sum();
    let rate = done.token_seconds.len() as f64 / decode_seconds.max(f64::MIN_POSITIVE);
    if !args.json {
        crate::output::print(&format!("{rest}\n"))?;
        tracing::info!("{} tokens, {rate:.1} tokens/s", done.tokens.len());
        return Ok(());
    }
    json_output::print(&json!({
        "model": args.model,
        "seed": args.seed,
        "kv_cache": args.runtime.kv_cache.name(),
        "lm_head_bits": args.runtime.lm_head_bits.bits(),
        "activations": Activations::from(args.runtime.activations).name(),
        "prompt_tokens": prompt.len(),
        "new_tokens": done.tokens.len(),
        "tokens": done.tokens,
        "text": text,
        "finish_reason": match done.finish {
            FinishReason::Eos(_) | FinishReason::Stop | FinishReason::Cancelled => "stop",
            FinishReason::Length | FinishReason::Context => "length",
        },
        "prefill_seconds": done.prefill_seconds,
        "decode_seconds": decode_seconds,
        "tokens_per_second": rate,
    }))
}
