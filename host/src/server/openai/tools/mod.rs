//! Tools: which ones the model may call.
//!
//! Models are told of tools by their chat template, and write calls in the [`form`] it teaches them.
//! Constrained decoding keeps every call to a tool that exists and to its parameters' schema; [`parser`]
//! finds the calls in what comes.

mod form;
mod parser;

pub(super) use form::Form;
pub(super) use parser::{Call, CallParser, Part};

use super::super::fields::{Fields, Kind};
use crate::engine::EngineHandle;
use serde_json::{Value, json};

const MAX_TOOLS: usize = 64;

/// How the model writes calls, where its template teaches a form that is known here.
pub(super) fn form(engine: &EngineHandle) -> Option<&'static Form> {
    Form::of(engine.text().template()?)
}

pub(in super::super) fn are_supported(engine: &EngineHandle) -> bool {
    form(engine).is_some()
}

pub(in super::super) fn kind() -> Kind {
    Kind::Own {
        constraint: "an array of up to 64 {\"type\": \"function\", \"function\": {\"name\", \"description\"?, \"parameters\"?}}",
        schema: json!({ "type": "array", "minItems": 1, "maxItems": MAX_TOOLS, "items": {
            "type": "object", "required": ["type", "function"], "additionalProperties": false, "properties": {
                "type": { "const": "function" },
                "function": { "type": "object", "required": ["name"], "additionalProperties": false, "properties": {
                    "name": { "type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$" },
                    "description": { "type": ["string", "null"] },
                    "parameters": { "type": ["object", "null"], "description": "A JSON schema of an object" },
                    "strict": { "type": ["boolean", "null"] } } } } } }),
    }
}

pub(super) fn choice_kind() -> Kind {
    let named = json!({ "type": "object", "required": ["type", "function"], "additionalProperties": false, "properties": {
        "type": { "const": "function" },
        "function": { "type": "object", "required": ["name"], "additionalProperties": false,
            "properties": { "name": { "type": "string" } } } } });
    Kind::Own {
        constraint: "none, auto, required, or {\"type\": \"function\", \"function\": {\"name\"}} of a tool",
        schema: json!({ "anyOf": [{ "enum": ["none", "auto", "required"] }, named] }),
    }
}

/// The tools of a request.
#[derive(Clone, Debug)]
pub(in super::super) struct Tools(Vec<Tool>);

#[derive(Clone, Debug)]
struct Tool {
    name: String,
    /// As the client wrote it, for the template.
    value: Value,
    parameters: Value,
}

/// Which tools the model may or must call.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Choice {
    None,
    Auto,
    Required,
    Named(String),
}

/// Reads `tools`; what is wrong with them is added to `fields`.
pub(in super::super) fn read(fields: &mut Fields, engine: &EngineHandle) -> Option<Tools> {
    let value = fields.take("tools")?;
    let Kind::Own { constraint, .. } = kind() else {
        return None;
    };
    if !are_supported(engine) {
        let found = "the model's chat template has no place for tools, or teaches a form of calls that is not known here";
        fields.add("tools", constraint, found, Value::Null);
        return None;
    }
    let list = value
        .as_array()
        .filter(|list| (1..=MAX_TOOLS).contains(&list.len()));
    let tools: Option<Vec<Tool>> = list.and_then(|list| list.iter().map(tool).collect());
    let distinct = |tools: &[Tool]| {
        let mut names = std::collections::HashSet::new();
        tools.iter().all(|t| names.insert(t.name.clone()))
    };
    match tools {
        Some(tools) if distinct(&tools) => Some(Tools(tools)),
        _ => {
            fields.add("tools", constraint, "it is something else", Value::Null);
            None
        }
    }
}

fn tool(value: &Value) -> Option<Tool> {
    let function = &value["function"];
    let name = function["name"].as_str()?;
    let known = ["name", "description", "parameters", "strict"];
    let fits = value["type"] == "function"
        && (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
        && function
            .as_object()?
            .keys()
            .all(|k| known.contains(&k.as_str()));
    let is_text = |v: &Value| v.is_string() || v.is_null();
    let is_flag = |v: &Value| v.is_boolean() || v.is_null();
    let fits = fits
        && value.as_object()?.len() == 2
        && is_text(&function["description"])
        && is_flag(&function["strict"]);
    let parameters = match &function["parameters"] {
        Value::Null => json!({ "type": "object", "properties": {}, "additionalProperties": false }),
        Value::Object(map) => {
            let mut map = map.clone();
            map.entry("type").or_insert(json!("object"));
            Value::Object(map)
        }
        _ => return None,
    };
    fits.then(|| Tool {
        name: name.to_owned(),
        value: value.clone(),
        parameters,
    })
}

/// Reads `tool_choice`: auto where there are tools and nothing is said.
pub(super) fn read_choice(fields: &mut Fields, tools: Option<&Tools>) -> Choice {
    let value = fields.take("tool_choice");
    let choice = match &value {
        None if tools.is_some() => return Choice::Auto,
        None => return Choice::None,
        Some(Value::String(name)) => match name.as_str() {
            "none" => Some(Choice::None),
            "auto" => Some(Choice::Auto),
            "required" => Some(Choice::Required),
            _ => None,
        },
        Some(value) => {
            let name = value["function"]["name"].as_str();
            name.filter(|n| tools.is_some_and(|t| t.0.iter().any(|t| t.name == *n)))
                .map(|n| Choice::Named(n.to_owned()))
        }
    };
    match (choice, tools) {
        (Some(Choice::None), None) => Choice::None,
        (Some(choice), Some(_)) => choice,
        (Some(_), None) => {
            fields.add(
                "tool_choice",
                "tools to choose from",
                "there are no tools",
                Value::Null,
            );
            Choice::None
        }
        (None, _) => {
            if let Kind::Own { constraint, .. } = choice_kind() {
                fields.add(
                    "tool_choice",
                    constraint,
                    "it is something else",
                    Value::Null,
                );
            }
            Choice::None
        }
    }
}

impl Tools {
    /// As the template is to see them.
    pub(in super::super) fn for_template(&self) -> Value {
        Value::Array(self.0.iter().map(|t| t.value.clone()).collect())
    }

    /// Those that `choice` leaves.
    fn left_by<'a>(&'a self, choice: &'a Choice) -> impl Iterator<Item = &'a Tool> {
        self.0.iter().filter(move |tool| match choice {
            Choice::None => false,
            Choice::Auto | Choice::Required => true,
            Choice::Named(name) => tool.name == *name,
        })
    }
}
