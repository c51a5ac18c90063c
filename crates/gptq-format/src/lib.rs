//! Checkpoint formats: safetensors, GGUF, GPTQ packing, tokenizers, configs.
//!
//! The way in is [`Checkpoint::open`]: a directory or a `.gguf` file becomes a [`Config`], a [`TensorStore`] of named
//! tensors and, where the checkpoint is quantized, a [`QuantizeConfig`]. The way out is [`ShardWriter`] inside an
//! [`OutputDir`], which gives the output its final name only when it is whole.
//!
//! Everything read here is untrusted: what the types of this crate hold has been checked, and what could not be checked
//! is an error that names the file and the tensor.

#![deny(unsafe_code)]

pub mod awq;
pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod dtype;
pub mod dynamic;
pub mod error;
pub mod fs;
pub mod gguf;
pub mod gptq_linear;
pub mod hub;
pub mod mmap;
pub mod pack;
pub mod quantize_config;
pub mod safetensors_file;
pub mod shards;
mod side_files;
pub mod tensors;
pub mod tokenizer;
mod tokenizer_gguf;

pub use checkpoint::{Checkpoint, CheckpointKind};
pub use config::Config;
pub use dtype::DType;
pub use dynamic::Dynamic;
pub use error::{FormatError, Result};
pub use fs::OutputDir;
pub use gptq_linear::GptqLinear;
pub use pack::Bits;
pub use quantize_config::{CheckpointFormat, ModuleSettings, QuantizeConfig};
pub use shards::{ShardPlan, ShardWriter, TensorSpec};
pub use side_files::{copy_custom_code, copy_sentence_files};
pub use tensors::{SharedBytes, TensorInfo, TensorStore};
pub use tokenizer::Tokenizer;
pub use tokenizer_gguf::GgufTokenizer;
