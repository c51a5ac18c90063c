//! What can go wrong between a config.json and a token.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, ModelError>;

/// Errors of describing, loading and running a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The config names an architecture that has no table.
    #[error(
        "{file}: model_type \"{model_type}\" is not supported; supported are {supported}; one that is like them can be \
         described by --family FILE.toml (see `gptq families`)"
    )]
    UnknownFamily {
        /// The config file.
        file: PathBuf,
        /// The value of `model_type`.
        model_type: String,
        /// All known values.
        supported: String,
    },
    /// A family file is malformed, contradicts itself, or does not fit the config.
    #[error("{file}: {reason}")]
    FamilyFile {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A required key is absent.
    #[error("{file}: \"{key}\" is missing")]
    MissingField {
        /// The config file.
        file: PathBuf,
        /// Path of the key, for example `rope_scaling.factor`.
        key: String,
    },
    /// A key has a value which cannot be used.
    #[error("{file}: \"{key}\" is {value}, expected {expected}")]
    BadField {
        /// The config file.
        file: PathBuf,
        /// Path of the key.
        key: String,
        /// Its value as JSON.
        value: String,
        /// What would have been accepted.
        expected: String,
    },
    /// A key changes what the model computes and nothing here implements it.
    #[error(
        "{file}: \"{key}\" is {value}, which family {family} does not implement; running without it would give wrong \
         results (if the key has no effect on this model, remove it from the file)"
    )]
    UnhandledField {
        /// The config file.
        file: PathBuf,
        /// Path of the key.
        key: String,
        /// Its value as JSON.
        value: String,
        /// The family that was asked.
        family: String,
    },
    /// A tensor's shape contradicts the config.
    #[error("{file}: tensor {tensor} has shape {got:?}, the config asks for {expected:?}")]
    Shape {
        /// The checkpoint.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Shape that follows from the config.
        expected: Vec<usize>,
        /// Shape in the file.
        got: Vec<usize>,
    },
    /// A tensor that the family needs is absent.
    #[error("{file}: tensor {tensor} is missing (family {family})")]
    MissingTensor {
        /// The checkpoint.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The family that needs it.
        family: String,
    },
    /// Packed codes without the settings that tell how to read them.
    #[error(
        "{file}: module {module} is quantized, but neither config.json (quantization_config) nor quantize_config.json says \
         how"
    )]
    NoQuantizeConfig {
        /// The checkpoint.
        file: PathBuf,
        /// The quantized module.
        module: String,
    },
    /// The file holds a bias that the family does not have.
    #[error(
        "{file}: tensor {tensor} is not zero, but family {family} with this config has no such bias"
    )]
    UnexpectedBias {
        /// The checkpoint.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The family.
        family: String,
    },
    /// A token id is outside the vocabulary.
    #[error("token {id} at position {index} is outside the vocabulary of {vocab} tokens")]
    Token {
        /// The id.
        id: u32,
        /// Its index in the call.
        index: usize,
        /// Number of tokens in the vocabulary.
        vocab: usize,
    },
    /// A token type that the model does not have.
    #[error("token type {kind} is not below {known}, the number of token types of this model")]
    TokenType {
        /// The type.
        kind: u32,
        /// Number of types.
        known: usize,
    },
    /// A model without a direction was asked for the next token.
    #[error(
        "family {family} reads in both directions and predicts no next token; embed text with it instead"
    )]
    NotCausal {
        /// The family.
        family: String,
    },
    /// A model that was saved without a projection to logits was asked for the next token.
    #[error(
        "this {family} has no projection to logits (lm_head) and predicts no next token; embed text with it instead"
    )]
    NoHead {
        /// The family.
        family: String,
    },
    /// A sequence is longer than the table of learned positions, or than what is implemented of its family.
    #[error(
        "position {position} is beyond the {limit} positions of this model; use shorter sequences"
    )]
    Position {
        /// The first position that does not fit.
        position: usize,
        /// Number of positions.
        limit: usize,
    },
    /// A stage was run before its linears were loaded or set.
    #[error("block {layer}: linear {linear} is not loaded")]
    LinearNotLoaded {
        /// Index of the block.
        layer: usize,
        /// Name of the linear within the block.
        linear: String,
    },
    /// A linear of the wrong shape was put into a block.
    #[error("block {layer}: linear {linear} is {got:?}, expected {expected:?} (out, in)")]
    LinearShape {
        /// Index of the block.
        layer: usize,
        /// Name of the linear within the block.
        linear: String,
        /// (out, in) of the spec.
        expected: (usize, usize),
        /// (out, in) that was given.
        got: (usize, usize),
    },
    /// The gradient of a part of the block is not implemented.
    #[error("block {layer}: no gradients of {part}")]
    NoGradient {
        /// Index of the block.
        layer: usize,
        /// What has none.
        part: &'static str,
    },
    /// The arguments of a forward call contradict each other.
    #[error("{0}")]
    Batch(String),
    /// A sampling option is out of range.
    #[error("sampling: {option} is {value}, expected {expected}")]
    Sampling {
        /// The option.
        option: &'static str,
        /// Its value.
        value: f32,
        /// The accepted range.
        expected: &'static str,
    },
    /// The logits hold NaN or no finite number at all.
    #[error(
        "the model produced {what} logits at generated token {step}; its weights or activations are broken (run `gptq \
         verify`)"
    )]
    BadLogits {
        /// `NaN` or `only infinite`.
        what: &'static str,
        /// Index of the token being generated.
        step: usize,
    },
    /// Reading the checkpoint failed.
    #[error(transparent)]
    Format(#[from] gptq_format::FormatError),
    /// A weight could not be turned into a matrix.
    #[error("tensor {tensor}: {source}")]
    Compute {
        /// The tensor's or module's name.
        tensor: String,
        /// The reason.
        source: gptq_compute::ComputeError,
    },
}
