//! `/v1/chat/completions`.

use super::super::execute::encode;
use super::super::fields::{Body, Field, Fields, Kind};
use super::super::generation::max_tokens;
use super::super::routes::{blocking, with_status};
use super::super::{Config, State};
use super::tools::{Call, CallParser, Choice, Part};
use super::*;
use crate::engine::{Grammar, LogProbs};
use std::collections::VecDeque;
use std::sync::Arc;
use warp::http::StatusCode;

pub(in super::super) fn body(engine: &EngineHandle, config: &Config) -> Body {
    let most = config.max_tokens_out.unwrap_or(usize::MAX);
    let most = most.min(engine.context().saturating_sub(1)).max(1) as u64;
    let tokens = Kind::Integer { min: 1, max: most };
    let formats = json!({ "anyOf": [
        { "type": "object", "required": ["type"], "additionalProperties": false,
            "properties": { "type": { "enum": ["text", "json_object"] } } },
        { "type": "object", "required": ["type", "json_schema"], "additionalProperties": false, "properties": {
            "type": { "const": "json_schema" },
            "json_schema": { "type": "object", "required": ["name", "schema"], "additionalProperties": false, "properties": {
                "name": { "type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$" },
                "description": { "type": "string" },
                "schema": { "type": "object", "description": "A JSON schema" },
                "strict": { "type": ["boolean", "null"] } } } } },
    ] });
    let mut fields = vec![
        Field::new("messages", messages::kind(), "The chat").required(),
        Field::new(
            "max_completion_tokens",
            tokens.clone(),
            "Tokens to generate at most; what the prompt leaves of the context when absent",
        ),
        Field::new(
            "max_tokens",
            tokens,
            "The older name of `max_completion_tokens`",
        ),
        Field::new(
            "logprobs",
            Kind::Bool,
            "Report the log-probability of each token",
        ),
        Field::new(
            "top_logprobs",
            Kind::Integer { min: 0, max: 20 },
            "And those of so many of the likeliest; with `logprobs` only",
        ),
        Field::new(
            "response_format",
            Kind::Own {
                constraint: "{\"type\": \"text\" | \"json_object\"} or {\"type\": \"json_schema\", \"json_schema\": {\"name\", \"schema\"}}",
                schema: formats,
            },
            "What the answer must be",
        ),
        Field::new("tools", tools::kind(), "Functions the model may call"),
        Field::new(
            "tool_choice",
            tools::choice_kind(),
            "Whether and which tool to call",
        ),
        Field::new(
            "parallel_tool_calls",
            Kind::Bool,
            "Several calls in one answer; true when absent",
        ),
    ];
    fields.extend(shared_fields(engine));
    let mut rules = shared_rules();
    rules.push(needs("top_logprobs", "logprobs"));
    Body {
        fields,
        rules: all_of(rules),
    }
}

/// What a body asks for.
struct Chat {
    shared: Shared,
    prompt: Vec<u32>,
    max_tokens: usize,
    logprobs: Option<usize>,
    constraint: Option<Constraint>,
    with_tools: bool,
}

fn parse(bytes: &[u8], state: &State) -> Result<Chat, Response> {
    let engine = state.engine().map_err(|failure| failed(&failure, None))?;
    let config = &state.config;
    let mut fields = read_body(&body(engine, config), bytes)?;
    check_model(&fields, state, engine)?;
    let shared = read_shared(&mut fields, engine);
    let tools = tools::read(&mut fields, engine);
    let choice = tools::read_choice(&mut fields, tools.as_ref());
    let parallel = !fields.has("parallel_tool_calls") || fields.bool("parallel_tool_calls");
    let tools = tools.filter(|_| choice != Choice::None);
    let format = response_format(&mut fields);
    let grammar = match (&tools, format) {
        (Some(_), Some(_)) => {
            let constraint = "no tools beside it, or tool_choice none";
            fields.add(
                "response_format",
                constraint,
                "there are tools",
                Value::Null,
            );
            None
        }
        (Some(tools), None) => tools.grammar(&choice, parallel).map(|g| ("tools", g)),
        (None, format) => format.map(|g| ("response_format", g)),
    };
    let logprobs = fields
        .bool("logprobs")
        .then(|| fields.u64("top_logprobs").unwrap_or(0) as usize);
    if logprobs.is_none() && fields.has("top_logprobs") {
        let constraint = "logprobs to be true as well";
        fields.add(
            "top_logprobs",
            constraint,
            "logprobs is not true",
            Value::Null,
        );
    }
    let prompt = prompt(&mut fields, tools.as_ref(), engine, config);
    let name = if fields.has("max_completion_tokens") {
        "max_completion_tokens"
    } else {
        "max_tokens"
    };
    let tokens = prompt.as_ref().map_or(1, Vec::len);
    let max_tokens = max_tokens(&mut fields, name, tokens, engine, config.max_tokens_out);
    let mut constraint = None;
    if let Some((field, grammar)) = grammar.filter(|_| fields.violations.is_empty()) {
        match engine.compile(&grammar) {
            Ok(compiled) => constraint = Some(compiled),
            Err(why) => {
                let why: String = why.chars().take(300).collect();
                fields.add(
                    field,
                    "a schema that decoding can be held to",
                    &why,
                    Value::Null,
                );
            }
        }
    }
    if !fields.violations.is_empty() {
        return Err(invalid(&fields.violations));
    }
    Ok(Chat {
        shared,
        prompt: prompt.unwrap_or_default(),
        max_tokens,
        logprobs,
        constraint,
        with_tools: tools.is_some(),
    })
}

fn prompt(
    fields: &mut Fields,
    tools: Option<&tools::Tools>,
    engine: &EngineHandle,
    config: &Config,
) -> Option<Vec<u32>> {
    let given = fields.take("messages")?;
    let before = fields.violations.len();
    let messages = messages::for_template(fields, &given);
    if fields.violations.len() > before {
        return None;
    }
    let tools = tools.map(|t| t.for_template());
    match engine.text().render_with(&messages, tools.as_ref(), true) {
        Ok(text) => encode(fields, "messages", &text, engine, config),
        Err(_) => {
            let constraint = "messages the model's chat template takes";
            let found = if engine.text().template().is_none() {
                "the model's file has no chat template; use /v1/completions"
            } else {
                "the template refuses them"
            };
            fields.add("messages", constraint, found, Value::Null);
            None
        }
    }
}

fn response_format(fields: &mut Fields) -> Option<Grammar> {
    let format = fields.take("response_format")?;
    let only = |value: &Value, known: &[&str]| {
        let map = value.as_object();
        map.is_some_and(|map| map.keys().all(|k| known.contains(&k.as_str())))
    };
    let schema = &format["json_schema"];
    match format["type"].as_str() {
        Some("text") if only(&format, &["type"]) => None,
        Some("json_object") if only(&format, &["type"]) => {
            Some(Grammar::JsonSchema(json!({ "type": "object" })))
        }
        Some("json_schema")
            if only(&format, &["type", "json_schema"])
                && only(schema, &["name", "description", "schema", "strict"])
                && schema["name"].is_string()
                && schema["schema"].is_object() =>
        {
            Some(Grammar::JsonSchema(schema["schema"].clone()))
        }
        _ => {
            let constraint = "{\"type\": \"text\" | \"json_object\"} or {\"type\": \"json_schema\", \"json_schema\": {\"name\", \"schema\"}}";
            fields.add(
                "response_format",
                constraint,
                "it is something else",
                Value::Null,
            );
            None
        }
    }
}

/// The answer as a whole.
#[derive(Debug, Serialize, JsonSchema)]
pub(in super::super) struct Completion {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: String,
    choices: Vec<FullChoice>,
    usage: Usage,
}

#[derive(Debug, Serialize, JsonSchema)]
struct FullChoice {
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
#[derive(Debug, Serialize, JsonSchema)]
pub(in super::super) struct Chunk {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: String,
    choices: Vec<ChunkChoice>,
    /// In the last chunk only, where `stream_options.include_usage` asks for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct ChunkChoice {
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

/// One answer as it grows.
struct Growing {
    /// Where the model may call tools.
    parser: Option<CallParser>,
    calls: usize,
}

/// What an event adds to an answer.
#[derive(Default)]
struct Added {
    content: String,
    calls: Vec<Call>,
    logprob: Option<TokenLogprob>,
    finish: Option<&'static str>,
}

impl Growing {
    fn new(with_tools: bool) -> Self {
        Self {
            parser: with_tools.then(CallParser::default),
            calls: 0,
        }
    }

    fn take(&mut self, engine: &EngineHandle, event: Event) -> Result<Added, Failure> {
        let mut added = Added::default();
        let parts = match event {
            Event::Started | Event::Embedding(_) => return Ok(added),
            Event::Token {
                id, text, logprobs, ..
            } => {
                added.logprob = logprobs.map(|l| logprob(engine, id, &l));
                match &mut self.parser {
                    Some(parser) => parser.push(&text),
                    None => vec![Part::Content(text)],
                }
            }
            Event::End(end) => {
                added.finish = Some(finish_reason(&end)?);
                self.parser
                    .as_mut()
                    .map(CallParser::finish)
                    .unwrap_or_default()
            }
            Event::Error(failure) => return Err(failure),
        };
        for part in parts {
            match part {
                Part::Content(text) => added.content.push_str(&text),
                Part::Call(call) => added.calls.push(call),
            }
        }
        self.calls += added.calls.len();
        if self.calls > 0 && added.finish == Some("stop") {
            added.finish = Some("tool_calls");
        }
        Ok(added)
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

pub(in super::super) async fn respond(
    bytes: bytes::Bytes,
    deadline: Option<Instant>,
    state: Arc<State>,
) -> Response {
    let chat = match blocking(state.clone(), move |state| parse(&bytes, state)).await {
        Ok(chat) => chat,
        Err(response) => return response,
    };
    let engine = match state.engine() {
        Ok(engine) => engine.clone(),
        Err(failure) => return failed(&failure, None),
    };
    let id = new_completion_id("chatcmpl");
    let requests = (0..chat.shared.n).map(|index| {
        let answer = Answer {
            id: &id,
            prompt: &chat.prompt,
            max_tokens: chat.max_tokens,
            generation: &chat.shared.generation,
            constraint: chat.constraint.as_ref(),
            logprobs: chat.logprobs,
            deadline,
            index,
        };
        answer.request()
    });
    let jobs = match submit_all(&engine, requests.collect()) {
        Ok(jobs) => jobs,
        Err(failure) => return failed(&failure, None),
    };
    let head = Head {
        id,
        created: unix_time(),
        model: super::super::info::model_id(&engine, &state.config),
    };
    let answers = (0..jobs.len())
        .map(|_| Growing::new(chat.with_tools))
        .collect();
    if chat.shared.stream {
        let stream = ChatStream {
            events: merged(jobs),
            engine,
            head,
            left: chat.shared.n,
            answers,
            with_logprobs: chat.logprobs.is_some(),
            usage: chat.shared.include_usage.then(Usage::default),
            ready: VecDeque::new(),
            ended: false,
        };
        return event_stream(stream.chunks());
    }
    match whole(
        &engine,
        head,
        merged(jobs),
        answers,
        chat.logprobs.is_some(),
    )
    .await
    {
        Ok(completion) => with_status(StatusCode::OK, &json!(completion)),
        Err(failure) => failed(&failure, None),
    }
}

/// What all pieces of an answer have in common.
struct Head {
    id: String,
    created: u64,
    model: String,
}

async fn whole(
    engine: &EngineHandle,
    head: Head,
    mut events: Events,
    mut answers: Vec<Growing>,
    with_logprobs: bool,
) -> Result<Completion, Failure> {
    let mut usage = Usage::default();
    let mut choices: Vec<FullChoice> = (0..answers.len())
        .map(|index| FullChoice {
            index,
            message: Message {
                role: "assistant",
                content: Some(String::new()),
                refusal: None,
                tool_calls: Vec::new(),
            },
            logprobs: with_logprobs.then(TokenLogprobs::default),
            finish_reason: "",
        })
        .collect();
    while let Some((i, event)) = events.next().await {
        if let Event::End(end) = &event {
            usage.add(end, i == 0);
        }
        let added = answers[i].take(engine, event)?;
        let choice = &mut choices[i];
        if let Some(content) = &mut choice.message.content {
            content.push_str(&added.content);
        }
        let calls = added.calls.into_iter().map(tool_call);
        choice.message.tool_calls.extend(calls);
        if let (Some(all), Some(one)) = (&mut choice.logprobs, added.logprob) {
            all.content.push(one);
        }
        if let Some(reason) = added.finish {
            choice.finish_reason = reason;
        }
    }
    for choice in &mut choices {
        if choice.finish_reason.is_empty() {
            let what = "the engine's thread ended before the answer did";
            return Err(Failure::new(Code::Internal, what));
        }
        let message = &mut choice.message;
        if !message.tool_calls.is_empty() && message.content.as_deref() == Some("") {
            message.content = None;
        }
    }
    Ok(Completion {
        id: head.id,
        object: "chat.completion",
        created: head.created,
        model: head.model,
        system_fingerprint: fingerprint(),
        choices,
        usage,
    })
}

struct ChatStream {
    events: Events,
    engine: EngineHandle,
    head: Head,
    /// Answers that have not ended.
    left: usize,
    answers: Vec<Growing>,
    with_logprobs: bool,
    /// Counted where it is asked for.
    usage: Option<Usage>,
    ready: VecDeque<Value>,
    ended: bool,
}

impl ChatStream {
    fn chunks(mut self) -> impl Stream<Item = Value> + Send + Sync {
        for index in 0..self.answers.len() {
            let delta = Delta {
                role: Some("assistant"),
                content: Some(String::new()),
                ..Delta::default()
            };
            let chunk = self.chunk(index, delta, None, None);
            self.ready.push_back(chunk);
        }
        stream::unfold(self, |mut stream| async move {
            let chunk = stream.next().await?;
            Some((chunk, stream))
        })
    }

    fn envelope(&self, choices: Vec<ChunkChoice>, usage: Option<Option<Usage>>) -> Value {
        json!(Chunk {
            id: self.head.id.clone(),
            object: "chat.completion.chunk",
            created: self.head.created,
            model: self.head.model.clone(),
            system_fingerprint: fingerprint(),
            choices,
            usage,
        })
    }

    fn chunk(
        &self,
        index: usize,
        delta: Delta,
        logprob: Option<TokenLogprob>,
        finish_reason: Option<&'static str>,
    ) -> Value {
        let logprobs = logprob
            .filter(|_| self.with_logprobs)
            .map(|one| TokenLogprobs { content: vec![one] });
        let choice = ChunkChoice {
            index,
            delta,
            logprobs,
            finish_reason,
        };
        self.envelope(vec![choice], self.usage.map(|_| None))
    }

    async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(chunk) = self.ready.pop_front() {
                return Some(chunk);
            }
            if self.ended {
                return None;
            }
            match self.events.next().await {
                Some((i, event)) => self.take(i, event),
                None => {
                    self.ended = true;
                    let what = "the engine's thread ended before the answer did";
                    let failure = Failure::new(Code::Internal, what);
                    self.ready.push_back(stream_error(&failure));
                }
            }
        }
    }

    fn take(&mut self, i: usize, event: Event) {
        if let (Event::End(end), Some(usage)) = (&event, &mut self.usage) {
            usage.add(end, i == 0);
        }
        let added = match self.answers[i].take(&self.engine, event) {
            Ok(added) => added,
            Err(failure) => {
                self.ended = true;
                self.ready.push_back(stream_error(&failure));
                return;
            }
        };
        if !added.content.is_empty() || added.logprob.is_some() {
            let delta = Delta {
                content: Some(added.content),
                ..Delta::default()
            };
            let chunk = self.chunk(i, delta, added.logprob, None);
            self.ready.push_back(chunk);
        }
        let first = self.answers[i].calls - added.calls.len();
        for (n, call) in added.calls.into_iter().enumerate() {
            let call = DeltaCall {
                index: first + n,
                call: tool_call(call),
            };
            let delta = Delta {
                tool_calls: vec![call],
                ..Delta::default()
            };
            let chunk = self.chunk(i, delta, None, None);
            self.ready.push_back(chunk);
        }
        if let Some(reason) = added.finish {
            let chunk = self.chunk(i, Delta::default(), None, Some(reason));
            self.ready.push_back(chunk);
            self.left -= 1;
        }
        if self.left == 0 {
            self.ended = true;
            if let Some(usage) = self.usage {
                let chunk = self.envelope(Vec::new(), Some(Some(usage)));
                self.ready.push_back(chunk);
            }
            self.ready.push_back(done());
        }
    }
}
