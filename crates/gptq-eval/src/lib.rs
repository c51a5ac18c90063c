//! Perplexity of a model on a text, and its divergence from a reference model.
//!
//! Two protocols give two numbers that must not be compared with each other: [`Protocol::Gptq`]
//! (the GPTQ paper: every token of non-overlapping windows) and [`Protocol::LlamaCpp`] (only the
//! second half of each window). Logits exist for a slice of a window at a time, so memory does not
//! grow with the text.

#![forbid(unsafe_code)]

mod divergence;
mod perplexity;
mod recording;

pub use divergence::DivergenceSummary;
pub use perplexity::{EvalError, EvalOptions, Evaluation, Protocol, Reference, evaluate, record};
pub use recording::Recording;
