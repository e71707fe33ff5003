//! Requests that are refused for what they say.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn every_violation_is_named_and_no_prompt_is_echoed() {
    let worker = start(
        FakeRunner::hashing(64),
        0,
        Config {
            max_tokens_out: Some(20),
            ..Config::default()
        },
    )
    .await;
    let body = json!({
        "job_id": "", "prompt": 7, "max_tokens": 0, "temperature": 2.5, "top_p": -1, "top_k": 9999,
        "min_p": "secret", "repetition_penalty": 0, "stop": ["a", "b", "c", "d", "secret"],
        "seed": -1, "top_logits": 1000, "colour": "secret", "presence_penalty": 3, "frequency_penalty": "secret",
        "logit_bias": { "secret": 1 }, "samplers": ["secret"], "typical_p": 0, "top_n_sigma": -1,
        "xtc_probability": 2, "xtc_threshold": 2, "dry_multiplier": -1, "dry_base": 0, "dry_allowed_length": -1,
        "dry_penalty_last_n": 0.5, "dry_sequence_breakers": "secret", "dynatemp_range": -1, "dynatemp_exponent": 0,
        "mirostat": 3, "mirostat_tau": -1, "mirostat_eta": -1, "timeout_ms": 0, "metrics_interval_ms": 1,
    });
    let (status, text) = worker.ask("POST", "/execute", &body.to_string()).await;
    assert_eq!(status, 400);
    assert!(!text.contains("secret"), "{text}");
    let errors: Value = serde_json::from_str(&text).unwrap();
    let errors = errors["errors"].as_array().unwrap();
    let mut fields: Vec<&str> = errors
        .iter()
        .map(|e| e["field"].as_str().unwrap())
        .collect();
    fields.sort_unstable();
    let shape = crate::server::execute::body(&worker.engine, &Config::default());
    let mut expected: Vec<&str> = shape.fields.iter().map(|f| f.name).collect();
    expected.retain(|f| *f != "messages");
    expected.push("colour");
    expected.sort_unstable();
    assert_eq!(fields, expected);
    for error in errors {
        let keys: Vec<&String> = error.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["field", "constraint", "message", "value"]);
    }
    assert_eq!(worker.steps.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_bodies_are_400_with_a_reason() {
    let worker = start(
        FakeRunner::hashing(64),
        0,
        Config {
            max_tokens_out: Some(20),
            ..Config::default()
        },
    )
    .await;
    let long = "x".repeat(64);
    let huge = "x".repeat(40_000);
    for (body, field) in [
        ("{\"prompt\": \"secret".to_owned(), "body"),
        ("[1]".to_owned(), "body"),
        (json!({ "job_id": "a" }).to_string(), "prompt"),
        (json!({ "job_id": "a", "prompt": "" }).to_string(), "prompt"),
        (
            json!({ "job_id": "a", "prompt": long }).to_string(),
            "prompt",
        ),
        (
            json!({ "job_id": "a", "prompt": huge }).to_string(),
            "prompt",
        ),
        (
            json!({ "job_id": "a", "prompt": "a", "messages": [] }).to_string(),
            "prompt",
        ),
        (
            json!({ "job_id": "a", "messages": [] }).to_string(),
            "messages",
        ),
        (
            json!({ "job_id": "a", "messages": [{ "role": "user" }] }).to_string(),
            "messages",
        ),
        (
            json!({ "job_id": "a\n", "prompt": "a" }).to_string(),
            "job_id",
        ),
        (
            json!({ "job_id": "a", "prompt": "a", "max_tokens": 21 }).to_string(),
            "max_tokens",
        ),
        (
            json!({ "job_id": "a", "prompt": "a", "max_tokens": 1.5 }).to_string(),
            "max_tokens",
        ),
        (
            json!({ "job_id": "a", "prompt": "a", "stop": [""] }).to_string(),
            "stop",
        ),
    ] {
        let (status, text) = worker.ask("POST", "/execute", &body).await;
        let errors: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(status, 400, "{text}");
        assert_eq!(errors["errors"][0]["field"], field, "{text}");
        assert_eq!(errors["errors"].as_array().unwrap().len(), 1, "{text}");
        assert!(!text.contains("secret") && !text.contains("xxx"), "{text}");
    }
    let body = json!({ "job_id": "a", "messages": [{ "role": "user", "content": "hi" }], "top_p": 0,
        "max_tokens": 2.0, "stop": "zz", "seed": u64::MAX, "min_p": null });
    let events = all_events(worker.execute(&body).await, &worker.steps).await;
    assert_eq!(events[0].data["seed"], u64::MAX);
    assert_eq!(events.last().unwrap().data["tokens_out"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_paths_methods_and_sizes_are_refused_in_json() {
    let worker = start(FakeRunner::hashing(64), 0, Config::default()).await;
    let big = " ".repeat(5 << 20);
    for (method, path, body, status, code) in [
        ("GET", "/nothing", "", 404, "NOT_FOUND"),
        ("GET", "/execute", "", 405, "METHOD_NOT_ALLOWED"),
        ("POST", "/execute", big.as_str(), 413, "PAYLOAD_TOO_LARGE"),
    ] {
        let (found, text) = worker.ask(method, path, body).await;
        let failure: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((found, &failure["code"]), (status, &json!(code)), "{text}");
        assert_eq!(failure["retriable"], false);
    }
}
