//! What the tests of the workspace share: fixtures, expected values, comparisons, seeded random
//! numbers and tiny models.
//!
//! A development dependency only. Everything here panics with a message that names the file, tensor
//! or index instead of returning errors: its callers are tests. It knows none of the crates under
//! test, so that it can be the independent side of a comparison.
#![forbid(unsafe_code)]
#![allow(
    clippy::missing_panics_doc,
    reason = "every helper panics on bad fixtures; the module docs say so"
)]

pub mod awq;
mod compare;
mod expected;
pub mod fixtures;
mod head_norms;
mod rng;
pub mod safetensors_file;
mod tiny;
mod world;

pub use compare::{Difference, assert_close, assert_relative, difference};
pub use expected::Expected;
pub use head_norms::models_with_head_norms;
pub use rng::Rng;
pub use tiny::{TinyLlama, byte_level_tokenizer, tiny_llama};
pub use world::World;
