//! Options of the commands that run a model.

use gptq_compute::{Activations, KvType};
use gptq_model::HeadBits;

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum KvCacheArg {
    /// 32-bit floats
    F32,
    /// Half precision
    F16,
    /// 8-bit integers with a scale per head and token
    Int8,
}

impl KvCacheArg {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        }
    }
}

impl From<KvCacheArg> for KvType {
    fn from(arg: KvCacheArg) -> Self {
        match arg {
            KvCacheArg::F32 => Self::F32,
            KvCacheArg::F16 => Self::F16,
            KvCacheArg::Int8 => Self::Int8,
        }
    }
}

/// How the projection to logits is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum HeadBitsArg {
    /// As the checkpoint has it
    #[value(name = "16")]
    Stored,
    /// 8-bit integers with a scale per token of the vocabulary
    #[value(name = "8")]
    Eight,
}

impl HeadBitsArg {
    pub(crate) fn bits(self) -> u32 {
        if self == Self::Stored { 16 } else { 8 }
    }
}

impl From<HeadBitsArg> for HeadBits {
    fn from(arg: HeadBitsArg) -> Self {
        match arg {
            HeadBitsArg::Stored => Self::Stored,
            HeadBitsArg::Eight => Self::Eight,
        }
    }
}

/// How quantized linears take their input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ActivationsArg {
    /// 32-bit floats
    F32,
    /// Rounded to 16 bits: faster where the processor multiplies pairs of bfloat16 or of integers
    Bf16,
    /// 8-bit integers with a scale per token and group
    Int8,
}

impl From<ActivationsArg> for Activations {
    fn from(arg: ActivationsArg) -> Self {
        match arg {
            ActivationsArg::F32 => Self::F32,
            ActivationsArg::Bf16 => Self::Bf16,
            ActivationsArg::Int8 => Self::Int8,
        }
    }
}

/// What generation and benchmarks choose; the defaults are the fast ones.
#[derive(Debug, clap::Args)]
pub(crate) struct RuntimeArgs {
    /// How keys and values are kept.
    #[arg(long, value_enum, default_value_t = KvCacheArg::F16, value_name = "TYPE")]
    pub(crate) kv_cache: KvCacheArg,
    /// Bits of the projection to logits where the checkpoint has floats.
    #[arg(long, value_enum, default_value_t = HeadBitsArg::Eight, value_name = "BITS")]
    pub(crate) lm_head_bits: HeadBitsArg,
    /// How quantized linears take their input.
    #[arg(long, value_enum, default_value_t = ActivationsArg::Int8, value_name = "TYPE")]
    pub(crate) activations: ActivationsArg,
}
