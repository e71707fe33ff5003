//! Asking for a haiku, and what must hold of the answer.

use super::client::{Client, Received};
use super::say;
use super::words::{count_word, minute_in_words};
use crate::cli::load_with_progress;
use crate::engine::direct::top_logits;
use crate::engine::{Direct, EngineHandle, ModelText, Text};
use crate::error::{Error, Result};
use crate::model::LoadOptions;
use crate::server::{Config, Server};
use gguf::Gguf;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// Attempts, each with a seed of its own.
const MAX_ATTEMPTS: usize = 8;
/// For all attempts together.
const TIME_LIMIT: Duration = Duration::from_secs(30);
/// Tokens of a haiku at most.
const MAX_TOKENS: usize = 64;
/// Logits compared.
const TOP_LOGITS: usize = 16;
/// The same device computes the same logits for the same rows. This leaves room for sums whose order
/// is not fixed and for nothing else: another prompt changes logits by whole units.
const LOGIT_TOLERANCE: f32 = 1e-3;

const MINUTE_ONCE: &str = "the minute is in the haiku exactly once";
const NONCE_KEPT: &str = "the nonce is not echoed";

/// One thing that must hold.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Check {
    pub name: &'static str,
    pub passed: bool,
    /// What was found.
    pub found: String,
}

/// One request and its answer.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Attempt {
    pub number: usize,
    pub seed: u64,
    /// The minute asked for, in words.
    pub minute: String,
    pub text: String,
    /// Token events.
    pub tokens: usize,
    pub elapsed_ms: f64,
    /// Decode speed: tokens after the first, over the time from it to the last.
    pub tokens_per_s: f64,
    pub checks: Vec<Check>,
    /// What was asked; the check of the logits asks it again.
    #[serde(skip)]
    messages: Value,
    #[serde(skip)]
    pub(super) events: Vec<Received>,
}

/// What came of asking.
pub struct Asked {
    /// At least one; the last one counts.
    pub attempts: Vec<Attempt>,
    /// Of all attempts together.
    pub elapsed: Duration,
    pub metrics_before: BTreeMap<String, f64>,
    pub metrics_after: BTreeMap<String, f64>,
}

/// The chat that asks for a haiku. The example shows the form; small models fail without it.
fn messages(minute: &str, nonce: &str) -> Value {
    let ask = |word: &str, id: &str| {
        format!(
            "Request {id}. Write a haiku about this minute: three short lines. Use the word \
             \"{word}\" exactly once."
        )
    };
    // The example's own word must not be the one asked for: the answer could be copied.
    let (word, haiku) = if minute == "seven" {
        (
            "nine",
            "Nine crows on a wire\nthe morning fog is lifting\nsomewhere a bell rings",
        )
    } else {
        (
            "seven",
            "Seven crows at dusk\nthe last light leaves the river\nquiet fills the reeds",
        )
    };
    json!([
        { "role": "system", "content": "You write haiku." },
        { "role": "user", "content": ask(word, "k4w8m2zt") },
        { "role": "assistant", "content": haiku },
        { "role": "user", "content": ask(minute, nonce) },
    ])
}

/// Starts a worker on a free port and asks until an answer passes, an answer fails in a way that
/// another seed cannot mend, or the attempts are used up.
pub(super) async fn ask(engine: EngineHandle, nonce: &str, out: &mut dyn Write) -> Result<Asked> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let io = |source| Error::Io {
        path: address.to_string().into(),
        source,
    };
    let server = Server::bind(address, engine.into(), Config::default())
        .await
        .map_err(io)?;
    let url = server.url();
    say(out, &format!("worker at {url}\n"))?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let worker = tokio::spawn(server.run(async {
        // An error says that nobody waits for the worker any more: a reason to stop as well.
        let _ = stopped.await;
    }));

    let failed = |what: String| Error::Request(format!("{url}: {what}"));
    let client = Client::new(url.clone(), TIME_LIMIT).map_err(failed)?;
    let metrics_before = client.metrics().await.map_err(failed)?;
    let mut metrics = metrics_before.clone();
    let started = Instant::now();
    let random = RandomState::new();
    let mut attempts = Vec::new();
    for number in 1..=MAX_ATTEMPTS {
        let seed = random.hash_one(number) >> 11;
        let mut attempt = attempt(&client, number, seed, nonce, out).await?;
        let now = client.metrics().await.map_err(failed)?;
        attempt.judge(nonce, &metrics, &now, started.elapsed());
        metrics = now;
        let again = attempt.only_words_are_wrong();
        attempts.push(attempt);
        if !again {
            break;
        }
    }
    let elapsed = started.elapsed();
    drop(client);
    let _ = stop.send(());
    worker
        .await
        .map_err(|e| failed(format!("the worker panicked: {e}")))?;
    Ok(Asked {
        attempts,
        elapsed,
        metrics_before,
        metrics_after: metrics,
    })
}

/// Asks once and shows the tokens as they arrive.
async fn attempt(
    client: &Client,
    number: usize,
    seed: u64,
    nonce: &str,
    out: &mut dyn Write,
) -> Result<Attempt> {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let minute = minute_in_words(now.as_secs() / 60 % 60);
    let messages = messages(&minute, nonce);
    say(
        out,
        &format!("\nattempt {number}: the minute is {minute}, the seed {seed}\n\n"),
    )?;
    let body = json!({
        "job_id": format!("haiku-{nonce}-{number}"),
        "messages": messages,
        "max_tokens": MAX_TOKENS,
        "temperature": 0.6,
        "seed": seed,
        "top_logits": TOP_LOGITS,
    });
    let mut attempt = Attempt {
        number,
        seed,
        minute,
        text: String::new(),
        tokens: 0,
        elapsed_ms: 0.0,
        tokens_per_s: 0.0,
        checks: Vec::new(),
        messages,
        events: Vec::new(),
    };
    let started = Instant::now();
    let mut shown = Ok(());
    let answered = client
        .execute(&body, |received| {
            if let Some(text) = received.data["t"].as_str()
                && received.event == "token"
            {
                attempt.tokens += 1;
                attempt.text.push_str(text);
                if shown.is_ok() {
                    shown = say(out, text);
                }
            }
            attempt.events.push(received);
        })
        .await;
    shown?;
    say(out, "\n")?;
    attempt.elapsed_ms = started.elapsed().as_secs_f64() * 1e3;
    if let Some(end) = attempt.events.last()
        && let Some(decode_ms) = end.data["decode_time_ms"].as_f64()
        && decode_ms > 0.0
    {
        attempt.tokens_per_s = attempt.tokens.saturating_sub(1) as f64 / decode_ms * 1e3;
    }
    if let Err(what) = answered {
        attempt.check("the answer arrived", false, what);
    }
    Ok(attempt)
}

impl Attempt {
    fn check(&mut self, name: &'static str, passed: bool, found: impl Into<String>) {
        self.checks.push(Check {
            name,
            passed,
            found: found.into(),
        });
    }

    pub fn passed(&self) -> bool {
        self.checks.iter().all(|c| c.passed)
    }

    /// Whether another seed may do better: all is right but the words.
    fn only_words_are_wrong(&self) -> bool {
        let mut wrong = self.checks.iter().filter(|c| !c.passed).peekable();
        wrong.peek().is_some() && wrong.all(|c| [MINUTE_ONCE, NONCE_KEPT].contains(&c.name))
    }

    /// Checks everything but the logits.
    fn judge(
        &mut self,
        nonce: &str,
        before: &BTreeMap<String, f64>,
        after: &BTreeMap<String, f64>,
        elapsed: Duration,
    ) {
        let names: Vec<String> = self.events.iter().map(|e| e.event.clone()).collect();
        let count = |name| names.iter().filter(|n| *n == name).count();
        let first = names.first().cloned().unwrap_or_default();
        let once = first == "started" && count("started") == 1;
        self.check("started comes first", once, format!("first {first:?}"));
        let last = names.last().cloned().unwrap_or_default();
        let once = last == "end" && count("end") + count("error") == 1;
        self.check("end comes last", once, format!("last {last:?}"));
        let in_order = self
            .events
            .iter()
            .enumerate()
            .all(|(i, e)| e.id == Some(i as u64));
        self.check(
            "event ids count up",
            in_order,
            format!("{} events", names.len()),
        );
        self.check("there are tokens", self.tokens > 0, self.tokens.to_string());

        let times = count_word(&self.text, &self.minute);
        let found = format!("{:?} {times} times", self.minute);
        self.check(MINUTE_ONCE, times == 1, found);
        let echoed = self.text.to_lowercase().contains(nonce);
        let found = if echoed { "it is" } else { "it is not" };
        self.check(NONCE_KEPT, !echoed, found);

        let total = |m: &BTreeMap<String, f64>| m.get("tokens_out_total").copied();
        let grown = total(after)
            .zip(total(before))
            .map(|(after, before)| after - before);
        let found = match grown {
            Some(grown) => format!("by {grown}; {} were seen", self.tokens),
            None => "there is no such metric".to_owned(),
        };
        let name = "tokens_out_total grew by the tokens seen";
        self.check(name, grown == Some(self.tokens as f64), found);
        let found = format!(
            "{:.1} s since the first attempt began",
            elapsed.as_secs_f64()
        );
        self.check("done within 30 s", elapsed <= TIME_LIMIT, found);
    }

    /// Computes the first step's logits again, through the library on a model loaded anew, and checks
    /// that the worker sent the same.
    ///
    /// # Errors
    /// The model cannot be loaded or run a second time.
    pub(super) fn compare_logits(
        &mut self,
        file: &Arc<Gguf>,
        text: &ModelText,
        load: &LoadOptions,
    ) -> Result<()> {
        let sent: Option<Vec<(u32, f32)>> = self
            .events
            .iter()
            .find(|e| e.event == "token")
            .and_then(|e| serde_json::from_value(e.data["top"].clone()).ok());
        let prompt = text.encode(&text.render(&self.messages)?)?;
        let mut direct = Direct::new(load_with_progress(file, load)?.runner);
        direct.feed_prompt(&prompt)?;
        let computed = top_logits(&direct.logits()?, TOP_LOGITS);
        let (passed, found) = same_logits(&sent.unwrap_or_default(), &computed);
        self.check(
            "the first logits equal a second forward pass",
            passed,
            found,
        );
        Ok(())
    }
}

/// Whether two lists of greatest logits are the same, and by how much they differ.
fn same_logits(sent: &[(u32, f32)], computed: &[(u32, f32)]) -> (bool, String) {
    if sent.len() != computed.len() || sent.is_empty() {
        let found = format!("{} sent, {} computed", sent.len(), computed.len());
        return (false, found);
    }
    let pairs = || sent.iter().zip(computed);
    let difference = pairs().map(|(s, c)| (s.1 - c.1).abs()).fold(0.0, f32::max);
    let same_ids = pairs().all(|(s, c)| s.0 == c.0);
    let found = format!(
        "{} logits from {:.4} down, same ids: {same_ids}, greatest difference {difference:e}",
        sent.len(),
        sent[0].1
    );
    // Pair by pair: a NaN is within no tolerance, and `max` would lose it.
    let close = pairs().all(|(s, c)| (s.1 - c.1).abs() <= LOGIT_TOLERANCE);
    (same_ids && close, found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logits_of_another_prompt_do_not_pass() {
        let computed = [(5, 20.0), (3, 18.5)];
        assert!(same_logits(&[(5, 20.0), (3, 18.5)], &computed).0);
        assert!(!same_logits(&[(5, 20.0), (3, 18.4)], &computed).0);
        assert!(!same_logits(&[(3, 20.0), (5, 18.5)], &computed).0);
        assert!(!same_logits(&[(5, f32::NAN), (3, 18.5)], &computed).0);
        assert!(!same_logits(&[], &[]).0);
        assert!(!same_logits(&[(5, 20.0)], &computed).0);
    }

    fn answered(text: &str) -> Attempt {
        let event = |id: usize, name: &str, data: Value| Received {
            at_ms: 0.0,
            id: Some(id as u64),
            event: name.to_owned(),
            data,
        };
        Attempt {
            number: 1,
            seed: 1,
            minute: "six".to_owned(),
            text: text.to_owned(),
            tokens: 1,
            elapsed_ms: 1.0,
            tokens_per_s: 0.0,
            checks: Vec::new(),
            messages: Value::Null,
            events: vec![
                event(0, "started", json!({})),
                event(1, "token", json!({ "t": text })),
                event(2, "end", json!({})),
            ],
        }
    }

    fn judged(mut attempt: Attempt, grown: f64, seconds: u64) -> Attempt {
        let metrics = |n| BTreeMap::from([("tokens_out_total".to_owned(), n)]);
        attempt.judge(
            "abcd2345",
            &metrics(10.0),
            &metrics(10.0 + grown),
            Duration::from_secs(seconds),
        );
        attempt
    }

    #[test]
    fn a_good_answer_passes() {
        let attempt = judged(answered("Six crows"), 1.0, 1);
        assert!(attempt.passed(), "{:?}", attempt.checks);
        assert!(!attempt.only_words_are_wrong());
    }

    #[test]
    fn wrong_words_deserve_another_seed() {
        for text in ["sixteen crows", "six by six", "", "six abcd2345"] {
            let attempt = judged(answered(text), 1.0, 1);
            assert!(
                !attempt.passed() && attempt.only_words_are_wrong(),
                "{text}"
            );
        }
    }

    #[test]
    fn everything_else_is_final() {
        let mut cut = answered("six");
        cut.events.pop();
        let mut reordered = answered("six");
        reordered.events.swap(0, 1);
        let mut twice = answered("six");
        twice.events.push(twice.events[2].clone());
        let mut failed = answered("six");
        failed.events[2].event = "error".to_owned();
        for attempt in [
            judged(cut, 1.0, 1),
            judged(reordered, 1.0, 1),
            judged(twice, 1.0, 1),
            judged(failed, 1.0, 1),
            judged(answered("six"), 2.0, 1),
            judged(answered("six"), 1.0, 31),
        ] {
            assert!(
                !attempt.passed() && !attempt.only_words_are_wrong(),
                "{:?}",
                attempt.checks
            );
        }
    }
}
