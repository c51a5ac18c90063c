//! A model in AutoAWQ's packing computes what the same codes in GPTQ's packing compute, to the bit.

use std::path::Path;
use std::sync::Arc;

use gptq_compute::Pool;
use gptq_format::{Checkpoint, CheckpointFormat, GptqLinear};
use gptq_model::{EncodeInput, Model, Session};
use gptq_testkit::{awq, fixtures};

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
