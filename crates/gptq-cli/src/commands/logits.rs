//! `gptq logits`: raw outputs for conformance checks from outside.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use gptq_format::TensorStore;
use gptq_model::{EncodeInput, HeadBits, ModelError, Rows, Session};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Map, json};

use super::{explain, load, pool, progress};
use crate::Global;
use crate::output::json as json_output;

/// Run a model on token ids and write its logits or hidden states.
///
/// Reads input_ids `[batch, seq]` (i64 or i32) and, if present, attention_mask and token_type_ids of
/// the same shape; writes logits `[batch, seq, vocab]` in f32, zeros under padding. Of an encoder
/// without a head for masked tokens it writes last_hidden_state `[batch, seq, hidden]` and, where it
/// has a pooler, pooler_output `[batch, hidden]`.
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
    let inputs = Inputs::read(&args.input)?;
    let pool = pool(global);
    let (checkpoint, model) = load(&args.model, HeadBits::Stored, &pool, &view)?;
    view.finish();
    let Inputs { batch, seq, ids, types, mask } = &inputs;
    let (batch, seq) = (*batch, *seq);
    let (hidden, vocab) = (model.spec().hidden, model.spec().vocab);
    let has_logits = model.head().projection().is_some();
    let (name, width) = if has_logits { ("logits", vocab) } else { ("last_hidden_state", hidden) };
    let mut session = Session::new(pool);
    let mut rows = vec![0f32; batch * seq * width];
    let mut pooled = Vec::new();
    for (row, out) in rows.chunks_exact_mut(seq * width).enumerate() {
        let here = row * seq..(row + 1) * seq;
        let mask = &mask[here.clone()];
        if !mask.contains(&true) {
            pooled.resize(pooled.len() + hidden, 0.0);
            continue;
        }
        let types = types.as_ref().map_or(&[][..], |types| &types[here.clone()]);
        let input = EncodeInput { ids: &ids[here], types, mask };
        let encoded = model
            .encode(&mut session, &[input])
            .with_context(|| format!("{}: row {row}", args.input.display()))?;
        if let Some(vector) = encoded.pooled {
            pooled.extend_from_slice(vector.as_slice());
        }
        let computed =
            if has_logits { model.logits(&mut session, Rows::All) } else { encoded.hidden };
        let real = (0..seq).filter(|&position| mask[position]);
        for (index, position) in real.enumerate() {
            out[position * width..][..width].copy_from_slice(computed.row(index));
        }
    }
    let mut tensors = vec![(name, vec![batch, seq, width], rows)];
    if !has_logits && pooled.len() == batch * hidden {
        tensors.push(("pooler_output", vec![batch, hidden], pooled));
    }
    check(&tensors).map_err(|error| explain(&checkpoint, error))?;
    write(&args.output, &tensors)?;
    if args.json {
        let shapes: Map<_, _> =
            tensors.iter().map(|(name, shape, _)| ((*name).to_owned(), json!(shape))).collect();
        json_output::print(&json!({
            "model": args.model,
            "output": args.output,
            "tensors": shapes,
            "seconds": start.elapsed().as_secs_f64(),
        }))?;
    }
    Ok(())
}

/// What the input file holds, row after row.
struct Inputs {
    batch: usize,
    seq: usize,
    ids: Vec<u32>,
    types: Option<Vec<u32>>,
    mask: Vec<bool>,
}

impl Inputs {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let store = TensorStore::open_file(path)?;
        let shape = store.info("input_ids")?.shape.clone();
        let &[batch, seq] = shape.as_slice() else {
            bail!("{}: input_ids has shape {shape:?}, expected [batch, seq]", path.display());
        };
        ensure!(batch > 0 && seq > 0, "{}: input_ids is empty", path.display());
        let unsigned = |name: &str| -> anyhow::Result<Vec<u32>> {
            let values = store.read_i32(name, &shape)?;
            values
                .into_iter()
                .map(u32::try_from)
                .collect::<Result<_, _>>()
                .with_context(|| format!("{}: {name} holds a negative number", path.display()))
        };
        let optional = |name| store.contains(name).then(|| unsigned(name)).transpose();
        let mask = optional("attention_mask")?.unwrap_or_else(|| vec![1; batch * seq]);
        Ok(Self {
            batch,
            seq,
            ids: unsigned("input_ids")?,
            types: optional("token_type_ids")?,
            mask: mask.into_iter().map(|m| m != 0).collect(),
        })
    }
}

/// Refuses outputs that are not numbers.
fn check(tensors: &[(&str, Vec<usize>, Vec<f32>)]) -> Result<(), ModelError> {
    let broken = |(_, _, values): &(_, _, Vec<f32>)| values.iter().any(|v| !v.is_finite());
    if tensors.iter().any(broken) {
        return Err(ModelError::BadLogits { what: "NaN or infinite", step: 0 });
    }
    Ok(())
}

fn write(path: &Path, tensors: &[(&str, Vec<usize>, Vec<f32>)]) -> anyhow::Result<()> {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, _, values)| values.iter().flat_map(|v| v.to_le_bytes()).collect())
        .collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| {
            Ok((*name, TensorView::new(Dtype::F32, shape.clone(), bytes)?))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let file = safetensors::serialize(views, None)?;
    Ok(gptq_format::fs::write_atomic(path, &file)?)
}
