//! Errors of this crate: wrong shapes at construction and matrices that cannot be factorised.

/// Result with [`ComputeError`].
pub type Result<T, E = ComputeError> = std::result::Result<T, E>;

/// What can go wrong in this crate. Shape mistakes between operations are programming errors and
/// panic instead; these variants depend on data.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ComputeError {
    /// A buffer does not hold as many elements as its shape says.
    #[error("{what}: expected {expected} elements, got {got}")]
    Length {
        /// Name of the buffer.
        what: &'static str,
        /// Elements that the shape needs.
        expected: usize,
        /// Elements that were given.
        got: usize,
    },
    /// A bit width without a kernel.
    #[error("{bits} bits are not supported (2, 3, 4 and 8 are)")]
    Bits {
        /// The width asked for.
        bits: u32,
    },
    /// An entry of `g_idx` points past the last group.
    #[error("g_idx[{index}] = {group} but there are only {groups} groups")]
    GroupIndex {
        /// Input column.
        index: usize,
        /// Its group.
        group: u32,
        /// Number of groups.
        groups: usize,
    },
    /// The input width does not fill whole packed words.
    #[error(
        "in_features {in_features} is not a multiple of {multiple}, as {bits}-bit packing needs"
    )]
    InFeatures {
        /// Input width.
        in_features: usize,
        /// Required divisor.
        multiple: usize,
        /// Bit width.
        bits: u32,
    },
    /// The matrix is not positive definite.
    #[error("the matrix is not positive definite (pivot {index})")]
    NotPositiveDefinite {
        /// Column at which the factorisation failed.
        index: usize,
    },
}
