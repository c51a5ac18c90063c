//! Streams tensors into an output, piece by piece, in another float type or row order where that is asked for.

use gptq_format::gguf::RowMap;
use gptq_format::{DType, FormatError, TensorStore};
use half::{bf16, f16};

use crate::error::{CheckpointError, Result};

/// Bytes that are read at once.
const PIECE: usize = 1 << 20;

/// Where the bytes of a tensor go, in order.
pub(super) type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> std::result::Result<(), FormatError>;

/// Streams a tensor as `dtype`; with `rows`, in the row order of a GGUF file.
pub(super) fn stream(
    store: &TensorStore,
    name: &str,
    dtype: DType,
    rows: Option<RowMap>,
    sink: Sink<'_>,
) -> Result<()> {
    let info = store.info(name)?;
    if info.dtype == dtype && rows.is_none() && store.is_identity(name) {
        let mut piece = vec![0u8; PIECE.min(info.bytes)];
        let mut at = 0;
        while at < info.bytes {
            let len = piece.len().min(info.bytes - at);
            store.copy_bytes(name, at, &mut piece[..len])?;
            sink(&piece[..len])?;
            at += len;
        }
        return Ok(());
    }
    let &[count, columns] = info.shape.as_slice() else {
        let mut values = store.read_f32(name, &info.shape)?;
        if let Some(map) = rows {
            values = (0..values.len()).map(|row| values[map.logical(row)]).collect();
        }
        return Ok(sink(&encode(name, dtype, 0, &values)?)?);
    };
    let step = if rows.is_some() { 1 } else { (PIECE / 4 / columns.max(1)).max(1) };
    let mut values = vec![0.0; step.min(count) * columns];
    for row in (0..count).step_by(step) {
        let source = rows.map_or(row, |map| map.logical(row));
        let len = step.min(count - row);
        store.read_rows_f32(name, source..source + len, &mut values[..len * columns])?;
        sink(&encode(name, dtype, source * columns, &values[..len * columns])?)?;
    }
    Ok(())
}

/// Floats as little-endian `dtype`; `first` is the index of the first for the message.
pub(super) fn encode(name: &str, dtype: DType, first: usize, values: &[f32]) -> Result<Vec<u8>> {
    Ok(match dtype {
        DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => {
            let halves: Vec<f16> = values.iter().map(|x| f16::from_f32(*x)).collect();
            if let Some(at) = halves.iter().position(|h| !h.is_finite()) {
                return Err(CheckpointError::Overflow {
                    tensor: name.to_owned(),
                    index: first + at,
                    value: values[at],
                });
            }
            halves.iter().flat_map(|h| h.to_le_bytes()).collect()
        }
    })
}
