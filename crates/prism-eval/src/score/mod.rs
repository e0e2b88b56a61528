//! How an answer is scored, 0 to 1, as the benchmarks' own programs do it; where one is approximated, the
//! function says so.

mod choice;
mod code;
mod number;
mod overlap;
mod words;

use crate::score::words::line_one;

/// Scores an answer against the right ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Metric {
    /// Share of the references that the answer contains, whatever the case (RULER `string_match_all`).
    AllWithin,
    /// Whether it contains any of them (RULER `string_match_part`).
    AnyWithin,
    /// Best F1 of normalised words (LongBench, InfiniteBench).
    F1,
    /// Best F1 of normalised characters (InfiniteBench, Chinese).
    CharacterF1,
    /// Best F1 of ROUGE-L.
    RougeL,
    /// Whether the class is the reference, shared among all classes that are named (LongBench).
    Class {
        /// All classes.
        classes: Vec<String>,
    },
    /// Share of the numbers in the answer that are the reference's (LongBench counting and retrieval).
    Numbers,
    /// Similarity of the first line of code (LongBench).
    CodeLine,
    /// As one of these, of the first line of the answer only (LongBench's few-shot tasks).
    FirstLine(Box<Metric>),
    /// Whether the first integer is the reference (InfiniteBench passkey, number string).
    FirstInteger,
    /// Whether the first number is the reference (InfiniteBench math_find).
    FirstNumber,
    /// Whether the last word is the reference's integer (InfiniteBench code_run).
    LastInteger,
    /// Share of the reference's numbers that the answer names from the first on without a mistake
    /// (InfiniteBench math_calc).
    NumbersInOrder,
    /// Whether a word is the reference (InfiniteBench kv_retrieval).
    Word,
    /// Whether a word is the first reference in capitals (InfiniteBench dialogues).
    CapitalWord,
    /// Whether the letter of an option is chosen (InfiniteBench longbook_choice); the references are the letter and the
    /// option.
    Letter,
    /// Whether the letter or the name of a function is chosen (InfiniteBench code_debug); the references are
    /// the name and the letter.
    Debug,
}

impl Metric {
    /// The score of an answer.
    pub fn score(&self, prediction: &str, references: &[String]) -> f64 {
        let best = |of: &dyn Fn(&str) -> f64| {
            references.iter().map(|reference| of(reference)).fold(0.0, f64::max)
        };
        let first = references.first().map_or("", String::as_str);
        let yes = |right: bool| f64::from(u8::from(right));
        match self {
            Self::AllWithin => words::share_within(prediction, references),
            Self::AnyWithin => yes(words::share_within(prediction, references) > 0.0),
            Self::F1 => best(&|reference| overlap::f1(prediction, reference)),
            Self::CharacterF1 => best(&|reference| overlap::character_f1(prediction, reference)),
            Self::RougeL => best(&|reference| overlap::rouge_l(prediction, reference)),
            Self::Class { classes } => {
                best(&|reference| choice::class(prediction, reference, classes))
            }
            Self::Numbers => best(&|reference| number::share(prediction, reference)),
            Self::CodeLine => best(&|reference| code::first_line(prediction, reference)),
            Self::FirstLine(metric) => metric.score(line_one(prediction), references),
            Self::FirstInteger => yes(number::first_integer(prediction) == first),
            Self::FirstNumber => yes(number::first_number_is(prediction, first)),
            Self::LastInteger => yes(number::last_integer_is(prediction, first)),
            Self::NumbersInOrder => number::in_order(prediction, references),
            Self::Word => yes(words::has_word(prediction, first)),
            Self::CapitalWord => yes(words::has_word(&prediction.to_uppercase(), first)),
            Self::Letter => yes(choice::letter(prediction, references)),
            Self::Debug => yes(choice::debug(prediction, references)),
        }
    }
}
