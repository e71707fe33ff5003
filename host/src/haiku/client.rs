//! A client of the worker, over HTTP like any other.

use futures_util::StreamExt;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// An event as it came.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Received {
    /// Since the request was sent.
    pub at_ms: f64,
    pub id: Option<u64>,
    pub event: String,
    pub data: Value,
}

pub struct Client {
    http: reqwest::Client,
    url: String,
}

impl Client {
    /// A client of the worker at `url`. The answers' time limit is `limit`.
    pub fn new(url: String, limit: Duration) -> Result<Client, String> {
        // The worker is on this machine: a proxy from the environment would only be in the way.
        let http = reqwest::Client::builder().no_proxy().timeout(limit).build();
        Ok(Client {
            http: http.map_err(|e| describe(&e))?,
            url,
        })
    }

    /// `POST /execute`, handing every event to `each` as it comes.
    pub async fn execute(
        &self,
        body: &Value,
        mut each: impl FnMut(Received),
    ) -> Result<(), String> {
        let sent = Instant::now();
        let request = self.http.post(format!("{}/execute", self.url)).json(body);
        let response = request.send().await.map_err(|e| describe(&e))?;
        let status = response.status();
        if !status.is_success() {
            let text = response.text().await.unwrap_or_default();
            return Err(format!("POST /execute: {status}: {text}"));
        }
        let mut parser = Parser::default();
        let mut body = response.bytes_stream();
        while let Some(part) = body.next().await {
            for (id, event, data) in parser.push(&part.map_err(|e| describe(&e))?) {
                let data = serde_json::from_str(&data)
                    .map_err(|e| format!("event {event} carries no JSON: {e}"))?;
                each(Received {
                    at_ms: sent.elapsed().as_secs_f64() * 1e3,
                    id,
                    event,
                    data,
                });
            }
        }
        Ok(())
    }

    /// Every sample of `GET /metrics` without labels, by name.
    pub async fn metrics(&self) -> Result<BTreeMap<String, f64>, String> {
        let response = self.http.get(format!("{}/metrics", self.url)).send().await;
        let text = response
            .map_err(|e| describe(&e))?
            .text()
            .await
            .map_err(|e| describe(&e))?;
        Ok(text
            .lines()
            .filter(|line| !line.starts_with('#') && !line.contains('{'))
            .filter_map(|line| line.split_once(' '))
            .filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?)))
            .collect())
    }
}

/// An error with its causes.
fn describe(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

/// The framing of server-sent events, as the HTML standard describes it (section 9.2.6), for servers
/// that end lines with a line feed.
#[derive(Default)]
struct Parser {
    buffer: Vec<u8>,
    id: Option<u64>,
    event: String,
    data: Option<String>,
}

impl Parser {
    /// Takes bytes as they come; returns the events they complete as `(id, event, data)`.
    fn push(&mut self, bytes: &[u8]) -> Vec<(Option<u64>, String, String)> {
        self.buffer.extend_from_slice(bytes);
        let mut events = Vec::new();
        while let Some(end) = self.buffer.iter().position(|&b| b == b'\n') {
            let line: Vec<u8> = self.buffer.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches(['\n', '\r']);
            if line.is_empty() {
                if let Some(data) = self.data.take() {
                    events.push((self.id.take(), std::mem::take(&mut self.event), data));
                }
                continue;
            }
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "id" => self.id = value.parse().ok(),
                "event" => self.event = value.to_owned(),
                "data" => match &mut self.data {
                    Some(data) => {
                        data.push('\n');
                        data.push_str(value);
                    }
                    None => self.data = Some(value.to_owned()),
                },
                // Comments (an empty field name) and fields this client does not know.
                _ => {}
            }
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_found_however_the_bytes_are_cut() {
        let wire = ":ping\n\nevent: started\nid: 0\ndata: {\"a\":1}\n\nevent:token\nid:1\ndata:{\ndata:}\n\n";
        let expected = [
            (Some(0), "started".to_owned(), "{\"a\":1}".to_owned()),
            (Some(1), "token".to_owned(), "{\n}".to_owned()),
        ];
        for size in 1..wire.len() {
            let mut parser = Parser::default();
            let events: Vec<_> = wire
                .as_bytes()
                .chunks(size)
                .flat_map(|part| parser.push(part))
                .collect();
            assert_eq!(events, expected, "in pieces of {size}");
        }
    }
}
