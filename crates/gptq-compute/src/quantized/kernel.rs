//! y = x Wᵀ from packed codes: one register tile of `MT` tokens by `P` panels of 16 outputs.
//!
//! Within a group, integer codes times activations accumulate in f32; at its end the zero point
//! and the scale are applied once:  acc += s · (Σ x q - z Σ x).  The order of all additions is the
//! same for every tile height, so a token's result does not depend on what it is batched with.

use super::{PAD, QuantizedMatrix, unit_columns, unit_words};
use crate::arch::{Isa, Kernel, LANES, Simd, dispatch_on};
use crate::tensor::Tensor;

/// How far ahead of the codes to prefetch, in words of 64 bytes. Four KiB covers the latency of
/// memory at the bandwidth of one core.
const PREFETCH: usize = 64;

/// Tile heights of an instruction set, tallest first: what its registers hold.
pub(crate) fn heights(isa: Isa) -> &'static [usize] {
    if isa == Isa::Avx512 { &[12, 8, 4, 2, 1] } else { &[4, 2, 1] }
}

/// How inputs must be laid out for a matrix; equal layouts share one packed input.
#[derive(Clone, Copy)]
pub(crate) struct Layout<'a>(&'a QuantizedMatrix);

impl PartialEq for Layout<'_> {
    fn eq(&self, other: &Self) -> bool {
        let (a, b) = (self.0, other.0);
        a.padded_in == b.padded_in
            && a.order == b.order
            && (a.group_units == b.group_units && unit_columns(a.bits) == unit_columns(b.bits)
                || (a.zero_offsets.is_none() && b.zero_offsets.is_none()))
    }
}

impl QuantizedMatrix {
    pub(crate) fn layout(&self) -> Layout<'_> {
        Layout(self)
    }

    /// Whether a single row can be used as it is: no permutation, and no sums for zero points.
    pub(crate) fn reads_plain_input(&self) -> bool {
        self.order.is_none() && self.zero_offsets.is_none()
    }
}

impl Layout<'_> {
    /// Floats of one packed row: the padded inputs and their sum per group.
    pub(crate) fn packed_len(self) -> usize {
        self.0.padded_in + self.0.groups()
    }
}

/// Packs rows `first..first + rows` of `x` for a tile of `height >= rows` tokens:
/// `[padded_in, height]` inputs followed by `[groups, height]` sums. Missing rows are zero.
pub(crate) fn pack_input(
    layout: Layout<'_>,
    x: &Tensor,
    first: usize,
    rows: usize,
    height: usize,
    out: &mut [f32],
) {
    let m = layout.0;
    let (inputs, sums) = out[..layout.packed_len() * height].split_at_mut(m.padded_in * height);
    if rows < height {
        inputs.fill(0.0);
    }
    for i in 0..rows {
        let row = x.row(first + i);
        let cells = inputs[i..].iter_mut().step_by(height);
        match &m.order {
            None => cells.zip(row).for_each(|(c, v)| *c = *v),
            Some(order) => cells
                .zip(order.iter())
                .for_each(|(c, &k)| *c = if k == PAD { 0.0 } else { row[k as usize] }),
        }
    }
    let mut position = 0;
    for (sum, units) in sums.chunks_exact_mut(height).zip(m.group_units.iter()) {
        let columns = *units as usize * unit_columns(m.bits);
        sum.fill(0.0);
        for cells in inputs[position * height..(position + columns) * height].chunks_exact(height) {
            for (s, c) in sum.iter_mut().zip(cells) {
                *s += c;
            }
        }
        position += columns;
    }
}

/// Where a tile writes.
#[derive(Clone, Copy)]
pub(crate) struct Out<'a> {
    /// Element `[0, 0]` of the output rows of this tile.
    pub(crate) ptr: *mut f32,
    /// Distance between rows.
    pub(crate) stride: usize,
    /// Rows to write.
    pub(crate) rows: usize,
    pub(crate) bias: Option<&'a [f32]>,
}

struct Tile<'a, const BITS: u32, const MT: usize, const P: usize> {
    m: &'a QuantizedMatrix,
    panel: usize,
    x: *const f32,
    sums: *const f32,
    out: Out<'a>,
}

#[inline(always)]
unsafe fn multiply<S: Simd, const MT: usize, const P: usize>(
    part: &mut [[S::F; MT]; P],
    code: [S::F; P],
    x: *const f32,
) {
    for i in 0..MT {
        let v = S::splat(*x.add(i));
        for p in 0..P {
            part[p][i] = S::fma(code[p], v, part[p][i]);
        }
    }
}

/// Repeats an expression for each literal, so that shifts are constants of the instruction.
macro_rules! unroll {
    ($j:ident in [$($n:literal)*] $body:block) => {{ $({ const $j: u32 = $n; $body })* }};
}

impl<const BITS: u32, const MT: usize, const P: usize> Kernel for Tile<'_, BITS, MT, P> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { m, panel, x, sums, out } = self;
        let (groups, panel_words) = (m.groups(), m.words_per_panel());
        let words = unit_words(BITS);
        let mut acc = [[S::splat(0.0); MT]; P];
        let mut w: [*const u32; P] =
            std::array::from_fn(|p| m.codes.as_ptr().add((panel + p) * panel_words * LANES));
        let mut x = x;
        for g in 0..groups {
            let mut part = [[S::splat(0.0); MT]; P];
            for _ in 0..m.group_units[g] {
                macro_rules! step {
                    ($j:expr, $code:expr) => {{
                        let code: [S::F; P] = std::array::from_fn($code);
                        multiply::<S, MT, P>(&mut part, code, x.add($j as usize * MT));
                    }};
                }
                let a: [S::I; P] = std::array::from_fn(|p| S::load_i32(w[p]));
                if MT <= 4 {
                    for p in 0..P {
                        S::prefetch(w[p].wrapping_add(PREFETCH * LANES).cast());
                    }
                }
                match BITS {
                    2 => unroll!(J in [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15] {
                        step!(J, |p: usize| S::code(2, a[p], 2 * J));
                    }),
                    4 => unroll!(J in [0 1 2 3 4 5 6 7] {
                        step!(J, |p: usize| S::code(4, a[p], 4 * J));
                    }),
                    8 => unroll!(J in [0 1 2 3] {
                        step!(J, |p: usize| S::code(8, a[p], 8 * J));
                    }),
                    _ => {
                        let b: [S::I; P] = std::array::from_fn(|p| S::load_i32(w[p].add(LANES)));
                        let c: [S::I; P] =
                            std::array::from_fn(|p| S::load_i32(w[p].add(2 * LANES)));
                        unroll!(J in [0 1 2 3 4 5 6 7 8 9] {
                            step!(J, |p: usize| S::code(3, a[p], 3 * J));
                        });
                        step!(10, |p: usize| {
                            S::code(3, S::or(S::shr(a[p], 30), S::shl(b[p], 2)), 0)
                        });
                        unroll!(J in [11 12 13 14 15 16 17 18 19 20] {
                            step!(J, |p: usize| S::code(3, b[p], 3 * J - 32));
                        });
                        step!(21, |p: usize| {
                            S::code(3, S::or(S::shr(b[p], 31), S::shl(c[p], 1)), 0)
                        });
                        unroll!(J in [22 23 24 25 26 27 28 29 30 31] {
                            step!(J, |p: usize| S::code(3, c[p], 3 * J - 64));
                        });
                    }
                }
                x = x.add(unit_columns(BITS) * MT);
                for p in 0..P {
                    w[p] = w[p].add(words * LANES);
                }
            }
            for p in 0..P {
                let at = ((panel + p) * groups + g) * LANES;
                if let Some(zeros) = &m.zero_offsets {
                    let z = S::load_i8(zeros.as_ptr().add(at));
                    for i in 0..MT {
                        part[p][i] = S::fnma(z, S::splat(*sums.add(g * MT + i)), part[p][i]);
                    }
                }
                let s = S::load_f16(m.scales.as_ptr().add(at));
                for i in 0..MT {
                    acc[p][i] = S::fma(s, part[p][i], acc[p][i]);
                }
            }
        }
        for p in 0..P {
            let first = (panel + p) * LANES;
            let n = LANES.min(m.out_features - first);
            let mut lanes = [0.0; LANES];
            if let Some(bias) = out.bias {
                lanes[..n].copy_from_slice(&bias[first..first + n]);
            }
            let bias = S::load(lanes.as_ptr());
            for i in 0..MT {
                if i < out.rows {
                    let y = S::add(acc[p][i], bias);
                    let to = out.ptr.add(i * out.stride + first);
                    if n == LANES {
                        S::store(to, y);
                    } else {
                        S::store(lanes.as_mut_ptr(), y);
                        std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n);
                    }
                }
            }
        }
    }
}

/// Computes panels `panels` for the tokens of one packed tile.
///
/// # Safety
/// `packed` must come from [`pack_input`] with the layout of `m` and this `height` (for height 1
/// without permutation and zero offsets, a plain input row will do); `out` must be valid for
/// `rows` rows of `out_features` at its stride, and nobody else may touch these columns.
pub(crate) unsafe fn run_tile(
    isa: Isa,
    m: &QuantizedMatrix,
    panels: std::ops::Range<usize>,
    packed: &[f32],
    height: usize,
    out: Out<'_>,
) {
    assert!(panels.end <= m.panels() && out.rows <= height);
    assert!(packed.len() >= m.padded_in * height);
    let x = packed.as_ptr();
    // Only read when zero offsets exist, and then the packed input holds the sums.
    let sums = x.wrapping_add(m.padded_in * height);
    assert!(m.zero_offsets.is_none() || packed.len() >= m.layout().packed_len() * height);
    let mut panel = panels.start;
    macro_rules! tile {
        ($bits:literal, $mt:literal, $p:literal) => {{
            while panels.end - panel >= $p {
                dispatch_on(isa, Tile::<$bits, $mt, $p> { m, panel, x, sums, out });
                panel += $p;
            }
        }};
    }
    macro_rules! bits {
        ($mt:literal, $p:literal) => {
            match m.bits {
                2 => tile!(2, $mt, $p),
                3 => tile!(3, $mt, $p),
                4 => tile!(4, $mt, $p),
                _ => tile!(8, $mt, $p),
            }
        };
    }
    match height {
        // Four streams hide the latency of the one accumulator that each has.
        1 => {
            bits!(1, 4);
            bits!(1, 1);
        }
        2 => {
            bits!(2, 4);
            bits!(2, 1);
        }
        4 => {
            if isa == Isa::Avx512 {
                bits!(4, 2);
            }
            bits!(4, 1);
        }
        8 => bits!(8, 1),
        12 => bits!(12, 1),
        _ => unreachable!("heights() lists every tile"),
    }
}
