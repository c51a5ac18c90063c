//! Quantized weight matrices in the layout that the kernels stream.
//!
//! Outputs are cut into *strips* of 64, which is four vectors of 16 lanes. A strip is one sequential
//! run of bytes, group after group: `[scales, 64] [offsets, 64] [units of codes]`. Scales are f16, or
//! f32 where f16 does not hold them. Symmetric matrices have no offsets; those of other GPTQ layers
//! are zero points less 2^(bits-1), as i8; those of GGUF's blocks are minima, in the type of the scales.
//! A *unit* is `[word][4 vectors][16 lanes]` of u32 and holds these inputs of each of the 64 outputs:
//!
//! | bits | inputs | words | position of input k of the unit |
//! |---|---|---|---|
//! | 8 | 4 | 1 | byte k |
//! | 4 | 8 | 1 | byte k mod 4, bit 4 (k div 4) |
//! | 2 | 16 | 1 | byte k mod 4, bit 2 (k div 4) |
//! | 3 | 32 | 3 | k < 24: word k div 8, placed as 4-bit codes are; k >= 24: bit b of the code is the spare fourth bit of the place of k - 24 in word b |
//!
//! So one mask and one shift give four codes as the bytes of a lane, with the inputs in their
//! natural order, which is what products of bytes need; and one shift gives a single code.
//!
//! Groups are padded to whole units. Columns are sorted by group where act-order scattered them;
//! `order` then tells where each position takes its input from, and the input is permuted once
//! while it is prepared for all outputs.

mod float;
mod input;
mod int8;
mod repack;
mod round;
mod tile;

use std::ops::Range;
use std::sync::Arc;

use half::f16;

pub(crate) use float::{FloatTile, PREFETCH};
pub use input::Activations;
pub(crate) use input::{Int8Input, Packing, pack_floats, token_floats};
pub(crate) use int8::{Int8Tiles, TILES as INT8_TILES};
pub(crate) use tile::{Out, Tiling};

use crate::arch::{LANES, Simd};
use crate::arena::Arena;
use crate::error::{ComputeError, Result};
use crate::pool::Pool;

/// Vectors of outputs in a strip.
pub(crate) const VECTORS: usize = 4;
/// Outputs of a strip.
pub(crate) const STRIP: usize = VECTORS * LANES;
/// Bytes of one word of all outputs of a strip.
const WORD_BYTES: usize = STRIP * 4;
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

/// What a matrix of block-quantized rows is like, such as one of a GGUF file. With minima
/// w = scale · code + minimum, else w = scale · (code - 2^(bits-1)).
#[derive(Debug, Clone, Copy)]
pub struct BlockParts {
    /// Bits of a code, 1 to 8.
    pub bits: u32,
    /// Neighbouring inputs that share scale and minimum: a multiple of 16.
    pub group_size: usize,
    /// Whether groups have a minimum.
    pub minima: bool,
    /// Whether f16 holds scales and minima.
    pub half: bool,
    /// Input width.
    pub in_features: usize,
    /// Output width.
    pub out_features: usize,
}

impl BlockParts {
    /// Bytes that the matrix takes in the runtime layout.
    pub fn bytes(&self) -> u64 {
        let groups = (self.in_features / self.group_size.max(1)) as u64;
        let codes = self.group_size as u64 * u64::from(self.width()) / 8 * STRIP as u64;
        let strips = self.out_features.div_ceil(STRIP) as u64;
        let group = codes.saturating_add(self.header().bytes() as u64);
        strips.saturating_mul(groups).saturating_mul(group)
    }

    /// Bits of a code in the runtime layout: the narrowest that hold it. Those of 3 bits take 4, since a
    /// unit of 3 is longer than the groups of 16 that come with them.
    fn width(&self) -> u32 {
        match self.bits {
            ..=2 => 2,
            3 | 4 => 4,
            _ => 8,
        }
    }

    fn header(&self) -> Header {
        let centre = (1u32 << (self.bits - 1)) as f32;
        let offsets = if self.minima { Offsets::Minima { centre } } else { Offsets::None };
        Header { wide: !self.half, offsets }
    }
}

/// Buffers for rows of a matrix of blocks, row-major.
#[derive(Debug)]
pub struct BlockRows<'a> {
    /// `[rows, in_features]`, below 2^bits.
    pub codes: &'a mut [u8],
    /// `[rows, in_features / group_size]`
    pub scales: &'a mut [f32],
    /// As `scales` where there are minima, else empty.
    pub minima: &'a mut [f32],
}

/// What comes before the codes of a group.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Header {
    /// Scales are f32, else f16.
    wide: bool,
    offsets: Offsets,
}

/// What is added to scale · (code - 2^(bits-1)).
#[derive(Debug, Clone, Copy, PartialEq)]
enum Offsets {
    None,
    /// -scale · offset, an integer.
    Zeros,
    /// scale · centre + minimum.
    Minima {
        centre: f32,
    },
}

impl Header {
    fn scale_bytes(self) -> usize {
        STRIP * if self.wide { 4 } else { 2 }
    }

    fn bytes(self) -> usize {
        let offsets = match self.offsets {
            Offsets::None => 0,
            Offsets::Zeros => STRIP,
            Offsets::Minima { .. } => self.scale_bytes(),
        };
        self.scale_bytes() + offsets
    }

    /// The scales, or minima, of the 16 outputs from `lane` on.
    #[inline(always)]
    unsafe fn load<S: Simd>(self, values: *const u8, lane: usize) -> S::F {
        if self.wide {
            S::load(values.cast::<f32>().add(lane))
        } else {
            S::load_f16(values.cast::<u16>().add(lane))
        }
    }
}

/// One group of inputs, the same in every strip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Group {
    /// First position in the padded input.
    pub(crate) first: usize,
    /// Padded inputs.
    pub(crate) columns: usize,
    /// First of its blocks of int8 inputs.
    block: usize,
    /// The same of int16.
    word_block: usize,
    /// Byte in the strip at which its scales begin.
    offset: usize,
}

/// A quantized matrix `[out, in]`: w = scale · (code - zero), or scale · code + minimum. Clones share
/// the codes.
#[derive(Clone)]
pub struct QuantizedMatrix {
    bits: u32,
    in_features: usize,
    out_features: usize,
    strips: Arc<Arena>,
    strip_bytes: usize,
    groups: Arc<[Group]>,
    header: Header,
    /// Input column of each padded position, or [`PAD`]; absent when it is the identity.
    order: Option<Arc<[u32]>>,
    padded_in: usize,
}

impl std::fmt::Debug for QuantizedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { out_features, in_features, bits, .. } = self;
        write!(f, "QuantizedMatrix[{out_features}, {in_features}] {bits} bits")
    }
}

/// Input columns of one unit of packing.
pub(crate) const fn unit_columns(bits: u32) -> usize {
    if bits == 3 { 32 } else { 32 / bits as usize }
}

/// Words of one unit of packing.
const fn unit_words(bits: u32) -> usize {
    if bits == 3 { 3 } else { 1 }
}

/// How inputs must be laid out for a matrix; equal layouts share one prepared input.
#[derive(Clone, Copy)]
pub(crate) struct Layout<'a>(&'a QuantizedMatrix);

impl PartialEq for Layout<'_> {
    fn eq(&self, other: &Self) -> bool {
        let (a, b) = (self.0, other.0);
        a.bits == b.bits
            && a.order == b.order
            && a.groups.len() == b.groups.len()
            && a.groups.iter().zip(b.groups.iter()).all(|(a, b)| a.columns == b.columns)
    }
}

impl QuantizedMatrix {
    /// Brings a GPTQ layer into the runtime layout, on this thread.
    ///
    /// # Errors
    /// [`ComputeError`] when the width is unknown, a buffer has the wrong length, or `g_idx`
    /// points past the groups.
    pub fn from_gptq(parts: GptqParts<'_>) -> Result<Self> {
        Self::from_gptq_on(&Pool::new(1), parts)
    }

    /// Brings a GPTQ layer into the runtime layout with all threads of `pool`.
    ///
    /// # Errors
    /// As [`QuantizedMatrix::from_gptq`].
    pub fn from_gptq_on(pool: &Pool, parts: GptqParts<'_>) -> Result<Self> {
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
        Ok(repack::gptq(pool, &parts, groups))
    }

    /// Brings block-quantized rows into the runtime layout with all threads of `pool`: the codes in
    /// 2, 4 or 8 bits, no value changed. `read` is asked for 64 rows at a time, from several threads
    /// at once, and fills the buffers.
    ///
    /// # Errors
    /// What `read` returns.
    ///
    /// # Panics
    /// If `bits` are not 1 to 8, `group_size` is no multiple of 16, or `in_features` none of it.
    #[track_caller]
    pub fn from_blocks<E: Send>(
        pool: &Pool,
        parts: BlockParts,
        read: impl Fn(Range<usize>, BlockRows<'_>) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let BlockParts { bits, group_size, in_features, .. } = parts;
        assert!(matches!(bits, 1..=8), "codes of {bits} bits");
        assert!(
            group_size > 0
                && group_size.is_multiple_of(16)
                && in_features.is_multiple_of(group_size),
            "{in_features} inputs in groups of {group_size}"
        );
        repack::blocks(pool, parts, read)
    }

    /// Output width.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Input width.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Bits per code in the runtime layout.
    pub fn bits(&self) -> u32 {
        self.bits
    }

    /// Bytes that one pass over the weights reads.
    pub fn bytes(&self) -> usize {
        self.strip_bytes * self.strips()
    }

    /// Whether the kernels need the inputs in another order (act-order or padding).
    pub fn permutes_input(&self) -> bool {
        self.order.is_some()
    }

    pub(crate) fn layout(&self) -> Layout<'_> {
        Layout(self)
    }

    pub(crate) fn strips(&self) -> usize {
        self.out_features.div_ceil(STRIP)
    }

    /// Blocks of int8 inputs.
    fn blocks(&self) -> usize {
        self.groups.last().map_or(0, |g| g.block + g.columns.div_ceil(input::BLOCK))
    }

    /// Blocks of int16 inputs.
    fn word_blocks(&self) -> usize {
        self.groups.last().map_or(0, |g| g.word_block + g.columns.div_ceil(input::WORD_BLOCK))
    }

    /// Whether a single row can be used as it is: no permutation, and no sums for offsets.
    pub(crate) fn reads_plain_input(&self) -> bool {
        self.order.is_none() && !self.needs_sums()
    }

    /// Whether offsets are multiplied with the sums of the inputs.
    pub(crate) fn needs_sums(&self) -> bool {
        self.header.offsets != Offsets::None
    }

    /// Bytes of one strip, with everything that [`Group::offset`]s point at.
    fn strip(&self, index: usize) -> &[u8] {
        &self.strips.as_slice()[index * self.strip_bytes..][..self.strip_bytes]
    }
}
