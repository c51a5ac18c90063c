//! Keys and values of one layer and one sequence.

use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::memory::{KvMemory, Words};
use super::storage::{Bf16, Element, F16, F32, Int8, Int16};
use crate::arch::{LANES, Pairs, isa, pairs};
use crate::math;
use crate::pairs::{scale_of, word};
use crate::tensor::Tensor;

/// Positions of one block.
pub(super) const BLOCK: usize = 64;

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvType {
    /// 32-bit floats: what evaluation uses.
    #[default]
    F32,
    /// Half precision, rounded to nearest; magnitudes beyond 65504 become 65504.
    F16,
    /// 8-bit integers with one f32 scale per head and token.
    Int8,
    /// bfloat16, multiplied with queries and weights that are rounded to it, too; sums in f32. For
    /// processors that multiply pairs of these ([`KvType::rounding`]).
    Bf16,
    /// The same of 16-bit integers, with one f32 scale per head and token, and exact sums.
    Int16,
}

impl KvType {
    /// [`KvType::Bf16`] or [`KvType::Int16`] where pairs of these are multiplied faster than f32, else
    /// [`KvType::F32`].
    pub fn rounding() -> Self {
        match pairs(isa()) {
            Some(Pairs::Bf16) => Self::Bf16,
            Some(Pairs::Int16) => Self::Int16,
            None => Self::F32,
        }
    }

    fn in_pairs(self) -> bool {
        matches!(self, Self::Bf16 | Self::Int16)
    }

    /// Bytes of one stored element, scales left out.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => F32::SIZE,
            Self::F16 => F16::SIZE,
            Self::Int8 => Int8::SIZE,
            Self::Bf16 => Bf16::SIZE / Bf16::STEPS,
            Self::Int16 => Int16::SIZE / Int16::STEPS,
        }
    }

    /// Bytes of the scales of one token and head: one for the key and one for the value.
    fn scale_bytes(self) -> usize {
        if matches!(self, Self::Int8 | Self::Int16) { 2 * size_of::<f32>() } else { 0 }
    }

    /// Bytes that the keys and values of one token take in one layer.
    pub fn bytes_per_token(self, kv_heads: usize, head_dim: usize) -> usize {
        let keys = if self.in_pairs() { head_dim.next_multiple_of(2) } else { head_dim };
        kv_heads * ((keys + head_dim.next_multiple_of(LANES)) * self.size() + self.scale_bytes())
    }
}

/// The cache grows by blocks of 64 positions. A block holds, for each kv head, the keys transposed
/// `[head_dim, 64]` (so that scores of 64 positions are one product without horizontal sums), the
/// values `[64, head_dim rounded up to 16]` and, for integers, the scales of the keys `[64]` and of the
/// values `[64]`. [`KvType::Bf16`] and [`KvType::Int16`] keep two rows in one: columns 2i and 2i + 1 of
/// the keys; positions i and i + 16 of each 32 of the values, so that weights are paired lane by lane.
#[derive(Debug)]
pub struct LayerKv {
    /// Words, so that every kind of element is aligned.
    blocks: Vec<Words>,
    memory: KvMemory,
    kind: KvType,
    kv_heads: usize,
    head_dim: usize,
    len: usize,
}

/// One head's part of a block.
#[derive(Clone, Copy)]
pub(super) struct Part<'a, E: Element> {
    /// `[head_dim / STEPS, 64]`
    pub(super) keys: &'a [E::Item],
    /// `[64 / STEPS, padded_dim]`
    pub(super) values: &'a [E::Item],
    /// Of the keys `[64]` and of the values `[64]`; empty where elements have none.
    pub(super) scales: (&'a [f32], &'a [f32]),
}

impl LayerKv {
    /// An empty cache of 32-bit floats.
    pub fn new(kv_heads: usize, head_dim: usize) -> Self {
        Self::with_type(kv_heads, head_dim, KvType::F32)
    }

    /// An empty cache.
    ///
    /// # Panics
    /// As [`LayerKv::sharing`].
    #[track_caller]
    pub fn with_type(kv_heads: usize, head_dim: usize, kind: KvType) -> Self {
        Self::sharing(&KvMemory::default(), kv_heads, head_dim, kind)
    }

    /// An empty cache that takes its memory together with others, of which none outlives the others for
    /// long: the layers of a sequence.
    ///
    /// # Panics
    /// If this processor has no kernels for pairs of this kind ([`KvType::rounding`]).
    #[track_caller]
    pub fn sharing(memory: &KvMemory, kv_heads: usize, head_dim: usize, kind: KvType) -> Self {
        assert!(!kind.in_pairs() || kind == KvType::rounding(), "products of {kind:?}");
        Self { blocks: Vec::new(), memory: memory.clone(), kind, kv_heads, head_dim, len: 0 }
    }

    /// How elements are kept.
    pub fn kind(&self) -> KvType {
        self.kind
    }

    /// Positions stored.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is stored.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Key/value heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Columns of one head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Forgets all positions and keeps the memory.
    pub fn clear(&mut self) {
        self.truncate(0);
    }

    /// Forgets the positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        let forgotten = self.len.min(len)..self.len;
        self.len = forgotten.start;
        // Weights of zero meet what is kept beside positions that stay, and it may be no number: scales, and the other
        // half of a pair of values.
        for position in forgotten {
            let paired = position / LANES % 2 == 1 && position - LANES < len;
            for head in 0..self.kv_heads {
                match self.kind {
                    KvType::Int16 => self.put_scales(position, head, 0.0, 0.0),
                    KvType::Bf16 if paired => {
                        let (_, values) = self.cells::<Bf16>(position, head);
                        for cell in values {
                            *cell &= 0xFFFF;
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    /// Allocates blocks for `positions` in all, so that appending up to there does not.
    pub fn reserve(&mut self, positions: usize) {
        self.blocks.reserve(positions.div_ceil(BLOCK).saturating_sub(self.blocks.len()));
        while self.blocks.len() * BLOCK < positions {
            self.blocks.push(self.memory.take(self.kv_heads * self.head_words()));
        }
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        self.blocks.len() * self.kv_heads * self.head_words() * size_of::<u32>()
    }

    /// Appends rows `rows` of `k` and `v`, both `[_, kv_heads * head_dim]`.
    ///
    /// # Panics
    /// If the widths do not fit.
    #[track_caller]
    pub fn append(&mut self, k: &Tensor, v: &Tensor, rows: Range<usize>) {
        let width = self.kv_heads * self.head_dim;
        assert_eq!((k.cols(), v.cols()), (width, width), "key and value width");
        self.reserve(self.len + rows.len());
        for row in rows {
            for head in 0..self.kv_heads {
                let part = head * self.head_dim..(head + 1) * self.head_dim;
                let (key, value) = (&k.row(row)[part.clone()], &v.row(row)[part]);
                match self.kind {
                    KvType::F32 => self.put_f32(head, key, value),
                    KvType::F16 => self.put_f16(head, key, value),
                    KvType::Int8 => self.put_int8(head, key, value),
                    KvType::Bf16 => self.put_bf16(head, key, value),
                    KvType::Int16 => self.put_int16(head, key, value),
                }
            }
            self.len += 1;
        }
    }

    fn put_f32(&mut self, head: usize, key: &[f32], value: &[f32]) {
        let (mut keys, values) = self.cells::<F32>(self.len, head);
        keys.by_ref().zip(key).for_each(|(cell, x)| *cell = *x);
        values.copy_from_slice(value);
    }

    fn put_f16(&mut self, head: usize, key: &[f32], value: &[f32]) {
        // The conversion of a whole slice uses the processor's instruction.
        const PIECE: usize = 64;
        let (mut floats, mut halves) = ([0.0; PIECE], [f16::ZERO; PIECE]);
        let mut round = |from: &[f32], to: &mut dyn FnMut(&[f16])| {
            for piece in from.chunks(PIECE) {
                let n = piece.len();
                let limit = f16::MAX.to_f32();
                floats.iter_mut().zip(piece).for_each(|(f, x)| *f = x.clamp(-limit, limit));
                halves[..n].convert_from_f32_slice(&floats[..n]);
                to(&halves[..n]);
            }
        };
        let (mut keys, values) = self.cells::<F16>(self.len, head);
        round(key, &mut |piece| {
            // The shorter side comes first: zip takes an element of the first before it looks at the second.
            piece.iter().zip(keys.by_ref()).for_each(|(x, cell)| *cell = x.to_bits());
        });
        let mut at = 0;
        round(value, &mut |piece| {
            values[at..at + piece.len()].iter_mut().zip(piece).for_each(|(v, x)| *v = x.to_bits());
            at += piece.len();
        });
    }

    fn put_int8(&mut self, head: usize, key: &[f32], value: &[f32]) {
        let ((k, key_scale), (v, value_scale)) = (scale_of(key, 127.0), scale_of(value, 127.0));
        self.put_scales(self.len, head, key_scale, value_scale);
        let code = |x: &f32, inverse: f32| math::nearest(x * inverse) as i8;
        let (mut keys, values) = self.cells::<Int8>(self.len, head);
        keys.by_ref().zip(key).for_each(|(cell, x)| *cell = code(x, k));
        values.iter_mut().zip(value).for_each(|(cell, x)| *cell = code(x, v));
    }

    fn put_bf16(&mut self, head: usize, key: &[f32], value: &[f32]) {
        let high = self.len / LANES % Bf16::STEPS == 1;
        let (keys, values) = self.cells::<Bf16>(self.len, head);
        let bits = |x: &f32| math::to_bf16(*x).to_bits();
        for (cell, pair) in keys.zip(key.chunks(Bf16::STEPS)) {
            *cell = bits(&pair[0]) >> 16 | pair.get(1).map_or(0, bits);
        }
        for (cell, x) in values.iter_mut().zip(value) {
            // A position whose partner is still to come has zeros there, which meet weights of zero.
            *cell = if high { *cell & 0xFFFF | bits(x) } else { bits(x) >> 16 };
        }
    }

    fn put_int16(&mut self, head: usize, key: &[f32], value: &[f32]) {
        let high = self.len / LANES % Int16::STEPS == 1;
        let (k, key_scale) = scale_of(key, largest(self.head_dim));
        let (v, value_scale) = scale_of(value, largest(BLOCK));
        self.put_scales(self.len, head, key_scale, value_scale);
        let (keys, values) = self.cells::<Int16>(self.len, head);
        for (cell, pair) in keys.zip(key.chunks(Int16::STEPS)) {
            *cell = word(pair[0] * k) | pair.get(1).map_or(0, |x| word(x * k)) << 16;
        }
        for (cell, x) in values.iter_mut().zip(value) {
            // As above.
            *cell = if high { *cell & 0xFFFF | word(x * v) << 16 } else { word(x * v) };
        }
    }

    fn put_scales(&mut self, position: usize, head: usize, key: f32, value: f32) {
        let (at, scales) = (position % BLOCK, self.head_words() - 2 * BLOCK);
        let first = head * self.head_words() + scales + at;
        let block = &mut self.blocks[position / BLOCK];
        block[first] = key.to_bits();
        block[first + BLOCK] = value.to_bits();
    }

    /// Where the key and the value of a position of one head are.
    fn cells<E: Element>(
        &mut self,
        position: usize,
        head: usize,
    ) -> (impl Iterator<Item = &mut E::Item>, &mut [E::Item]) {
        let (d, at, padded) = (self.head_dim, position % BLOCK, self.padded_dim());
        let size = self.head_words();
        let words = &mut self.blocks[position / BLOCK][head * size..(head + 1) * size];
        let rows = d.div_ceil(E::STEPS);
        let (keys, values) = bytemuck::cast_slice_mut(words).split_at_mut(rows * BLOCK);
        let first = value_row::<E>(at) * padded;
        (keys[at..].iter_mut().step_by(BLOCK), &mut values[first..first + d])
    }

    /// head_dim rounded up to whole vectors.
    pub(super) fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Words of one head in one block.
    fn head_words(&self) -> usize {
        BLOCK * self.kind.bytes_per_token(1, self.head_dim) / size_of::<u32>()
    }

    /// One head's part of a block.
    pub(super) fn part<E: Element>(&self, block: usize, head: usize) -> Part<'_, E> {
        assert_eq!(E::KIND, self.kind, "elements of the cache");
        let size = self.head_words();
        let words = &self.blocks[block][head * size..(head + 1) * size];
        let (words, scales) = words.split_at(size - BLOCK * self.kind.scale_bytes() / 4);
        let (keys, values) =
            bytemuck::cast_slice(words).split_at(self.head_dim.div_ceil(E::STEPS) * BLOCK);
        let scales: &[f32] = bytemuck::cast_slice(scales);
        Part { keys, values, scales: scales.split_at(scales.len() / 2) }
    }
}

/// Row of the values of a block that holds position `at`.
fn value_row<E: Element>(at: usize) -> usize {
    at / (E::STEPS * LANES) * LANES + at % LANES
}

/// Rows that hold the values of the first `n` positions of a block.
pub(super) fn value_rows<E: Element>(n: usize) -> usize {
    let part = E::STEPS * LANES;
    n / part * LANES + (n % part).min(LANES)
}

/// Largest magnitude of the integers of both sides whose products so many terms add up, below 2³¹.
pub(super) fn largest(terms: usize) -> f32 {
    (f64::from(i32::MAX) / terms as f64).sqrt().floor().min(32767.0) as f32
}
