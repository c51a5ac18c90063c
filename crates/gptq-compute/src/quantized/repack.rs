//! From the checkpoint layouts to the runtime layout.

use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;

use half::f16;

use super::input::{BLOCK, WORD_BLOCK};
use super::{
    BlockParts, BlockRows, GptqParts, Group, Header, Offsets, PAD, QuantizedMatrix, STRIP,
    WORD_BYTES, unit_columns, unit_words,
};
use crate::arena::Arena;
use crate::pool::Pool;
use crate::tensor::RawSlice;

/// Words of a unit, at most.
const UNIT_WORDS: usize = 3;
/// One code of each output of a strip.
type Codes = [u32; STRIP];

pub(super) fn gptq(pool: &Pool, parts: &GptqParts<'_>, groups: usize) -> QuantizedMatrix {
    let &GptqParts { bits, in_features, out_features, .. } = parts;
    let centre = 1u8 << (bits - 1);
    let symmetric = parts.zeros.iter().all(|&z| z == centre);
    let offsets = if symmetric { Offsets::None } else { Offsets::Zeros };
    let header = Header { wide: false, offsets };
    // Columns sorted by group.
    let mut by_group: Vec<Vec<u32>> = vec![Vec::new(); groups];
    for (k, &g) in parts.g_idx.iter().enumerate() {
        by_group[g as usize].push(k as u32);
    }
    let plan = Plan::new(bits, header, [out_features, in_features], &by_group);
    let filled = plan.fill(pool, |outputs, strip| {
        for g in 0..plan.groups.len() {
            let range = g * out_features + outputs.start..g * out_features + outputs.end;
            let (scales, offsets, units) = plan.split(g, strip);
            write_halves(scales, parts.scales[range.clone()].iter().copied());
            for (to, zero) in offsets.iter_mut().zip(&parts.zeros[range]) {
                *to = zero.wrapping_sub(centre);
            }
            plan.pack(g, units, |k| gptq_codes(parts, k, &outputs));
        }
        Ok::<_, Infallible>(())
    });
    let Ok(strips) = filled;
    plan.finish(strips)
}

pub(super) fn blocks<E: Send>(
    pool: &Pool,
    parts: BlockParts,
    read: impl Fn(Range<usize>, BlockRows<'_>) -> Result<(), E> + Sync,
) -> Result<QuantizedMatrix, E> {
    let BlockParts { bits, group_size, minima: has_minima, half, in_features, out_features } =
        parts;
    let groups = in_features / group_size;
    let of_group = |g| (g * group_size..(g + 1) * group_size).map(|k| k as u32).collect();
    let by_group: Vec<Vec<u32>> = (0..groups).map(of_group).collect();
    let width = parts.width();
    let plan = Plan::new(width, parts.header(), [out_features, in_features], &by_group);
    // Codes are moved from their centre to that of the width.
    let shift = (1u32 << (width - 1)) - (1 << (bits - 1));
    let strips = plan.fill(pool, |outputs, strip| {
        let rows = outputs.len();
        let mut codes = vec![0; rows * in_features];
        let mut scales = vec![0.0; rows * groups];
        let mut minima = vec![0.0; if has_minima { rows * groups } else { 0 }];
        let buffers = BlockRows { codes: &mut codes, scales: &mut scales, minima: &mut minima };
        read(outputs, buffers)?;
        for g in 0..groups {
            let (scale_bytes, offset_bytes, units) = plan.split(g, strip);
            for (to, from) in [(scale_bytes, &scales), (offset_bytes, &minima)] {
                let values = from.iter().skip(g).step_by(groups).copied();
                if half {
                    write_halves(to, values.map(f16::from_f32));
                } else {
                    for (to, v) in to.chunks_exact_mut(4).zip(values) {
                        to.copy_from_slice(&v.to_ne_bytes());
                    }
                }
            }
            plan.pack(g, units, |k| {
                let mut column = [0; STRIP];
                for (to, row) in column.iter_mut().zip(codes.chunks_exact(in_features)) {
                    *to = u32::from(row[k]) + shift;
                }
                column
            });
        }
        Ok(())
    })?;
    Ok(plan.finish(strips))
}

fn write_halves(to: &mut [u8], values: impl Iterator<Item = f16>) {
    for (to, v) in to.chunks_exact_mut(2).zip(values) {
        to.copy_from_slice(&v.to_bits().to_ne_bytes());
    }
}

/// Where everything goes in the runtime layout.
struct Plan {
    bits: u32,
    header: Header,
    out_features: usize,
    in_features: usize,
    groups: Vec<Group>,
    /// Input of each padded position, or [`PAD`].
    order: Vec<u32>,
    strip_bytes: usize,
}

impl Plan {
    /// Each group padded to whole units.
    fn new(bits: u32, header: Header, shape: [usize; 2], by_group: &[Vec<u32>]) -> Self {
        let [out_features, in_features] = shape;
        let (columns, words) = (unit_columns(bits), unit_words(bits));
        let mut order = Vec::with_capacity(in_features);
        let (mut block, mut word_block, mut strip_bytes) = (0, 0, 0);
        let mut groups = Vec::with_capacity(by_group.len());
        for group in by_group {
            let units = group.len().div_ceil(columns);
            let columns = units * columns;
            let (first, offset) = (order.len(), strip_bytes);
            groups.push(Group { first, columns, block, word_block, offset });
            block += columns.div_ceil(BLOCK);
            word_block += columns.div_ceil(WORD_BLOCK);
            order.extend_from_slice(group);
            order.resize(order.len() + columns - group.len(), PAD);
            strip_bytes += header.bytes() + units * words * WORD_BYTES;
        }
        Self { bits, header, out_features, in_features, groups, order, strip_bytes }
    }

    /// All strips, each filled by `fill`, which is told its outputs.
    fn fill<E: Send>(
        &self,
        pool: &Pool,
        fill: impl Fn(Range<usize>, &mut [u8]) -> Result<(), E> + Sync,
    ) -> Result<Arena, E> {
        let mut arena = Arena::zeroed(self.out_features.div_ceil(STRIP) * self.strip_bytes);
        let raw = RawSlice::new(arena.as_mut_slice());
        pool.try_run(self.out_features.div_ceil(STRIP), &|index| {
            // SAFETY: strips are disjoint.
            let strip = unsafe { raw.range(index * self.strip_bytes, self.strip_bytes) };
            fill(index * STRIP..self.out_features.min((index + 1) * STRIP), strip)
        })?;
        Ok(arena)
    }

    /// The scales, the offsets and the units of group `g` in a strip.
    fn split<'a>(
        &self,
        g: usize,
        strip: &'a mut [u8],
    ) -> (&'a mut [u8], &'a mut [u8], &'a mut [u8]) {
        let group = &mut strip[self.groups[g].offset..];
        let (header, units) = group.split_at_mut(self.header.bytes());
        let (scales, offsets) = header.split_at_mut(self.header.scale_bytes());
        (scales, offsets, units)
    }

    /// Packs the codes of group `g`, of which `codes` gives those of one input.
    fn pack(&self, g: usize, units: &mut [u8], codes: impl Fn(usize) -> Codes) {
        let group = &self.groups[g];
        let inputs = &self.order[group.first..group.first + group.columns];
        let unit_bytes = unit_words(self.bits) * WORD_BYTES;
        for (unit, inputs) in
            units.chunks_exact_mut(unit_bytes).zip(inputs.chunks_exact(unit_columns(self.bits)))
        {
            let packed = pack_unit(self.bits as usize, inputs, &codes);
            for (to, word) in unit.chunks_exact_mut(4).zip(packed.as_flattened()) {
                to.copy_from_slice(&word.to_ne_bytes());
            }
        }
    }

    fn finish(self, strips: Arena) -> QuantizedMatrix {
        let Self { bits, header, out_features, in_features, groups, order, strip_bytes } = self;
        let padded_in = order.len();
        let identity = order.iter().enumerate().all(|(i, &k)| i as u32 == k);
        QuantizedMatrix {
            bits,
            in_features,
            out_features,
            strips: Arc::new(strips),
            strip_bytes,
            groups: groups.into(),
            header,
            order: (!identity).then(|| order.into()),
            padded_in,
        }
    }
}

/// The words of one unit with the codes of `inputs`.
fn pack_unit(bits: usize, inputs: &[u32], codes: impl Fn(usize) -> Codes) -> [Codes; UNIT_WORDS] {
    let mut unit = [[0; STRIP]; UNIT_WORDS];
    for (i, &k) in inputs.iter().enumerate().filter(|&(_, &k)| k != PAD) {
        let codes = codes(k as usize);
        let slot = if bits == 3 { 4 } else { bits };
        let place = |i: usize| 8 * (i % 4) + slot * (i / 4);
        if bits == 3 && i >= 24 {
            for (b, words) in unit.iter_mut().enumerate() {
                for (to, c) in words.iter_mut().zip(&codes) {
                    *to |= (c >> b & 1) << (place(i - 24) + 3);
                }
            }
        } else {
            let (word, at) = if bits == 3 { (i / 8, place(i % 8)) } else { (0, place(i)) };
            for (to, c) in unit[word].iter_mut().zip(&codes) {
                *to |= c << at;
            }
        }
    }
    unit
}

/// The codes of input `k`: bits `shift..shift + bits` of a row of words, or of two.
fn gptq_codes(parts: &GptqParts<'_>, k: usize, outputs: &Range<usize>) -> Codes {
    let bits = parts.bits as usize;
    let mask = (1 << bits) - 1;
    let row = |word: usize| {
        let row = word * parts.out_features;
        &parts.qweight[row + outputs.start..row + outputs.end]
    };
    let (word, shift) = (k * bits / 32, k * bits % 32);
    let mut codes = [0; STRIP];
    for (c, w) in codes.iter_mut().zip(row(word)) {
        *c = (w >> shift) & mask;
    }
    if shift + bits > 32 {
        for (c, w) in codes.iter_mut().zip(row(word + 1)) {
            *c |= (w << (32 - shift)) & mask;
        }
    }
    codes
}
