//! What is in a checkpoint ([`inspect()`]), whether it is sound and who can read it ([`verify()`]), and other forms of it
//! ([`convert()`]).
//!
//! Everything here works on headers or on one tensor at a time, so that a checkpoint may be larger than memory.

#![forbid(unsafe_code)]

pub mod convert;
pub mod error;
pub mod inspect;
mod modules;
pub mod stats;
#[cfg(test)]
mod testing;
pub mod verify;

pub use convert::{ConvertOptions, Converted, Progress, Target, convert};
pub use error::{CheckpointError, Result};
pub use inspect::{Inspection, ModuleInfo, inspect};
pub use stats::{TensorStats, tensor_stats};
pub use verify::{Finding, Report, Severity, Verdict, verify};
