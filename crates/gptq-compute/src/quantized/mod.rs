//! Quantized weight matrices in the layout that the kernels stream.
//!
//! A checkpoint packs codes along the input dimension: word `[k / 8, n]` of a 4-bit matrix holds
//! eight consecutive inputs of output n, so 16 consecutive words are 16 outputs: one vector. The
//! runtime layout keeps those words and only brings the words of one *panel* of 16 outputs
//! together, `[panel][word][16]`, so that a kernel reads one sequential stream per panel. Codes
//! are stored as two's complement (code - 2^(bits-1)), which makes a symmetric zero point free.
//!
//! Groups of inputs are padded to whole *units* of packing (the inputs of one word; 32 inputs in
//! three words for 3 bits). Columns are sorted by group where act-order scattered them; `order`
//! then tells where each position takes its input from, and the input is permuted once while it
//! is packed for all outputs.

mod kernel;
mod repack;

use std::sync::Arc;

use half::f16;

pub(crate) use kernel::{Out, heights, pack_input, run_tile};

use crate::arch::LANES;
use crate::error::{ComputeError, Result};

/// A position of the padded input that no input column fills.
pub(crate) const PAD: u32 = u32::MAX;

/// A quantized linear layer as a GPTQ checkpoint stores it, unpacked from its file format.
#[derive(Debug, Clone, Copy)]
pub struct GptqParts<'a> {
    /// 2, 3, 4 or 8.
    pub bits: u32,
    /// Input width.
    pub in_features: usize,
    /// Output width.
    pub out_features: usize,
    /// `[in * bits / 32, out]`, row-major; 3-bit codes as a little-endian bit stream down each
    /// column.
    pub qweight: &'a [u32],
    /// `[groups, out]`.
    pub scales: &'a [f16],
    /// True zero points `[groups, out]`.
    pub zeros: &'a [u8],
    /// Group of each input, `[in]`.
    pub g_idx: &'a [u32],
}

/// A quantized matrix `[out, in]`: w = scale · (code - zero).
#[derive(Debug, Clone)]
pub struct QuantizedMatrix {
    bits: u32,
    in_features: usize,
    out_features: usize,
    /// `[panels, words, 16]`.
    codes: Vec<u32>,
    /// f16 bits `[panels, groups, 16]`.
    scales: Vec<u16>,
    /// Zero point - 2^(bits-1), `[panels, groups, 16]`; absent when all are zero.
    zero_offsets: Option<Vec<i8>>,
    /// Units of each group.
    group_units: Arc<[u32]>,
    /// Input column of each padded position, or [`PAD`]; absent when it is the identity.
    order: Option<Arc<[u32]>>,
    padded_in: usize,
}

/// Input columns of one unit of packing.
pub(crate) fn unit_columns(bits: u32) -> usize {
    if bits == 3 { 32 } else { 32 / bits as usize }
}

/// Words of one unit of packing.
fn unit_words(bits: u32) -> usize {
    if bits == 3 { 3 } else { 1 }
}

impl QuantizedMatrix {
    /// Brings a GPTQ layer into the runtime layout.
    ///
    /// # Errors
    /// [`ComputeError`] when the width is unknown, a buffer has the wrong length, or `g_idx`
    /// points past the groups.
    pub fn from_gptq(parts: GptqParts<'_>) -> Result<Self> {
        let GptqParts { bits, in_features, out_features, .. } = parts;
        if !matches!(bits, 2 | 3 | 4 | 8) {
            return Err(ComputeError::Bits { bits });
        }
        let multiple = unit_columns(bits);
        if !in_features.is_multiple_of(multiple) {
            return Err(ComputeError::InFeatures { in_features, multiple, bits });
        }
        let groups = parts.scales.len().checked_div(out_features).unwrap_or(0);
        let words = in_features / multiple * unit_words(bits);
        for (what, expected, got) in [
            ("qweight", words * out_features, parts.qweight.len()),
            ("scales", groups * out_features, parts.scales.len()),
            ("zeros", groups * out_features, parts.zeros.len()),
            ("g_idx", in_features, parts.g_idx.len()),
        ] {
            if expected != got {
                return Err(ComputeError::Length { what, expected, got });
            }
        }
        if let Some((index, &group)) =
            parts.g_idx.iter().enumerate().find(|&(_, &g)| g as usize >= groups)
        {
            return Err(ComputeError::GroupIndex { index, group, groups });
        }
        Ok(repack::repack(&parts, groups))
    }

    /// Output width.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Input width.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Bits per code.
    pub fn bits(&self) -> u32 {
        self.bits
    }

    /// Bytes that one pass over the weights reads.
    pub fn bytes(&self) -> usize {
        self.codes.len() * 4
            + self.scales.len() * 2
            + self.zero_offsets.as_ref().map_or(0, Vec::len)
    }

    /// Whether the kernels need the inputs in another order (act-order or padding).
    pub fn permutes_input(&self) -> bool {
        self.order.is_some()
    }

    pub(crate) fn panels(&self) -> usize {
        self.out_features.div_ceil(LANES)
    }

    fn groups(&self) -> usize {
        self.group_units.len()
    }

    fn words_per_panel(&self) -> usize {
        self.padded_in / unit_columns(self.bits) * unit_words(self.bits)
    }
}
