//! Between text and token ids: what the engine and the server need of a vocabulary.

use crate::error::{Error, Result};
use crate::tokenizer::chat::ChatTemplate;
use crate::tokenizer::{Detokenizer, Tokenizer};
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
}

impl ModelText {
    /// # Errors
    /// A vocabulary or template that cannot be used; the message names the metadata key.
    pub fn from_gguf(file: &gguf::Gguf) -> Result<Self> {
        Ok(Self {
            tokenizer: Tokenizer::from_gguf(file)?,
            template: ChatTemplate::from_gguf(file)?,
        })
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
        let template = self.template.as_ref().ok_or_else(|| {
            Error::Request(
                "this model's file has no chat template (tokenizer.chat_template); send a prompt \
                 instead of messages"
                    .to_owned(),
            )
        })?;
        Ok(template.render(messages, tools, add_generation_prompt)?)
    }

    fn template(&self) -> Option<&str> {
        self.template.as_ref().map(ChatTemplate::source)
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
