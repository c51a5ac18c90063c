//! GPTQ: Hessians, solvers, calibration and the block-by-block pipeline.
//!
//! [`quantize`] runs the whole job: block after block and, inside a block, stage after stage, the
//! inputs of a stage are computed once from the already quantized stages before it; its Hessian,
//! column order and factor are shared by its linears; each is solved ([`solver`]), packed, written
//! at once and put back as packed codes, with which the activations move on. What is evaluated
//! later is, to the bit, what the following stages were calibrated on.

#![forbid(unsafe_code)]

pub mod calibration;
mod error;
pub mod hessian;
pub mod model_card;
pub mod order;
pub mod pipeline;
pub mod progress;
pub mod report;
pub mod rss;
pub mod self_calibration;
pub mod solver;
mod token_weights;

pub use calibration::{
    CalibrationOptions, CalibrationReport, CalibrationSet, CalibrationSource, Windows,
};
pub use error::{QuantizeError, Result};
pub use pipeline::{
    Method, MoeFallback, Plan, QuantizeOptions, model_fingerprint, plan, quantize,
    quantize_as_planned,
};
pub use progress::Progress;
pub use report::{ModuleRecord, QuantReport, TuningRecord};
pub use self_calibration::{SelfCalibration, self_calibrate};
pub use solver::Correction;
pub use token_weights::TokenWeights;
