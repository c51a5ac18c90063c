//! What the tiles of both compute modes share: their heights and where they write.

use super::STRIP;
use crate::arch::Isa;

/// Tokens that a tile may have, tallest first.
pub(crate) type Heights = &'static [usize];

/// Heights of tiles in f32, those up to [`Simd::TALLEST`].
///
/// [`Simd::TALLEST`]: crate::arch::Simd::TALLEST
pub(crate) fn float_heights(isa: Isa) -> Heights {
    match isa {
        Isa::Avx512 | Isa::Avx512Vnni => &[12, 8, 4, 2, 1],
        Isa::Scalar => &[1],
        _ => &[4, 2, 1],
    }
}

/// Heights of tiles in int8, lower because codes are unpacked into registers beside the sums.
pub(crate) fn int8_heights(isa: Isa) -> Heights {
    match isa {
        Isa::Avx512Vnni => &[8, 4, 2, 1],
        Isa::Scalar => &[1],
        _ => &[4, 2, 1],
    }
}

/// Where a tile writes: some rows of the columns of one strip.
#[derive(Clone, Copy)]
pub(crate) struct Out<'a> {
    /// First row, first column.
    pub(crate) ptr: *mut f32,
    /// Distance between rows.
    pub(crate) stride: usize,
    /// Rows to write, at most the height of the tile.
    pub(crate) rows: usize,
    /// Columns to write, at most those of a strip.
    pub(crate) columns: usize,
    /// Added to each row, `[columns]`.
    pub(crate) bias: Option<&'a [f32]>,
}

/// Results of a tile under construction, `[token][output]`.
#[repr(align(64))]
pub(super) struct Sums<const MT: usize>(pub(super) [[f32; STRIP]; MT]);

impl Out<'_> {
    /// Writes the results, plus the bias.
    ///
    /// # Safety
    /// `ptr` must be valid for `rows` rows of `columns` elements at this stride, which nobody else
    /// may touch.
    #[inline(always)]
    pub(super) unsafe fn write<const MT: usize>(&self, sums: &mut Sums<MT>) {
        for (i, sums) in sums.0.iter_mut().enumerate().take(self.rows) {
            if let Some(bias) = self.bias {
                sums.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
            let row = self.ptr.add(i * self.stride);
            std::ptr::copy_nonoverlapping(sums.as_ptr(), row, self.columns);
        }
    }
}
