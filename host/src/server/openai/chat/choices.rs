//! What chat answers with: choices, whole and in pieces.

use super::super::answers::{Choices, Envelope};
use super::super::tools::{Call, CallParser, Form, Part};
use super::super::{finish_reason, finite, token_text};
use crate::engine::{EngineHandle, Event, Failure, LogProbs};
use schemars::JsonSchema;
use serde::Serialize;

/// The answer as a whole.
pub(in super::super::super) type Completion = Envelope<FullChoice>;

#[derive(Debug, Serialize, JsonSchema)]
pub(in super::super::super) struct FullChoice {
    index: usize,
    message: Message,
    logprobs: Option<TokenLogprobs>,
    finish_reason: &'static str,
}

#[derive(Debug, Serialize, JsonSchema)]
struct Message {
    role: &'static str,
    content: Option<String>,
    refusal: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct ToolCall {
    id: String,
    r#type: &'static str,
    function: FunctionCall,
}

#[derive(Debug, Serialize, JsonSchema)]
struct FunctionCall {
    name: String,
    /// JSON, as text.
    arguments: String,
}

#[derive(Debug, Default, Serialize, JsonSchema)]
struct TokenLogprobs {
    content: Vec<TokenLogprob>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct TokenLogprob {
    #[serde(flatten)]
    token: OneLogprob,
    top_logprobs: Vec<OneLogprob>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct OneLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

/// A piece of a streamed answer.
pub(in super::super::super) type Chunk = Envelope<ChunkChoice>;

#[derive(Debug, Serialize, JsonSchema)]
pub(in super::super::super) struct ChunkChoice {
    index: usize,
    delta: Delta,
    logprobs: Option<TokenLogprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Debug, Default, Serialize, JsonSchema)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<DeltaCall>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct DeltaCall {
    index: usize,
    #[serde(flatten)]
    call: ToolCall,
}

fn logprob(engine: &EngineHandle, id: u32, logprobs: &LogProbs) -> TokenLogprob {
    let one = |id: u32, logprob: f32| {
        let (token, bytes) = token_text(engine, id);
        OneLogprob {
            token,
            logprob: finite(logprob),
            bytes,
        }
    };
    TokenLogprob {
        token: one(id, logprobs.chosen),
        top_logprobs: logprobs.top.iter().map(|&(id, l)| one(id, l)).collect(),
    }
}

/// The answers to one chat as they grow.
pub(super) struct ChatChoices {
    engine: EngineHandle,
    answers: Vec<Growing>,
}

/// One answer as it grows.
struct Growing {
    /// Where the model may call tools.
    parser: Option<CallParser>,
    calls: usize,
}

impl ChatChoices {
    /// `n` answers; `form` is how calls are written where the model may make some.
    pub fn new(engine: &EngineHandle, n: usize, form: Option<&'static Form>) -> Self {
        let growing = || Growing {
            parser: form.map(CallParser::new),
            calls: 0,
        };
        Self {
            engine: engine.clone(),
            answers: (0..n).map(|_| growing()).collect(),
        }
    }
}

impl Choices for ChatChoices {
    type Piece = ChunkChoice;
    type Whole = FullChoice;

    const WHOLE: &'static str = "chat.completion";
    const PIECE: &'static str = "chat.completion.chunk";
    const ID: &'static str = "chatcmpl";

    fn opening(&self, index: usize) -> Option<ChunkChoice> {
        let mut piece = ChunkChoice::new(index);
        piece.delta.role = Some("assistant");
        piece.delta.content = Some(String::new());
        Some(piece)
    }

    fn take(&mut self, index: usize, event: Event) -> Result<Vec<ChunkChoice>, Failure> {
        let answer = &mut self.answers[index];
        let mut last = None;
        let mut text = ChunkChoice::new(index);
        let parts = match event {
            Event::Started | Event::Embedding(_) => return Ok(Vec::new()),
            Event::Token {
                id,
                text: piece,
                logprobs,
                ..
            } => {
                text.logprobs = logprobs.map(|l| TokenLogprobs {
                    content: vec![logprob(&self.engine, id, &l)],
                });
                match &mut answer.parser {
                    Some(parser) => parser.push(&piece),
                    None => vec![Part::Content(piece)],
                }
            }
            Event::End(end) => {
                last = Some(finish_reason(&end)?);
                let parser = answer.parser.as_mut();
                parser.map(CallParser::finish).unwrap_or_default()
            }
            Event::Error(failure) => return Err(failure),
        };
        let mut content = String::new();
        let mut calls = Vec::new();
        for part in parts {
            match part {
                Part::Content(text) => content.push_str(&text),
                Part::Call(call) => calls.push(call),
            }
        }
        let mut pieces = Vec::new();
        if !content.is_empty() || text.logprobs.is_some() {
            text.delta.content = Some(content);
            pieces.push(text);
        }
        for call in calls {
            let mut piece = ChunkChoice::new(index);
            piece.delta.tool_calls.push(DeltaCall {
                index: answer.calls,
                call: tool_call(call),
            });
            answer.calls += 1;
            pieces.push(piece);
        }
        if let Some(reason) = last {
            let mut piece = ChunkChoice::new(index);
            let called = answer.calls > 0 && reason == "stop";
            piece.finish_reason = Some(if called { "tool_calls" } else { reason });
            pieces.push(piece);
        }
        Ok(pieces)
    }

    fn is_last(piece: &ChunkChoice) -> bool {
        piece.finish_reason.is_some()
    }

    fn begin(&self, index: usize) -> FullChoice {
        FullChoice {
            index,
            message: Message {
                role: "assistant",
                content: Some(String::new()),
                refusal: None,
                tool_calls: Vec::new(),
            },
            logprobs: None,
            finish_reason: "",
        }
    }

    fn join(whole: &mut FullChoice, piece: ChunkChoice) {
        let message = &mut whole.message;
        if let (Some(all), Some(more)) = (&mut message.content, piece.delta.content) {
            all.push_str(&more);
        }
        let calls = piece.delta.tool_calls.into_iter().map(|c| c.call);
        message.tool_calls.extend(calls);
        if let Some(more) = piece.logprobs {
            let all = whole.logprobs.get_or_insert_default();
            all.content.extend(more.content);
        }
        if let Some(reason) = piece.finish_reason {
            whole.finish_reason = reason;
            if !message.tool_calls.is_empty() && message.content.as_deref() == Some("") {
                message.content = None;
            }
        }
    }
}

impl ChunkChoice {
    /// Nothing new about answer `index`.
    fn new(index: usize) -> Self {
        Self {
            index,
            delta: Delta::default(),
            logprobs: None,
            finish_reason: None,
        }
    }
}

fn tool_call(call: Call) -> ToolCall {
    ToolCall {
        id: call.id,
        r#type: "function",
        function: FunctionCall {
            name: call.name,
            arguments: call.arguments,
        },
    }
}
