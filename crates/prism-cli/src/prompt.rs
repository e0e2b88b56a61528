//! From messages to the tokens of a prompt.

use anyhow::{Context, Result, bail};
use prism_models::{ChatTemplate, Checkpoint, Message, TemplateVariables, Tokenizer};

use crate::args::TemplateArgs;

/// Variables that the conversation itself sets.
const RESERVED: [&str; 4] = ["messages", "add_generation_prompt", "bos_token", "eos_token"];

/// A model's chat template with all that it is given besides the conversation.
pub struct Prompter {
    template: ChatTemplate,
    variables: TemplateVariables,
    bos: String,
    eos: String,
    system: Option<Message>,
}

impl Prompter {
    /// With the model's own template; `None` where it has none.
    pub fn new(
        args: &TemplateArgs,
        checkpoint: &Checkpoint,
        tokenizer: &Tokenizer,
    ) -> Result<Option<Self>> {
        let variables = variables(args)?;
        let Some(template) = checkpoint.chat_template()? else {
            if args.system.is_some() || !args.template_arg.is_empty() {
                bail!("--system and --template-arg need a chat template, which this model lacks");
            }
            return Ok(None);
        };
        if let Some(name) = variables.names().find(|name| !template.reads(name)) {
            bail!("--template-arg {name}: the model's chat template doesn't read it");
        }
        let tokens = checkpoint.special_tokens(tokenizer)?;
        let (bos, eos) = (tokens.bos.unwrap_or_default(), tokens.eos.unwrap_or_default());
        let system = args.system.as_ref().map(|text| Message::new("system", text));
        Ok(Some(Self { template, variables, bos, eos, system }))
    }

    /// The messages that a conversation starts with.
    pub fn beginning(&self) -> Vec<Message> {
        self.system.iter().cloned().collect()
    }

    /// The text of a conversation and of the start of an answer.
    pub fn text(&self, messages: &[Message]) -> Result<String> {
        self.template
            .render_with(messages, true, &self.bos, &self.eos, &self.variables)
            .context("the chat template failed")
    }

    /// The tokens of a conversation and of the start of an answer.
    pub fn ids(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>> {
        Ok(tokenizer.encode(&self.text(messages)?, false)?)
    }
}

/// Refuses what could not be right with any template.
pub fn variables(args: &TemplateArgs) -> Result<TemplateVariables> {
    let mut variables = TemplateVariables::default();
    for given in &args.template_arg {
        let named = given.split_once('=').filter(|(name, _)| !name.is_empty());
        let Some((name, value)) = named else {
            bail!("--template-arg must be NAME=VALUE, got {given:?}");
        };
        if RESERVED.contains(&name) {
            bail!("--template-arg {name}: the conversation itself sets it");
        }
        if variables.names().any(|set| set == name) {
            bail!("--template-arg {name} is given twice");
        }
        if variables.set_json(name, value).is_err() {
            variables.set(name, value)?;
        }
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(given: &[&str]) -> Result<Vec<String>> {
        let template_arg = given.iter().map(|&arg| arg.to_string()).collect();
        let variables = variables(&TemplateArgs { system: None, template_arg })?;
        Ok(variables.names().map(str::to_string).collect())
    }

    #[test]
    fn are_template_arguments_named_once_and_never_the_conversations_own() {
        assert_eq!(names(&["b=1", "a=[x", "c="]).unwrap(), ["a", "b", "c"]);
        for (given, says) in [
            (&["thinking"][..], "must be NAME=VALUE, got \"thinking\""),
            (&["=1"], "must be NAME=VALUE"),
            (&["messages=[]"], "messages: the conversation itself sets it"),
            (&["a=1", "a=2"], "a is given twice"),
        ] {
            let error = names(given).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
