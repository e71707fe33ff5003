//! Messages as this API writes them, and as chat templates read them.

use super::super::fields::{Fields, Kind};
use serde_json::{Map, Value, json};

pub(in super::super) fn kind() -> Kind {
    let text = json!({ "type": "string" });
    let part = json!({ "type": "object", "required": ["type", "text"], "additionalProperties": false,
        "properties": { "type": { "const": "text" }, "text": text } });
    let content = json!({ "anyOf": [text, { "type": "array", "minItems": 1, "items": part }] });
    let call = json!({ "type": "object", "required": ["id", "type", "function"], "additionalProperties": false,
        "properties": { "id": text, "type": { "const": "function" },
            "function": { "type": "object", "required": ["name", "arguments"], "additionalProperties": false,
                "properties": { "name": text,
                    "arguments": { "type": "string", "description": "A JSON object", "contentMediaType": "application/json" } } } } });
    let optional = json!({ "type": ["string", "null"] });
    let message = |roles: &[&str], required: &[&str], content: &Value, extra: Value| {
        let mut properties =
            json!({ "role": { "enum": roles }, "content": content, "name": optional });
        if let (Some(properties), Some(extra)) = (properties.as_object_mut(), extra.as_object()) {
            properties.extend(extra.clone());
        }
        json!({ "type": "object", "required": required, "additionalProperties": false, "properties": properties })
    };
    let calls = json!({ "type": "array", "minItems": 1, "items": call });
    let none = json!({ "type": "null" });
    let perhaps = |schema: &Value| json!({ "anyOf": [schema, none] });
    let plain = message(
        &["system", "developer", "user"],
        &["role", "content"],
        &content,
        json!({}),
    );
    let said = message(
        &["assistant"],
        &["role", "content"],
        &content,
        json!({ "tool_calls": perhaps(&calls), "refusal": optional }),
    );
    let called = message(
        &["assistant"],
        &["role", "tool_calls"],
        &none,
        json!({ "tool_calls": calls, "refusal": optional }),
    );
    let result = message(
        &["tool"],
        &["role", "content", "tool_call_id"],
        &content,
        json!({ "tool_call_id": text }),
    );
    Kind::Own {
        constraint: "a non-empty array of messages with a role and text",
        schema: json!({ "type": "array", "minItems": 1, "items": { "anyOf": [plain, said, called, result] } }),
    }
}

/// The messages as a template expects them: contents as text, arguments of calls as objects. What is
/// wrong with them is added to `fields`, without any of their text.
pub(in super::super) fn for_template(fields: &mut Fields, messages: &Value) -> Value {
    let mut add = |found: String| {
        let constraint = "a non-empty array of messages with a role and text";
        fields.add("messages", constraint, &found, Value::Null);
        Value::Null
    };
    let Some(list) = messages.as_array() else {
        return add("it is no array".to_owned());
    };
    if list.is_empty() {
        return add("it is empty".to_owned());
    }
    let mut out = Vec::with_capacity(list.len());
    for (i, message) in list.iter().enumerate() {
        match convert(message) {
            Ok(message) => out.push(message),
            Err(what) => return add(format!("message {i} {what}")),
        }
    }
    Value::Array(out)
}

fn convert(message: &Value) -> Result<Value, &'static str> {
    let message = message.as_object().ok_or("is no object")?;
    let role = message
        .get("role")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let own: &[&str] = match role {
        "system" | "developer" | "user" => &[],
        "assistant" => &["tool_calls", "refusal"],
        "tool" => &["tool_call_id"],
        _ => return Err("has no role out of system, developer, user, assistant, tool"),
    };
    let known = |key: &String| {
        ["role", "content", "name"].contains(&key.as_str()) || own.contains(&key.as_str())
    };
    if !message.keys().all(known) {
        return Err("has a field that is not supported for its role");
    }
    if message
        .get("refusal")
        .is_some_and(|r| !r.is_string() && !r.is_null())
    {
        return Err("has a refusal that is no text");
    }
    let mut out = Map::new();
    // Templates know the older name.
    let name = if role == "developer" { "system" } else { role };
    out.insert("role".to_owned(), json!(name));
    let calls = message.get("tool_calls").filter(|c| !c.is_null());
    let content = match message.get("content") {
        None | Some(Value::Null) if role == "assistant" && calls.is_some() => String::new(),
        Some(content) => text(content)?,
        None => return Err("has no content"),
    };
    out.insert("content".to_owned(), json!(content));
    if let Some(calls) = calls {
        let calls = calls.as_array().filter(|c| !c.is_empty());
        let calls: Result<Vec<Value>, _> = calls
            .ok_or("has tool_calls that are no array, or empty")?
            .iter()
            .map(call)
            .collect();
        out.insert("tool_calls".to_owned(), json!(calls?));
    }
    if role == "tool" {
        let id = message.get("tool_call_id").and_then(Value::as_str);
        out.insert(
            "tool_call_id".to_owned(),
            json!(id.ok_or("has no tool_call_id")?),
        );
    }
    if let Some(name) = message.get("name").filter(|n| !n.is_null()) {
        let name = name.as_str().ok_or("has a name that is no string")?;
        out.insert("name".to_owned(), json!(name));
    }
    Ok(Value::Object(out))
}

/// Text, or parts of text put together.
fn text(content: &Value) -> Result<String, &'static str> {
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) if !parts.is_empty() => parts
            .iter()
            .map(
                |part| match (part["type"].as_str(), part["text"].as_str()) {
                    (Some("text"), Some(text))
                        if part.as_object().is_some_and(|p| p.len() == 2) =>
                    {
                        Ok(text)
                    }
                    _ => Err("has a part that is no text"),
                },
            )
            .collect(),
        _ => Err("has a content that is neither text nor parts of text"),
    }
}

fn call(call: &Value) -> Result<Value, &'static str> {
    let what = "has a tool call that is not of the form {id, type, function: {name, arguments}}";
    let function = &call["function"];
    let (Some(id), Some(name), Some(arguments)) = (
        call["id"].as_str(),
        function["name"].as_str(),
        function["arguments"].as_str(),
    ) else {
        return Err(what);
    };
    let arguments: Value = serde_json::from_str(arguments)
        .ok()
        .filter(Value::is_object)
        .ok_or("has a tool call whose arguments are no JSON object")?;
    Ok(
        json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } }),
    )
}
