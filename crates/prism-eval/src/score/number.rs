//! Numbers within an answer.

fn integers(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty())
}

/// Share of the answer's integers that are the first integer of the reference; 0 without any.
pub fn share(prediction: &str, reference: &str) -> f64 {
    let right = integers(reference).next();
    let (mut all, mut same) = (0, 0);
    for digits in integers(prediction) {
        all += 1;
        same += usize::from(Some(digits) == right);
    }
    if all == 0 { 0.0 } else { same as f64 / all as f64 }
}

/// The first integer, or nothing.
pub fn first_integer(prediction: &str) -> &str {
    integers(prediction).next().unwrap_or("")
}

/// Whether the first number, digits with or without decimals, is the reference.
pub fn first_number_is(prediction: &str, reference: &str) -> bool {
    let Some(start) = prediction.find(|c: char| c.is_ascii_digit()) else { return false };
    let rest = &prediction[start..];
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let whole = digits(rest);
    let decimals = rest[whole..].strip_prefix('.').map_or(0, digits);
    let end = if decimals > 0 { whole + 1 + decimals } else { whole };
    match (rest[..end].parse::<f64>(), reference.parse::<f64>()) {
        (Ok(got), Ok(right)) => got == right,
        _ => false,
    }
}

/// Whether the last word is the reference as an integer.
pub fn last_integer_is(prediction: &str, reference: &str) -> bool {
    let blank = |c: char| "\n.`'\":".contains(c) || c.is_whitespace();
    let last = prediction.split(blank).rfind(|word| !word.is_empty());
    match (last.map(str::parse::<i64>), reference.parse::<i64>()) {
        (Some(Ok(got)), Ok(right)) => got == right,
        _ => false,
    }
}

/// Share of the references that the answer's integers are, in order, up to the first mistake.
pub fn in_order(prediction: &str, references: &[String]) -> f64 {
    let same = |(got, right): &(&str, &String)| {
        got.trim_start_matches('0') == right.trim_start_matches('-').trim_start_matches('0')
    };
    let right = integers(prediction).zip(references).take_while(same).count();
    right as f64 / references.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn are_numbers_counted_that_are_right() {
        assert_eq!(share("Paragraph 3, or 12", "Paragraph 12"), 0.5);
        assert_eq!(share("12", "12"), 1.0);
        assert_eq!(share("none", "12"), 0.0);
        assert_eq!(share("112", "12"), 0.0);
    }

    #[test]
    fn is_the_first_or_the_last_number_taken() {
        assert_eq!(first_integer(" The key is 71432. 5"), "71432");
        assert!(first_number_is("about 3.50 of 7", "3.5") && !first_number_is("3.5", "3"));
        assert!(first_number_is("7.", "7") && !first_number_is("none", "7"));
        assert!(last_integer_is("It returns: -14.", "-14") && !last_integer_is("14 or so", "14"));
    }

    #[test]
    fn does_the_first_mistake_end_the_count() {
        let right = ["8", "5", "7", "3"].map(String::from);
        assert_eq!(in_order("[8, 5, 6, 3]", &right), 0.5);
        assert_eq!(in_order("8 5 7 3 9", &right), 1.0);
        assert_eq!(in_order("", &right), 0.0);
    }
}
