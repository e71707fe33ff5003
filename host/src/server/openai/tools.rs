//! Tools: which ones the model may call, and the calls in what it writes.
//!
//! Models are told of tools by their chat template, and write calls in the form it teaches them. One form
//! is known here, that of Qwen and Hermes: `<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>`.
//! Constrained decoding keeps every call to a tool that exists and to its parameters' schema.

use super::super::fields::{Fields, Kind};
use super::super::service::new_id;
use crate::engine::grammar::with_separators;
use crate::engine::{EngineHandle, Grammar};
use serde_json::{Value, json};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
const MAX_TOOLS: usize = 64;

/// Whether the model's template teaches the form that is known here.
pub(in super::super) fn are_supported(engine: &EngineHandle) -> bool {
    let template = engine.text().template();
    template.is_some_and(|t| t.contains("tools") && t.contains(OPEN))
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
        let found = "the model's chat template has no place for tools, or a form that is not known";
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

    /// What keeps the model to `choice`; `parallel` allows several calls in one answer.
    pub(super) fn grammar(&self, choice: &Choice, parallel: bool) -> Option<Grammar> {
        let named = |tool: &&Tool| match choice {
            Choice::Named(name) => tool.name == *name,
            _ => true,
        };
        let calls: Vec<Value> = self
            .0
            .iter()
            .filter(named)
            .map(|tool| {
                json!({ "type": "object", "required": ["name", "arguments"], "additionalProperties": false,
                    "properties": { "name": { "const": tool.name }, "arguments": tool.parameters } })
            })
            .collect();
        let schema = with_separators(&json!({ "anyOf": calls }));
        let call = format!("call: \"{OPEN}\" \"\\n\" %json {schema} \"\\n\" \"{CLOSE}\"\n");
        let more = if parallel && !matches!(choice, Choice::Named(_)) {
            "(\"\\n\" call)*"
        } else {
            ""
        };
        let start = match choice {
            Choice::None => return None,
            Choice::Auto => {
                // Text first, if any; once it opens a call, the call must be one.
                let call = call.replacen(&format!("call: \"{OPEN}\""), "call_rest:", 1);
                let more = more.replace("call", &format!("\"{OPEN}\" call_rest"));
                return Some(Grammar::Lark(format!(
                    "start: TEXT | opening call_rest {more}\n\
                     opening[lazy]: /(.|\\n)*<tool_call>/\n\
                     TEXT: /(.|\\n)*/ & ~/(.|\\n)*<tool_call>(.|\\n)*/\n{call}"
                )));
            }
            Choice::Required | Choice::Named(_) => format!("start: call {more}\n"),
        };
        Some(Grammar::Lark(format!("{start}{call}")))
    }
}

/// A call that the model made.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Call {
    pub id: String,
    pub name: String,
    /// JSON, as text.
    pub arguments: String,
}

/// What a piece of text brought.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Part {
    Content(String),
    Call(Call),
}

/// Finds calls in a text that comes in pieces.
#[derive(Debug, Default)]
pub(super) struct CallParser {
    held: String,
    in_call: bool,
    pub calls: usize,
}

impl CallParser {
    /// Takes a piece; what may yet become a tag is held back.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        loop {
            let tag = if self.in_call { CLOSE } else { OPEN };
            let Some(at) = self.held.find(tag) else { break };
            let before: String = self.held.drain(..at + tag.len()).collect();
            let before = &before[..at];
            if self.in_call {
                parts.push(self.call(before));
            } else {
                self.content(before, &mut parts);
            }
            self.in_call = !self.in_call;
        }
        if !self.in_call {
            let undecided = (1..OPEN.len())
                .rev()
                .find(|&n| self.held.ends_with(&OPEN[..n]))
                .unwrap_or(0);
            let sure = self.held.len() - undecided;
            let sure: String = self.held.drain(..sure).collect();
            self.content(&sure, &mut parts);
        }
        parts
    }

    /// The text has ended. A call that was not closed is one if it reads as one.
    pub fn finish(&mut self) -> Vec<Part> {
        let rest = std::mem::take(&mut self.held);
        if rest.is_empty() {
            return Vec::new();
        }
        if std::mem::take(&mut self.in_call) {
            return vec![self.call(&rest)];
        }
        vec![Part::Content(rest)]
    }

    /// White space between calls is none of the answer.
    fn content(&self, text: &str, parts: &mut Vec<Part>) {
        let between = self.calls > 0 && text.trim().is_empty();
        if !text.is_empty() && !between {
            parts.push(Part::Content(text.to_owned()));
        }
    }

    fn call(&mut self, text: &str) -> Part {
        let value: Value = serde_json::from_str(text.trim()).unwrap_or_default();
        match (value["name"].as_str(), &value["arguments"]) {
            (Some(name), arguments @ Value::Object(_)) => {
                self.calls += 1;
                Part::Call(Call {
                    id: format!("call_{}", new_id()),
                    name: name.to_owned(),
                    arguments: arguments.to_string(),
                })
            }
            // Cut off in the middle, mostly: better shown than lost.
            _ => Part::Content(format!("{OPEN}{text}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, size: usize) -> (String, Vec<(String, String)>) {
        let mut parser = CallParser::default();
        let chars: Vec<char> = text.chars().collect();
        let pieces = chars.chunks(size).map(|c| c.iter().collect::<String>());
        let mut parts: Vec<Part> = pieces.flat_map(|p| parser.push(&p)).collect();
        parts.extend(parser.finish());
        let mut content = String::new();
        let mut calls = Vec::new();
        for part in parts {
            match part {
                Part::Content(text) => content.push_str(&text),
                Part::Call(call) => calls.push((call.name, call.arguments)),
            }
        }
        (content, calls)
    }

    #[test]
    fn calls_are_found_however_the_text_is_cut() {
        let text = "Let me see: a < b <tool\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>\n\
                    <tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>";
        for size in 1..text.len() {
            let (content, calls) = parse(text, size);
            assert_eq!(content, "Let me see: a < b <tool\n", "{size}");
            assert_eq!(
                calls,
                [
                    ("f".to_owned(), "{\"x\":1}".to_owned()),
                    ("g".to_owned(), "{}".to_owned())
                ]
            );
        }
        assert_eq!(parse("no call <tool_cal", 3).0, "no call <tool_cal");
        assert_eq!(
            parse("<tool_call>\n{\"name\": \"f", 4).0,
            "<tool_call>\n{\"name\": \"f"
        );
    }

    fn tools() -> Tools {
        let f = json!({ "type": "function", "function": { "name": "f", "parameters": {
            "properties": { "x": { "type": "integer" } }, "required": ["x"], "additionalProperties": false } } });
        let g = json!({ "type": "function", "function": { "name": "g" } });
        Tools([f, g].iter().map(|t| tool(t).unwrap()).collect())
    }

    /// Whether an answer may be `text`.
    fn allows(choice: Choice, parallel: bool, text: &str) -> bool {
        use crate::engine::fake::{ByteText, EOS, VOCABULARY};
        let grammar = tools().grammar(&choice, parallel).unwrap();
        let grammars = crate::engine::Grammars::new(&ByteText, VOCABULARY).unwrap();
        let mut constraint = grammars.compile(&grammar).unwrap();
        for (i, byte) in text.bytes().enumerate() {
            let mut logits = vec![0.0; VOCABULARY];
            constraint.mask(&mut logits).unwrap();
            if logits[usize::from(byte)] < 0.0 {
                return false;
            }
            if constraint.take(u32::from(byte)).unwrap() {
                return i + 1 == text.len();
            }
        }
        let mut logits = vec![0.0; VOCABULARY];
        constraint.mask(&mut logits).unwrap();
        logits[EOS as usize] == 0.0
    }

    #[test]
    fn a_grammar_allows_calls_of_the_tools_only() {
        let f = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>";
        let g = "<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>";
        let wrong = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": true}}\n</tool_call>";
        let unknown = "<tool_call>\n{\"name\": \"h\", \"arguments\": {}}\n</tool_call>";
        for choice in [Choice::Required, Choice::Auto] {
            assert!(allows(choice.clone(), true, f));
            assert!(allows(choice.clone(), true, &format!("{f}\n{g}")));
            assert!(!allows(choice.clone(), false, &format!("{f}\n{g}")));
            assert!(!allows(choice.clone(), true, wrong));
            assert!(!allows(choice.clone(), true, unknown));
        }
        let named = Choice::Named("g".to_owned());
        assert!(allows(named.clone(), true, g) && !allows(named, true, f));
        assert!(!allows(Choice::Required, true, "hello"));
        assert!(allows(Choice::Auto, true, "hello <tool>"));
        assert!(allows(Choice::Auto, true, &format!("First this.\n{f}")));
        assert!(!allows(
            Choice::Auto,
            true,
            &format!("First this.\n{wrong}")
        ));
    }
}
