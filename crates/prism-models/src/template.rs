//! Chat templates: a list of messages to the text that the model was trained on.
//!
//! Templates are programs from untrusted files. They run with a budget of fuel, which bounds both
//! their time and their memory, and their output has a limit of its own. One hole is the engine's:
//! joining two lists by `+` is free, and printing the result costs only in the end, so that a
//! template that doubles a list some thirty times can exhaust both.

mod clock;
mod json;
mod variables;

use std::fmt;
use std::io::{self, Write};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior};
use serde::Serialize;

use crate::gguf::{Metadata, MetadataError};
pub use variables::TemplateVariables;

/// Longest template, in bytes.
pub const MAX_TEMPLATE_BYTES: usize = 1 << 20;
/// Longest text that a template may produce, in bytes.
pub const MAX_OUTPUT_BYTES: usize = 8 << 20;
/// Budget of one rendering besides that for its messages: instructions, or 64 bytes of data each.
const FUEL: u64 = 500_000;
/// Part of the budget for each byte of the messages and variables: enough to copy them sixteen times.
const FUEL_PER_BYTE: f64 = 16.0 / 64.0;
/// Values can nest as deep as the fuel lasts, and the engine recurses to print and to drop them.
const STACK_BYTES: usize = 256 << 20;
const NAME: &str = "chat_template";

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: String,
    /// What they say.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// Why a chat template was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The file of the template is not UTF-8.
    #[error("the template is not UTF-8: {0}")]
    NotUtf8(#[from] std::string::FromUtf8Error),
    /// The file that holds the template is not JSON.
    #[error("invalid JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// The template is stored as something other than a string.
    #[error("`chat_template` is neither a string nor a list with a template named default")]
    WrongType,
    /// The GGUF value is not a string.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The template is too long.
    #[error("the template has {got} bytes; the limit is {limit}")]
    TooLong {
        /// Most bytes accepted.
        limit: usize,
        /// Bytes of the template.
        got: usize,
    },
    /// The template does not parse.
    #[error("the template does not parse: {0}")]
    Syntax(#[source] Error),
    /// The template did not end within its budget of time and memory.
    #[error("the template needs more than its budget of {limit} steps")]
    OutOfFuel {
        /// The budget.
        limit: u64,
    },
    /// The template produces too much text.
    #[error("the template produces more than {limit} bytes")]
    OutputTooLong {
        /// Most bytes accepted.
        limit: usize,
    },
    /// The template called `raise_exception`.
    #[error("the template refuses the conversation: {message}")]
    Raised {
        /// What the template says.
        message: String,
    },
    /// The system has no thread to render on.
    #[error("cannot start to render: {0}")]
    Thread(#[source] io::Error),
    /// Anything else went wrong while rendering.
    #[error("the template failed: {message}")]
    Render {
        /// What the engine says.
        message: String,
    },
}

/// A parsed chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
}

impl ChatTemplate {
    /// Parses a template.
    ///
    /// # Errors
    ///
    /// The template is longer than [`MAX_TEMPLATE_BYTES`] or does not parse.
    pub fn new(source: impl Into<String>) -> Result<Self, TemplateError> {
        let source = source.into();
        if source.len() > MAX_TEMPLATE_BYTES {
            let got = source.len();
            return Err(TemplateError::TooLong { limit: MAX_TEMPLATE_BYTES, got });
        }
        // The set-up of Hugging Face, except that attributes of undefined values are undefined.
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(TemplateError::Syntax)?);
        environment.set_undefined_behavior(UndefinedBehavior::Chainable);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", clock::strftime_now);
        environment.add_filter("tojson", json::tojson);
        environment.add_template_owned(NAME, source).map_err(TemplateError::Syntax)?;
        Ok(Self { environment })
    }

    /// Parses the contents of a `chat_template.jinja`.
    ///
    /// # Errors
    ///
    /// The contents are not UTF-8, or [`ChatTemplate::new`] refuses them.
    pub fn from_bytes(source: Vec<u8>) -> Result<Self, TemplateError> {
        Self::new(String::from_utf8(source)?)
    }

    /// Takes the template out of a `tokenizer_config.json`; `None` where it has none.
    ///
    /// # Errors
    ///
    /// The text is not JSON, its `chat_template` is malformed, or [`ChatTemplate::new`] refuses
    /// it.
    pub fn from_tokenizer_config(json: &[u8]) -> Result<Option<Self>, TemplateError> {
        use serde_json::Value;
        let config: Value = serde_json::from_slice(json)?;
        let source = match &config["chat_template"] {
            Value::Null => return Ok(None),
            Value::String(source) => Some(source.as_str()),
            Value::Array(named) => named
                .iter()
                .find(|entry| entry["name"] == "default")
                .and_then(|entry| entry["template"].as_str()),
            _ => None,
        };
        Self::new(source.ok_or(TemplateError::WrongType)?).map(Some)
    }

    /// Takes the template out of GGUF metadata; `None` where it has none.
    ///
    /// # Errors
    ///
    /// The value is not a string, or [`ChatTemplate::new`] refuses it.
    pub fn from_gguf(metadata: &Metadata) -> Result<Option<Self>, TemplateError> {
        metadata.find_str("tokenizer.chat_template")?.map(Self::new).transpose()
    }

    /// Renders a conversation, with the start of an answer if `add_generation_prompt`; `bos` and
    /// `eos` are the texts of the tokens that begin and end a text.
    ///
    /// # Errors
    ///
    /// The template raises an exception, exceeds its budget or the limit of its output, or fails.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        bos: &str,
        eos: &str,
    ) -> Result<String, TemplateError> {
        self.render_with(messages, add_generation_prompt, bos, eos, &TemplateVariables::default())
    }

    /// As [`render`](Self::render), with messages of any form (content in parts, calls of tools, as
    /// the template understands them) and with `variables`. Those named as what Hugging Face
    /// gives every template (`messages`, `add_generation_prompt`, `bos_token`, `eos_token`) are
    /// replaced by it.
    ///
    /// # Errors
    ///
    /// As [`render`](Self::render), or a message has no JSON.
    pub fn render_with(
        &self,
        messages: &[impl Serialize],
        add_generation_prompt: bool,
        bos: &str,
        eos: &str,
        variables: &TemplateVariables,
    ) -> Result<String, TemplateError> {
        let mut context = TemplateVariables::default();
        // Templates ask whether these are none.
        context.set("tools", &())?;
        context.set("documents", &())?;
        context.extend(variables);
        context.set("messages", messages)?;
        context.set("add_generation_prompt", &add_generation_prompt)?;
        context.set("bos_token", bos)?;
        context.set("eos_token", eos)?;
        let fuel = FUEL + (context.bytes() as f64 * FUEL_PER_BYTE) as u64;
        let context = context.into_context();
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
            let thread = thread.spawn_scoped(scope, || self.run(context, fuel));
            let result = thread.map_err(TemplateError::Thread)?.join();
            result.unwrap_or_else(|_| {
                Err(TemplateError::Render { message: "the engine panicked".into() })
            })
        })
    }

    /// Whether the template reads a variable of this name anywhere.
    pub fn reads(&self, variable: &str) -> bool {
        let template = self.environment.get_template(NAME);
        template.is_ok_and(|template| template.undeclared_variables(false).contains(variable))
    }

    fn run(&self, context: Value, fuel: u64) -> Result<String, TemplateError> {
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let mut output = Limited { bytes: Vec::new(), exceeded: false };
        let template = environment.get_template(NAME).map_err(|error| classify(error, fuel))?;
        let result = template.render_captured_to(context, &mut output).map(|_| ());
        if output.exceeded {
            return Err(TemplateError::OutputTooLong { limit: MAX_OUTPUT_BYTES });
        }
        result.map_err(|error| classify(error, fuel))?;
        Ok(String::from_utf8(output.bytes)?)
    }
}

/// A buffer that refuses to grow beyond [`MAX_OUTPUT_BYTES`].
struct Limited {
    bytes: Vec<u8>,
    exceeded: bool,
}

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > MAX_OUTPUT_BYTES - self.bytes.len() {
            self.exceeded = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What `raise_exception` was called with.
#[derive(Debug)]
struct Exception(String);

impl fmt::Display for Exception {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Exception {}

fn raise_exception(message: String) -> Result<Value, Error> {
    let error = Error::new(ErrorKind::InvalidOperation, "raise_exception was called");
    Err(error.with_source(Exception(message)))
}

/// Finds the cause of a failure, which an error inside a block or macro wraps.
fn classify(error: Error, fuel: u64) -> TemplateError {
    let mut cause: Option<&dyn std::error::Error> = Some(&error);
    while let Some(current) = cause {
        if let Some(Exception(message)) = current.downcast_ref() {
            return TemplateError::Raised { message: message.clone() };
        }
        let kind = current.downcast_ref().map(Error::kind);
        if kind == Some(ErrorKind::OutOfFuel) {
            return TemplateError::OutOfFuel { limit: fuel };
        }
        cause = current.source();
    }
    // The text only: the error may hold values that only the stack of this thread can drop.
    TemplateError::Render { message: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String, TemplateError> {
        let messages = [Message::new("user", "Hi <&'> \\u003c")];
        ChatTemplate::new(source)?.render(&messages, true, "<s>", "</s>")
    }

    #[test]
    fn does_a_chat_template_see_messages_and_tokens() {
        let source = "{{ bos_token }}{% for m in messages %}\n  [{{ m['role'] }}] {{ m.content }}\
                      {% endfor %}\n{% if add_generation_prompt %}>{% endif %}{{ eos_token }}";
        assert_eq!(render(source).unwrap(), "<s>  [user] Hi <&'> \\u003c></s>");
    }

    #[test]
    fn do_methods_of_python_strings_work() {
        assert_eq!(render("{{ messages[0].role.strip().upper() }}").unwrap(), "USER");
        assert_eq!(render("{{ tools is none }}").unwrap().to_lowercase(), "true");
    }

    #[test]
    fn is_json_not_escaped_for_html() {
        let json = render("{{ messages[0].content | tojson }}").unwrap();
        assert_eq!(json, r#""Hi <&'> \\u003c""#);
        assert_eq!(render("{{ {'a': [1, 2]} | tojson }}").unwrap(), r#"{"a": [1, 2]}"#);
        assert_eq!(render("{{ [1, []] | tojson(indent=2) }}").unwrap(), "[\n  1,\n  []\n]");
        assert_eq!(
            render("{{ {'a': none, 'b': true} | tojson(indent=1) }}").unwrap(),
            "{\n \"a\": null,\n \"b\": true\n}"
        );
    }

    #[test]
    fn does_the_default_of_several_templates_count() {
        let json = br#"{"chat_template":[{"name":"rag","template":"r"},
            {"name":"default","template":"d"}]}"#;
        let template = ChatTemplate::from_tokenizer_config(json).unwrap().unwrap();
        assert_eq!(template.render(&[], false, "", "").unwrap(), "d");
        assert!(ChatTemplate::from_tokenizer_config(b"{}").unwrap().is_none());
        let error = ChatTemplate::from_tokenizer_config(br#"{"chat_template":1}"#).unwrap_err();
        assert!(matches!(error, TemplateError::WrongType));
    }
}
