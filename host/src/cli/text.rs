//! `kigo tokenize`, `detokenize` and `chat-template`: a model's text side, without its weights.

use super::{Common, load, parse_json, print_json, read_stdin, stdout_error};
use crate::engine::render_chat;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::chat::ChatTemplate;
use clap::Args;
use serde_json::{Value, json};
use std::io::Write;

#[derive(Debug, Args)]
pub(super) struct TokenizeArgs {
    /// Names of special tokens in the text stand for those tokens
    #[arg(long)]
    parse_special: bool,
    /// Add the opening and closing tokens that the vocabulary asks for
    #[arg(long)]
    add_special: bool,
}

#[derive(Debug, Args)]
pub(super) struct DetokenizeArgs {
    /// Token ids [default: from stdin, as a JSON array, {"ids": [...]}, or numbers with spaces or
    /// commas between]
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    ids: Option<Vec<u32>>,
}

pub(super) fn tokenize(common: &Common, args: &TokenizeArgs, out: &mut dyn Write) -> Result<()> {
    let tokenizer = Tokenizer::from_gguf(&*load::open(common)?)?;
    let text = read_stdin("the text")?;
    let ids = tokenizer.encode(&text, args.add_special, args.parse_special)?;
    if common.json {
        return print_json(out, &json!({ "ids": ids }));
    }
    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
    writeln!(out, "{}", ids.join(" ")).map_err(stdout_error)
}

pub(super) fn detokenize(
    common: &Common,
    args: &DetokenizeArgs,
    out: &mut dyn Write,
) -> Result<()> {
    let tokenizer = Tokenizer::from_gguf(&*load::open(common)?)?;
    let ids = match &args.ids {
        Some(ids) => ids.clone(),
        None => parse_ids(&read_stdin("the list of ids")?)?,
    };
    let bytes = tokenizer.decode(&ids);
    if common.json {
        return print_json(out, &json!({ "text": String::from_utf8_lossy(&bytes) }));
    }
    out.write_all(&bytes).map_err(stdout_error)
}

/// Ids as people and programs write them.
pub(super) fn parse_ids(text: &str) -> Result<Vec<u32>> {
    let text = text.trim();
    if text.starts_with(['[', '{']) {
        let mut value: Value = parse_json(text, "the ids", "a JSON array of token ids")?;
        if let Some(ids) = value.get_mut("ids") {
            value = ids.take();
        }
        return serde_json::from_value(value).map_err(|e| {
            Error::Request(format!("the ids: {e}; expected a JSON array of token ids"))
        });
    }
    text.split(|c: char| c == ',' || c.is_whitespace())
        .filter(|word| !word.is_empty())
        .map(|word| {
            word.parse()
                .map_err(|_| Error::Request(format!("{word:?} is not a token id")))
        })
        .collect()
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct TemplateInput {
    messages: Value,
    #[serde(default)]
    tools: Option<Value>,
    #[serde(default)]
    add_generation_prompt: bool,
}

pub(super) fn chat_template(common: &Common, out: &mut dyn Write) -> Result<()> {
    let file = load::open(common)?;
    let template = ChatTemplate::from_gguf(&file)?;
    let input: TemplateInput = parse_json(
        &read_stdin("the JSON")?,
        "stdin",
        "{\"messages\", \"tools\"?, \"add_generation_prompt\"?}",
    )?;
    let text = render_chat(
        template.as_ref(),
        common.template_fallback().as_ref(),
        &input.messages,
        input.tools.as_ref(),
        input.add_generation_prompt,
    )?;
    if common.json {
        return print_json(out, &json!({ "text": text }));
    }
    out.write_all(text.as_bytes()).map_err(stdout_error)
}
