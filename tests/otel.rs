//! Spans as an OpenTelemetry collector receives them: a small one, over OTLP/HTTP, in this process.

use kigo_tests::golden_dir;
use kigo_tests::worker::{Worker, events};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What came to `POST /v1/traces`.
#[derive(Clone, Default)]
struct Collected(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

impl Collected {
    /// Listens; gives the endpoint.
    fn listen(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let collected = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let collected = collected.clone();
                std::thread::spawn(move || collected.serve(&stream.expect("a connection")));
            }
        });
        format!("http://{address}")
    }

    /// Requests of one connection, until it ends.
    fn serve(&self, stream: &TcpStream) {
        let mut reader = BufReader::new(stream);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            assert_eq!(line, "POST /v1/traces HTTP/1.1\r\n");
            let mut length = 0;
            while !line.trim().is_empty() {
                line.clear();
                reader.read_line(&mut line).expect("a header");
                let line = line.to_ascii_lowercase();
                if let Some(n) = line.strip_prefix("content-length:") {
                    length = n.trim().parse().expect("a length");
                }
                if let Some(kind) = line.strip_prefix("content-type:") {
                    assert_eq!(kind.trim(), "application/x-protobuf");
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).expect("a body");
            let request = ExportTraceServiceRequest::decode(&body[..]).expect("OTLP");
            self.0.lock().expect("nobody panicked").push(request);
            let answer = "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
            (&mut &*stream)
                .write_all(answer.as_bytes())
                .expect("an answer");
        }
    }

    fn spans(&self) -> Vec<Span> {
        let requests = self.0.lock().expect("nobody panicked");
        let resources = requests.iter().flat_map(|r| &r.resource_spans);
        let scopes = resources.flat_map(|r| &r.scope_spans);
        scopes.flat_map(|s| s.spans.clone()).collect()
    }
}

fn text<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a str> {
    let value = &attributes.iter().find(|a| a.key == key)?.value;
    match value.as_ref()?.value.as_ref()? {
        any_value::Value::StringValue(text) => Some(text),
        _ => None,
    }
}

#[test]
fn a_collector_is_told_of_requests_and_their_steps() {
    let collected = Collected::default();
    let endpoint = collected.listen();
    let model = golden_dir().join("tiny/llama-F16.gguf");
    let mut worker = Worker::start_with(&model, &[("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)]);
    let body = r#"{"job_id": "j", "prompt": "unspeakable pond", "max_tokens": 7, "temperature": 0, "logit_bias": {"2": -100}}"#;
    let header = "x-correlation-id: c-42\r\n";
    let events = events(worker.send_with("POST /execute", header, body));
    let tokens = events.iter().filter(|e| e.0 == "token").count();
    worker.signal("TERM");
    let status = worker.wait(Duration::from_secs(20));
    assert_eq!(status.code(), Some(0), "what was left was sent");
    let spans = collected.spans();
    let request = spans
        .iter()
        .find(|s| s.name == "request" && text(&s.attributes, "correlation_id") == Some("c-42"))
        .unwrap_or_else(|| panic!("no span of the request among {}", spans.len()));
    assert_eq!(text(&request.attributes, "path"), Some("/execute"));
    assert!(request.end_time_unix_nano > request.start_time_unix_nano);
    let steps: Vec<&Span> = spans
        .iter()
        .filter(|s| s.name == "step" && s.parent_span_id == request.span_id)
        .collect();
    assert_eq!(
        steps.len(),
        tokens,
        "a step for the prompt and each token but the last"
    );
    for step in steps {
        assert_eq!(step.trace_id, request.trace_id);
        assert!(step.start_time_unix_nano >= request.start_time_unix_nano);
    }
    let requests = collected.0.lock().expect("nobody panicked");
    let resource = requests[0].resource_spans[0].resource.as_ref();
    let resource = resource.expect("a resource");
    assert_eq!(text(&resource.attributes, "service.name"), Some("kigo"));
    assert!(!format!("{requests:?}").contains("unspeakable"));
}
