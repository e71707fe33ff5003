//! The OpenAI API.

use super::*;
use crate::engine::Text;

#[tokio::test(flavor = "multi_thread")]
async fn embeddings_come_as_numbers_or_as_base64() {
    use base64::Engine as _;
    let worker = start(FakeRunner::hashing(64), 0, Config::default()).await;
    let ask = async |body: Value| {
        let (status, text) = worker
            .ask("POST", "/v1/embeddings", &body.to_string())
            .await;
        assert_eq!(status, 200, "{text}");
        serde_json::from_str::<Value>(&text).unwrap()
    };
    let floats = ask(json!({ "model": "fake", "input": ["ab", "c"] })).await;
    assert_eq!(floats["usage"]["prompt_tokens"], 3);
    assert_eq!(floats["data"][1]["index"], 1);
    let x = floats["data"][0]["embedding"][0].as_f64().unwrap();
    let expected = 195.0 / 195f64.hypot(1.0);
    assert!((x - expected).abs() < 1e-6, "{floats}");
    let coded =
        ask(json!({ "model": "fake", "input": [97, 98], "encoding_format": "base64" })).await;
    let text = coded["data"][0]["embedding"].as_str().unwrap();
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(text)
        .unwrap();
    assert_eq!(bytes.len(), 8);
    assert_eq!(f32::from_le_bytes(bytes[..4].try_into().unwrap()), x as f32);
    let (status, _) = worker
        .ask(
            "POST",
            "/v1/embeddings",
            "{\"model\": \"fake\", \"input\": []}",
        )
        .await;
    assert_eq!(status, 400);
}

/// A worker whose model answers with this text, in which names of control tokens stand for those, and whose
/// template has these words.
async fn saying(text: &str, template: &'static str, controls: bool) -> Worker {
    let text_side = ByteText { template, controls };
    let ids = text_side.tokenize(text, false, true).unwrap();
    let runner = FakeRunner::saying(512, 2, ids);
    start_speaking(runner, text_side).await
}

/// The finish reason, the text and the calls (id, name, arguments) of a chat.
type Said = (String, String, Vec<(String, String, Value)>);

fn calls(message: &Value) -> Vec<(String, String, Value)> {
    let calls = message["tool_calls"].as_array().into_iter().flatten();
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    calls
        .map(|c| {
            let function = &c["function"];
            let arguments = serde_json::from_str(function["arguments"].as_str().unwrap());
            (text(&c["id"]), text(&function["name"]), arguments.unwrap())
        })
        .collect()
}

async fn chat(worker: &Worker, mut body: Value) -> Said {
    let (status, text) = worker
        .ask("POST", "/v1/chat/completions", &body.to_string())
        .await;
    assert_eq!(status, 200, "{text}");
    let whole: Value = serde_json::from_str(&text).unwrap();
    let choice = &whole["choices"][0];
    let message = &choice["message"];
    let content = message["content"].as_str().unwrap_or_default().to_owned();
    let reason = choice["finish_reason"].as_str().unwrap().to_owned();
    let said = (reason, content, calls(message));
    // In pieces it is the same, but for the ids of calls.
    body["stream"] = json!(true);
    let (_, text) = worker
        .ask("POST", "/v1/chat/completions", &body.to_string())
        .await;
    let mut streamed: Said = Default::default();
    for data in text.lines().filter_map(|l| l.strip_prefix("data:")) {
        if data.trim() == "[DONE]" {
            break;
        }
        let chunk: Value = serde_json::from_str(data).unwrap();
        let choice = &chunk["choices"][0];
        streamed.1 += choice["delta"]["content"].as_str().unwrap_or_default();
        streamed.2.extend(calls(&choice["delta"]));
        if let Some(reason) = choice["finish_reason"].as_str() {
            streamed.0 = reason.to_owned();
        }
    }
    let without_ids = |said: &Said| {
        let calls: Vec<_> = said.2.iter().map(|c| (c.1.clone(), c.2.clone())).collect();
        (said.0.clone(), said.1.clone(), calls)
    };
    assert_eq!(without_ids(&said), without_ids(&streamed));
    said
}

fn with_tools(choice: &str) -> Value {
    let tool = |name: &str| {
        json!({ "type": "function", "function": { "name": name, "parameters": { "properties": { "x": { "type": "integer" } },
            "required": ["x"], "additionalProperties": false } } })
    };
    json!({ "model": "fake", "messages": [{ "role": "user", "content": "hi" }], "tools": [tool("f"), tool("g")],
        "tool_choice": choice, "temperature": 0 })
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_of_every_form_come_out_as_calls() {
    let cases = [
        (
            "tools <tool_call>",
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>\n\
                               <tool_call>\n{\"name\": \"g\", \"arguments\": {\"x\": 2}}\n</tool_call>",
        ),
        (
            "tools [TOOL_CALLS]",
            "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"x\": 1}}, {\"name\": \"g\", \"arguments\": {\"x\": 2}}]",
        ),
        (
            "tools [TOOL_CALLS] [CALL_ID] [ARGS]",
            "[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{\"x\": 1}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{\"x\": 2}",
        ),
        (
            "tools [TOOL_CALLS] [ARGS]",
            "[TOOL_CALLS]f[ARGS]{\"x\": 1}[TOOL_CALLS]g[ARGS]{\"x\": 2}",
        ),
        (
            "tools <|tool_call|>",
            "<|tool_call|>[{\"name\": \"f\", \"arguments\": {\"x\": 1}}, {\"name\": \"g\", \"arguments\": {\"x\": 2}}]",
        ),
        (
            "tools \"parameters\": dictionary of argument name",
            "{\"name\": \"f\", \"parameters\": {\"x\": 1}}",
        ),
    ];
    for (template, text) in cases {
        for controls in [false, true] {
            let worker = saying(text, template, controls).await;
            let (_, about) = worker.ask("GET", "/v1/worker", "").await;
            assert!(about.contains("\"tools\":true"), "{about}");
            for choice in ["required", "auto"] {
                let (reason, content, calls) = chat(&worker, with_tools(choice)).await;
                let context = format!("{template}, {choice}, {controls}");
                assert_eq!(
                    (reason.as_str(), content.as_str()),
                    ("tool_calls", ""),
                    "{context}"
                );
                let called: Vec<_> = calls.iter().map(|c| (c.1.as_str(), &c.2["x"])).collect();
                let (one, two) = (json!(1), json!(2));
                let both = [("f", &one), ("g", &two)];
                let expected = if text.contains("2") {
                    &both[..]
                } else {
                    &both[..1]
                };
                assert_eq!(called, expected, "{context}");
                assert_eq!(
                    calls[0].0.len(),
                    if template.contains("TOOL_CALLS") {
                        9
                    } else {
                        29
                    }
                );
            }
            // Without tools nothing of it is a call, and control tokens are no text.
            let mut plain = with_tools("none");
            plain["tool_choice"] = Value::Null;
            plain["tools"] = Value::Null;
            let (reason, content, calls) = chat(&worker, plain).await;
            assert_eq!((reason.as_str(), calls.len()), ("stop", 0));
            let expected = if controls {
                [
                    "[TOOL_CALLS]",
                    "[CALL_ID]",
                    "[ARGS]",
                    "<|tool_call|>",
                    "<tool_call>",
                    "</tool_call>",
                ]
                .iter()
                .fold(text.to_owned(), |text, name| text.replace(name, ""))
            } else {
                text.to_owned()
            };
            assert_eq!(content, expected);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tools_of_a_form_that_is_not_known_are_an_error() {
    for template in [
        "{{ messages }}",
        "tools <tool_call> <function=",
        "tools Action:",
    ] {
        let worker = saying("x", template, false).await;
        let (status, text) = worker
            .ask(
                "POST",
                "/v1/chat/completions",
                &with_tools("auto").to_string(),
            )
            .await;
        let error: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (status, &error["error"]["param"]),
            (400, &json!("tools")),
            "{text}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_tells_of_cached_tokens() {
    let worker = start(FakeRunner::hashing(1024), 0, Config::default()).await;
    let prompt = "abcdefgh".repeat(40);
    let body = json!({ "model": "fake", "prompt": prompt, "max_tokens": 5, "temperature": 0 });
    let chat = json!({ "model": "fake", "messages": [{ "role": "user", "content": prompt }], "max_tokens": 5,
        "temperature": 0 });
    let mut texts = Vec::new();
    for (path, body, cached) in [
        ("/v1/completions", &body, 0),
        ("/v1/completions", &body, 256),
        ("/v1/chat/completions", &chat, 256),
    ] {
        let (status, text) = worker.ask("POST", path, &body.to_string()).await;
        assert_eq!(status, 200, "{text}");
        let answer: Value = serde_json::from_str(&text).unwrap();
        let usage = &answer["usage"];
        assert_eq!(usage["prompt_tokens"], 320);
        assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], cached);
        let choice = &answer["choices"][0];
        let said = choice.get("text").unwrap_or(&choice["message"]["content"]);
        texts.push(said.clone());
    }
    assert_eq!(texts[0], texts[1]);
    assert_eq!(texts[0], texts[2]);
    let native = json!({ "job_id": "a", "prompt": prompt, "max_tokens": 5, "temperature": 0 });
    let events = all_events(worker.execute(&native).await, &worker.steps).await;
    assert_eq!(events.last().unwrap().data["cached_tokens"], 256);
    let (_, metrics) = worker.ask("GET", "/metrics", "").await;
    assert!(
        metrics.contains("\ntokens_in_cached_total 768\n"),
        "{metrics}"
    );
    worker.idle().await;
}
