//! What a run that goes on must have in common with the one that was stopped.

#![allow(missing_docs)]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use common::{Stop, calibration};
use gptq_compute::Pool;
use gptq_format::{Checkpoint, Dynamic};
use gptq_quantize::pipeline::Job;
use gptq_quantize::{Progress, QuantizeError, QuantizeOptions, quantize};
use gptq_testkit::TinyLlama;

fn run(folder: &Path, rules: &str, progress: &dyn Progress) -> gptq_quantize::Result<()> {
    let rules = serde_json::from_str(rules).unwrap();
    let options = QuantizeOptions {
        group_size: 32,
        resume: true,
        dynamic: Dynamic::from_map(&rules).unwrap(),
        ..QuantizeOptions::default()
    };
    let checkpoint = Checkpoint::open(&folder.join("model")).unwrap();
    let job = Job {
        checkpoint: &checkpoint,
        tokenizer: None,
        model: "tiny",
        calibration: Some(&calibration(200, 4, 32)),
        options: &options,
        output: &folder.join("out"),
        plots: None,
        float_stream: None,
        pool: &Arc::new(Pool::new(2)),
    };
    quantize(&job, progress).map(|_| ())
}

#[test]
fn rules_must_be_the_same_in_the_same_order() {
    let folder = tempfile::tempdir().unwrap();
    TinyLlama::default().write(&folder.path().join("model"), 3);
    let begun = r#"{"+:.*down_proj": {"sym": false}, "+:.*proj": {"sym": true}}"#;
    let stopped = run(folder.path(), begun, &Stop(AtomicBool::new(true)));
    assert!(matches!(stopped, Err(QuantizeError::Interrupted { done: 1, .. })), "{stopped:?}");
    for other in [
        "{}",
        r#"{"+:.*down_proj": {"sym": false}}"#,
        // Of rules that name the same module the first counts.
        r#"{"+:.*proj": {"sym": true}, "+:.*down_proj": {"sym": false}}"#,
    ] {
        let error = run(folder.path(), other, &()).unwrap_err();
        assert!(
            matches!(&error, QuantizeError::ResumeDiffers { field, .. } if field == "dynamic"),
            "{other}: {error}"
        );
    }
    run(folder.path(), begun, &()).unwrap();
}
