//! A convolution over the tokens beside the first block (DeBERTa v2).

use std::mem::swap;

use gptq_compute::{Activation, Convolution, Norm, Tensor, activate, add_scaled, convolve, norm};

use crate::Result;
use crate::load::Loader;
use crate::state::{Ctx, SeqSpan};

/// The output of the first block becomes `norm(output + activation(convolution(input)))`; names relative to
/// [`crate::Spec::base`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenConvolution {
    /// Tensors `[hidden, hidden / groups, kernel]` and `[hidden]`.
    pub name: &'static str,
    /// Tokens that an output is made of, an odd number.
    pub kernel: usize,
    /// Groups of channels that do not see each other; a divisor of the hidden width.
    pub groups: usize,
    /// Of the convolution's output.
    pub activation: Activation,
    /// Norm of the sum.
    pub norm: &'static str,
}

/// The convolution with its weights.
pub(crate) struct ConvolutionLayer {
    convolution: Convolution,
    activation: Activation,
    norm: Norm,
}

impl ConvolutionLayer {
    pub(crate) fn load(loader: &Loader<'_>, scheme: TokenConvolution) -> Result<Self> {
        let spec = loader.spec;
        let name = |name: &str| format!("{}{name}", spec.base);
        let shape = [spec.hidden, spec.hidden / scheme.groups, scheme.kernel];
        let weight = loader.tensor(&format!("{}.weight", name(scheme.name)), &shape)?;
        let bias = loader.vector(&format!("{}.bias", name(scheme.name)), spec.hidden)?;
        let (kernel, groups) = (scheme.kernel, scheme.groups);
        Ok(Self {
            convolution: Convolution { weight, bias, kernel, groups },
            activation: scheme.activation,
            norm: loader.norm(&name(scheme.norm), spec.hidden, spec.norm)?,
        })
    }

    /// What is added to the block's output, from its input `[rows, hidden]`.
    pub(crate) fn begin(&self, ctx: &Ctx, input: &Tensor, seqs: &[SeqSpan<'_>], out: &mut Tensor) {
        let spans: Vec<_> = seqs.iter().map(|seq| seq.rows.clone()).collect();
        convolve(&ctx.pool, input, &spans, &self.convolution, out);
        activate(&ctx.pool, self.activation, out);
    }

    /// Adds that to the block's output.
    pub(crate) fn finish(&self, ctx: &mut Ctx, convolved: &Tensor, stream: &mut Tensor) {
        add_scaled(&ctx.pool, stream, convolved, 1.0);
        norm(&ctx.pool, stream, &self.norm, &mut ctx.wide);
        swap(stream, &mut ctx.wide);
    }
}
