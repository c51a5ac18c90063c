//! Products of a matrix with panels of 16 rows.

use std::ops::Range;

use crate::arch::{LANES, Simd};

/// One column of a panel.
pub(super) type Lanes = [f32; LANES];

/// `[columns][16]` from rows `first..first + rows` of `[out, columns]`; missing lanes are zero.
pub(super) fn transpose(weights: &[f32], first: usize, rows: usize, columns: usize) -> Vec<Lanes> {
    let mut panel = vec![[0.0; LANES]; columns];
    for lane in 0..rows {
        let row = &weights[(first + lane) * columns..][..columns];
        panel.iter_mut().zip(row).for_each(|(p, w)| p[lane] = *w);
    }
    panel
}

/// to_c += Σ_b m_bc from_b for `b` in `sources` and `c` in `targets`, or -= with `SUBTRACT`, in each
/// panel; `matrix` has rows of `stride`. `parts` gives the columns of a panel that are read, the
/// first of which belongs to the first source, and all those that are written.
///
/// # Safety
/// The processor must have the instruction set of `S`; ranges must lie inside of the matrix and of
/// what `parts` gives.
#[inline(always)]
pub(super) unsafe fn add_product<S: Simd, P, const SUBTRACT: bool>(
    panels: &mut [P],
    parts: impl Fn(&mut P) -> (&[Lanes], &mut [Lanes]),
    matrix: &[f32],
    stride: usize,
    sources: Range<usize>,
    targets: Range<usize>,
) {
    let mut c = targets.start;
    macro_rules! tile {
        ($t:literal) => {
            while targets.end - c >= $t {
                for panel in panels.iter_mut() {
                    let (from, to) = parts(panel);
                    let mut acc = [S::splat(0.0); $t];
                    for j in 0..$t {
                        acc[j] = S::load(to[c + j].as_ptr());
                    }
                    for (b, from) in sources.clone().zip(from) {
                        let e = S::load(from.as_ptr());
                        let row = matrix.as_ptr().add(b * stride + c);
                        for j in 0..$t {
                            let m = S::splat(*row.add(j));
                            acc[j] =
                                if SUBTRACT { S::fnma(m, e, acc[j]) } else { S::fma(m, e, acc[j]) };
                        }
                    }
                    for j in 0..$t {
                        S::store(to[c + j].as_mut_ptr(), acc[j]);
                    }
                }
                c += $t;
            }
        };
    }
    if S::WIDE {
        tile!(16);
    }
    tile!(4);
    tile!(1);
}
