//! `kigo run`: a chat in the terminal.

use super::generate::{SamplingArgs, encode_chat, tokens_per_s};
use super::{Common, load, positive, stdout_error};
use crate::engine::{EngineHandle, Event, Request, StopReason};
use crate::error::{Error, Result};
use crate::sampling::SamplingParams;
use clap::Args;
use rustyline::error::ReadlineError;
use serde_json::{Value, json};
use std::io::{IsTerminal, Write};

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// What the model is told before the chat
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens of an answer at most [default: what is left of the context]
    #[arg(long, value_name = "N", value_parser = positive)]
    max_tokens: Option<usize>,
    #[command(flatten)]
    sampling: SamplingArgs,
}

pub(super) fn run(common: &Common, args: &RunArgs) -> Result<()> {
    if common.json {
        let what = "run is a conversation, --json cannot show it; use kigo generate --json";
        return Err(Error::Request(what.to_owned()));
    }
    let sampling = args.sampling.params()?;
    let file = load::open_to_run(common)?;
    let engine = load::engine(common, &file, 0)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::Io {
            path: "the async runtime".into(),
            source,
        })?;
    let mut chat = Chat {
        engine,
        args,
        sampling,
        messages: Vec::new(),
    };
    if let Some(system) = &args.system {
        chat.messages
            .push(json!({ "role": "system", "content": system }));
    }
    // Fails here where the model has no chat template, not after the first line was typed.
    encode_chat(
        chat.engine.text(),
        &[json!({ "role": "user", "content": "hello" })],
    )?;

    let interactive = std::io::stdin().is_terminal();
    if interactive {
        let (model, device) = (chat.engine.model(), chat.engine.device());
        eprintln!(
            "{} on {}. Ctrl-C stops an answer, Ctrl-D leaves.",
            model.name, device.name
        );
    }
    // Bracketed paste: several pasted lines are one message.
    let mut editor = rustyline::DefaultEditor::new().map_err(terminal_error)?;
    loop {
        match editor.readline(if interactive { "> " } else { "" }) {
            Ok(line) if line.trim().is_empty() => {}
            Ok(line) => {
                let _ = editor.add_history_entry(&line);
                chat.turn(line, &runtime)?;
            }
            Err(ReadlineError::Interrupted) => eprintln!("Ctrl-D leaves."),
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(terminal_error(error)),
        }
    }
}

fn terminal_error(error: ReadlineError) -> Error {
    Error::Io {
        path: "the terminal".into(),
        source: std::io::Error::other(error),
    }
}

struct Chat<'a> {
    engine: EngineHandle,
    args: &'a RunArgs,
    sampling: SamplingParams,
    messages: Vec<Value>,
}

impl Chat<'_> {
    /// One question and its answer.
    fn turn(&mut self, line: String, runtime: &tokio::runtime::Runtime) -> Result<()> {
        self.messages
            .push(json!({ "role": "user", "content": line }));
        let prompt = match self.fit()? {
            Some(prompt) => prompt,
            None => {
                self.messages.pop();
                eprintln!("error: this message is too long; use a larger --ctx-size");
                return Ok(());
            }
        };
        let left = self.engine.context() - prompt.len();
        let request = Request {
            job_id: "run".to_owned(),
            prompt,
            max_tokens: self.args.max_tokens.map_or(left, |n| n.min(left)),
            sampling: self.sampling.clone(),
            ..Request::default()
        };
        let mut job = self.engine.submit(request)?;
        let canceller = job.canceller();
        let mut answer = String::new();
        let result = runtime.block_on(async {
            loop {
                let event = tokio::select! {
                    event = job.next() => event,
                    _ = tokio::signal::ctrl_c() => {
                        canceller.cancel();
                        continue;
                    }
                };
                match event {
                    Some(Event::Started | Event::Embedding(_)) => {}
                    Some(Event::Token { text, .. }) => {
                        answer.push_str(&text);
                        show(&text)?;
                    }
                    Some(Event::End(end)) => return Ok(end),
                    Some(Event::Error(failure)) => return Err(failure.into()),
                    None => {
                        let what = "the engine ended without an answer".to_owned();
                        return Err(Error::Request(what));
                    }
                }
            }
        });
        show("\n")?;
        let end = result?;
        if std::io::stderr().is_terminal() {
            let note = match end.stop_reason {
                StopReason::Cancelled => ", stopped",
                StopReason::MaxTokens => ", cut at the limit",
                _ => "",
            };
            let rate = tokens_per_s(end.tokens_out, end.decode_ms);
            eprintln!(
                "\x1b[2m[{} tokens, {rate:.1} tokens/s{note}]\x1b[0m",
                end.tokens_out
            );
        }
        self.messages
            .push(json!({ "role": "assistant", "content": answer }));
        Ok(())
    }

    /// The chat's prompt, the oldest turns left out where the context is too small for all and a
    /// decent answer; `None` where even the last message alone is too long.
    fn fit(&mut self) -> Result<Option<Vec<u32>>> {
        let context = self.engine.context();
        loop {
            let prompt = encode_chat(self.engine.text(), &self.messages)?;
            let room = context.saturating_sub(prompt.len());
            let first = usize::from(self.messages.first().is_some_and(|m| m["role"] == "system"));
            if room >= context / 4 {
                return Ok(Some(prompt));
            }
            if self.messages.len() <= first + 1 {
                return Ok((room > 0).then_some(prompt));
            }
            self.messages.drain(first..first + 2);
        }
    }
}

/// Writes a piece of an answer at once. A model's control characters do not reach the terminal.
fn show(text: &str) -> Result<()> {
    let harmless = |c: char| !c.is_control() || matches!(c, '\n' | '\t');
    let text: String = text.chars().filter(|&c| harmless(c)).collect();
    let mut out = std::io::stdout();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(stdout_error)
}
