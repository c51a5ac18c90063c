//! What bits are chosen from: the divergence that is measured of a group is that of a model with this group alone
//! quantized, as `quantize` writes it.

#![allow(missing_docs)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::calibration;
use gptq_compute::{Activations, Pool, Tensor, kl_divergence};
use gptq_format::{Bits, Checkpoint, Dynamic};
use gptq_model::{Model, Rows, Sequence, Session, Spec};
use gptq_quantize::pipeline::{Job, MixedReport, apply_target, sensitivity};
use gptq_quantize::{CalibrationSet, Correction, QuantizeOptions, quantize};
use gptq_testkit::TinyLlama;
use serde_json::json;

/// So few windows that all of them are fitted and compared.
const WINDOWS: usize = 4;

fn logits(directory: &Path, windows: &CalibrationSet) -> Tensor {
    let model = Model::load(&Checkpoint::open(directory).unwrap()).unwrap();
    let mut session = Session::new(Arc::new(Pool::new(2)));
    let ids: Vec<&[u32]> = windows.windows.iter().map(Vec::as_slice).collect();
    let mut batch: Vec<_> = ids.iter().map(|_| Sequence::new(model.spec())).collect();
    model.forward(&mut session, &mut batch, &ids).unwrap();
    model.logits(&mut session, Rows::All).clone()
}

#[test]
fn divergences_are_those_of_models_with_one_group_quantized() {
    let folder = tempfile::tempdir().unwrap();
    let (source, output) = (folder.path().join("model"), folder.path().join("out"));
    TinyLlama::default().write(&source, 3);
    let checkpoint = Checkpoint::open(&source).unwrap();
    let pool = Arc::new(Pool::new(2));
    let spec = Spec::for_checkpoint(&checkpoint).unwrap();
    let windows = calibration(spec.vocab, WINDOWS, 96);
    let modules: Vec<(usize, String, String)> = (0..spec.layer_count())
        .flat_map(|layer| spec.stages(layer).into_iter().map(move |stage| (layer, stage)))
        .flat_map(|(layer, stage)| {
            stage.linears.into_iter().map(move |l| (layer, l.name, l.module))
        })
        .collect();
    let options = QuantizeOptions {
        bits: Bits::B3,
        group_size: 32,
        overwrite: true,
        activations: Activations::F32,
        correction: Correction::None,
        ..QuantizeOptions::default()
    };
    let job = Job {
        checkpoint: &checkpoint,
        tokenizer: None,
        model: "tiny",
        calibration: Some(&windows),
        options: &options,
        output: &output,
        plots: None,
        float_stream: None,
        pool: &pool,
    };
    let mut chosen = options.clone();
    apply_target(&job, &sensitivity(&job, &()).unwrap(), 5.0, &mut chosen).unwrap();
    let MixedReport { probe_bits, groups: measured, .. } = chosen.mixed.unwrap();
    assert_eq!(probe_bits, 3);
    assert_eq!(measured.len(), 4 * spec.layer_count());
    let expected = logits(&source, &windows);
    for group in measured {
        let rest = modules
            .iter()
            .filter(|(layer, name, _)| *layer != group.layer || !group.modules.contains(name));
        let rules =
            rest.map(|(.., module)| (format!("-:{}$", module.replace('.', "\\.")), json!({})));
        let dynamic = Dynamic::from_map(&rules.collect()).unwrap();
        let alone = QuantizeOptions { dynamic, ..options.clone() };
        let report = quantize(&Job { options: &alone, ..job }, &()).unwrap();
        assert_eq!(report.modules.len(), group.modules.len());
        let rows = kl_divergence(&pool, &expected, &logits(&output, &windows));
        let kl = rows.iter().map(|row| row.kl).sum::<f64>() / rows.len() as f64;
        // What is not quantized is saved in f16, and some codes are others behind it.
        assert!((group.kl / kl - 1.0).abs() < 0.05, "{:?}: {} {kl}", group.modules, group.kl);
    }
}
