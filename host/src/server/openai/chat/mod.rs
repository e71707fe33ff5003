//! `/v1/chat/completions`.

use super::super::State;
use super::super::execute::encode;
use super::super::fields::{Body, Field, Fields, Kind};
use super::super::generation::max_tokens;
use super::super::routes::blocking;
use super::tools::{Choice, Form};
use super::*;
use crate::engine::Grammar;
use std::sync::Arc;

mod choices;

pub(in super::super) use choices::{Chunk, Completion};

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
    fields.extend(shared_fields(engine, config));
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
    /// How the model writes calls, where it may make some.
    form: Option<&'static Form>,
}

fn parse(bytes: &[u8], state: &State) -> Result<Chat, Response> {
    let engine = state.engine().map_err(|failure| failed(&failure, None))?;
    let config = &state.config;
    let mut fields = read_body(&body(engine, config), bytes)?;
    check_model(&mut fields, state, engine)?;
    let shared = read_shared(&mut fields, engine);
    let tools = tools::read(&mut fields, engine);
    let choice = tools::read_choice(&mut fields, tools.as_ref());
    let parallel = !fields.has("parallel_tool_calls") || fields.bool("parallel_tool_calls");
    let tools = tools.filter(|_| choice != Choice::None);
    let form = tools.as_ref().and_then(|_| tools::form(engine));
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
        (Some(tools), None) => form
            .and_then(|form| form.grammar(tools, &choice, parallel, engine.text()))
            .map(|g| ("tools", g)),
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
        form,
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
    let controls = chat.form.map(|form| form.control_tokens(engine.text()));
    let asked = Asked {
        prompts: vec![chat.prompt],
        max_tokens: chat.max_tokens,
        constraint: chat.constraint,
        logprobs: chat.logprobs,
        visible: controls.unwrap_or_default(),
        deadline,
    };
    let choices = choices::ChatChoices::new(&engine, chat.shared.n, chat.form);
    answers::respond(choices, asked, chat.shared, &state).await
}
