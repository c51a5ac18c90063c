//! Comparing floats: how far two tensors are apart, and where most.

use std::fmt;

/// How far `got` is from `want`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// Largest |got - want|; infinite where one side is NaN and the other is not.
    pub absolute: f64,
    /// `absolute` over the largest |want| (over 1e-30 where `want` is all zero): the relative error
    /// that a matrix of mixed magnitudes is judged by, since single elements near zero have no
    /// meaningful relative error.
    pub relative: f64,
    /// Root of the summed squared differences over the root of the summed squares of `want`.
    pub rms: f64,
    /// Flat index of the largest difference.
    pub index: usize,
    /// The value found there.
    pub got: f32,
    /// The value expected there.
    pub want: f32,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { absolute, relative, rms, index, got, want } = self;
        write!(
            f,
            "max abs {absolute:.3e}, relative {relative:.3e}, rms {rms:.3e}; worst at [{index}]: got {got}, want {want}"
        )
    }
}

/// The difference of two tensors of equal length, in double precision. NaN equals NaN only.
pub fn difference(got: &[f32], want: &[f32]) -> Difference {
    assert_eq!(got.len(), want.len(), "lengths differ");
    let mut worst = (0.0f64, 0);
    let (mut largest, mut squares, mut errors) = (0.0f64, 0.0f64, 0.0f64);
    for (index, (&a, &b)) in got.iter().zip(want).enumerate() {
        let same = a == b || (a.is_nan() && b.is_nan());
        let apart = if same { 0.0 } else { (f64::from(a) - f64::from(b)).abs() };
        let apart = if apart.is_nan() { f64::INFINITY } else { apart };
        if apart > worst.0 {
            worst = (apart, index);
        }
        largest = largest.max(f64::from(b).abs());
        squares += f64::from(b) * f64::from(b);
        errors += apart * apart;
    }
    let (absolute, index) = worst;
    Difference {
        absolute,
        relative: absolute / largest.max(1e-30),
        rms: (errors / squares.max(1e-60)).sqrt(),
        index,
        got: got.get(index).copied().unwrap_or_default(),
        want: want.get(index).copied().unwrap_or_default(),
    }
}

/// Panics unless every |got - want| is at most `tolerance`; the message shows the worst index.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: f64) {
    let found = difference(got, want);
    assert!(found.absolute <= tolerance, "{what}: {found}; absolute tolerance {tolerance:e}");
}

/// Panics unless the largest |got - want| is at most `tolerance` times the largest |want|.
#[track_caller]
pub fn assert_relative(what: &str, got: &[f32], want: &[f32], tolerance: f64) {
    let found = difference(got, want);
    assert!(found.relative <= tolerance, "{what}: {found}; relative tolerance {tolerance:e}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_worst_index() {
        let found = difference(&[1.0, 2.0, 3.5], &[1.0, 2.25, 4.0]);
        assert_eq!((found.index, found.absolute, found.relative), (2, 0.5, 0.125));
        assert_eq!((found.got, found.want), (3.5, 4.0));
    }

    #[test]
    fn nan_and_infinity_are_not_close_to_numbers() {
        assert!(difference(&[f32::NAN], &[1.0]).absolute.is_infinite());
        assert!(difference(&[1.0], &[f32::INFINITY]).absolute.is_infinite());
        assert_eq!(
            difference(&[f32::NAN, f32::INFINITY], &[f32::NAN, f32::INFINITY]).absolute,
            0.0
        );
        assert_eq!(difference(&[], &[]).absolute, 0.0);
    }

    #[test]
    #[should_panic(expected = "logits: max abs 1.000e0")]
    fn the_message_names_the_tensor() {
        assert_close("logits", &[1.0], &[2.0], 1e-3);
    }
}
