//! Loading, health, draining.

use super::*;
use crate::engine::fake::{device_failure, out_of_memory};

#[tokio::test(flavor = "multi_thread")]
async fn health_tells_a_working_engine_from_a_broken_one() {
    let mut runner = FakeRunner::hashing(64);
    runner.panic_at = Some(1);
    let worker = start(runner, 0, Config::default()).await;
    let (status, health) = worker.ask("GET", "/health", "").await;
    let health: Value = serde_json::from_str(&health).unwrap();
    assert_eq!(
        (status, &health["status"], &health["model"]),
        (200, &json!("ok"), &json!("fake"))
    );

    let body = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 10 });
    let events = all_events(worker.execute(&body).await, &worker.steps).await;
    let last = events.last().unwrap();
    assert_eq!(
        (last.name.as_str(), &last.data["code"]),
        ("error", &json!("INTERNAL"))
    );
    assert_eq!(last.data["retriable"], true);
    assert_eq!(
        events
            .iter()
            .filter(|e| matches!(e.name.as_str(), "end" | "error"))
            .count(),
        1
    );
    assert_eq!(worker.ask("GET", "/health", "").await.0, 503);
    assert_eq!(
        worker.ask("POST", "/execute", &body.to_string()).await.0,
        500
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn shutting_down_lets_streams_end_and_refuses_new_work() {
    let worker = start(FakeRunner::hashing(4096), 10, Config::default()).await;
    let body = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 60 });
    let mut stream = worker.execute(&body).await;
    while next_event(&mut stream, &worker.steps).await.unwrap().name != "token" {}
    let (status, _) = worker.ask("POST", "/shutdown", "").await;
    assert_eq!(status, 202);
    tokio::time::sleep(Duration::from_millis(30)).await;
    let other = json!({ "job_id": "b", "prompt": "hi", "max_tokens": 1 });
    let (status, refused) = worker.ask("POST", "/execute", &other.to_string()).await;
    assert_eq!(status, 503);
    assert!(refused.contains("DRAINING"), "{refused}");
    let (status, ready) = worker.ask("GET", "/ready", "").await;
    assert_eq!(status, 503);
    assert!(ready.contains("draining"));
    assert_eq!(worker.ask("GET", "/health", "").await.0, 200);
    let events = all_events(stream, &worker.steps).await;
    assert_eq!(events.last().unwrap().data["tokens_out"], 60);
    tokio::time::timeout(Duration::from_secs(5), worker.task)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_outlasts_the_drain_timeout_is_cancelled_with_an_event() {
    let config = Config {
        drain_timeout: Duration::from_millis(100),
        ..Config::default()
    };
    let worker = start(FakeRunner::hashing(4096), 10, config).await;
    let body = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 2000 });
    let mut stream = worker.execute(&body).await;
    while next_event(&mut stream, &worker.steps).await.unwrap().name != "token" {}
    worker.stop.send(()).unwrap();
    let events = all_events(stream, &worker.steps).await;
    assert_eq!(events.last().unwrap().data["stop_reason"], "CANCELLED");
    tokio::time::timeout(Duration::from_secs(5), worker.task)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_loads_is_healthy_and_not_ready() {
    let slot = crate::server::EngineSlot::default();
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    let server = Server::bind(any_port, slot.clone(), Config::default())
        .await
        .unwrap();
    let url = server.url();
    let task = tokio::spawn(server.run(std::future::pending()));
    let get = async |path: &str| {
        let response = reqwest::Client::builder().no_proxy().build().unwrap();
        let response = response.get(format!("{url}{path}")).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };
    slot.loaded(25, 100);
    let (status, health) = get("/health").await;
    assert_eq!(status, 200);
    assert!(
        health.contains("\"loading\"") && health.contains("0.25"),
        "{health}"
    );
    assert_eq!(get("/ready").await.0, 503);
    let (status, failure) = get("/v1/worker").await;
    assert!(
        status == 503 && failure.contains("MODEL_LOADING"),
        "{failure}"
    );
    assert!(get("/metrics").await.1.contains("model_load_progress 0.25"));
    let engine = Engine::start(
        Box::new(FakeRunner::hashing(64)),
        Arc::new(ByteText::PLAIN),
        EngineConfig::default(),
    );
    slot.fill(engine.unwrap());
    assert_eq!(get("/ready").await.0, 200);
    let (status, metrics) = get("/metrics").await;
    assert_eq!(status, 200);
    assert!(
        metrics.contains("model_load_progress 1\n") && metrics.ends_with("# EOF\n"),
        "{metrics}"
    );
    task.abort();
}

/// The last event of a job on a runner that fails at its second step, and what comes of the next job.
async fn after_a_failure(runner: FakeRunner) -> (Value, u16, Value) {
    let worker = start(runner, 0, Config::default()).await;
    let body = |id: &str| json!({ "job_id": id, "prompt": "hi", "max_tokens": 10 });
    let events = all_events(worker.execute(&body("a")).await, &worker.steps).await;
    let first = events.last().unwrap().data.clone();
    let health = worker.ask("GET", "/health", "").await.0;
    let (_, text) = worker.ask("POST", "/execute", &body("b").to_string()).await;
    let last = text.lines().rev().find_map(|l| {
        l.strip_prefix("data:")
            .or(Some(l).filter(|l| l.starts_with('{')))
    });
    worker.idle().await;
    (first, health, serde_json::from_str(last.unwrap()).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_runs_out_fails_the_job_and_not_the_worker() {
    let mut runner = FakeRunner::hashing(64);
    runner.fail_at = Some((1, out_of_memory));
    let (first, health, next) = after_a_failure(runner).await;
    assert_eq!(
        (&first["code"], &first["retriable"]),
        (&json!("VRAM_OOM"), &json!(true))
    );
    assert_eq!((health, &next["stop_reason"]), (200, &json!("MAX_TOKENS")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cuda_device_that_fails_takes_the_worker_with_it() {
    let mut runner = FakeRunner::hashing(64);
    runner.device.backend = "cuda";
    runner.fail_at = Some((1, device_failure));
    let (first, health, next) = after_a_failure(runner).await;
    assert_eq!(
        (&first["code"], &first["retriable"]),
        (&json!("CUDA_ERROR"), &json!(true))
    );
    assert_eq!((health, &next["code"]), (503, &json!("INTERNAL")));
}
