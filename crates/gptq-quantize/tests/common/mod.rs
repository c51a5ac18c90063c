//! What the tests of whole runs share: random calibration windows and an interruption.

#![allow(missing_docs, dead_code, reason = "each test file uses a part of it")]

use std::sync::atomic::{AtomicBool, Ordering};

use gptq_quantize::{CalibrationOptions, CalibrationReport, CalibrationSet, Progress};
use gptq_testkit::Rng;

/// So many windows of random tokens.
pub(crate) fn calibration(vocab: usize, count: usize, length: usize) -> CalibrationSet {
    let mut rng = Rng::new(4);
    let windows: Vec<Vec<u32>> = (0..count).map(|_| rng.tokens(length, vocab)).collect();
    let options = CalibrationOptions { nsamples: count, seqlen: length, seed: 0 };
    let report = CalibrationReport::new(Vec::new(), &windows, &options, vocab);
    CalibrationSet::from_windows(windows, report)
}

/// Stops after the first block, once.
pub(crate) struct Stop(pub(crate) AtomicBool);

impl Progress for Stop {
    fn interrupted(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}
