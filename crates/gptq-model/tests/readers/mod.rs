//! Everything that reads untrusted bytes, each as a function from bytes to a result. The fuzz targets and the tests by
//! mutation share them; the corpus of each lies in `testdata/corpus/<name>`. What they assert holds for any input.

use std::error::Error;
use std::path::Path;
use std::sync::LazyLock;

use gptq_format::chat::{ChatTemplate, Message};
use gptq_format::gguf::header;
use gptq_format::pack::{Bits, decode_zeros, encode_zeros, pack_rows, unpack_rows};
use gptq_format::{Checkpoint, CheckpointFormat, Config, GptqLinear, QuantizeConfig, TensorStore};
use gptq_model::{Model, Spec};

/// Whether the bytes were accepted, or the typed error that refused them.
pub(crate) type Read = Result<(), Box<dyn Error>>;

/// Elements above which a tensor is not read as a whole: its size was checked against the file, whose holes cost nothing.
const MAX_ELEMENTS: usize = 1 << 20;

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// A file that is mapped must not change: a new one takes its name.
fn replace(path: &Path, bytes: &[u8]) {
    let _ = std::fs::remove_file(path);
    std::fs::write(path, bytes).expect("a file in a temporary directory");
}

/// A sharded directory: the index is the input up to the first byte 0xff, which JSON cannot hold, the shard the rest.
pub(crate) fn safetensors_index(data: &[u8]) -> Read {
    thread_local!(static DIR: LazyLock<tempfile::TempDir> = LazyLock::new(scratch));
    let mut parts = data.splitn(2, |&byte| byte == 0xff);
    let (index, shard) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    DIR.with(|dir| {
        replace(&dir.path().join("model.safetensors.index.json"), index);
        replace(&dir.path().join("a.safetensors"), shard);
        let store = TensorStore::open_dir(dir.path())?;
        read_all(&store, shard.len())
    })
}

/// A whole GGUF file: header, config, tokenizer and values.
pub(crate) fn gguf(data: &[u8]) -> Read {
    thread_local!(static DIR: LazyLock<tempfile::TempDir> = LazyLock::new(scratch));
    header::parse(data, data.len() as u64, Path::new("a.gguf"))?;
    DIR.with(|dir| {
        let path = dir.path().join("a.gguf");
        replace(&path, data);
        let checkpoint = Checkpoint::open(&path)?;
        Spec::for_checkpoint(&checkpoint)?;
        read_all(&checkpoint.tensors, data.len())?;
        Model::load(&checkpoint)?;
        checkpoint.tokenizer()?.encode("a b", true)?;
        Ok(())
    })
}

fn read_all(store: &TensorStore, file_bytes: usize) -> Read {
    let mut result = Ok(());
    for name in store.names() {
        let info = store.info(name)?;
        assert!(info.bytes <= file_bytes, "{name} is larger than its file");
        if info.elements() <= MAX_ELEMENTS {
            let floats = store.read_f32(name, &info.shape).map(drop);
            let read = floats.or_else(|_| store.read_i32(name, &info.shape).map(drop));
            result = result.and(read.map_err(Into::into));
        }
    }
    result
}

/// Packed codes and zero points: bits, format, rows and columns are the first four bytes. What unpacks packs again to the
/// same words.
pub(crate) fn gptq_unpack(data: &[u8]) -> Read {
    let [width, v2, rows, columns, rest @ ..] = data else {
        return Err("four bytes of settings".into());
    };
    let bits = Bits::ALL[usize::from(width % 4)];
    let format = if v2 % 2 == 0 { CheckpointFormat::Gptq } else { CheckpointFormat::GptqV2 };
    let (rows, columns) = (usize::from(*rows), usize::from(*columns));
    let (words, tail) = rest.as_chunks::<4>();
    let words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
    let zeros = decode_zeros(bits, format, &words, rows, columns);
    if let Ok(zeros) = &zeros
        && let Ok(packed) = encode_zeros(bits, format, zeros, rows, columns)
    {
        assert_eq!(packed, words, "zero points of {bits:?} {format:?} [{rows}, {columns}]");
    }
    let codes = match unpack_rows(bits, &words, rows, columns) {
        Ok(codes) => codes,
        Err(error) => return zeros.map(drop).map_err(|_| error.into()),
    };
    assert_eq!(codes.len(), rows * columns);
    assert_eq!(pack_rows(bits, &codes, rows, columns)?, words, "codes of {bits:?}");
    let scales = vec![half::f16::ONE; columns];
    let zeros = vec![tail.first().copied().unwrap_or(0); columns];
    let g_idx = vec![u32::from(*v2 > 250); rows];
    let linear = GptqLinear::from_codes(bits, [rows, columns], &codes, scales, zeros, g_idx, None)?;
    assert_eq!(linear.dequantize().len(), rows * columns);
    linear.encode("m", format)?;
    Ok(())
}

/// config.json with its quantization settings, their `dynamic` rules included.
pub(crate) fn config(data: &[u8]) -> Read {
    let map: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(data)?;
    let path = Path::new("config.json");
    if let Some(settings) = map.get("quantization_config") {
        let settings = QuantizeConfig::from_json(path, settings)?;
        let _ = settings.settings_for("model.layers.0.mlp.down_proj");
        let again = QuantizeConfig::from_json(path, &settings.to_json());
        assert!(again.is_ok(), "what was read is not read again: {again:?}");
    }
    let spec = Spec::from_config(&Config::new(path, map))?;
    for layer in 0..spec.layer_count().min(2) {
        let _ = spec.stages(layer);
    }
    Ok(())
}

/// A chat template, compiled and rendered.
pub(crate) fn chat_template(data: &[u8]) -> Read {
    let source = std::str::from_utf8(data)?;
    let variables = [("bos_token".to_owned(), "<s>".to_owned())].into();
    let template = ChatTemplate::new("t.jinja", source, variables)?;
    template.render(
        &[Message::new("user", "Hi"), Message::new("assistant", "Yo")],
        true,
        std::time::UNIX_EPOCH,
    )?;
    Ok(())
}
