//! `kigo generate`, and what it shares with `kigo run`.

use super::{Common, load, parse_json, positive, print_json, read_file, read_stdin, stdout_error};
use crate::engine::{EngineHandle, Event, Failure, Request, Text};
use crate::error::{Error, Result};
use crate::sampling::SamplingParams;
use clap::Args;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};

#[derive(Debug, Args)]
pub(super) struct GenerateArgs {
    #[command(flatten)]
    input: Input,
    /// Tokens to generate at most [default: what is left of the context, at most 512]
    #[arg(long, value_name = "N", value_parser = positive)]
    max_tokens: Option<usize>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// End the answer before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Input {
    /// A text to go on from; names of special tokens in it stand for those tokens
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// A JSON file with an array of {"role", "content"}; - for stdin
    #[arg(long, value_name = "FILE")]
    messages: Option<PathBuf>,
    /// Token ids, fed as given
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    ids: Option<Vec<u32>>,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub(super) struct SamplingArgs {
    /// 0 takes the likeliest token always
    #[arg(long, default_value_t = SamplingParams::default().temperature)]
    temperature: f32,
    /// Choose among the N likeliest; 0: all
    #[arg(long, value_name = "N", default_value_t = SamplingParams::default().top_k)]
    top_k: u32,
    /// Choose among the likeliest that hold this share
    #[arg(long, value_name = "P", default_value_t = SamplingParams::default().top_p)]
    top_p: f32,
    /// Choose among those at least this fraction as likely as the likeliest
    #[arg(long, value_name = "P", default_value_t = SamplingParams::default().min_p)]
    min_p: f32,
    /// Makes tokens seen before less likely; 1: no
    #[arg(long, value_name = "R", default_value_t = SamplingParams::default().repetition_penalty)]
    repetition_penalty: f32,
    /// The same seed gives the same answer [default: a new one each time]
    #[arg(long)]
    seed: Option<u64>,
}

impl SamplingArgs {
    /// # Errors
    /// Values out of range; only the vocabulary's size is not known yet.
    pub(super) fn params(&self) -> Result<SamplingParams> {
        in_range(SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        })
    }
}

/// `params` as flags gave them.
///
/// # Errors
/// Values out of range; only the vocabulary's size is not known yet.
pub(super) fn in_range(params: SamplingParams) -> Result<SamplingParams> {
    params.validate(usize::MAX).map_err(|violations| {
        let flags = violations.iter().map(|v| {
            let flag = v.field.replace('_', "-");
            format!("--{flag} is {}, expected {}", v.value, v.constraint)
        });
        Error::Request(flags.collect::<Vec<_>>().join("; "))
    })?;
    Ok(params)
}

/// Tokens of an answer where nobody says how many.
const DEFAULT_MAX_TOKENS: usize = 512;

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Error::Request(failure.message)
    }
}

pub(super) fn run(common: &Common, args: &GenerateArgs, out: &mut dyn Write) -> Result<()> {
    // What is wrong with the input is said before a model is loaded.
    let sampling = args.sampling.params()?;
    let file = load::open_to_run(common)?;
    let messages = args
        .input
        .messages
        .as_deref()
        .map(read_messages)
        .transpose()?;
    let tokens = args.input.ids.as_ref().map_or(0, Vec::len) + args.max_tokens.unwrap_or(0);
    let engine = load::engine(common, &file, tokens)?;
    let text = engine.text();
    let prompt = match (&args.input.prompt, &messages, &args.input.ids) {
        (Some(prompt), _, _) => text.encode(prompt)?,
        (_, Some(messages), _) => text.encode(&text.render(messages)?)?,
        (_, _, ids) => ids.clone().unwrap_or_default(),
    };
    let left = engine.context().saturating_sub(prompt.len());
    let request = Request {
        job_id: "generate".to_owned(),
        prompt,
        max_tokens: args.max_tokens.unwrap_or(left.clamp(1, DEFAULT_MAX_TOKENS)),
        sampling,
        stop: args.stop.clone(),
        ..Request::default()
    };
    generate(&engine, request, common.json, out)
}

fn generate(
    engine: &EngineHandle,
    request: Request,
    as_json: bool,
    out: &mut dyn Write,
) -> Result<()> {
    let mut job = engine.submit(request)?;
    let mut ids = Vec::new();
    let mut answer = String::new();
    while let Some(event) = job.blocking_next() {
        match event {
            Event::Started | Event::Embedding(_) => {}
            Event::Token { id, text, .. } => {
                ids.push(id);
                if !as_json {
                    out.write_all(text.as_bytes()).map_err(stdout_error)?;
                    out.flush().map_err(stdout_error)?;
                }
                answer.push_str(&text);
            }
            Event::End(end) if as_json => {
                let value = json!({
                    "ids": ids,
                    "text": answer,
                    "stop_reason": end.stop_reason,
                    "stop_sequence": end.stop_sequence,
                    "seed": job.seed,
                    "prompt_tokens": end.prompt_tokens,
                    "prefill_ms": end.prefill_ms,
                    "decode_ms": end.decode_ms,
                });
                return print_json(out, &value);
            }
            Event::End(end) => {
                writeln!(out).map_err(stdout_error)?;
                let rate = tokens_per_s(end.tokens_out, end.decode_ms);
                tracing::info!(?end.stop_reason, end.tokens_out, tokens_per_s = rate, "done");
                return Ok(());
            }
            Event::Error(failure) => return Err(failure.into()),
        }
    }
    Err(Error::Request(
        "the engine ended without an answer".to_owned(),
    ))
}

/// Decode speed: the first token belongs to the prefill.
pub(super) fn tokens_per_s(tokens: usize, decode_ms: f64) -> f64 {
    if decode_ms > 0.0 {
        tokens.saturating_sub(1) as f64 / decode_ms * 1e3
    } else {
        0.0
    }
}

/// An array of messages, or an object that holds one under `messages`.
fn read_messages(path: &Path) -> Result<Value> {
    let (text, origin) = if path == Path::new("-") {
        (read_stdin("the messages")?, "stdin".to_owned())
    } else {
        (read_file(&path.to_owned())?, path.display().to_string())
    };
    let expected = "an array of {\"role\", \"content\"}";
    let mut value: Value = parse_json(&text, &origin, expected)?;
    if let Some(messages) = value.get_mut("messages") {
        value = messages.take();
    }
    match value.as_array() {
        Some(messages) if !messages.is_empty() => Ok(value),
        _ => Err(Error::Request(format!("{origin}: expected {expected}"))),
    }
}

/// The prompt of a chat.
pub(super) fn encode_chat(text: &dyn Text, messages: &[Value]) -> Result<Vec<u32>> {
    text.encode(&text.render(&Value::Array(messages.to_vec()))?)
}
