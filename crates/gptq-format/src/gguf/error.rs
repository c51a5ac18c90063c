//! What can be wrong with a GGUF file.

use std::path::PathBuf;

use super::GgmlType;

/// Why a GGUF file could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The file could not be opened or read.
    #[error("cannot read `{}`: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// The file does not begin with `GGUF`.
    #[error("`{}` is not a GGUF file: it does not begin with the bytes `GGUF`", path.display())]
    NotGguf {
        /// The file.
        path: PathBuf,
    },
    /// The file was written for a big-endian machine.
    #[error(
        "`{}` is a big-endian GGUF file, which is not supported; convert it with `gguf-convert-endian FILE little`",
        path.display()
    )]
    BigEndian {
        /// The file.
        path: PathBuf,
    },
    /// The version is neither 2 nor 3.
    #[error("`{}` has GGUF version {version}; supported are 2 and 3", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// The version found.
        version: u32,
    },
    /// The file is one part of several.
    #[error(
        "`{}` is one of {parts} parts of a split model; join them first with `gguf-split --merge`",
        path.display()
    )]
    Split {
        /// The file.
        path: PathBuf,
        /// Number of parts.
        parts: u64,
    },
    /// The header runs past the end of the file.
    #[error("`{}` is truncated: {what} at byte {position} needs {needed} bytes", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What was being read.
        what: String,
        /// Where in the file, in bytes.
        position: u64,
        /// How many bytes it needs from there.
        needed: u64,
    },
    /// The header is larger than any model needs.
    #[error("`{}` has a header of more than {limit} bytes, which no model needs; the file is damaged", path.display())]
    HeaderTooLarge {
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        limit: u64,
    },
    /// The header is not well formed.
    #[error("`{}` is malformed: {what}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The key, tensor or field.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor's description is wrong.
    #[error("`{}`: tensor `{tensor}`: {reason}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in the file.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor is stored in a type that cannot be read.
    #[error(
        "`{}`: tensor `{tensor}` is stored as {dtype}, which cannot be read; supported are F32, F16, BF16, F64, Q4_0, \
         Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K",
        path.display()
    )]
    UnsupportedType {
        /// The file.
        path: PathBuf,
        /// The tensor's name in the file.
        tensor: String,
        /// Its type.
        dtype: GgmlType,
    },
    /// A metadata key that is needed is missing.
    #[error("`{}` has no metadata key `{key}`", path.display())]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// A metadata value has the wrong type or an impossible value.
    #[error("`{}`: metadata key `{key}` should be {expected}, but is {got}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// The architecture is not one that is handled.
    #[error("`{}` has architecture `{architecture}`; supported GGUF architectures are {supported}", path.display())]
    Architecture {
        /// The file.
        path: PathBuf,
        /// `general.architecture`.
        architecture: String,
        /// The supported ones, separated by commas.
        supported: String,
    },
    /// The model has a feature that would change its results and is not handled.
    #[error("`{}` uses {feature}, which is not supported for GGUF input; convert from the original checkpoint", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The feature, with its key or tensor.
        feature: String,
    },
}
