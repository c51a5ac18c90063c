//! The float tensor that operations read and write.

/// A row-major matrix of f32, `[rows, cols]`.
///
/// Buffers are reused: [`Tensor::resize`] allocates only when the capacity is exceeded, which is
/// what keeps decoding free of allocations.
#[derive(Debug, Clone, Default)]
pub struct Tensor {
    data: Vec<f32>,
    rows: usize,
    cols: usize,
}

impl Tensor {
    /// A tensor of zeros, `[rows, cols]`.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self { data: vec![0.0; rows * cols], rows, cols }
    }

    /// Takes over `data`, `[rows, cols]` row-major.
    ///
    /// # Panics
    /// If `data.len() != rows * cols`.
    #[track_caller]
    pub fn from_vec(rows: usize, cols: usize, data: Vec<f32>) -> Self {
        assert_eq!(data.len(), rows * cols, "tensor of {rows} x {cols}");
        Self { data, rows, cols }
    }

    /// Changes the shape. The contents are unspecified afterwards.
    pub fn resize(&mut self, rows: usize, cols: usize) {
        let len = rows * cols;
        if len > self.data.capacity() {
            // Exactly what is needed, and never the old contents beside it: buffers are planned.
            self.data = Vec::new();
            self.data.reserve_exact(len);
        }
        self.data.resize(len, 0.0);
        self.rows = rows;
        self.cols = cols;
    }

    /// Number of rows (tokens).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns (features).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row `i`.
    #[track_caller]
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.cols..(i + 1) * self.cols]
    }

    /// Row `i`, writable.
    #[track_caller]
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.data[i * self.cols..(i + 1) * self.cols]
    }

    /// All elements, row-major.
    pub fn as_slice(&self) -> &[f32] {
        &self.data
    }

    /// All elements, row-major, writable.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// Size of the buffer in bytes, spare capacity included.
    pub fn capacity_bytes(&self) -> usize {
        self.data.capacity() * size_of::<f32>()
    }
}

/// A raw pointer to elements that several tasks write at disjoint places.
pub(crate) struct RawSlice<T = f32> {
    ptr: *mut T,
    len: usize,
}

impl<T> Clone for RawSlice<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for RawSlice<T> {}

// SAFETY: a RawSlice is only used inside `Pool::run`, whose tasks write disjoint ranges while the
// borrow from which it was made is alive.
unsafe impl<T: Send> Send for RawSlice<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for RawSlice<T> {}

impl<T> RawSlice<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self { ptr: slice.as_mut_ptr(), len: slice.len() }
    }

    /// A pointer to element `start` of a region of `len` elements, for pieces of rows that other
    /// tasks' pieces lie between.
    #[inline]
    pub(crate) fn at(&self, start: usize, len: usize) -> *mut T {
        assert!(start + len <= self.len);
        self.ptr.wrapping_add(start)
    }

    /// The elements `start..start + len`.
    ///
    /// # Safety
    /// No other task may touch this range while the returned slice is alive, and the slice from
    /// which `self` was made must still be borrowed.
    #[allow(clippy::mut_from_ref)]
    #[inline]
    pub(crate) unsafe fn range(&self, start: usize, len: usize) -> &mut [T] {
        // SAFETY: in bounds by `at`'s assertion; exclusive by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.at(start, len), len) }
    }
}
