//! Which tokens end a generation.

use std::collections::BTreeSet;

use super::ChatTemplate;
use super::vocab::{TokenType, Vocab};

/// End-of-turn and end-of-text tokens by the names that model families gave them. Files name one
/// end-of-sequence id, but chat models end a turn with one token and a document with another.
const NAMES: [&str; 17] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
    "<|return|>",
    "<|call|>",
    "<|eos|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|end_of_turn|>",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
    "<EOT>",
];

/// In gpt-oss `<|end|>` ends a message, after which the next channel begins; what ends a generation
/// there is `<|return|>` or `<|call|>`.
const MESSAGE_END: &str = "<|end|>";
const RETURN: &str = "<|return|>";

/// Adds the tokens of well-known names. Only control tokens count: a vocabulary may contain such
/// text as plain text.
pub(super) fn extend_by_name(ends: &mut BTreeSet<u32>, vocab: &Vocab<'_>) {
    let known = |text: &str| {
        vocab
            .iter()
            .find(|&(_, t, ty)| t == text && ty == TokenType::Control)
            .map(|(id, ..)| id)
    };
    ends.extend(
        vocab
            .iter()
            .filter(|&(_, text, ty)| ty == TokenType::Control && NAMES.contains(&text))
            .map(|(id, ..)| id),
    );
    if let (Some(_), Some(end)) = (known(RETURN), known(MESSAGE_END)) {
        ends.remove(&end);
    }
}

/// Adds the control token that the chat template puts after an assistant's message: for families whose
/// names are not known here.
pub(super) fn extend_by_template(
    ends: &mut BTreeSet<u32>,
    metadata: &gguf::Metadata,
    vocab: &Vocab<'_>,
) {
    /// What no template says by itself.
    const ANSWER: &str = "kigo-answer-0a1b2c";
    let Ok(Some(template)) = ChatTemplate::from_metadata(metadata) else {
        return;
    };
    let messages = serde_json::json!([
        { "role": "user", "content": "question" },
        { "role": "assistant", "content": ANSWER },
    ]);
    // A template that does not take this conversation says nothing about it.
    let Ok(text) = template.render(&messages, None, false) else {
        return;
    };
    let Some((_, after)) = text.split_once(ANSWER) else {
        return;
    };
    let after = after.trim_start();
    let control = vocab.iter().filter(|&(_, text, ty)| {
        ty == TokenType::Control && !text.is_empty() && after.starts_with(text)
    });
    ends.extend(
        control
            .max_by_key(|(_, text, _)| text.len())
            .map(|(id, ..)| id),
    );
}
