//! From the checkpoint layout to the runtime layout.

use std::sync::Arc;

use super::input::BLOCK;
use super::{
    GptqParts, Group, PAD, QuantizedMatrix, SCALE_BYTES, STRIP, WORD_BYTES, unit_columns,
    unit_words,
};
use crate::arena::Arena;
use crate::pool::Pool;
use crate::tensor::RawSlice;

/// Words of a unit, at most.
const UNIT_WORDS: usize = 3;

pub(super) fn repack(pool: &Pool, parts: &GptqParts<'_>, groups: usize) -> QuantizedMatrix {
    let &GptqParts { bits, in_features, out_features, .. } = parts;
    let (columns, words) = (unit_columns(bits), unit_words(bits));
    let centre = 1u8 << (bits - 1);
    let asymmetric = parts.zeros.iter().any(|&z| z != centre);
    let header = SCALE_BYTES + if asymmetric { STRIP } else { 0 };

    // Columns sorted by group, each group padded to whole units.
    let mut by_group: Vec<Vec<u32>> = vec![Vec::new(); groups];
    for (k, &g) in parts.g_idx.iter().enumerate() {
        by_group[g as usize].push(k as u32);
    }
    let mut order = Vec::with_capacity(in_features);
    let (mut block, mut offset) = (0, 0);
    let mut table = Vec::with_capacity(groups);
    for group in &by_group {
        let units = group.len().div_ceil(columns);
        table.push(Group { first: order.len(), columns: units * columns, block, offset });
        block += (units * columns).div_ceil(BLOCK);
        order.extend_from_slice(group);
        order.resize(order.len() + units * columns - group.len(), PAD);
        offset += header + units * words * WORD_BYTES;
    }
    let (strip_bytes, padded_in) = (offset, order.len());
    let identity = order.iter().enumerate().all(|(i, &k)| i as u32 == k);

    let strips = out_features.div_ceil(STRIP);
    let mut arena = Arena::zeroed(strips * strip_bytes);
    let raw = RawSlice::new(arena.as_mut_slice());
    pool.run(strips, &|index| {
        // SAFETY: strips are disjoint.
        let strip = unsafe { raw.range(index * strip_bytes, strip_bytes) };
        let first = index * STRIP;
        let lanes = STRIP.min(out_features - first);
        for (g, group) in table.iter().enumerate() {
            let at = g * out_features + first;
            let bytes = &mut strip[group.offset..];
            for (to, scale) in bytes.chunks_exact_mut(2).zip(&parts.scales[at..at + lanes]) {
                to.copy_from_slice(&scale.to_bits().to_ne_bytes());
            }
            if asymmetric {
                let zeros = &parts.zeros[at..at + lanes];
                for (to, zero) in bytes[SCALE_BYTES..].iter_mut().zip(zeros) {
                    *to = zero.wrapping_sub(centre);
                }
            }
            let units = bytes[header..].chunks_exact_mut(words * WORD_BYTES);
            let inputs = order[group.first..group.first + group.columns].chunks_exact(columns);
            for (unit, inputs) in units.zip(inputs) {
                let packed = pack_unit(parts, inputs, first, lanes);
                let values = packed.as_flattened();
                for (to, word) in unit.chunks_exact_mut(4).zip(values) {
                    to.copy_from_slice(&word.to_ne_bytes());
                }
            }
        }
    });
    QuantizedMatrix {
        bits,
        in_features,
        out_features,
        strips: Arc::new(arena),
        strip_bytes,
        groups: table.into(),
        asymmetric,
        order: (!identity).then(|| order.into()),
        padded_in,
    }
}

/// The words of one unit: codes of the inputs `inputs` of outputs `first..first + lanes`.
fn pack_unit(
    parts: &GptqParts<'_>,
    inputs: &[u32],
    first: usize,
    lanes: usize,
) -> [[u32; STRIP]; UNIT_WORDS] {
    let bits = parts.bits as usize;
    let mask = (1 << bits) - 1;
    let mut unit = [[0; STRIP]; UNIT_WORDS];
    let row = |word: usize| &parts.qweight[word * parts.out_features + first..][..lanes];
    for (i, &k) in inputs.iter().enumerate().filter(|&(_, &k)| k != PAD) {
        // The codes of input k: bits `shift..shift + bits` of a row of words, or of two.
        let (word, shift) = (k as usize * bits / 32, k as usize * bits % 32);
        let mut codes = [0; STRIP];
        for (c, w) in codes.iter_mut().zip(row(word)) {
            *c = (w >> shift) & mask;
        }
        if shift + bits > 32 {
            for (c, w) in codes.iter_mut().zip(row(word + 1)) {
                *c |= (w << (32 - shift)) & mask;
            }
        }
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
