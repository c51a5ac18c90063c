//! The head as the last unit of a run: one linear behind the blocks, on the normalised stream.

use gptq_model::{Ctx, HeadLayer};

use super::Run;
use super::activations::Activations;
use super::inputs::StageInputs;
use crate::error::Result;

impl Run<'_> {
    /// Quantizes the head against the activations behind the last block.
    pub(super) fn head(
        &mut self,
        ctx: &mut Ctx,
        activations: Option<&mut Activations<'_>>,
    ) -> Result<()> {
        let Some(linear) = self.spec.head_linear() else { return Ok(()) };
        let inputs = match activations {
            None => StageInputs::default(),
            Some(activations) => {
                self.progress.phase("inputs");
                let model = self.output.checkpoint();
                let head = HeadLayer::load_without_projection(model, self.spec)?;
                activations.head_inputs(ctx, &head, &mut self.phases)?
            }
        };
        self.solve_linears(self.spec.layer_count(), &[linear], inputs, |_, _| Ok(()))
    }
}
