//! A text cut into windows that are read apart.

use crate::error::{EvalError, Result};

/// Windows of `window` tokens of `ids`, one after the other; the last may be shorter. Two neighbours share
/// one token, so that every token of the text but the first is predicted exactly once (PG19 as lm-eval
/// scores it).
///
/// # Errors
/// A window of fewer than 2 tokens, or fewer tokens than that.
pub fn windows(ids: &[u32], window: usize) -> Result<Vec<&[u32]>> {
    if window < 2 {
        return Err(EvalError::argument("window", "at least 2 tokens", window));
    }
    if ids.len() < 2 {
        return Err(EvalError::argument("text", "at least 2 tokens long", ids.len()));
    }
    let starts = (0..ids.len() - 1).step_by(window - 1);
    Ok(starts.map(|start| &ids[start..(start + window).min(ids.len())]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_every_token_but_the_first_predicted_once() {
        for (tokens, window) in [(2, 2), (10, 4), (11, 4), (100, 7), (7, 100), (65, 64), (64, 64)] {
            let ids: Vec<u32> = (0..tokens).collect();
            let predicted: Vec<u32> =
                windows(&ids, window).unwrap().iter().flat_map(|w| w[1..].to_vec()).collect();
            assert_eq!(predicted, ids[1..], "{tokens} in {window}");
        }
        assert!(windows(&[1], 4).is_err());
        assert!(windows(&[1, 2], 1).is_err());
    }
}
