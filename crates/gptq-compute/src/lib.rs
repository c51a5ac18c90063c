//! Tensors, thread pool and CPU kernels of gptq-rs.
//!
//! This crate knows nothing of models or file formats. It offers a few coarse operations on
//! [`Tensor`]s ([`linear`], [`norm`], [`rope`], [`attention()`], …) and the numerical core of GPTQ
//! ([`Gram`], [`cholesky`], [`sweep`]). Every operation is written once over the
//! [`arch::Simd`] trait and instantiated per instruction set; the set is chosen once per process
//! ([`arch::isa`], overridable with `GPTQ_ISA`, see [`arch::Isa::name`]).
//!
//! Results never depend on the number of threads: work is cut into pieces whose boundaries depend
//! on the shapes alone, and every piece is computed by one thread from start to end.

// A kernel is an `unsafe fn` over `arch::Simd` under one contract, stated there; a block around every
// intrinsic would say nothing more. Code outside such functions marks each unsafe step.
#![allow(unsafe_op_in_unsafe_fn)]
// Kernels must be compiled inside the `#[target_feature]` function of their instruction set.
#![allow(clippy::inline_always)]
// Loops over registers index several arrays at once.
#![allow(clippy::needless_range_loop)]
// All loads and stores are unaligned ones.
#![allow(clippy::cast_ptr_alignment)]

mod activation;
pub mod arch;
mod arena;
pub mod attention;
mod backward;
mod bandwidth;
pub mod cholesky;
mod convolution;
mod cross;
mod elementwise;
mod error;
mod gemm;
mod gram;
mod int8_rate;
mod linear;
#[cfg(test)]
mod linear_tests;
mod loss;
mod math;
mod matrix;
mod norm;
mod pairs;
mod pool;
pub mod quantized;
mod rope;
pub mod sweep;
mod tensor;

pub use activation::{Activation, activate, activate_gated};
pub use attention::{
    AttnParams, AttnSpan, Distances, KvMemory, KvType, LayerKv, Span, attention, relative_attention,
};
pub use backward::{
    AttnTrace, NormGradient, Steps, activate_backward, attention_backward, input_gradient,
    norm_backward, norm_heads_backward, weight_gradient,
};
pub use bandwidth::BandwidthProbe;
pub use convolution::{Convolution, convolve};
pub use cross::{Cross, times_inverse};
pub use elementwise::{
    add_scaled, clamp, embed, gather_cols, multiply, scale, scatter_cols, soft_cap,
};
pub use error::{ComputeError, Result};
pub use gemm::{gemm_nt, gemm_peak_rate};
pub use gram::Gram;
pub use int8_rate::int8_peak_rate;
pub use linear::{Scratch, linear};
pub use loss::{Divergence, argmax, cross_entropy, kl_divergence};
pub use matrix::{DenseMatrix, DenseType, Linear, Matrix, SharedBytes};
pub use norm::{Norm, NormKind, add_norm, norm, norm_heads};
pub use pool::{Pool, physical_cores};
pub use quantized::{Activations, BlockParts, BlockRows, GptqParts, QuantizedMatrix};
pub use rope::{RopeStyle, RopeTable, rope, rope_backward};
pub use tensor::Tensor;
