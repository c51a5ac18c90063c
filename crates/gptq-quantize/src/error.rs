//! Errors of a quantization run.

use std::path::PathBuf;

use gptq_compute::ComputeError;
use gptq_format::FormatError;
use gptq_model::ModelError;

use crate::calibration::CalibrationError;

/// Result with [`QuantizeError`].
pub type Result<T> = std::result::Result<T, QuantizeError>;

/// Why a quantization run cannot start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuantizeError {
    /// Reading or writing a checkpoint failed.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The model is not supported or does not fit its config.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The calibration data cannot be used.
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    /// A quantized layer does not fit the kernels.
    #[error("{module}: {source}")]
    Compute {
        /// The module.
        module: String,
        /// What the kernels say.
        source: ComputeError,
    },
    /// Options that contradict each other or are out of range.
    #[error("{option}: {reason}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The input is a quantized checkpoint already.
    #[error(
        "{path} is a GPTQ checkpoint already ({bits} bits); quantize the original float model instead"
    )]
    AlreadyQuantized {
        /// The checkpoint.
        path: PathBuf,
        /// Its bits.
        bits: u32,
    },
    /// `--resume` with other settings or inputs than the interrupted run had.
    #[error(
        "{path} was begun with {field} = {then}, this run has {now}; resume with what it was begun \
         with, or start afresh without --resume"
    )]
    ResumeDiffers {
        /// The unfinished directory.
        path: PathBuf,
        /// Name of the setting or input.
        field: String,
        /// Its value when the run began.
        then: String,
        /// Its value now.
        now: String,
    },
    /// The user asked to stop.
    #[error("stopped after {done} of {total} blocks; run the same command with --resume to go on")]
    Interrupted {
        /// Finished blocks.
        done: usize,
        /// Blocks of the model, and one for the head if it is quantized.
        total: usize,
    },
    /// Something outside of the run failed, such as a disk that is full.
    #[error(
        "{source}; {done} of {total} blocks are kept: when that is mended, run the same command \
         with --resume to go on"
    )]
    Kept {
        /// What failed.
        source: Box<QuantizeError>,
        /// Finished blocks.
        done: usize,
        /// Blocks of the model.
        total: usize,
    },
    /// Weights beyond what half precision scales reach.
    #[error(
        "{path}: tensor {tensor} holds weights of up to {largest:e}; their scale does not fit \
         float16, in which it is stored; the file is damaged, or the weights have to be scaled first"
    )]
    ScaleTooLarge {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The largest magnitude.
        largest: f32,
    },
    /// The model computes something that is not a number.
    #[error(
        "layer {layer}: the inputs of {module} are not finite; the weights of the model or of an \
         earlier block are damaged, or its activations overflow"
    )]
    NotFinite {
        /// Block.
        layer: usize,
        /// First linear of the stage.
        module: String,
    },
    /// What comes out of the last block is not a number.
    #[error(
        "layer {layer}: the outputs of {module} are not finite, though its inputs are; its weights \
         are damaged, or its activations overflow"
    )]
    OutputNotFinite {
        /// Block.
        layer: usize,
        /// The module.
        module: String,
    },
    /// No module of the model is left to quantize.
    #[error("nothing to quantize: the rules of --dynamic skip every module")]
    NothingToQuantize,
    /// `--max-memory` below what the run needs.
    #[error(
        "--max-memory {} MiB is too little: {what} needs {least_mib} MiB{hint}",
        limit >> 20
    )]
    Memory {
        /// The limit, in bytes.
        limit: u64,
        /// What needs more.
        what: &'static str,
        /// The least that would do, in MiB.
        least_mib: u64,
        /// What would need less.
        hint: &'static str,
    },
    /// Calibration windows longer than the model's table of positions.
    #[error(
        "calibration windows of {seqlen} tokens exceed the model's {max_positions} positions; use --seqlen {max_positions} or less"
    )]
    WindowTooLong {
        /// Tokens of a window.
        seqlen: usize,
        /// Positions of the model.
        max_positions: usize,
    },
}
