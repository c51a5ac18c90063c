//! Folding changes no function: all families, with scales by chance.

use std::path::Path;
use std::sync::Arc;

use gptq_compute::Pool;
use gptq_format::{Checkpoint, ShardPlan, ShardWriter, TensorSpec};
use gptq_model::{EncodeInput, Model, Session};
use gptq_testkit::{Rng, difference, fixtures};

use super::*;

/// Relative to the largest element of the last hidden state: both sides are computed in f32.
const TOLERANCE: f64 = 2e-5;

/// Factors, new norms, and stages with the reason why they have no scales.
type Fold = (Folded, HashMap<String, Vec<f32>>, Vec<(Stage, &'static str)>);

/// Folds scales between 1/4 and 4 into all sites of all blocks. Returns the factors, the new norms, and
/// the stages that no site was found for.
fn fold_all(checkpoint: &Checkpoint, spec: &Spec) -> Fold {
    let (mut folded, mut norms, mut skipped) = (Folded::default(), HashMap::new(), Vec::new());
    let mut rng = Rng::new(11);
    for layer in 0..spec.layer_count() {
        let sites = sites(spec, layer);
        let mut stages: Vec<Stage> = sites.iter().flat_map(|s| s.stages.clone()).collect();
        let mut order = spec.stage_order(layer);
        stages.sort();
        order.sort();
        assert_eq!(stages, order, "every stage has one site");
        for site in sites {
            let all = linears(spec, layer, &site);
            let mut scales: Vec<f32> =
                (0..all[0].in_features).map(|_| 4f32.powf(2.0 * rng.uniform() - 1.0)).collect();
            match &site.source {
                Source::Nothing(reason) => {
                    skipped.extend(site.stages.iter().map(|&stage| (stage, *reason)));
                    continue;
                }
                Source::Rows(rows) => {
                    for (input, channel) in rows.channels.iter().enumerate() {
                        scales[input] = scales[*channel];
                    }
                    let linear = &spec.stage_linears(layer, rows.stage)[rows.index];
                    folded.scale_outputs(linear, rows, &scales);
                }
                Source::Norm(name) => {
                    let read = |part: &str| {
                        let name = format!("{name}.{part}");
                        (name.clone(), checkpoint.tensors.read_f32(&name, &[scales.len()]).unwrap())
                    };
                    let (weight_name, weight) = read("weight");
                    let bias = spec.norm.bias.then(|| read("bias"));
                    let bias_of = bias.as_ref().map(|(_, bias)| (bias.as_slice(), DType::F16));
                    let kind = spec.norm.kind;
                    let new = divide_norm(kind, DType::F16, &weight, bias_of, &scales);
                    let floats = |bytes: &[u8]| -> Vec<f32> {
                        let halves = bytes.chunks_exact(2);
                        halves.map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
                    };
                    norms.insert(weight_name, floats(&new.weight));
                    if let (Some((name, bias)), Some(_)) = (bias, &new.bias) {
                        // As exact numbers: what rounding does to a bias is no fault of the fold.
                        norms.insert(
                            name,
                            bias.iter().zip(&new.scales).map(|(b, s)| b / s).collect(),
                        );
                    }
                    scales = new.scales;
                }
            }
            folded.scale_inputs(&all, &scales);
        }
    }
    (folded, norms, skipped)
}

/// Writes the model with its factors multiplied in, all in f32.
fn write(
    checkpoint: &Checkpoint,
    spec: &Spec,
    folded: &Folded,
    norms: &HashMap<String, Vec<f32>>,
    to: &Path,
) {
    let store = &checkpoint.tensors;
    let float = |name: &&str| {
        matches!(store.info(name).unwrap().dtype, DType::F32 | DType::F16 | DType::BF16)
    };
    let specs = store.names().filter(float).map(|name| TensorSpec {
        name: name.to_owned(),
        dtype: DType::F32,
        shape: store.info(name).unwrap().shape.clone(),
    });
    let specs: Vec<TensorSpec> = specs.collect();
    let plan = ShardPlan::new(specs.clone(), 1 << 30).unwrap();
    let mut writer = ShardWriter::create(to, plan).unwrap();
    let all = (0..spec.layer_count()).flat_map(|layer| spec.stages(layer));
    let all: HashMap<String, LinearSpec> =
        all.flat_map(|stage| stage.linears).map(|l| (l.module.clone(), l)).collect();
    for TensorSpec { name, shape, .. } in specs {
        let mut floats =
            norms.get(&name).cloned().unwrap_or_else(|| store.read_f32(&name, &shape).unwrap());
        let part = name.rsplit_once('.').and_then(|(module, part)| Some((all.get(module)?, part)));
        match part {
            Some((linear, "weight")) => {
                let LinearSpec { module, out_features, in_features, transposed, .. } = linear;
                let rows = LinearRows::open(checkpoint, spec, linear).unwrap();
                let mut weights = rows.read(0..*out_features).unwrap();
                folded.scale(module, 0..*out_features, &mut weights);
                for (i, w) in weights.iter().enumerate() {
                    let (row, column) = (i / in_features, i % in_features);
                    floats[if *transposed { column * out_features + row } else { i }] = *w;
                }
            }
            Some((linear, "bias")) => folded.scale_bias(&linear.module, &mut floats),
            _ => {}
        }
        let bytes: Vec<u8> = floats.iter().flat_map(|x| x.to_le_bytes()).collect();
        writer.write(&name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    std::fs::copy(checkpoint.path.join("config.json"), to.join("config.json")).unwrap();
}

fn hidden(directory: &Path) -> Vec<f32> {
    let model = Model::load(&Checkpoint::open(directory).unwrap()).unwrap();
    let mut session = Session::new(Arc::new(Pool::new(2)));
    let ids: Vec<u32> = (0..24).map(|i| (i * 7 + 3) % 60).collect();
    let input = EncodeInput { ids: &ids, ..EncodeInput::default() };
    model.encode(&mut session, &[input]).unwrap().hidden.as_slice().to_vec()
}

#[test]
fn every_family_computes_the_same_after_folding() {
    let mut seen = 0;
    for (name, dir) in fixtures::all() {
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let spec = Spec::for_checkpoint(&checkpoint).unwrap();
        let (folded, norms, skipped) = fold_all(&checkpoint, &spec);
        let folder = tempfile::tempdir().unwrap();
        write(&checkpoint, &spec, &folded, &norms, folder.path());
        let error = difference(&hidden(folder.path()), &hidden(&dir)).rms;
        assert!(error < TOLERANCE, "{name}: {error}");
        let reasons = |stage: Stage| skipped.iter().find(|s| s.0 == stage).map(|s| s.1);
        let up = reasons(Stage::MlpUp(gptq_model::Part::Dense));
        match name.as_str() {
            "llama" | "qwen2" | "gemma2" | "opt" => assert_eq!(skipped, [], "{name}"),
            // Attention and MLP side by side behind one norm, and GELU before the way back.
            "phi" => assert_eq!((reasons(Stage::Qkv), up, skipped.is_empty()), (None, None, false)),
            "bert" => assert!(up.is_some() && reasons(Stage::AttnOut).is_none()),
            "mixtral" => {
                assert!(skipped.iter().all(|(stage, why)| {
                    matches!(stage, Stage::MlpUp(_)) && why.contains("router")
                }));
                assert!(!skipped.is_empty());
            }
            _ => continue,
        }
        seen += 1;
    }
    // A checkout without the shared fixtures has some of them.
    assert!(seen > 0, "none of the families above");
}

#[test]
fn channels_whose_bias_would_overflow_stay_as_they_are() {
    let (weight, bias) = ([1.0, 1.0], [600.0, 60.0]);
    let bias = Some((bias.as_slice(), DType::F16));
    let got = divide_norm(NormKind::Layer, DType::F16, &weight, bias, &[2f32.powi(-7); 2]);
    assert_eq!(got.scales, [1.0, 2f32.powi(-7)]);
    let bias = got.bias.unwrap();
    let bias = bias.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32());
    assert_eq!(bias.collect::<Vec<_>>(), [600.0, 7680.0]);
}

#[test]
fn norms_are_divided_by_what_their_type_can_hold() {
    let weight = [1.0, 0.3, 0.0, 60_000.0, -2.0, 1e-7];
    let scales = [0.37, 1.9, 5.0, 0.001, 3.3, 1e4];
    for (kind, plus) in [(NormKind::Rms, 0.0), (NormKind::RmsPlusOne, 1.0)] {
        for dtype in [DType::F16, DType::BF16] {
            let weight: Vec<f32> = weight.iter().map(|w| w - plus).collect();
            let got = divide_norm(kind, dtype, &weight, Some((&weight, DType::F16)), &scales);
            let stored: Vec<f32> = got
                .weight
                .chunks_exact(2)
                .map(|b| match dtype {
                    DType::BF16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
                    _ => f16::from_le_bytes([b[0], b[1]]).to_f32(),
                })
                .collect();
            // In its own type, whatever that of the weight is.
            for (bytes, (w, s)) in
                got.bias.unwrap().chunks_exact(2).zip(weight.iter().zip(&got.scales))
            {
                assert_eq!(f16::from_le_bytes([bytes[0], bytes[1]]), f16::from_f32(w / s));
            }
            for i in 0..6 {
                let whole = (stored[i] + plus) * got.scales[i];
                let kept = got.scales[i] == 1.0;
                assert!(got.scales[i] > 0.0 && stored[i].is_finite());
                // A channel that is left alone is only rounded.
                let tolerance = if kept { 1e-2 } else { 1e-6 };
                let error = (whole - weight[i] - plus).abs();
                assert!(error <= tolerance * (weight[i] + plus).abs() + 1e-6, "{kind:?} {i}");
            }
            // Where there is a weight the scale is about the one asked for.
            assert!((got.scales[0] / scales[0] - 1.0).abs() < 1e-2);
            assert!((got.scales[4] / scales[4] - 1.0).abs() < 1e-2);
            assert_eq!(got.scales[2], 1.0, "nothing to divide");
        }
    }
}
