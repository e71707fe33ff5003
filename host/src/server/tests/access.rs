//! Keys, origins, correlation ids.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_asked_for_except_by_probes_and_the_page() {
    let config = Config {
        api_keys: vec!["first".to_owned(), "second".to_owned()],
        ..Config::default()
    };
    let worker = start(FakeRunner::hashing(64), 0, config).await;
    for path in ["/", "/health", "/ready"] {
        assert_eq!(worker.ask("GET", path, "").await.0, 200, "{path}");
    }
    let body = json!({ "content": "hi" }).to_string();
    for (header, status) in [
        ("", 401),
        ("authorization: Bearer firs\r\n", 401),
        ("authorization: first\r\n", 401),
        ("authorization: Bearer first\r\n", 200),
        ("authorization: bearer second\r\n", 200),
    ] {
        let (found, text) = worker.ask_with("POST", "/tokenize", header, &body).await;
        assert_eq!(found, status, "{header}: {text}");
    }
    let (status, text) = worker.ask("GET", "/v1/models", "").await;
    assert_eq!(status, 401);
    let error: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(error["error"]["code"], "invalid_api_key");
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_other_origins_are_refused_unless_allowed() {
    let config = Config {
        cors_origins: vec!["https://ours.example".to_owned()],
        ..Config::default()
    };
    let worker = start(FakeRunner::hashing(64), 0, config).await;
    let ask = async |origin: &str| {
        let header = format!("origin: {origin}\r\n");
        let mut text = String::new();
        let mut stream = worker.send_with("GET", "/v1/worker", &header, "").await;
        stream.read_to_string(&mut text).await.unwrap();
        text.to_lowercase()
    };
    assert!(
        ask("https://theirs.example")
            .await
            .starts_with("http/1.1 401")
    );
    assert!(ask("null").await.starts_with("http/1.1 401"));
    let same = ask("http://kigo").await;
    assert!(same.starts_with("http/1.1 200") && !same.contains("access-control"));
    let ours = ask("https://ours.example").await;
    assert!(ours.starts_with("http/1.1 200"));
    assert!(ours.contains("access-control-allow-origin: https://ours.example"));
}

#[tokio::test(flavor = "multi_thread")]
async fn correlation_ids_are_returned_or_made() {
    let worker = start(FakeRunner::hashing(64), 0, Config::default()).await;
    let ask = async |header: &str| {
        let mut text = String::new();
        let mut stream = worker.send_with("GET", "/health", header, "").await;
        stream.read_to_string(&mut text).await.unwrap();
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix("x-correlation-id: "));
        line.unwrap().to_owned()
    };
    assert_eq!(ask("x-correlation-id: Order-66\r\n").await, "Order-66");
    let made = ask("").await;
    assert_eq!(made.len(), 24);
    assert_ne!(made, ask("").await);
    assert_eq!(ask("x-correlation-id: a b\r\n").await.len(), 24);
}
