//! Similarity of code.

use super::overlap::longest_common;

/// How similar the first line without a comment or a code fence is to the reference, rounded to hundredths:
/// twice the longest common subsequence of characters over both lengths. The benchmark's own package counts
/// matching runs instead where it lacks its compiled part.
pub fn first_line(prediction: &str, reference: &str) -> f64 {
    let comment = |line: &&str| line.contains('`') || line.contains('#') || line.contains("//");
    let mut lines = prediction.trim_start_matches('\n').split('\n');
    let line: Vec<char> = lines.find(|line| !comment(line)).unwrap_or("").chars().collect();
    let reference: Vec<char> = reference.chars().collect();
    let all = line.len() + reference.len();
    if all == 0 {
        return 0.0;
    }
    (200.0 * longest_common(&line, &reference) as f64 / all as f64).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_the_first_line_of_code_compared() {
        assert_eq!(first_line("\n// so\n```\nlet x = 1;\nlet y", "let x = 1;"), 1.0);
        // "abcd" and "abxd": 3 of 4 in common.
        assert_eq!(first_line("abcd", "abxd"), 0.75);
        assert_eq!(first_line("# only", "x"), 0.0);
        // 2 of 3 and 4 characters: 4/7, rounded.
        assert_eq!(first_line("a b", "abxy"), 0.57);
    }
}
