//! One transformer for every family.
//!
//! A family is a table: [`Spec`], read from config.json by [`Spec::from_config`]. A block is a list of stages, and a stage is
//! the linears that share one input ([`Spec::stages`]). [`Block`] runs stage by stage over the rows of any number of
//! sequences; inference and calibration call the same functions:
//!
//! ```text
//! begin            hidden -> input of Qkv
//! run_stage(Qkv)      q, k, v, rotation, cache, attention -> input of AttnOut
//! run_stage(AttnOut)  projection, residual, norm          -> input of MlpUp
//! run_stage(MlpUp)    projections, activation             -> input of MlpDown
//! run_stage(MlpDown)  projection, residual                -> hidden of the next block
//! ```
//!
//! [`Model`] strings embedding, blocks and head together; [`generate()`] and [`generate_batch`] decode.

#![forbid(unsafe_code)]

pub mod backward;
pub mod block;
pub mod cache;
pub mod convolution;
pub mod embedder;
pub mod encode;
pub mod error;
pub mod families;
mod fields;
pub mod fused;
pub mod generate;
pub mod gradients;
pub mod head;
mod linear_rows;
mod load;
pub mod model;
mod moe;
pub mod pooling;
pub mod profile;
mod random;
pub mod relative;
pub mod rope;
pub mod sampler;
pub mod spec;
pub mod stages;
pub mod state;
pub mod table;
mod unfused;

pub use block::Block;
pub use cache::Sequence;
pub use embedder::Embedder;
pub use encode::{EncodeInput, Encoded};
pub use error::{ModelError, Result};
pub use families::{FAMILIES, Family};
pub use generate::{
    BatchOptions, FinishReason, GenerateOptions, Generated, generate, generate_batch,
};
pub use gradients::{Gradients, NormPlace, Trace};
pub use head::HeadLayer;
pub use linear_rows::LinearRows;
pub use load::{LinearSource, LoadedBytes, block_parts, is_buffer, load_linear, loaded_bytes};
pub use model::{HeadBits, LoadOptions, Model, Rows, Session};
pub use pooling::{Pooling, SentencePooling};
pub use profile::{Op, OpCost, Profile};
pub use sampler::{Sampler, Sampling};
pub use spec::Spec;
pub use stages::{LinearSpec, Part, Stage, StageSpec};
pub use state::{ActivationType, BlockState, Ctx, SeqSpan};
pub use table::FamilyTable;
