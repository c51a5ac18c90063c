//! A model in AutoAWQ's packing computes what AutoAWQ unpacks, and what the same codes in GPTQ's packing compute, to
//! the bit.

mod common;

use std::path::Path;
use std::sync::Arc;

use gptq_compute::Pool;
use gptq_format::{Checkpoint, CheckpointFormat, GptqLinear};
use gptq_model::{EncodeInput, Model, Session};
use gptq_testkit::{Expected, assert_relative, awq, fixtures};

fn hidden(directory: &Path) -> Vec<f32> {
    let model = Model::load(&Checkpoint::open(directory).unwrap()).unwrap();
    let mut session = Session::new(Arc::new(Pool::new(2)));
    let ids: Vec<u32> = (0..24).map(|i| (i * 7 + 3) % 60).collect();
    let input = EncodeInput { ids: &ids, ..EncodeInput::default() };
    model.encode(&mut session, &[input]).unwrap().hidden.as_slice().to_vec()
}

#[test]
fn awq_and_gptq_of_the_same_codes_are_the_same() {
    for name in ["b4_g32_asym.gptq_v2", "b4_g128_sym.gptq", "b4_gm1_sym.gptq"] {
        let Some(gptq) = fixtures::dir(&format!("quant/{name}")) else { continue };
        let folder = tempfile::tempdir().unwrap();
        awq::rewrite(&gptq, folder.path());
        let [theirs, ours] = [folder.path(), &gptq].map(|path| Checkpoint::open(path).unwrap());
        let config = theirs.quantize_config.as_ref().unwrap();
        assert_eq!(config.format, CheckpointFormat::AwqGemm);
        let mut modules = 0;
        for tensor in ours.tensors.names() {
            let Some(module) = tensor.strip_suffix(".qweight") else { continue };
            let load = |c: &Checkpoint| {
                GptqLinear::load(&c.tensors, module, c.quantize_config.as_ref().unwrap(), None)
            };
            assert_eq!(load(&theirs).unwrap(), load(&ours).unwrap(), "{name} {module}");
            modules += 1;
        }
        assert_eq!(modules, 14);
        assert_eq!(hidden(folder.path()), hidden(&gptq), "{name}");
    }
}

#[test]
fn logits_of_a_checkpoint_that_autoawq_packed() {
    let Some(dir) = fixtures::dir("awq/b4_g32.gemm") else { return };
    let expected = Expected::open(dir.join("expected.safetensors"));
    let (shape, ids) = expected.tokens("input_ids");
    let model = common::load(&common::open(&dir));
    let got = common::logits(&model, &mut common::session(), &ids, shape[0]);
    // Only the order of summation differs.
    assert_relative("awq", got.as_slice(), &expected.f32("logits").1, 2e-5);
}
