//! What a reference computed, kept so that it runs once for many comparisons.
//!
//! Kept is the stream behind the last block, not the logits: it is smaller by the ratio of
//! vocabulary to width (SmolLM2: 85), and the head gives from it the very logits that the model
//! would give.

use gptq_compute::Tensor;
use gptq_model::Spec;

use crate::perplexity::{EvalOptions, windows};

/// The stream of a model behind its last block in every window of a text.
pub struct Recording {
    pub(crate) vocab: usize,
    /// `[seqlen, hidden]` of each window.
    windows: Vec<Tensor>,
}

impl Recording {
    /// Bytes that the recording of a text of `tokens` tokens takes.
    pub fn bytes_for(spec: &Spec, tokens: usize, options: &EvalOptions) -> usize {
        let windows = windows(tokens, options.seqlen, options.max_windows);
        let window = options.seqlen.saturating_mul(spec.hidden * size_of::<f32>());
        windows.saturating_mul(window)
    }

    /// The stream `[seqlen, hidden]` of one window.
    ///
    /// # Panics
    /// If there is no such window.
    #[track_caller]
    pub(crate) fn hidden(&self, window: usize) -> &Tensor {
        &self.windows[window]
    }
}

/// A recording as it grows.
pub(crate) struct Recorder {
    seqlen: usize,
    recording: Recording,
}

impl Recorder {
    /// `None` where the recording would take more than `most_bytes`.
    pub(crate) fn new(
        spec: &Spec,
        tokens: usize,
        options: &EvalOptions,
        most_bytes: usize,
    ) -> Option<Self> {
        let fits = Recording::bytes_for(spec, tokens, options) <= most_bytes;
        let recording = Recording { vocab: spec.vocab, windows: Vec::new() };
        fits.then_some(Self { seqlen: options.seqlen, recording })
    }

    /// Adds the window that begins at row `first` of `hidden`; windows come in order.
    pub(crate) fn add(&mut self, hidden: &Tensor, first: usize) {
        let mut window = Tensor::default();
        window.resize(self.seqlen, hidden.cols());
        for row in 0..self.seqlen {
            window.row_mut(row).copy_from_slice(hidden.row(first + row));
        }
        self.recording.windows.push(window);
    }

    pub(crate) fn finish(self) -> Recording {
        self.recording
    }
}
