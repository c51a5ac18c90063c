//! The register tile of both products of attention: broadcast elements of the left side times rows
//! of 16 lanes of the cache.

use super::storage::Element;
use crate::arch::{LANES, Simd};

/// Bytes.
const CACHE_LINE: usize = 64;

/// C[r][..] (+)= Σ_k A[r][k] B[k][..] for `R` rows and `V` vectors. With `AHEAD`, memory at `ahead`
/// is fetched as B is read; otherwise the pointer is not used. What A and B hold is up to `E`; sums of
/// integers are multiplied with the `scales` of their rows.
///
/// # Safety
/// `a[r]` is valid for `k` elements, `b` for `k` rows of V·16 at stride `ldb`, `c[r]` for V·16.
#[inline(always)]
unsafe fn tile<S: Simd, E: Element, const R: usize, const V: usize, const AHEAD: bool>(
    k: usize,
    a: [*const f32; R],
    (b, ahead): (*const E::Item, *const E::Item),
    ldb: usize,
    c: [*mut f32; R],
    scales: [f32; R],
    accumulate: bool,
) {
    let mut acc = [[S::splat(0.0); V]; R];
    if accumulate && !E::INTEGERS {
        for r in 0..R {
            for v in 0..V {
                acc[r][v] = S::load(c[r].add(v * LANES));
            }
        }
    }
    for i in 0..k {
        let (mut row, mut left) = ([b.add(i * ldb); V], a);
        for v in 0..V {
            row[v] = row[v].add(v * LANES);
            if AHEAD && (v * LANES * E::SIZE).is_multiple_of(CACHE_LINE) {
                S::prefetch(ahead.wrapping_add(i * ldb + v * LANES).cast());
            }
        }
        for r in 0..R {
            left[r] = left[r].add(i);
        }
        E::multiply::<S, R, V>(&mut acc, left, row);
    }
    for r in 0..R {
        for v in 0..V {
            let to = c[r].add(v * LANES);
            let mut sum = acc[r][v];
            if E::INTEGERS {
                sum = S::mul(S::to_f32(S::bits(sum)), S::splat(scales[r]));
                if accumulate {
                    sum = S::add(sum, S::load(to));
                }
            }
            S::store(to, sum);
        }
    }
}

/// The tile for any number of rows and vectors: C (+)= A B with row pointers `a(r)` and `c(r)` and scales
/// `scale(r)` for r below `rows`, and B `[k, vectors * 16]` at stride `ldb`. What will be read next, in about the same
/// shape, is at `ahead`: a step of decoding finds the whole cache in memory, and the processor's own
/// prefetch begins anew at each page.
///
/// # Safety
/// Row pointers of A are valid for `k` elements, those of C for `vectors * 16`, and B for `k` rows.
#[inline(always)]
pub(super) unsafe fn product<S: Simd, E: Element>(
    rows: usize,
    vectors: usize,
    k: usize,
    a: impl Fn(usize) -> *const f32,
    (b, ahead, ldb): (*const E::Item, *const E::Item, usize),
    c: impl Fn(usize) -> *mut f32,
    scale: impl Fn(usize) -> f32,
    accumulate: bool,
) {
    macro_rules! tiles {
        ($r:literal x $v:literal, $row:ident, $vectors:expr) => {
            while rows - $row >= $r {
                let a: [*const f32; $r] = std::array::from_fn(|i| a($row + i));
                let scales: [f32; $r] =
                    std::array::from_fn(|i| if E::INTEGERS { scale($row + i) } else { 1.0 });
                for vector in $vectors.step_by($v) {
                    let c: [*mut f32; $r] =
                        std::array::from_fn(|i| c($row + i).add(vector * LANES));
                    let b = (b.add(vector * LANES), ahead.wrapping_add(vector * LANES));
                    if $row == 0 {
                        tile::<S, E, $r, $v, true>(k, a, b, ldb, c, scales, accumulate);
                    } else {
                        tile::<S, E, $r, $v, false>(k, a, b, ldb, c, scales, accumulate);
                    }
                }
                $row += $r;
            }
        };
    }
    let mut vector = 0;
    while vectors - vector >= 4 {
        let four = || vector..vector + 4;
        let mut row = 0;
        if S::WIDE {
            tiles!(6 x 4, row, four());
            tiles!(4 x 4, row, four());
            tiles!(3 x 4, row, four());
            tiles!(2 x 4, row, four());
        } else {
            // As many sums as leave registers for B, whose elements may take as long to widen as to multiply.
            tiles!(6 x 1, row, four());
            tiles!(4 x 1, row, four());
            tiles!(3 x 2, row, four());
            tiles!(2 x 2, row, four());
        }
        tiles!(1 x 4, row, four());
        vector += 4;
    }
    while vector < vectors {
        let one = || vector..vector + 1;
        let mut row = 0;
        tiles!(6 x 1, row, one());
        tiles!(1 x 1, row, one());
        vector += 1;
    }
}
