//! The chat template of a model file: messages in, prompt out.
//!
//! Templates are Jinja2 programs that strangers wrote. They run with transformers' conventions
//! (`apply_chat_template`): blocks trimmed, `None` for absent tools, `tojson` as Python's
//! `json.dumps(ensure_ascii=False)`, values printed as Python prints them, `raise_exception`,
//! `strftime_now`, `{% generation %}`. And they run within limits: steps, time, depth, and bytes
//! made are bounded, whatever the template does.

mod builtins;
mod limits;
mod python;
mod sandbox;

use minijinja::value::Value;

use super::Error;

/// A model's chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    /// `bos_token` and the like, as far as the model has them.
    special_tokens: Vec<(&'static str, String)>,
}

impl ChatTemplate {
    /// The template of a model file; none if it has none. Whether it is sound shows when it renders.
    ///
    /// # Errors
    /// `tokenizer.chat_template` is not a string, or a special token's id is out of range.
    pub fn from_gguf(gguf: &gguf::Gguf) -> Result<Option<Self>, Error> {
        Self::from_metadata(gguf.metadata())
    }

    /// As [`ChatTemplate::from_gguf`], from metadata alone.
    ///
    /// # Errors
    /// See [`ChatTemplate::from_gguf`].
    pub fn from_metadata(metadata: &gguf::Metadata) -> Result<Option<Self>, Error> {
        let Some(source) = metadata.opt_str("tokenizer.chat_template")? else {
            return Ok(None);
        };
        let tokens = metadata
            .opt_strings("tokenizer.ggml.tokens")?
            .unwrap_or_default();
        let mut special_tokens = Vec::new();
        for (name, key) in [
            ("bos_token", "tokenizer.ggml.bos_token_id"),
            ("eos_token", "tokenizer.ggml.eos_token_id"),
            ("unk_token", "tokenizer.ggml.unknown_token_id"),
            ("pad_token", "tokenizer.ggml.padding_token_id"),
        ] {
            if let Some(id) = metadata.opt_u32(key)? {
                let token = tokens.get(id as usize).ok_or_else(|| Error::Vocabulary {
                    file: metadata.path().to_owned(),
                    what: format!(
                        "{key} is {id}, but the vocabulary has {} tokens",
                        tokens.len()
                    ),
                })?;
                special_tokens.push((name, token.clone()));
            }
        }
        Ok(Some(Self {
            source: source.to_owned(),
            special_tokens,
        }))
    }

    /// A template from elsewhere than a model file; `bos_token` and `eos_token` as the template
    /// sees them.
    #[must_use]
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Self {
        Self {
            source: source.to_owned(),
            special_tokens: vec![
                ("bos_token", bos_token.to_owned()),
                ("eos_token", eos_token.to_owned()),
            ],
        }
    }

    /// ChatML, for models whose own template is missing or fails. It has no place for tools, and
    /// refuses them.
    #[must_use]
    pub fn chatml() -> Self {
        Self::new(include_str!("chatml.jinja"), "", "")
    }

    /// The template's text, as it stands in the file.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt for a list of messages (`[{"role": …, "content": …}, …]`, passed on as it is).
    ///
    /// Encode the result with `parse_special`, and without `add_special`: templates write BOS
    /// themselves.
    ///
    /// # Errors
    /// [`Error::TemplateRefused`] if the template calls `raise_exception`; [`Error::Template`] if it
    /// is malformed, fails on these messages, or exceeds a limit.
    pub fn render(
        &self,
        messages: &serde_json::Value,
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<String, Error> {
        let mut context = vec![
            ("messages", Value::from_serialize(messages)),
            // transformers passes None, so `tools is defined` holds and `if tools` does not.
            (
                "tools",
                tools.map_or(Value::from(()), Value::from_serialize),
            ),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        context.extend(
            self.special_tokens
                .iter()
                .map(|(name, token)| (*name, Value::from(token.as_str()))),
        );
        sandbox::render(&self.source, context.into_iter().collect())
    }
}

#[cfg(test)]
mod tests;
