//! Forms of prompts with places to fill in.

/// A form with every `{name}` of the fields replaced, all at once: braces within the values stay.
pub fn filled(form: &str, fields: &[(&str, &str)]) -> String {
    let mut text = String::new();
    let mut rest = form;
    while let Some(at) = rest.find('{') {
        text += &rest[..at];
        rest = &rest[at..];
        let field = fields.iter().find(|(name, _)| {
            rest[1..].strip_prefix(name).is_some_and(|after| after.starts_with('}'))
        });
        match field {
            Some((name, value)) => {
                text += value;
                rest = &rest[name.len() + 2..];
            }
            None => {
                text.push('{');
                rest = &rest[1..];
            }
        }
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn are_values_never_searched_for_places() {
        let fields = [("a", "{b}"), ("b", "x")];
        assert_eq!(filled("{a}-{b}-{c}-{ a}{", &fields), "{b}-x-{c}-{ a}{");
    }
}
