//! Classes and options.

/// 1 over the number of classes that the answer names, if the reference is among them. A class that is
/// part of the reference doesn't count beside it.
pub fn class(prediction: &str, reference: &str, classes: &[String]) -> f64 {
    let named: Vec<&str> = (classes.iter().map(String::as_str))
        .filter(|class| prediction.contains(class))
        .filter(|class| *class == reference || !reference.contains(class))
        .collect();
    if named.contains(&reference) { 1.0 / named.len() as f64 } else { 0.0 }
}

/// Whether the option with one of the references' names is chosen: by the first letter, after words like
/// "answer is", or by the first word that is a letter.
pub fn letter(prediction: &str, references: &[String]) -> bool {
    let right = |text: &str| {
        references
            .iter()
            .any(|reference| !reference.is_empty() && text.starts_with(reference.as_str()))
    };
    let option = |c: char| ('A'..='D').contains(&c);
    let named =
        |c: char| references.iter().any(|reference| reference.contains(c) && reference.len() == 1);
    match prediction.chars().next() {
        None => return false,
        Some(c) if option(c) => return named(c),
        Some(_) => {}
    }
    let text = plain(prediction, "\n\"'.,?!{}");
    for prefix in ["answer is:", "answer:", "answer is", "option is"] {
        if let Some(at) = text.find(prefix) {
            return right(text[at + prefix.len()..].trim_start());
        }
    }
    let mut words = text.split_whitespace();
    let first = words.find_map(|word| {
        let mut letters = word.chars();
        letters.next().filter(|&c| option(c) && letters.next().is_none())
    });
    first.is_some_and(named)
}

/// Whether the letter or the name of the function, the references' second and first, is chosen.
pub fn debug(prediction: &str, references: &[String]) -> bool {
    let [name, letter] = references else { return false };
    let begins = |mark: char| prediction.starts_with(&format!("{letter}{mark}"));
    if begins('.') || begins(':') {
        return true;
    }
    let text = plain(prediction.trim(), "\n`'\"-*").replace("Option", " ").replace("option", " ");
    for prefix in ["answer is:", "is:", "answer:"] {
        if let Some(at) = text.find(prefix) {
            let rest = text[at + prefix.len()..].trim_start();
            return rest.starts_with(letter.as_str()) || rest.starts_with(name.as_str());
        }
    }
    false
}

/// With blanks for some characters, and one blank for several.
fn plain(text: &str, blanks: &str) -> String {
    let text: String = text.chars().map(|c| if blanks.contains(c) { ' ' } else { c }).collect();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| word.to_string()).collect()
    }

    #[test]
    fn is_the_score_shared_among_the_classes_named() {
        let classes = owned(&["Person", "Group of persons", "City", "City of state"]);
        assert_eq!(class("Type: City", "City", &classes), 1.0);
        assert_eq!(class("City or Person", "City", &classes), 0.5);
        // "City" is within the right class and doesn't count.
        assert_eq!(class("City of state", "City of state", &classes), 1.0);
        assert_eq!(class("Person", "City", &classes), 0.0);
        assert_eq!(class("", "City", &classes), 0.0);
    }

    #[test]
    fn is_an_option_found_where_it_is_named() {
        let right = owned(&["B", "The butler"]);
        for yes in ["B", "B. The butler", "The answer is: B", "I think the answer is B.", "it is B"]
        {
            assert!(letter(yes, &right), "{yes}");
        }
        assert!(letter("the answer is: The butler", &right));
        for no in ["", "A", "C. The cook", "The answer is: A, not B", "nobody"] {
            assert!(!letter(no, &right), "{no}");
        }
    }

    #[test]
    fn is_a_function_found_by_letter_or_name() {
        let right = owned(&["load_all", "C"]);
        for yes in ["C.", "C: load_all", "The answer is: C", "the option is: `load_all`"] {
            assert!(debug(yes, &right), "{yes}");
        }
        for no in ["A.", "C", "The answer is: A", "load_all", ""] {
            assert!(!debug(no, &right), "{no}");
        }
    }
}
