//! Gradients of the operations: what a change of the output means for inputs and parameters.
//!
//! With L any number computed from the outputs, `dy` is dL/dy for an output y, and an operation's
//! backward computes dL/dx for its inputs x. Everything is f32, for whole sequences, and as
//! independent of the number of threads as the operations themselves.

mod activation;
mod attention;
mod norm;
mod product;
mod scales;

pub use activation::activate_backward;
pub use attention::{AttnTrace, attention_backward};
pub use norm::{NormGradient, norm_backward, norm_heads_backward};
pub use product::{input_gradient, weight_gradient};
pub use scales::Steps;
