//! `gptq logits`: raw outputs for conformance checks from outside.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use gptq_format::TensorStore;
use gptq_model::{Rows, Sequence, Session};
use serde_json::json;

use super::{load, pool, progress};
use crate::Global;
use crate::output::json as json_output;

/// Run a model on token ids and write its logits.
///
/// Reads input_ids `[batch, seq]` (i64 or i32) and, if present, attention_mask `[batch, seq]` of
/// right-padded rows; writes logits `[batch, seq, vocab]` in f32, zeros under padding.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory, .gguf file or hub id.
    model: String,
    /// Safetensors file with input_ids.
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// Safetensors file to write.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Print what was written as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let start = Instant::now();
    let view = progress(global);
    let (batch, seq, rows) = read_input(&args.input)?;
    let (_, model) = load(&args.model, &view)?;
    view.finish();
    let vocab = model.spec().vocab;
    let mut session = Session::new(pool(global));
    let mut logits = vec![0f32; batch * seq * vocab];
    for (ids, out) in rows.iter().zip(logits.chunks_exact_mut(seq * vocab)) {
        if ids.is_empty() {
            continue;
        }
        let mut sequence = [Sequence::new(model.spec())];
        model.forward(&mut session, &mut sequence, &[ids])?;
        let computed = model.logits(&mut session, Rows::All).as_slice();
        out[..computed.len()].copy_from_slice(computed);
    }
    let shape = [batch, seq, vocab];
    write(&args.output, "logits", &shape, &logits)?;
    if args.json {
        json_output::print(&json!({
            "model": args.model,
            "output": args.output,
            "tensors": { "logits": shape },
            "seconds": start.elapsed().as_secs_f64(),
        }))?;
    }
    Ok(())
}

/// Batch, length, and the ids of each row without its padding.
fn read_input(path: &Path) -> anyhow::Result<(usize, usize, Vec<Vec<u32>>)> {
    let store = TensorStore::open_file(path)?;
    let shape = store.info("input_ids")?.shape.clone();
    let &[batch, seq] = shape.as_slice() else {
        bail!("{}: input_ids has shape {shape:?}, expected [batch, seq]", path.display());
    };
    ensure!(batch > 0 && seq > 0, "{}: input_ids is empty", path.display());
    let ids = store.read_i32("input_ids", &shape)?;
    let mask = if store.contains("attention_mask") {
        store.read_i32("attention_mask", &shape)?
    } else {
        vec![1; ids.len()]
    };
    let rows =
        ids.chunks_exact(seq).zip(mask.chunks_exact(seq)).enumerate().map(|(row, (ids, mask))| {
            let len = mask.iter().take_while(|&&m| m != 0).count();
            ensure!(
                mask[len..].iter().all(|&m| m == 0),
                "{}: row {row} of attention_mask is not right-padded",
                path.display()
            );
            ids[..len]
                .iter()
                .map(|&id| u32::try_from(id).ok())
                .collect::<Option<Vec<u32>>>()
                .with_context(|| {
                    format!("{}: row {row} of input_ids holds a negative id", path.display())
                })
        });
    Ok((batch, seq, rows.collect::<anyhow::Result<_>>()?))
}

fn write(path: &Path, name: &str, shape: &[usize], values: &[f32]) -> anyhow::Result<()> {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let view =
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), &bytes)?;
    let file = safetensors::serialize([(name, view)], None)?;
    Ok(gptq_format::fs::write_atomic(path, &file)?)
}
