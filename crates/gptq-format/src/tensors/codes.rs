//! Tensors in the block types of GGUF, read as codes.

use std::ops::Range;

use super::{TensorInfo, TensorStore};
use crate::dtype::DType;
use crate::error::{FormatError, Result};
use crate::gguf::{CodeFormat, CodeRows, unpack_rows};

impl TensorStore {
    /// How the codes of a tensor `[rows, columns]` of a block type are to be taken; `None` for any other tensor.
    pub fn code_format(&self, name: &str) -> Option<CodeFormat> {
        match self.entries.get(name)?.info {
            TensorInfo { dtype: DType::Ggml(ggml), ref shape, .. } if shape.len() == 2 => {
                ggml.code_format()
            }
            _ => None,
        }
    }

    /// Reads the codes, scales and minima of `rows` of a tensor `[rows, columns]` of a block type.
    ///
    /// # Errors
    /// If there is no such tensor, it has not two dimensions or not those rows, a buffer has another length, its type has
    /// no codes, a scale or minimum is NaN or infinite, or reading fails.
    pub fn read_codes(&self, name: &str, rows: Range<usize>, out: CodeRows<'_>) -> Result<()> {
        let entry = self.entry(name)?;
        let (DType::Ggml(ggml), Some(format)) = (entry.info.dtype, self.code_format(name)) else {
            return Err(entry.dtype_error(name, "a block type of two dimensions"));
        };
        let CodeRows { codes, scales, minima } = out;
        let (total, columns) = (entry.info.shape[0], entry.info.shape[1]);
        let groups = columns / format.group_size;
        let fits = rows.start <= rows.end
            && rows.end <= total
            && codes.len() == rows.len() * columns
            && scales.len() == rows.len() * groups
            && minima.len() == if format.minima { scales.len() } else { 0 };
        if !fits {
            let expected = format!("[rows, columns] with rows {rows:?} and {} codes", codes.len());
            return Err(entry.shape_error(name, &expected));
        }
        // Rows that lie one after another are read at once.
        let run = if entry.row_map.is_none() { rows.len() } else { 1 };
        let row_bytes = entry.info.bytes / total.max(1);
        let mut buffer = vec![0; run * row_bytes];
        for first in rows.clone().step_by(run.max(1)) {
            let stored = entry.row_map.map_or(first, |map| map.source(first));
            self.files[entry.file].read_at(entry.offset + stored * row_bytes, &mut buffer)?;
            let of =
                |width: usize| (first - rows.start) * width..(first - rows.start + run) * width;
            let of_groups = of(groups);
            let minima = if format.minima { &mut minima[of_groups.clone()] } else { &mut [][..] };
            let mut part =
                CodeRows { codes: &mut codes[of(columns)], scales: &mut scales[of_groups], minima };
            unpack_rows(ggml, &buffer, &mut part)
                .ok_or_else(|| entry.dtype_error(name, "a block type"))?;
            if let Some((group, value)) = part.not_finite() {
                return Err(FormatError::Value {
                    path: entry.info.file.clone(),
                    tensor: name.to_owned(),
                    index: first * columns + group * format.group_size,
                    value: value.to_string(),
                    expected: "a finite scale and minimum",
                });
            }
        }
        Ok(())
    }
}
