//! Decoding: one sequence with a callback per token, or many sequences at once.

use std::ops::ControlFlow;
use std::time::Instant;

use gptq_compute::KvType;

use crate::cache::Sequence;
use crate::model::{Model, Rows, Session};
use crate::rope::{Rope, RopeScaling};
use crate::sampler::{Sampler, Sampling};
use crate::spec::{Positions, Spec};
use crate::{ModelError, Result};

/// What to generate and when to stop.
#[derive(Debug, Clone, Default)]
pub struct GenerateOptions {
    /// At most so many tokens.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens that end the text; they are not part of it.
    pub eos_ids: Vec<u32>,
    /// Token sequences that end the text when it ends with one of them; they are part of it.
    pub stop: Vec<Vec<u32>>,
    /// How keys and values are kept.
    pub kv_cache: KvType,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model gave this end-of-text token.
    Eos(u32),
    /// `max_new_tokens` were generated.
    Length,
    /// The table of learned positions is full.
    Context,
    /// A stop sequence appeared.
    Stop,
    /// The callback asked to stop.
    Cancelled,
}

/// A finished generation.
#[derive(Debug, Clone)]
pub struct Generated {
    /// The new tokens, without the prompt.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: FinishReason,
    /// Time for the prompt up to the first token, in seconds.
    pub prefill_seconds: f64,
    /// Time for each further token, in seconds.
    pub token_seconds: Vec<f64>,
}

/// Continues `prompt` in a fresh sequence. `on_token` sees every new token as soon as it is known.
///
/// # Errors
/// An empty prompt, a token outside the vocabulary, options out of range, a prompt longer than a table of learned positions,
/// or logits that are not numbers.
pub fn generate(
    model: &Model,
    session: &mut Session,
    prompt: &[u32],
    options: &GenerateOptions,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated> {
    let mut sampler = Sampler::new(options.sampling, 0)?;
    sampler.observe(prompt);
    let mut sequence = [Sequence::with_cache(model.spec(), options.kv_cache)];
    let mut done = Generated {
        tokens: Vec::with_capacity(options.max_new_tokens.min(MAX_RESERVE)),
        finish: FinishReason::Length,
        prefill_seconds: 0.0,
        token_seconds: Vec::with_capacity(options.max_new_tokens.min(MAX_RESERVE)),
    };
    let mut last: [u32; 1];
    let mut whole: Vec<u32>;
    let mut new = prompt;
    while done.tokens.len() < options.max_new_tokens {
        let start = Instant::now();
        if outgrows_cache(model.spec(), &sequence[0], new) {
            sequence[0].clear();
            whole = [prompt, &done.tokens].concat();
            new = &whole;
        }
        match model.forward(session, &mut sequence, &[new]) {
            Err(ModelError::Position { .. }) if !done.tokens.is_empty() => {
                done.finish = FinishReason::Context;
                break;
            }
            other => other?,
        }
        let token = sampler.sample(model.logits(session, Rows::Last).row(0))?;
        let seconds = start.elapsed().as_secs_f64();
        if done.tokens.is_empty() {
            done.prefill_seconds = seconds;
        } else {
            done.token_seconds.push(seconds);
        }
        if options.eos_ids.contains(&token) {
            done.finish = FinishReason::Eos(token);
            break;
        }
        done.tokens.push(token);
        sampler.observe(&[token]);
        if on_token(token).is_break() {
            done.finish = FinishReason::Cancelled;
            break;
        }
        if options.stop.iter().any(|stop| !stop.is_empty() && done.tokens.ends_with(stop)) {
            done.finish = FinishReason::Stop;
            break;
        }
        last = [token];
        new = &last;
    }
    Ok(done)
}

/// Whether `new` tokens make a text so long that the keys which are kept of it should have been rotated otherwise: those of
/// LongRoPE have other divisors from a length on. The whole text has to be read again then, as in transformers' Phi-3.
fn outgrows_cache(spec: &Spec, sequence: &Sequence, new: &[u32]) -> bool {
    let Positions::Rotary(ropes) = &spec.positions else { return false };
    let (kept, length) = (sequence.len(), sequence.len() + new.len());
    let changes = |rope: &Rope| {
        let long = matches!(rope.scaling, RopeScaling::Long { .. });
        long && rope.length_key(kept) != rope.length_key(length)
    };
    kept > 0 && ropes.iter().any(changes)
}

/// Options of [`generate_batch`].
#[derive(Debug, Clone)]
pub struct BatchOptions {
    /// At most so many tokens for each prompt.
    pub max_new_tokens: usize,
    /// How tokens are chosen; prompt `i` draws from random stream `i`.
    pub sampling: Sampling,
    /// Tokens that end a text; they are not part of it.
    pub eos_ids: Vec<u32>,
    /// How keys and values are kept.
    pub kv_cache: KvType,
    /// Go on after an end-of-text token, which then is part of the text.
    pub ignore_eos: bool,
    /// Sequences that are decoded at once; memory for keys and values grows with it ([`crate::Spec::kv_bytes_per_token`]).
    /// Random numbers do not depend on it, and neither do products with packed codes; products with float weights round
    /// differently for different numbers of rows, so that a seed gives the same text to the last token only with the same
    /// batch.
    pub batch: usize,
}

/// Continues each prompt in a sequence of its own, many at once, and returns the new tokens of each. `progress` is told the
/// number of tokens generated since its last call.
///
/// # Errors
/// As [`generate`].
pub fn generate_batch(
    model: &Model,
    session: &mut Session,
    prompts: &[&[u32]],
    options: &BatchOptions,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Vec<u32>>> {
    let mut texts: Vec<Vec<u32>> = vec![Vec::new(); prompts.len()];
    let batch = options.batch.max(1);
    for (group, prompts_of_group) in prompts.chunks(batch).enumerate() {
        let mut running: Vec<Running> = Vec::with_capacity(prompts_of_group.len());
        for (index, prompt) in (group * batch..).zip(prompts_of_group) {
            let mut sampler = Sampler::new(options.sampling, index as u64)?;
            sampler.observe(prompt);
            running.push(Running { index, sampler, last: [0], whole: Vec::new() });
        }
        let mut sequences: Vec<Sequence> =
            running.iter().map(|_| Sequence::with_cache(model.spec(), options.kv_cache)).collect();
        for step in 0..options.max_new_tokens {
            if step > 0 {
                // Where the table of learned positions is full a text ends.
                for row in (0..running.len()).rev() {
                    if model.spec().check_positions(sequences[row].len() + 1).is_err() {
                        running.swap_remove(row);
                        sequences.swap_remove(row);
                    }
                }
                if running.is_empty() {
                    break;
                }
            }
            for (running, sequence) in running.iter_mut().zip(&mut sequences) {
                let outgrows = outgrows_cache(model.spec(), sequence, &running.last);
                running.whole.clear();
                if outgrows {
                    sequence.clear();
                    running.whole.extend_from_slice(prompts[running.index]);
                    running.whole.extend_from_slice(&texts[running.index]);
                }
            }
            let new: Vec<&[u32]> = running
                .iter()
                .map(|running| match step {
                    0 => prompts[running.index],
                    _ if running.whole.is_empty() => &running.last[..],
                    _ => &running.whole[..],
                })
                .collect();
            model.forward(session, &mut sequences, &new)?;
            let logits = model.logits(session, Rows::Last);
            let mut ended = Vec::new();
            for (row, running) in running.iter_mut().enumerate() {
                let token = running.sampler.sample(logits.row(row))?;
                if options.eos_ids.contains(&token) && !options.ignore_eos {
                    ended.push(row);
                    continue;
                }
                texts[running.index].push(token);
                running.sampler.observe(&[token]);
                running.last = [token];
            }
            progress(running.len() - ended.len());
            for &row in ended.iter().rev() {
                running.swap_remove(row);
                sequences.swap_remove(row);
            }
            if running.is_empty() {
                break;
            }
        }
    }
    Ok(texts)
}

/// A sequence of [`generate_batch`] that has not ended.
struct Running {
    index: usize,
    sampler: Sampler,
    last: [u32; 1],
    /// All tokens, where they have to be read again; else empty.
    whole: Vec<u32>,
}

/// Tokens for which room is reserved at the start, whatever the limit.
const MAX_RESERVE: usize = 1 << 14;
