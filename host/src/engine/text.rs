//! Between text and token ids: what the engine and the server need of a vocabulary.

use crate::error::{Error, Result};
use crate::tokenizer::chat::ChatTemplate;
use crate::tokenizer::{self, Detokenizer, Tokenizer};
use serde_json::Value;

/// A vocabulary and its chat template. [`ModelText`] is the one of a file; tests bring their own.
pub trait Text: Send + Sync {
    /// The ids of a prompt. The names of special tokens in it stand for those tokens, and the
    /// vocabulary's own opening token is put in front where it asks for one.
    fn encode(&self, prompt: &str) -> Result<Vec<u32>>;

    /// The prompt that a chat makes, ready for the assistant's answer. `messages` is an array of
    /// `{role, content}`.
    fn render(&self, messages: &Value) -> Result<String>;

    /// As [`Text::render`], with tools, and without the assistant's opening where that is not wanted.
    ///
    /// # Errors
    /// No template, or it refuses these messages.
    fn render_with(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String>;

    /// The chat template's text, where there is one.
    fn template(&self) -> Option<&str>;

    /// The ids of a text: `add_special` puts the opening token in front where the vocabulary asks for
    /// one, `parse_special` takes the names of special tokens for those tokens.
    ///
    /// # Errors
    /// Text the vocabulary does not cover.
    fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>>;

    /// The bytes a token stands for; a control token's name.
    fn token_bytes(&self, id: u32) -> Vec<u8>;

    /// Whether a token steers the model rather than being text.
    fn is_control(&self, id: u32) -> bool;

    /// A decoder for one sequence.
    fn detokenizer(&self) -> Box<dyn Detokenize + '_>;

    /// End of turn, end of text: ids that end an answer.
    fn is_end_of_generation(&self, id: u32) -> bool;
}

/// Turns ids into text as they come, never half a character.
pub trait Detokenize {
    /// The text that is certain now that `id` came; often empty.
    fn push(&mut self, id: u32) -> String;

    /// What is left, broken characters replaced.
    fn finish(&mut self) -> String;
}

/// The vocabulary and template of a GGUF file.
pub struct ModelText {
    pub tokenizer: Tokenizer,
    /// `None` where the file has no template: such a model takes prompts, not messages.
    pub template: Option<ChatTemplate>,
    /// What renders messages where the model's own template is missing or fails, if that is wanted.
    pub fallback: Option<ChatTemplate>,
}

impl ModelText {
    /// # Errors
    /// A vocabulary or template that cannot be used; the message names the metadata key.
    pub fn from_gguf(file: &gguf::Gguf) -> Result<Self> {
        Ok(Self {
            tokenizer: Tokenizer::from_gguf(file)?,
            template: ChatTemplate::from_gguf(file)?,
            fallback: None,
        })
    }

    /// The same, with a fallback for the template.
    #[must_use]
    pub fn with_fallback(self, fallback: Option<ChatTemplate>) -> Self {
        Self { fallback, ..self }
    }
}

/// The prompt of a chat by a model's own template, or by `fallback` where that is missing or fails. A
/// template that refuses the messages in its own words has not failed.
///
/// # Errors
/// Neither renders; [`Error::Request`] says how to ask for the fallback.
pub fn render_chat(
    template: Option<&ChatTemplate>,
    fallback: Option<&ChatTemplate>,
    messages: &Value,
    tools: Option<&Value>,
    add_generation_prompt: bool,
) -> Result<String> {
    let render = |template: &ChatTemplate| template.render(messages, tools, add_generation_prompt);
    match (template.map(render), fallback) {
        (Some(Err(tokenizer::Error::Template(why))), Some(fallback)) => {
            tracing::warn!(%why, "the model's chat template failed; ChatML is used in its place");
            Ok(render(fallback)?)
        }
        (Some(Err(tokenizer::Error::Template(why))), None) => Err(Error::Request(format!(
            "the model's chat template (tokenizer.chat_template) does not render: {why}; send a prompt \
             instead of messages, or start with --template-fallback for ChatML in its place"
        ))),
        (Some(rendered), _) => Ok(rendered?),
        (None, Some(fallback)) => Ok(render(fallback)?),
        (None, None) => Err(Error::Request(
            "this model's file has no chat template (tokenizer.chat_template); send a prompt instead of \
             messages, or start with --template-fallback for ChatML"
                .to_owned(),
        )),
    }
}

impl Text for ModelText {
    fn encode(&self, prompt: &str) -> Result<Vec<u32>> {
        let mut ids = self.tokenizer.encode(prompt, true, true)?;
        // A template may write the opening token that the vocabulary also adds; models know one.
        if let Some(bos) = self.tokenizer.bos()
            && ids.starts_with(&[bos, bos])
        {
            ids.remove(0);
        }
        Ok(ids)
    }

    fn render(&self, messages: &Value) -> Result<String> {
        self.render_with(messages, None, true)
    }

    fn render_with(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        render_chat(
            self.template.as_ref(),
            self.fallback.as_ref(),
            messages,
            tools,
            add_generation_prompt,
        )
    }

    fn template(&self) -> Option<&str> {
        let template = self.template.as_ref().or(self.fallback.as_ref());
        template.map(ChatTemplate::source)
    }

    fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode(text, add_special, parse_special)?)
    }

    fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.tokenizer.token_bytes(id).to_vec()
    }

    fn is_control(&self, id: u32) -> bool {
        self.tokenizer.is_control(id)
    }

    fn detokenizer(&self) -> Box<dyn Detokenize + '_> {
        Box::new(self.tokenizer.detokenizer())
    }

    fn is_end_of_generation(&self, id: u32) -> bool {
        self.tokenizer.is_end_of_generation(id)
    }
}

impl Detokenize for Detokenizer {
    fn push(&mut self, id: u32) -> String {
        Detokenizer::push(self, id)
    }

    fn finish(&mut self) -> String {
        Detokenizer::finish(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(template: Option<&str>, fallback: bool, tools: Option<&Value>) -> Result<String> {
        let template = template.map(|source| ChatTemplate::new(source, "<s>", "</s>"));
        let fallback = fallback.then(ChatTemplate::chatml);
        let messages = json!([
            { "role": "system", "content": "Be brief." },
            { "role": "user", "content": "Hi {{ 1 }}" },
        ]);
        render_chat(template.as_ref(), fallback.as_ref(), &messages, tools, true)
    }

    const CHATML: &str = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi {{ 1 }}<|im_end|>\n<|im_start|>assistant\n";

    #[test]
    fn a_template_that_fails_is_replaced_only_where_that_is_asked_for() {
        let broken = [
            "{% for m in messages %}",
            "{{ messages | no_such_filter }}",
            "{% for i in range(1000000000) %}{{ i }}{% endfor %}",
        ];
        for template in broken {
            let error = render(Some(template), false, None).unwrap_err().to_string();
            assert!(error.contains("tokenizer.chat_template"), "{error}");
            assert!(error.contains("--template-fallback"), "{error}");
            assert_eq!(render(Some(template), true, None).unwrap(), CHATML);
        }
        let error = render(None, false, None).unwrap_err().to_string();
        assert!(error.contains("no chat template"), "{error}");
        assert_eq!(render(None, true, None).unwrap(), CHATML);
    }

    #[test]
    fn a_template_that_renders_or_refuses_is_heard() {
        assert_eq!(render(Some("own"), true, None).unwrap(), "own");
        let refuses = "{{ raise_exception('no system messages') }}";
        for fallback in [false, true] {
            let error = render(Some(refuses), fallback, None).unwrap_err();
            assert!(error.to_string().contains("no system messages"), "{error}");
        }
        let tools = json!([{ "type": "function", "function": { "name": "f" } }]);
        let error = render(None, true, Some(&tools)).unwrap_err().to_string();
        assert!(error.contains("no place for tools"), "{error}");
    }
}
