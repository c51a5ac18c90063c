//! From the checkpoint layout to the runtime layout.

use super::{GptqParts, PAD, QuantizedMatrix, unit_columns, unit_words};
use crate::arch::LANES;

/// What turns unsigned codes of a word into two's complement: the top bit of every code.
const fn sign_mask(bits: u32, word: usize) -> u32 {
    match bits {
        2 => 0xAAAA_AAAA,
        4 => 0x8888_8888,
        8 => 0x8080_8080,
        _ => {
            // Bit 3i + 2 of the 96-bit stream.
            let mut mask = 0;
            let mut i = 0;
            while i < 32 {
                let at = 3 * i + 2;
                if at / 32 == word {
                    mask |= 1 << (at % 32);
                }
                i += 1;
            }
            mask
        }
    }
}

/// Code of input `k`, output `n`, unsigned.
fn code(parts: &GptqParts<'_>, k: usize, n: usize) -> u32 {
    let bits = parts.bits as usize;
    let (word, shift) = (k * bits / 32, k * bits % 32);
    let at = |w: usize| u64::from(parts.qweight[w * parts.out_features + n]);
    let mut value = at(word) >> shift;
    if shift + bits > 32 {
        value |= at(word + 1) << (32 - shift);
    }
    value as u32 & ((1 << bits) - 1)
}

pub(super) fn repack(parts: &GptqParts<'_>, groups: usize) -> QuantizedMatrix {
    let &GptqParts { bits, in_features, out_features, .. } = parts;
    let (columns, words) = (unit_columns(bits), unit_words(bits));

    // Columns sorted by group, each group padded to whole units.
    let mut by_group: Vec<Vec<u32>> = vec![Vec::new(); groups];
    for (k, &g) in parts.g_idx.iter().enumerate() {
        by_group[g as usize].push(k as u32);
    }
    let group_units: Vec<u32> = by_group.iter().map(|g| g.len().div_ceil(columns) as u32).collect();
    let mut order = Vec::with_capacity(in_features);
    for (group, units) in by_group.iter().zip(&group_units) {
        order.extend_from_slice(group);
        order.resize(order.len() + *units as usize * columns - group.len(), PAD);
    }
    let padded_in = order.len();
    let identity = order.iter().enumerate().all(|(i, &k)| i as u32 == k);

    let panels = out_features.div_ceil(LANES);
    let panel_words = padded_in / columns * words;
    let mut codes = vec![0u32; panels * panel_words * LANES];
    let place = |word: usize, n: usize| ((n / LANES) * panel_words + word) * LANES + n % LANES;
    if identity {
        for (word, row) in parts.qweight.chunks_exact(out_features.max(1)).enumerate() {
            let sign = sign_mask(bits, word % words);
            for (panel, lanes) in row.chunks(LANES).enumerate() {
                let at = place(word, panel * LANES);
                for (c, w) in codes[at..].iter_mut().zip(lanes) {
                    *c = w ^ sign;
                }
            }
        }
    } else {
        let sign = 1 << (bits - 1);
        for (position, &k) in order.iter().enumerate().filter(|&(_, &k)| k != PAD) {
            let bit = position % columns * bits as usize;
            let word = position / columns * words + bit / 32;
            for n in 0..out_features {
                let c = u64::from(code(parts, k as usize, n) ^ sign) << (bit % 32);
                codes[place(word, n)] |= c as u32;
                if c >> 32 != 0 {
                    codes[place(word + 1, n)] |= (c >> 32) as u32;
                }
            }
        }
    }

    let centre = 1i32 << (bits - 1);
    let mut scales = vec![0u16; panels * groups * LANES];
    let mut zero_offsets = vec![0i8; panels * groups * LANES];
    for g in 0..groups {
        for n in 0..out_features {
            let at = ((n / LANES) * groups + g) * LANES + n % LANES;
            scales[at] = parts.scales[g * out_features + n].to_bits();
            zero_offsets[at] = (i32::from(parts.zeros[g * out_features + n]) - centre) as i8;
        }
    }
    QuantizedMatrix {
        bits,
        in_features,
        out_features,
        codes,
        scales,
        zero_offsets: zero_offsets.iter().any(|&z| z != 0).then_some(zero_offsets),
        group_units: group_units.into(),
        order: (!identity).then(|| order.into()),
        padded_in,
    }
}
