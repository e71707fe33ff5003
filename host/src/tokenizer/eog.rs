//! Which tokens end a generation.

use std::collections::BTreeSet;

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
