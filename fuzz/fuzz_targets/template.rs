//! Any text as a chat template: it renders or fails, within the limits on steps, depth, time and bytes
//! that the renderer sets itself; libFuzzer's own on time and memory are wider.

#![no_main]

use kigo::tokenizer::ChatTemplate;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use std::sync::LazyLock;

static CONVERSATIONS: LazyLock<[Value; 4]> = LazyLock::new(|| {
    [
        json!([{ "role": "user", "content": "hi" }]),
        json!([
            { "role": "system", "content": "be brief" },
            { "role": "user", "content": "a\n{{ b }} \u{1f600}" },
            { "role": "assistant", "content": "c" },
            { "role": "user", "content": [{ "type": "text", "text": "d" }] },
        ]),
        json!([
            { "role": "user", "content": "weather?" },
            { "role": "assistant", "content": null, "tool_calls": [
                { "id": "1", "type": "function",
                  "function": { "name": "f", "arguments": { "x": 1.5, "y": [true, null] } } },
            ] },
            { "role": "tool", "tool_call_id": "1", "content": "{\"t\": 3}" },
        ]),
        json!({ "not": ["a", "list"], "n": -1e300 }),
    ]
});

static TOOLS: LazyLock<Value> = LazyLock::new(|| {
    json!([{ "type": "function", "function": {
        "name": "f", "description": "<d>", "parameters": { "type": "object", "properties": {} },
    } }])
});

/// Bytes that a prompt may have, well above the renderer's own limit.
const MOST: usize = 64 << 20;

fuzz_target!(|data: &[u8]| {
    let Some((&flags, source)) = data.split_first() else {
        return;
    };
    let Ok(source) = std::str::from_utf8(source) else {
        return;
    };
    let template = ChatTemplate::new(source, "<s>", "</s>");
    let messages = &CONVERSATIONS[usize::from(flags & 3)];
    let tools = (flags & 4 != 0).then(|| &*TOOLS);
    match template.render(messages, tools, flags & 8 != 0) {
        Ok(prompt) => assert!(prompt.len() <= MOST),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
