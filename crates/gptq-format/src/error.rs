//! The one error type of this crate.

use std::path::{Path, PathBuf};

/// What this crate returns.
pub type Result<T> = std::result::Result<T, FormatError>;

/// Why a checkpoint could not be read or written.
///
/// Every message names the file, the tensor or the key, and says what was expected; where there is something the user
/// can do, it says that too.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The operating system refused: missing file, no permission, full disk.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// What was tried, as a verb: `read`, `create`, `rename`.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A disk is too small for what is to be written.
    #[error(
        "`{}` needs {} MiB, but {} MiB are free on its disk; make room, or write to another disk",
        path.display(), needed.div_ceil(1 << 20), available >> 20
    )]
    NoSpace {
        /// The directory.
        path: PathBuf,
        /// What is still to be written, in bytes.
        needed: u64,
        /// What is free for this user, in bytes.
        available: u64,
    },
    /// A JSON file is not JSON.
    #[error("`{}` is not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Position and reason.
        source: serde_json::Error,
    },
    /// A file is larger than any valid file of its kind.
    #[error("`{}` has {bytes} bytes, more than the {limit} bytes allowed for such a file", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        bytes: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The path holds no checkpoint that can be read.
    #[error("no checkpoint in `{}`: {reason}", path.display())]
    NoCheckpoint {
        /// The path given.
        path: PathBuf,
        /// What was found and what to do.
        reason: String,
    },
    /// A safetensors file is truncated, overlapping or otherwise malformed.
    #[error("`{}` is not a valid safetensors file: {reason}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// `model.safetensors.index.json` contradicts itself or its shards.
    #[error("`{}` is not a valid shard index: {reason}", path.display())]
    ShardIndex {
        /// The index file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A shard named by the index is not there.
    #[error(
        "shard `{shard}` is missing from `{}`; the index places tensor `{tensor}` in it; download the checkpoint again",
        directory.display()
    )]
    MissingShard {
        /// The directory of the checkpoint.
        directory: PathBuf,
        /// The file name of the shard.
        shard: String,
        /// The first tensor that the index places there.
        tensor: String,
    },
    /// A tensor that is needed is not in the checkpoint.
    #[error("tensor `{tensor}` is not in `{}`", path.display())]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
    },
    /// A tensor has another shape than the config asks for.
    #[error("tensor `{tensor}` in `{}` has shape {got:?}, expected {expected}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The shape that was expected, in words or brackets.
        expected: String,
        /// The shape found.
        got: Vec<usize>,
    },
    /// A tensor has a dtype that cannot be read as what was asked for.
    #[error("tensor `{tensor}` in `{}` has dtype {got}, expected {expected}", path.display())]
    DtypeMismatch {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The dtypes that would do.
        expected: &'static str,
        /// The dtype found.
        got: String,
    },
    /// A value is NaN, infinite, or outside the range of the type it is read as.
    #[error("tensor `{tensor}` in `{}` holds {value} at index {index}, expected {expected}; the file is damaged", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Row-major index of the first bad element.
        index: usize,
        /// The bad value as text.
        value: String,
        /// What would be allowed.
        expected: &'static str,
    },
    /// A tensor is stored with permuted rows and has no contiguous bytes in logical order.
    #[error("tensor `{tensor}` in `{}` is stored with permuted rows and can only be read by value", path.display())]
    Permuted {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
    },
    /// A key of a JSON configuration is missing or has the wrong type or value.
    #[error("`{}`: key `{key}`: expected {expected}, found {got}", path.display())]
    Config {
        /// The file (or the GGUF file whose metadata it was rebuilt from).
        path: PathBuf,
        /// The key, dotted for nested objects.
        key: String,
        /// What the key should hold.
        expected: String,
        /// What it holds.
        got: String,
    },
    /// A checkpoint is quantized in a way that is not supported.
    #[error("`{}`: {what} is not supported; {hint}", path.display())]
    Unsupported {
        /// The configuration file.
        path: PathBuf,
        /// The method, format or bit width.
        what: String,
        /// What to do instead.
        hint: &'static str,
    },
    /// A rule of `dynamic` is malformed.
    #[error("dynamic rule `{rule}`: {reason}")]
    Dynamic {
        /// The rule as written, with its prefix.
        rule: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The number of bits is not one that GPTQ checkpoints hold.
    #[error("{0} bits are not supported; use 2, 3, 4 or 8")]
    Bits(u64),
    /// Codes do not fit the packed layout.
    #[error("cannot pack: {0}")]
    Pack(String),
    /// A symmetric or asymmetric zero point of 0 cannot be written in the v1 format, where readers disagree on it.
    #[error(
        "group {group}, output {output} has zero point 0, which readers of the `gptq` (v1) format decode differently; \
         use the `gptq_v2` format or keep zero points at 1 or more"
    )]
    ZeroPointZero {
        /// The quantization group.
        group: usize,
        /// The output channel.
        output: usize,
    },
    /// The tensors of a quantized linear contradict each other or the config.
    #[error("quantized linear `{module}` in `{}`: {reason}", path.display())]
    Linear {
        /// The checkpoint.
        path: PathBuf,
        /// The module's name.
        module: String,
        /// The contradiction.
        reason: String,
    },
    /// The shard writer was used against its plan.
    #[error("cannot write tensor `{tensor}`: {reason}")]
    ShardWrite {
        /// The tensor's name.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
    /// The output directory exists and holds files.
    #[error("output directory `{}` exists and is not empty; choose another or allow overwriting", path.display())]
    OutputExists {
        /// The final directory.
        path: PathBuf,
    },
    /// The output file exists.
    #[error("`{}` exists; choose another file or allow overwriting", path.display())]
    FileExists {
        /// The file.
        path: PathBuf,
    },
    /// Another run is writing to the same output.
    #[error("another run is writing to `{}` (lock file `{}`); wait for it or choose another output", path.display(), lock.display())]
    Locked {
        /// The final directory.
        path: PathBuf,
        /// The lock file.
        lock: PathBuf,
    },
    /// A GGUF file could not be read.
    #[error(transparent)]
    Gguf(#[from] crate::gguf::GgufError),
    /// A tokenizer could not be read.
    #[error(transparent)]
    Tokenizer(#[from] crate::tokenizer::TokenizerError),
    /// A chat template could not be compiled or rendered.
    #[error(transparent)]
    Chat(#[from] crate::chat::ChatError),
    /// A model could not be obtained from the hub.
    #[error("cannot get `{model}` from the Hugging Face hub: {reason}; {hint}")]
    Hub {
        /// The hub id as given.
        model: String,
        /// What went wrong.
        reason: String,
        /// What to do without a network.
        hint: String,
    },
}

impl FormatError {
    /// For `map_err` on file system calls: `fs::read(p).map_err(FormatError::io("read", p))`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}
