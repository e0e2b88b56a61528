//! Texts that end an answer, found across the pieces that it comes in.

/// An empty text was given to stop at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a text to stop at must not be empty")]
pub struct EmptyStop;

/// Passes text on until one of several texts occurs in it. What may be the start of one is held
/// back until more comes.
#[derive(Clone, Debug)]
pub struct StopTexts {
    stops: Vec<String>,
    held: String,
}

impl StopTexts {
    /// Stops at the first of `stops`; never without any.
    ///
    /// # Errors
    ///
    /// One of them is empty.
    pub fn new(stops: &[String]) -> Result<Self, EmptyStop> {
        if stops.iter().any(String::is_empty) {
            return Err(EmptyStop);
        }
        Ok(Self { stops: stops.to_vec(), held: String::new() })
    }

    /// Takes the next piece. Returns the text that may be passed on, and the index of the text that
    /// was found after it: of those that begin first, the one given first.
    pub fn push(&mut self, piece: &str) -> (String, Option<usize>) {
        self.held.push_str(piece);
        let found = (self.stops.iter().enumerate())
            .filter_map(|(index, stop)| self.held.find(stop).map(|at| (at, index)))
            .min();
        if let Some((at, index)) = found {
            let text = self.held[..at].to_string();
            self.held.clear();
            return (text, Some(index));
        }
        let mut text = std::mem::take(&mut self.held);
        self.held = text.split_off(self.start_of_a_stop(&text));
        (text, None)
    }

    /// Ends the text: what was held back is passed on after all.
    pub fn finish(self) -> String {
        self.held
    }

    /// Where the earliest ending of `text` begins that a stop begins with.
    fn start_of_a_stop(&self, text: &str) -> usize {
        let starts = text.char_indices().map(|(at, _)| at);
        let mut starts =
            starts.filter(|&at| self.stops.iter().any(|stop| stop.starts_with(&text[at..])));
        starts.next().unwrap_or(text.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Option<usize>, String) {
        let stops = stops.iter().map(|&stop| stop.to_string()).collect::<Vec<_>>();
        let mut stop = StopTexts::new(&stops).unwrap();
        let mut passed = Vec::new();
        for piece in pieces {
            let (text, found) = stop.push(piece);
            passed.push(text);
            if found.is_some() {
                return (passed, found, stop.finish());
            }
        }
        (passed, None, stop.finish())
    }

    #[test]
    fn is_a_text_found_across_pieces_and_nothing_of_it_passed_on() {
        assert_eq!(
            run(&["\n\nUser"], &["Hi", "\n", "\nUs", "er: x"]),
            (
                vec!["Hi".into(), String::new(), String::new(), String::new()],
                Some(0),
                String::new()
            )
        );
    }

    #[test]
    fn is_what_only_begins_like_it_passed_on_in_the_end() {
        let (passed, found, rest) = run(&["</s>"], &["a<", "/b", "</s"]);
        assert_eq!(passed, ["a", "</b", ""]);
        assert_eq!((found, rest.as_str()), (None, "</s"));
        assert_eq!(
            run(&["aab"], &["aaa", "b"]),
            (vec!["a".into(), String::new()], Some(0), "".into())
        );
    }

    #[test]
    fn does_the_earliest_of_several_win() {
        assert_eq!(run(&["c", "b", "bc"], &["abc"]).1, Some(1));
        assert_eq!(run(&["é"], &["caf", "é!"]).0, ["caf", ""]);
        assert_eq!(run(&[], &["abc"]).0, ["abc"]);
    }

    #[test]
    fn is_an_empty_text_refused() {
        assert_eq!(StopTexts::new(&["x".into(), String::new()]).unwrap_err(), EmptyStop);
    }
}
