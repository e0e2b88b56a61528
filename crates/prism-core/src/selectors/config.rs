//! Any of the methods with its options, from JSON or from `name` and `key=value`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{PrismError, Result};
use crate::select::Budget;
use crate::selectors::{
    Dilated, FlexPrefill, Head, Lsh, MInference, MeanPool, Oracle, Outliers, Prism, Rows,
    SecondOrder, Selector, SelectorInput, Streaming, TopK, XAttention,
};

/// A method with its options.
///
/// ```
/// use prism_core::SelectorConfig;
///
/// let selector = SelectorConfig::from_settings("xattention", &[("stride", "16")])?;
/// assert_eq!(selector.name(), "xattention");
/// let json = serde_json::to_string(&selector)?;
/// assert_eq!(json, r#"{"xattention":{"stride":16,"threshold":0.9}}"#);
/// let error = SelectorConfig::from_settings("xattention", &[("strid", "16")]).unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     "selector: xattention has no option strid: it has stride=8, threshold=0.9"
/// );
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SelectorConfig {
    /// Block means within spectral bands.
    Prism(Prism),
    /// Sub-block means and key variances.
    SecondOrder(SecondOrder),
    /// The same with outlier keys apart, and a threshold.
    Outliers(Outliers),
    /// Block means, one softmax.
    MeanPool(MeanPool),
    /// Antidiagonal sums.
    #[serde(rename = "xattention")]
    XAttention(XAttention),
    /// Query-aware or vertical-slash, by head.
    #[serde(rename = "flexprefill")]
    FlexPrefill(FlexPrefill),
    /// Vertical-slash from the last queries.
    #[serde(rename = "minference")]
    MInference(MInference),
    /// First tokens and a window.
    Streaming(Streaming),
    /// Segments and strides.
    Dilated(Dilated),
    /// Shared buckets of block means.
    Lsh(Lsh),
    /// A fixed number of blocks by block means.
    TopK(TopK),
    /// True masses.
    Oracle(Oracle),
}

/// The same for every method.
macro_rules! each {
    ($config:expr, $options:ident => $body:expr) => {
        match $config {
            SelectorConfig::Prism($options) => $body,
            SelectorConfig::SecondOrder($options) => $body,
            SelectorConfig::Outliers($options) => $body,
            SelectorConfig::MeanPool($options) => $body,
            SelectorConfig::XAttention($options) => $body,
            SelectorConfig::FlexPrefill($options) => $body,
            SelectorConfig::MInference($options) => $body,
            SelectorConfig::Streaming($options) => $body,
            SelectorConfig::Dilated($options) => $body,
            SelectorConfig::Lsh($options) => $body,
            SelectorConfig::TopK($options) => $body,
            SelectorConfig::Oracle($options) => $body,
        }
    };
}

impl SelectorConfig {
    /// Every method with its default options.
    pub fn all() -> [Self; 12] {
        [
            Self::Prism(Prism::default()),
            Self::SecondOrder(SecondOrder::default()),
            Self::Outliers(Outliers::default()),
            Self::MeanPool(MeanPool::default()),
            Self::XAttention(XAttention::default()),
            Self::FlexPrefill(FlexPrefill::default()),
            Self::MInference(MInference::default()),
            Self::Streaming(Streaming::default()),
            Self::Dilated(Dilated::default()),
            Self::Lsh(Lsh::default()),
            Self::TopK(TopK::default()),
            Self::Oracle(Oracle::default()),
        ]
    }

    /// The names of all methods.
    pub fn names() -> [&'static str; 12] {
        Self::all().map(|selector| selector.name())
    }

    /// The method's name, as in JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Prism(_) => "prism",
            Self::SecondOrder(_) => "second_order",
            Self::Outliers(_) => "outliers",
            Self::MeanPool(_) => "mean_pool",
            Self::XAttention(_) => "xattention",
            Self::FlexPrefill(_) => "flexprefill",
            Self::MInference(_) => "minference",
            Self::Streaming(_) => "streaming",
            Self::Dilated(_) => "dilated",
            Self::Lsh(_) => "lsh",
            Self::TopK(_) => "top_k",
            Self::Oracle(_) => "oracle",
        }
    }

    /// The option that trades blocks for fidelity, to sweep; `None` where no single one does.
    pub fn dial(&self) -> Option<&'static str> {
        match self {
            Self::Prism(_) | Self::SecondOrder(_) | Self::MeanPool(_) | Self::Oracle(_) => {
                Some("mass")
            }
            Self::XAttention(_) | Self::Outliers(_) => Some("threshold"),
            Self::FlexPrefill(_) => Some("gamma"),
            Self::MInference(_) => Some("adaptive"),
            Self::Streaming(_) => Some("window"),
            Self::Lsh(_) => Some("rounds"),
            Self::TopK(_) => Some("blocks"),
            Self::Dilated(_) => None,
        }
    }

    /// A method by its name, with default options but for those given, each as a JSON value, a bare
    /// word or a list with commas: `stride=16`, `pattern=tri_shape`, `segments=2048,4096`.
    ///
    /// # Errors
    /// An unknown name or option (the error lists what there is), an option given twice, a value of
    /// another type or out of range.
    pub fn from_settings<K: AsRef<str>, V: AsRef<str>>(
        name: &str,
        settings: &[(K, V)],
    ) -> Result<Self> {
        let Some(default) = Self::all().into_iter().find(|selector| selector.name() == name) else {
            let reason = format!("there is no {name}: there are {}", Self::names().join(", "));
            return Err(PrismError::Selector { reason });
        };
        default.with_settings(settings)
    }

    /// These options but for those given, as of [`from_settings`](Self::from_settings).
    ///
    /// # Errors
    /// As there, but for the name.
    pub fn with_settings<K: AsRef<str>, V: AsRef<str>>(&self, settings: &[(K, V)]) -> Result<Self> {
        let name = self.name();
        let refuse = |reason: String| PrismError::Selector { reason };
        let mut options = self.options();
        for (i, (key, text)) in settings.iter().enumerate() {
            let (key, text) = (key.as_ref(), text.as_ref());
            if settings[..i].iter().any(|(earlier, _)| earlier.as_ref() == key) {
                return Err(refuse(format!("{name}: {key} is given twice")));
            }
            let Some(value) = options.get_mut(key) else {
                let known = self.describe_options();
                return Err(refuse(format!("{name} has no option {key}: it has {known}")));
            };
            *value = parse(text, value);
            // One by one, so that the error names the option.
            let given = Map::from_iter([(key.to_string(), value.clone())]);
            from_options(name, given)
                .map_err(|error| refuse(format!("{name}: {key}={text}: {error}")))?;
        }
        let selector =
            from_options(name, options).map_err(|error| refuse(format!("{name}: {error}")))?;
        selector.validate()?;
        Ok(selector)
    }

    /// The options with their values, as `key=value` with commas; `-` where nothing is set.
    pub fn describe_options(&self) -> String {
        let show = |(key, value): (&String, &Value)| match value {
            Value::Null => format!("{key}=-"),
            Value::String(text) => format!("{key}={text}"),
            other => format!("{key}={other}"),
        };
        self.options().iter().map(show).collect::<Vec<_>>().join(", ")
    }

    /// Checks the options but for what needs a block or a head.
    ///
    /// # Errors
    /// The first that is out of range, with its limit and the value got.
    pub fn validate(&self) -> Result<()> {
        each!(self, options => options.validate())
    }

    /// [`validate`](Self::validate), and against the size of the blocks.
    ///
    /// # Errors
    /// As there; a stride, sub-blocks or segments that don't fit the block.
    pub fn validate_block(&self, block: usize) -> Result<()> {
        self.validate()?;
        match self {
            Self::Prism(options) => options.validate_block(block),
            Self::SecondOrder(options) => options.scoring(block).validate(block),
            Self::Outliers(options) => options.validate_block(block),
            Self::XAttention(options) => options.validate_block(block),
            Self::Dilated(options) => options.validate_block(block),
            _ => Ok(()),
        }
    }

    /// Whether the budget of the [`SelectionRule`](crate::SelectionRule) decides, which it does for
    /// methods of masses that have none of their own.
    pub fn takes_budget(&self) -> bool {
        self.dial() == Some("mass") && self.budget().is_none()
    }

    /// The method's own budget, where it has one that a rule can express.
    pub fn budget(&self) -> Option<Budget> {
        match self {
            Self::Prism(Prism { mass, .. })
            | Self::SecondOrder(SecondOrder { mass, .. })
            | Self::MeanPool(MeanPool { mass })
            | Self::Oracle(Oracle { mass }) => mass.map(Budget::Mass),
            Self::TopK(options) => Some(Budget::TopK(options.blocks)),
            _ => None,
        }
    }

    /// The options by name, unset ones null.
    fn options(&self) -> Map<String, Value> {
        let options = each!(self, options => serde_json::to_value(options));
        match options {
            Ok(Value::Object(options)) => options,
            // Structs of numbers and lists are objects.
            _ => Map::new(),
        }
    }
}

fn from_options(name: &str, options: Map<String, Value>) -> serde_json::Result<SelectorConfig> {
    serde_json::from_value(Value::Object(Map::from_iter([(name.into(), Value::Object(options))])))
}

/// A value as JSON, as a list where the default is one, or as a bare word.
fn parse(text: &str, default: &Value) -> Value {
    let list = format!("[{text}]");
    let text_or_list = match default {
        Value::Array(_) if !text.trim_start().starts_with('[') => list.as_str(),
        _ => text,
    };
    // Also `.9`, which is no number of JSON.
    let number = || text.parse().ok().filter(|number: &f64| number.is_finite()).map(Value::from);
    let plain = || number().unwrap_or_else(|| Value::String(text.into()));
    serde_json::from_str(text_or_list).unwrap_or_else(|_| plain())
}

/// Checks a share of a probability.
pub(super) fn check_mass(name: &'static str, mass: Option<f64>) -> Result<()> {
    match mass {
        Some(got) if !(got > 0.0 && got <= 1.0) => {
            Err(PrismError::OutOfRange { name, allowed: "above 0 and at most 1", got })
        }
        _ => Ok(()),
    }
}

impl Selector for SelectorConfig {
    fn name(&self) -> &'static str {
        self.name()
    }

    fn validate(&self) -> Result<()> {
        self.validate()
    }

    fn validate_for(&self, input: &SelectorInput) -> Result<()> {
        each!(self, options => options.validate_for(input))
    }

    fn select_head(&self, head: &Head, rows: &mut Rows) -> Result<()> {
        each!(self, options => options.select_head(head, rows))
    }
}

impl std::fmt::Display for SelectorConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.name(), self.describe_options())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[test]
    fn names_are_those_of_json() {
        for selector in SelectorConfig::all() {
            let json = serde_json::to_value(&selector).unwrap();
            let names: Vec<&String> = json.as_object().unwrap().keys().collect();
            assert_eq!(names, [selector.name()]);
            let none: [(&str, &str); 0] = [];
            assert_eq!(SelectorConfig::from_settings(selector.name(), &none).unwrap(), selector);
            selector.validate().unwrap();
            if let Some(dial) = selector.dial() {
                assert!(selector.options().contains_key(dial), "{selector}: {dial}");
            }
        }
    }

    #[test]
    fn settings_are_typed() {
        let of = |name, settings: &[(&str, &str)]| {
            SelectorConfig::from_settings(name, settings).unwrap()
        };
        assert_eq!(of("oracle", &[("mass", ".9")]), of("oracle", &[("mass", "0.9")]));
        assert_eq!(
            of("dilated", &[("segments", "2048,4096"), ("strides", "[1, 2]")]),
            SelectorConfig::Dilated(Dilated { segments: vec![2048, 4096], strides: vec![1, 2] })
        );
        assert_eq!(
            of("streaming", &[("pattern", "tri_shape"), ("window", "512")]),
            SelectorConfig::Streaming(Streaming {
                pattern: crate::selectors::StreamingPattern::TriShape,
                window: Some(512),
                ..Default::default()
            })
        );
        let sets = [("mass", "0.5"), ("calibration", "causal")];
        let SelectorConfig::Prism(prism) = of("prism", &sets) else { panic!() };
        assert_eq!(prism.mass, Some(0.5));
        assert_eq!(prism.calibration, crate::Calibration::Causal);
        let segments = of("dilated", &[("segments", "128"), ("strides", "1")]);
        assert_eq!(segments.describe_options(), "segments=[128], strides=[1]");
    }

    #[rstest]
    #[case("xatention", "a", "1", "there is no xatention: there are prism, second_order, outliers")]
    #[case("xattention", "stride", "eight", "stride=eight: invalid type: string \"eight\"")]
    #[case("xattention", "stride", "5", "stride must be 4, 8 or 16, got 5")]
    #[case("xattention", "threshold", "1.5", "threshold must be above 0 and at most 1, got 1.5")]
    #[case("outliers", "threshold", "0", "threshold must be above 0 and at most 1, got 0")]
    #[case("mean_pool", "mass", "0", "mass must be above 0 and at most 1, got 0")]
    #[case("prism", "high_dims", "64", "go together")]
    #[case("prism", "pool_block", "-1", "pool_block=-1: invalid value: integer `-1`")]
    #[case("flexprefill", "tau", "-1", "tau must be between 0 and 1, got -1")]
    #[case(
        "flexprefill",
        "max_budget",
        "512",
        "max_budget must be at least min_budget and 1, got 512"
    )]
    #[case("minference", "vertical", "29", "vertical must be at least 30, got 29")]
    #[case("streaming", "pattern", "b_shape", "pattern=b_shape: unknown variant")]
    #[case("streaming", "window", "0", "window must be at least 1, got 0")]
    #[case("dilated", "segments", "128", "must be as many and at least 1, got 1 and 5")]
    #[case("lsh", "buckets", "7", "buckets must be even and between 2 and 1024, got 7")]
    #[case("top_k", "blocks", "-3", "blocks=-3: invalid value: integer `-3`")]
    #[case("oracle", "k", "1", "oracle has no option k: it has mass=-")]
    fn bad_settings_are_refused(
        #[case] name: &str,
        #[case] key: &str,
        #[case] value: &str,
        #[case] says: &str,
    ) {
        let error = SelectorConfig::from_settings(name, &[(key, value)]).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }

    #[test]
    fn a_setting_is_given_once() {
        let twice = [("mass", "0.5"), ("mass", "0.6")];
        let error = SelectorConfig::from_settings("oracle", &twice).unwrap_err();
        assert_eq!(error.to_string(), "selector: oracle: mass is given twice");
        let both = [("adaptive", "0.1"), ("slash", "100")];
        assert!(SelectorConfig::from_settings("minference", &both).is_err());
    }

    #[test]
    fn json_refuses_what_it_does_not_know() {
        let parse = serde_json::from_str::<SelectorConfig>;
        assert!(parse(r#"{"xattention": {"strid": 8}}"#).is_err());
        assert!(parse(r#"{"attention": {}}"#).is_err());
        assert!(parse(r#"{"xattention": {}}"#).is_ok());
    }
}
