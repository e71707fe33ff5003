//! Jobs and the events they send.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_has_started_then_tokens_then_one_end() {
    let worker = start(
        FakeRunner::script(64, 2, "né\n\nevent: end\n"),
        0,
        Config::default(),
    )
    .await;
    let body =
        json!({ "job_id": "a", "prompt": "hi", "max_tokens": 40, "temperature": 0, "seed": 5 });
    let mut response = worker.execute(&body).await;
    let mut status = String::new();
    response.read_line(&mut status).await.unwrap();
    assert_eq!(status, "HTTP/1.1 200 OK\r\n");
    let events = all_events(response, &worker.steps).await;
    let names: Vec<&str> = events.iter().map(|e| e.name.as_str()).collect();
    assert_eq!(names[0], "started");
    assert_eq!(names[names.len() - 1], "end");
    assert!(
        names[1..names.len() - 1].iter().all(|&n| n == "token"),
        "{names:?}"
    );
    assert!(events.iter().enumerate().all(|(i, e)| e.id == i as u64));
    assert_eq!(text_of(&events), "né\n\nevent: end\n");
    let started = &events[0].data;
    assert_eq!(
        (&started["job_id"], &started["model"]),
        (&json!("a"), &json!("fake"))
    );
    assert_eq!(started["seed"], 5);
    assert!(started["started_at"].as_str().unwrap().ends_with('Z'));
    let end = &events[events.len() - 1].data;
    assert_eq!(
        (&end["stop_reason"], &end["tokens_out"]),
        (&json!("EOS"), &json!(names.len() - 2))
    );
    assert!(end["decode_time_ms"].is_number());
    for (i, event) in events[1..events.len() - 1].iter().enumerate() {
        assert_eq!(event.data["i"], i);
    }

    let (status, metrics) = worker.ask("GET", "/metrics", "").await;
    assert_eq!(status, 200);
    let line = format!("tokens_out_total {}", names.len() - 2);
    assert!(metrics.lines().any(|l| l == line), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_arrive_one_by_one_while_later_ones_are_still_to_come() {
    let worker = start(FakeRunner::hashing(256), 20, Config::default()).await;
    let body = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 25 });
    let events = all_events(worker.execute(&body).await, &worker.steps).await;
    let tokens: Vec<&Seen> = events.iter().filter(|e| e.name == "token").collect();
    assert_eq!(tokens.len(), 25);
    assert!(
        tokens[0].at_step < 10,
        "the first token came at step {}",
        tokens[0].at_step
    );
    // Each token is here before the one after the next is made, give or take a busy machine.
    let late = tokens
        .iter()
        .enumerate()
        .filter(|(i, t)| t.at_step > i + 3)
        .count();
    assert!(late < 8, "{tokens:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_stops_the_work_within_a_token() {
    let worker = start(FakeRunner::hashing(4096), 30, Config::default()).await;
    let body = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 1000 });
    let mut stream = worker.execute(&body).await;
    loop {
        let event = next_event(&mut stream, &worker.steps).await.unwrap();
        if event.name == "token" && event.data["i"] == 2 {
            break;
        }
    }
    let before = worker.steps.load(Ordering::SeqCst);
    drop(stream);
    worker.idle().await;
    let after = worker.steps.load(Ordering::SeqCst);
    assert!(
        after - before <= 2,
        "{} steps after the client left",
        after - before
    );
    let body = json!({ "job_id": "b", "prompt": "hi", "max_tokens": 3 });
    let events = all_events(worker.execute(&body).await, &worker.steps).await;
    assert_eq!(events.last().unwrap().data["stop_reason"], "MAX_TOKENS");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_in_the_queue_is_forgotten() {
    let one = EngineConfig {
        max_running: 1,
        ..EngineConfig::default()
    };
    let worker = start_with(FakeRunner::hashing(4096), 10, Config::default(), one).await;
    let long = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 60 });
    let first = worker.execute(&long).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut other = long.clone();
    other["job_id"] = json!("b");
    let second = worker.execute(&other).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(second);
    let events = all_events(first, &worker.steps).await;
    assert_eq!(events.last().unwrap().data["tokens_out"], 60);
    worker.idle().await;
    assert_eq!(worker.steps.load(Ordering::SeqCst), 60);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_token_carries_the_top_logits_asked_for() {
    let worker = start(FakeRunner::script(64, 2, "ok"), 0, Config::default()).await;
    let body = json!({ "job_id": "a", "prompt": "hi", "temperature": 0, "top_logits": 2 });
    let events = all_events(worker.execute(&body).await, &worker.steps).await;
    assert_eq!(events[1].data["top"], json!([[111, 1000.0], [112, 999.5]]));
    assert!(events[2].data.get("top").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_ends_a_job_by_its_id_and_may_be_said_twice() {
    let worker = start(FakeRunner::hashing(4096), 5, Config::default()).await;
    let body = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 2000 });
    let mut stream = worker.execute(&body).await;
    while next_event(&mut stream, &worker.steps).await.unwrap().name != "token" {}
    let (status, text) = worker.ask("POST", "/execute", &body.to_string()).await;
    assert_eq!(status, 409, "{text}");
    let cancel = json!({ "job_id": "a" }).to_string();
    let (status, text) = worker.ask("POST", "/cancel", &cancel).await;
    assert_eq!(status, 202);
    assert!(text.contains("cancelling"), "{text}");
    let events = all_events(stream, &worker.steps).await;
    assert_eq!(events.last().unwrap().data["stop_reason"], "CANCELLED");
    let (status, text) = worker.ask("POST", "/cancel", &cancel).await;
    assert_eq!(status, 202);
    assert!(text.contains("not_running"), "{text}");
    assert_eq!(worker.ask("POST", "/cancel", "{}").await.0, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_events_tell_the_place_in_the_queue() {
    let one = EngineConfig {
        max_running: 1,
        ..EngineConfig::default()
    };
    let worker = start_with(FakeRunner::hashing(4096), 10, Config::default(), one).await;
    let first = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 60 });
    let first = worker.execute(&first).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let second =
        json!({ "job_id": "b", "prompt": "hi", "max_tokens": 60, "metrics_interval_ms": 250 });
    let events = all_events(worker.execute(&second).await, &worker.steps).await;
    assert!(events.iter().enumerate().all(|(i, e)| e.id == i as u64));
    let metrics: Vec<&Seen> = events.iter().filter(|e| e.name == "metrics").collect();
    assert!((3..8).contains(&metrics.len()), "{}", metrics.len());
    assert_eq!(metrics[0].data["queue_position"], 1);
    let last = metrics.last().unwrap();
    assert_eq!(last.data["queue_position"], 0);
    assert!(last.data["tokens_out"].as_u64() > Some(5));
    drop(first);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_429_with_retry_after() {
    let small = EngineConfig {
        max_running: 1,
        max_queue: 1,
        ..EngineConfig::default()
    };
    let worker = start_with(FakeRunner::hashing(4096), 10, Config::default(), small).await;
    let body = |id: &str| json!({ "job_id": id, "prompt": "hi", "max_tokens": 500 });
    let _first = worker.execute(&body("a")).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let _second = worker.execute(&body("b")).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut text = String::new();
    let mut third = worker.execute(&body("c")).await;
    third.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 429"), "{text}");
    assert!(text.to_lowercase().contains("\r\nretry-after: "), "{text}");
    assert!(text.contains("QUEUE_FULL") && text.contains("\"retriable\":true"));
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_come_from_the_body_and_from_a_header() {
    let worker = start(FakeRunner::hashing(4096), 10, Config::default()).await;
    let body = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 500, "timeout_ms": 80 });
    let events = all_events(worker.execute(&body).await, &worker.steps).await;
    assert_eq!(events.last().unwrap().data["code"], "INFERENCE_TIMEOUT");
    let now = std::time::SystemTime::now() + Duration::from_millis(80);
    let body = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 500 }).to_string();
    let at = humantime::format_rfc3339_millis(now);
    let stream = worker
        .send_with("POST", "/execute", &format!("x-deadline: {at}\r\n"), &body)
        .await;
    let events = all_events(stream, &worker.steps).await;
    assert_eq!(events.last().unwrap().data["code"], "INFERENCE_TIMEOUT");
    let (status, text) = worker
        .ask_with("POST", "/execute", "x-deadline: soon\r\n", &body)
        .await;
    assert_eq!(status, 400, "{text}");
}
