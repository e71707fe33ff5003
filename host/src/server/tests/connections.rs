//! What connections may not do.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn slow_headers_and_slow_bodies_are_cut_off() {
    let limits = crate::server::Limits {
        header_timeout: Duration::from_millis(200),
        body_timeout: Duration::from_millis(200),
        idle_timeout: Duration::from_millis(200),
        ..crate::server::Limits::default()
    };
    let config = Config {
        limits,
        ..Config::default()
    };
    let worker = start(FakeRunner::hashing(64), 0, config).await;
    let mut answers = Vec::new();
    for beginning in [
        "",
        "GET /health HTTP/1.1\r\nhost:",
        "POST /execute HTTP/1.1\r\nhost: kigo\r\nconnection: close\r\ncontent-length: 50\r\n\r\n{",
        "GET /health HTTP/1.1\r\nhost: kigo\r\n\r\n",
    ] {
        let mut stream = TcpStream::connect(worker.address).await.unwrap();
        stream.write_all(beginning.as_bytes()).await.unwrap();
        let mut text = String::new();
        let end = stream.read_to_string(&mut text);
        let end = tokio::time::timeout(Duration::from_secs(3), end).await;
        end.unwrap().unwrap();
        answers.push(text);
    }
    assert!(answers[2].starts_with("HTTP/1.1 400"), "{answers:?}");
    assert!(answers[3].starts_with("HTTP/1.1 200"), "{answers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_takes_nothing_is_cut_off() {
    let limits = crate::server::Limits {
        write_timeout: Duration::from_millis(300),
        ..crate::server::Limits::default()
    };
    let config = Config {
        limits,
        ..Config::default()
    };
    let worker = start(FakeRunner::hashing(1 << 17), 0, config).await;
    let body = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 100_000 });
    let stream = worker.execute(&body).await;
    // The connection stays open here, unread.
    worker.idle().await;
    assert!(worker.steps.load(Ordering::SeqCst) < 100_000);
    drop(stream);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_serves_and_a_dead_one_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kigo.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let engine = Engine::start(
        Box::new(FakeRunner::hashing(64)),
        Arc::new(ByteText::PLAIN),
        EngineConfig::default(),
    );
    let engine = engine.unwrap();
    let server = Server::bind_unix(&path, engine.clone().into(), Config::default())
        .await
        .unwrap();
    assert_eq!(server.url(), format!("unix:{}", path.display()));
    let task = tokio::spawn(server.run(std::future::pending()));
    let ask = async |request: &str| {
        let mut stream = tokio::net::UnixStream::connect(&path).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    };
    let health = ask("GET /health HTTP/1.1\r\nhost: kigo\r\nconnection: close\r\n\r\n").await;
    assert!(health.starts_with("HTTP/1.1 200"), "{health}");
    let again = Server::bind_unix(&path, engine.into(), Config::default()).await;
    assert!(again.is_err(), "somebody listens there");
    let bye = ask(
        "POST /shutdown HTTP/1.1\r\nhost: kigo\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
    )
    .await;
    assert!(bye.starts_with("HTTP/1.1 202"), "{bye}");
    tokio::time::timeout(Duration::from_secs(5), task)
        .await
        .unwrap()
        .unwrap();
    assert!(!path.exists());
}

/// Reads an answer whose end is known by its length, and nothing of what may come after it.
async fn answer(stream: &mut BufReader<TcpStream>) -> String {
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        if let Some(n) = line.to_lowercase().strip_prefix("content-length:") {
            length = n.trim().parse().unwrap();
        }
        head.push_str(&line);
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.unwrap();
    head
}

const HEALTH: &[u8] = b"GET /health HTTP/1.1\r\nhost: kigo\r\n\r\n";

/// How long the other side leaves a connection open.
async fn until_closed(stream: &mut BufReader<TcpStream>) -> Duration {
    let began = std::time::Instant::now();
    let mut rest = Vec::new();
    let end = stream.read_to_end(&mut rest);
    let end = tokio::time::timeout(Duration::from_secs(5), end).await;
    assert_eq!(end.unwrap().unwrap(), 0);
    began.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_and_slow_headers_have_times_of_their_own() {
    let config = |header_ms, idle_ms| Config {
        limits: crate::server::Limits {
            header_timeout: Duration::from_millis(header_ms),
            idle_timeout: Duration::from_millis(idle_ms),
            ..crate::server::Limits::default()
        },
        ..Config::default()
    };
    let connect = async |worker: &Worker| {
        let stream = TcpStream::connect(worker.address).await.unwrap();
        BufReader::new(stream)
    };
    // A connection may lie idle for longer than headers may take.
    let worker = start(FakeRunner::hashing(64), 0, config(150, 900)).await;
    let mut stream = connect(&worker).await;
    for _ in 0..2 {
        stream.write_all(HEALTH).await.unwrap();
        assert!(answer(&mut stream).await.starts_with("HTTP/1.1 200"));
        tokio::time::sleep(Duration::from_millis(400)).await;
    }
    stream.write_all(HEALTH).await.unwrap();
    answer(&mut stream).await;
    let idle = until_closed(&mut stream).await;
    assert!((800..2000).contains(&idle.as_millis()), "{idle:?}");
    // Headers that began after an answer are timed as headers.
    let mut stream = connect(&worker).await;
    stream.write_all(HEALTH).await.unwrap();
    answer(&mut stream).await;
    stream.write_all(b"GET /health").await.unwrap();
    let slow = until_closed(&mut stream).await;
    assert!((100..700).contains(&slow.as_millis()), "{slow:?}");
    // And for a shorter time, too.
    let worker = start(FakeRunner::hashing(64), 0, config(5000, 150)).await;
    let mut stream = connect(&worker).await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    stream.write_all(HEALTH).await.unwrap();
    answer(&mut stream).await;
    let idle = until_closed(&mut stream).await;
    assert!((100..1000).contains(&idle.as_millis()), "{idle:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_may_take_longer_than_any_request() {
    let short = Duration::from_millis(100);
    let limits = crate::server::Limits {
        header_timeout: short,
        idle_timeout: short,
        body_timeout: short,
        write_timeout: short,
        ..crate::server::Limits::default()
    };
    let config = Config {
        limits,
        ..Config::default()
    };
    let worker = start(FakeRunner::hashing(64), 20, config).await;
    let body = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 30 });
    let events = all_events(worker.execute(&body).await, &worker.steps).await;
    assert_eq!(events.last().unwrap().data["tokens_out"], 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_too_many_waits_for_another_to_end() {
    let limits = crate::server::Limits {
        max_connections: 2,
        ..crate::server::Limits::default()
    };
    let config = Config {
        limits,
        ..Config::default()
    };
    let worker = start(FakeRunner::hashing(64), 0, config).await;
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut stream = BufReader::new(TcpStream::connect(worker.address).await.unwrap());
        stream.write_all(HEALTH).await.unwrap();
        assert!(answer(&mut stream).await.starts_with("HTTP/1.1 200"));
        open.push(stream);
    }
    let mut third = BufReader::new(TcpStream::connect(worker.address).await.unwrap());
    third.write_all(HEALTH).await.unwrap();
    let early = tokio::time::timeout(Duration::from_millis(300), answer(&mut third)).await;
    assert!(early.is_err(), "it was answered beside two others");
    open.pop();
    let late = tokio::time::timeout(Duration::from_secs(5), answer(&mut third)).await;
    assert!(late.unwrap().starts_with("HTTP/1.1 200"));
}
