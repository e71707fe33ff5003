//! What connections may not do.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn slow_headers_and_slow_bodies_are_cut_off() {
    let limits = crate::server::Limits {
        header_timeout: Duration::from_millis(200),
        body_timeout: Duration::from_millis(200),
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
