//! How several sources share the windows.

use std::path::Path;

use super::CalibrationError;

/// How many of `nsamples` windows each source gives, given names and weights: the whole part of its
/// share, and one more for the largest remainders (of equal ones the first), so that the sum is
/// exact. With equal weights the first sources give what is left over.
///
/// # Errors
/// A weight that is not positive and finite, or so small beside the others that its source would
/// give no window.
pub fn shares(sources: &[(String, f64)], nsamples: usize) -> Result<Vec<usize>, CalibrationError> {
    let error = |(name, weight): &(String, f64), reason: String| CalibrationError::Weight {
        name: name.clone(),
        weight: *weight,
        reason,
    };
    if let Some(bad) = sources.iter().find(|(_, weight)| !(weight.is_finite() && *weight > 0.0)) {
        return Err(error(bad, "is not a positive number".into()));
    }
    let sum: f64 = sources.iter().map(|(_, weight)| weight).sum();
    let exact: Vec<f64> =
        sources.iter().map(|(_, weight)| nsamples as f64 * weight / sum).collect();
    let mut shares: Vec<usize> = exact.iter().map(|share| share.floor() as usize).collect();
    let mut by_remainder: Vec<usize> = (0..sources.len()).collect();
    // Stable: of equal remainders the first source comes first.
    by_remainder.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()));
    let left = nsamples - shares.iter().sum::<usize>().min(nsamples);
    for &index in by_remainder.iter().take(left) {
        shares[index] += 1;
    }
    match shares.iter().position(|&share| share == 0) {
        Some(empty) if nsamples > 0 => {
            let reason = format!("gives none of {nsamples} windows; raise it or --nsamples");
            Err(error(&sources[empty], reason))
        }
        _ => Ok(shares),
    }
}

/// Takes `FILE@WEIGHT` apart; without a weight it is 1. A file that has the whole name is that file.
pub fn split_weight(text: &str) -> (&str, f64) {
    let parts = text.rsplit_once('@').filter(|(name, _)| !name.is_empty());
    match parts.and_then(|(name, weight)| Some((name, weight.parse::<f64>().ok()?))) {
        Some(parts) if !Path::new(text).exists() => parts,
        _ => (text, 1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(weights: &[f64], nsamples: usize) -> Result<Vec<usize>, String> {
        let sources: Vec<_> = weights.iter().map(|&w| (format!("{w}.txt"), w)).collect();
        shares(&sources, nsamples).map_err(|error| error.to_string())
    }

    #[test]
    fn shares_are_proportional_and_their_sum_is_exact() {
        assert_eq!(of(&[1.0, 1.0, 1.0], 8).unwrap(), [3, 3, 2]);
        assert_eq!(of(&[1.0, 0.3], 128).unwrap(), [98, 30]);
        assert_eq!(of(&[2.0, 1.0], 3).unwrap(), [2, 1]);
        assert_eq!(of(&[1e-3, 3e-3], 4).unwrap(), [1, 3]);
        assert_eq!(of(&[0.1, 0.2, 0.7], 10).unwrap(), [1, 2, 7]);
        assert_eq!(of(&[5.0], 7).unwrap(), [7]);
    }

    #[test]
    fn weights_that_mean_nothing_are_refused() {
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(of(&[1.0, bad], 8).unwrap_err().contains("positive"), "{bad}");
        }
        let message = of(&[1.0, 0.001], 8).unwrap_err();
        assert!(message.contains("0.001.txt") && message.contains("none of 8"), "{message}");
        assert!(of(&[1.0, 1.0, 1.0], 2).unwrap_err().contains("none of 2"));
    }

    #[test]
    fn a_weight_follows_the_last_at_sign() {
        assert_eq!(split_weight("a.txt"), ("a.txt", 1.0));
        assert_eq!(split_weight("a.txt@0.3"), ("a.txt", 0.3));
        assert_eq!(split_weight("me@home.txt"), ("me@home.txt", 1.0));
        assert_eq!(split_weight("me@home.txt@2"), ("me@home.txt", 2.0));
        assert_eq!(split_weight("self@.5"), ("self", 0.5));
        assert_eq!(split_weight("@2"), ("@2", 1.0));
        let folder = tempfile::tempdir().unwrap();
        let odd = folder.path().join("a@2");
        std::fs::write(&odd, "x").unwrap();
        let odd = odd.to_str().unwrap();
        assert_eq!(split_weight(odd), (odd, 1.0));
    }
}
