//! The OpenAI API.

use super::*;

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
