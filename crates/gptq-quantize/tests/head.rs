//! The head as the last unit of a run: an interruption just before it is resumed to the same bytes.

#![allow(missing_docs)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use gptq_compute::Pool;
use gptq_format::Checkpoint;
use gptq_quantize::pipeline::Job;
use gptq_quantize::{
    CalibrationOptions, CalibrationReport, CalibrationSet, Progress, QuantReport, QuantizeError,
    QuantizeOptions, quantize,
};
use gptq_testkit::tiny_llama;

/// Asks to stop when so many units are done.
struct StopAfter {
    units: usize,
    done: AtomicUsize,
}

impl Progress for StopAfter {
    fn block_done(&self, _index: usize) {
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    fn interrupted(&self) -> bool {
        self.done.load(Ordering::Relaxed) == self.units
    }
}

fn run(
    source: &Path,
    output: &Path,
    options: QuantizeOptions,
    units: usize,
) -> Result<QuantReport, QuantizeError> {
    let windows: Vec<Vec<u32>> =
        (0..9).map(|w| (0..40).map(|i| (i * 13 + w * w * 7) % 256).collect()).collect();
    let sizes = CalibrationOptions { nsamples: windows.len(), seqlen: 40, seed: 0 };
    let report = CalibrationReport::new(Vec::new(), &windows, &sizes, 256);
    let job = Job {
        checkpoint: &Checkpoint::open(source).unwrap(),
        tokenizer: None,
        model: "tiny",
        calibration: Some(&CalibrationSet::from_windows(windows, report)),
        options: &QuantizeOptions { group_size: 32, lm_head: true, ..options },
        output,
        plots: None,
        float_stream: None,
        pool: &Arc::new(Pool::new(2)),
    };
    quantize(&job, &StopAfter { units, done: AtomicUsize::new(0) })
}

#[test]
fn a_run_resumes_at_the_head_and_behind_it() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    tiny_llama(&folder.join("model"), 4);
    let weights = |name: &str| std::fs::read(folder.join(name).join("model.safetensors")).unwrap();
    for true_sequential in [true, false] {
        let options = QuantizeOptions { true_sequential, overwrite: true, ..Default::default() };
        let resumed = QuantizeOptions { resume: true, ..options.clone() };
        let source = folder.join("model");
        let whole = run(&source, &folder.join("whole"), options.clone(), usize::MAX).unwrap();
        assert_eq!(whole.modules.len(), 15);
        for units in [1, 2] {
            let output = folder.join("out");
            let stopped = run(&source, &output, options.clone(), units).unwrap_err();
            assert!(
                matches!(stopped, QuantizeError::Interrupted { done, total: 3 } if done == units),
                "{stopped}"
            );
            let report = run(&source, &output, resumed.clone(), usize::MAX).unwrap();
            assert_eq!(report.modules.len(), 15);
            assert!(weights("whole") == weights("out"), "after {units} units: the bytes differ");
        }
    }
}

/// With all units done, what is left is to give the directory its name.
#[test]
fn all_units_done_is_finished_without_work() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let source = folder.join("model");
    tiny_llama(&source, 4);
    let options = QuantizeOptions::default();
    run(&source, &folder.join("out"), options.clone(), usize::MAX).unwrap();
    let stopped = run(&source, &folder.join("again"), options.clone(), 2);
    assert!(stopped.is_err());
    let partial = folder.join(".again.partial");
    let journal = std::fs::read_to_string(partial.join("journal.json")).unwrap();
    std::fs::copy(folder.join("out/model.safetensors"), partial.join("model.safetensors")).unwrap();
    let journal = journal.replace("\"blocks_done\":2", "\"blocks_done\":3");
    std::fs::write(partial.join("journal.json"), journal).unwrap();
    let resumed = QuantizeOptions { resume: true, ..options };
    // Writing the head again would be an error.
    run(&source, &folder.join("again"), resumed, 1).unwrap();
    assert!(folder.join("again/model.safetensors").exists());
}
