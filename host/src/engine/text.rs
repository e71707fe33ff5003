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
        let template = self.template.as_ref().ok_or_else(|| {
            Error::Request(
                "this model's file has no chat template (tokenizer.chat_template); send a prompt \
                 instead of messages"
                    .to_owned(),
            )
        })?;
        Ok(template.render(messages, None, true)?)
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
