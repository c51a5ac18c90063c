//! The one error type of this crate.

use std::path::PathBuf;

use gptq_format::{FormatError, tokenizer::TokenizerError};
use gptq_model::ModelError;

/// What this crate returns.
pub type Result<T> = std::result::Result<T, CheckpointError>;

/// Why a checkpoint could not be examined or converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The checkpoint could not be read or the output not written.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The architecture is not one that is known.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The checkpoint is not quantized with GPTQ.
    #[error("`{}` is not a GPTQ checkpoint: {reason}", path.display())]
    NotGptq {
        /// The checkpoint.
        path: PathBuf,
        /// What it is, and what to do.
        reason: &'static str,
    },
    /// A zero point of 0 has no certain form in the v1 format.
    #[error(
        "module `{module}` has zero point 0 (group {group}, output {output}), which readers of the format `gptq` (v1) \
         decode differently; convert to `gptq_v2`, or quantize again with zero points from 1 on"
    )]
    ZeroPointZero {
        /// The module.
        module: String,
        /// The group.
        group: usize,
        /// The output channel.
        output: usize,
    },
    /// A module or feature has no exact counterpart in the target.
    #[error("{subject}: {reason}; --lossy would {lossy}")]
    Lossy {
        /// The module or feature.
        subject: String,
        /// Why it does not fit.
        reason: String,
        /// What would be done instead.
        lossy: String,
    },
    /// A model that the target cannot hold at all.
    #[error("cannot convert `{}` to {target}: {reason}", path.display())]
    Unsupported {
        /// The checkpoint.
        path: PathBuf,
        /// The target format.
        target: &'static str,
        /// What it is about.
        reason: String,
    },
    /// A value does not fit the type that it is converted to.
    #[error(
        "tensor `{tensor}`: {value} at index {index} does not fit f16, whose largest value is 65504"
    )]
    Overflow {
        /// The tensor.
        tensor: String,
        /// Row-major index of the value.
        index: usize,
        /// The value.
        value: f32,
    },
}

impl From<TokenizerError> for CheckpointError {
    fn from(error: TokenizerError) -> Self {
        Self::Format(error.into())
    }
}
