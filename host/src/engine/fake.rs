//! A model that is a function, for tests of everything around models.
//!
//! Its cache holds token ids, written and read through the block tables it is given, so a wrong
//! table changes what comes out.

use super::{Detokenize, Text};
use crate::device::{BLOCK_TOKENS, Batch, DeviceInfo, SampleRow, Span};
use crate::error::{Error, Result};
use crate::model::{ModelInfo, Pooling, Runner};
use serde_json::Value;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Ids are bytes; this one ends the text.
pub const EOS: u32 = 256;
/// The control tokens after it.
const CONTROLS: [&str; 6] = [
    "[TOOL_CALLS]",
    "[CALL_ID]",
    "[ARGS]",
    "<|tool_call|>",
    "<tool_call>",
    "</tool_call>",
];
pub const VOCABULARY: usize = EOS as usize + 1 + CONTROLS.len();

/// Most steps that begin ahead at once.
const AHEAD: usize = 8;

type Next = Box<dyn Fn(&[u32]) -> u32 + Send>;

pub struct FakeRunner {
    info: ModelInfo,
    pub device: DeviceInfo,
    cache: Vec<u32>,
    /// The likeliest token after a sequence.
    next: Next,
    pub step_time: Duration,
    /// That of a step of several sequences, where it is another.
    pub together_time: Option<Duration>,
    pub max_batch: usize,
    /// Rows and sequences of each step.
    pub shapes: Arc<Mutex<Vec<(usize, usize)>>>,
    /// Steps done.
    pub steps: Arc<AtomicUsize>,
    /// The step at which to panic, and at which to fail.
    pub panic_at: Option<usize>,
    pub fail_at: Option<(usize, fn() -> Error)>,
    logits: Vec<Vec<f32>>,
    /// Steps to come whose logits are gone before they can be read, as those of a device that runs ahead.
    gone: usize,
    readable: bool,
    /// Steps that have begun ahead, and the position of the first; how many were lost as another's step came.
    begun: (usize, usize),
    pub lost: Arc<AtomicUsize>,
    /// How many have begun in all.
    pub ahead: Arc<AtomicUsize>,
    /// The tokens of the last step, and the position of the first.
    last: (Vec<u32>, usize),
}

impl FakeRunner {
    pub fn new(context: usize, next: impl Fn(&[u32]) -> u32 + Send + 'static) -> Self {
        Self {
            info: ModelInfo {
                name: "fake".to_owned(),
                architecture: "fake".to_owned(),
                path: "fake.gguf".into(),
                file_bytes: 0,
                parameters: 0,
                vocabulary: VOCABULARY,
                trained_context: context,
                context,
                layers: 0,
                pooling: Some(Pooling::Mean),
            },
            device: DeviceInfo {
                backend: "cpu",
                name: "fake".to_owned(),
                memory_bytes: 0,
                memory_bytes_per_s: None,
                architecture: "fake".to_owned(),
            },
            cache: vec![u32::MAX; context.div_ceil(BLOCK_TOKENS) * BLOCK_TOKENS],
            next: Box::new(next),
            step_time: Duration::ZERO,
            together_time: None,
            max_batch: 8,
            shapes: Arc::default(),
            steps: Arc::default(),
            panic_at: None,
            fail_at: None,
            logits: Vec::new(),
            gone: 0,
            readable: true,
            begun: (0, 0),
            lost: Arc::default(),
            ahead: Arc::default(),
            last: (Vec::new(), 0),
        }
    }

    /// Answers these ids to whatever prompt of `prompt_len` tokens, then the end token.
    pub fn saying(context: usize, prompt_len: usize, ids: Vec<u32>) -> Self {
        Self::new(context, move |tokens| {
            ids.get(tokens.len() - prompt_len).copied().unwrap_or(EOS)
        })
    }

    /// Answers `script` to whatever prompt of `prompt_len` tokens, then the end token.
    pub fn script(context: usize, prompt_len: usize, script: &'static str) -> Self {
        Self::saying(context, prompt_len, script.bytes().map(u32::from).collect())
    }

    /// A letter that depends on every token before it.
    pub fn hashing(context: usize) -> Self {
        Self::new(context, |tokens| {
            let hash = tokens
                .iter()
                .fold(0u32, |h, &t| (h ^ t).wrapping_mul(0x0100_0193));
            u32::from(b'a') + (hash >> 8) % 26
        })
    }
}

/// What a device says that failed.
pub fn device_failure() -> Error {
    Error::Device {
        device: "fake".to_owned(),
        what: "asked to".to_owned(),
    }
}

/// What a device says that has too little memory.
pub fn out_of_memory() -> Error {
    Error::OutOfMemory {
        device: "fake".to_owned(),
        what: "an allocation".to_owned(),
        required: 2,
        free: 1,
    }
}

impl Runner for FakeRunner {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn device(&self) -> &DeviceInfo {
        &self.device
    }

    fn cache_blocks(&self) -> usize {
        self.cache.len() / BLOCK_TOKENS
    }

    fn step_rows(&self) -> usize {
        512
    }

    fn max_batch(&self) -> usize {
        self.max_batch
    }

    fn forward(&mut self, batch: &Batch) -> Result<()> {
        let time = self.together_time.filter(|_| batch.spans.len() > 1);
        std::thread::sleep(time.unwrap_or(self.step_time));
        let step = self.steps.fetch_add(1, Ordering::SeqCst);
        assert!(self.panic_at != Some(step), "asked to");
        if let Some((at, error)) = self.fail_at
            && at == step
        {
            return Err(error());
        }
        // A step of several tokens is not one that was begun before.
        self.readable = self.gone == 0 || batch.tokens.len() > 1;
        self.gone = if self.readable { 0 } else { self.gone - 1 };
        let past = batch.spans[0].past;
        self.begun = match self.begun {
            (left, at) if left > 0 && batch.goes_on && batch.tokens.len() == 1 && at == past => {
                (left - 1, at + 1)
            }
            (left, _) => {
                self.lost.fetch_add(left, Ordering::SeqCst);
                (0, past)
            }
        };
        self.logits.clear();
        self.last = (batch.tokens.clone(), batch.spans[0].past);
        let shape = (batch.tokens.len(), batch.spans.len());
        self.shapes.lock().unwrap().push(shape);
        let slot = |span: &Span, t: usize| {
            span.blocks[t / BLOCK_TOKENS] as usize * BLOCK_TOKENS + t % BLOCK_TOKENS
        };
        for span in &batch.spans {
            for i in 0..span.len {
                self.cache[slot(span, span.past + i)] = batch.tokens[span.start + i];
            }
        }
        for &row in &batch.outputs {
            let mut spans = batch.spans.iter();
            let span = spans.find(|s| (s.start..s.start + s.len).contains(&row));
            let span = span.unwrap();
            let tokens: Vec<u32> = (0..=span.past + row - span.start)
                .map(|t| self.cache[slot(span, t)])
                .collect();
            assert!(
                !tokens.contains(&u32::MAX),
                "a block was read before it was written"
            );
            let id = (self.next)(&tokens);
            let mut logits: Vec<f32> = (0..VOCABULARY).map(|i| -(i as f32)).collect();
            logits[id as usize] = 1000.0;
            // The runner-up, for tests that sample.
            logits[(id as usize + 1) % VOCABULARY] = 999.5;
            self.logits.push(logits);
        }
        Ok(())
    }

    fn sample(&mut self, rows: &[SampleRow<'_>]) -> Result<Vec<u32>> {
        if let [row] = rows {
            self.gone = self.gone.max(row.ahead.saturating_sub(1));
            if self.begun.0 == 0 {
                let (tokens, past) = &self.last;
                self.begun = (row.ahead.min(AHEAD), past + tokens.len());
                self.ahead.fetch_add(self.begun.0, Ordering::SeqCst);
            }
        }
        Ok(rows
            .iter()
            .zip(&self.logits)
            .map(|(row, logits)| {
                crate::sampling::sample(row.params, row.u(), row.seen, &mut logits.clone())
            })
            .collect())
    }

    fn steps_begun(&self) -> usize {
        self.begun.0
    }

    /// The token and its position.
    fn hidden(&mut self, row: usize) -> Result<Vec<f32>> {
        let (tokens, past) = &self.last;
        Ok(vec![tokens[row] as f32, (past + row) as f32])
    }

    fn logits(&mut self, output: usize) -> Result<Vec<f32>> {
        if !self.readable {
            let what = "the logits of a step that others have begun behind";
            return Err(Error::Request(what.to_owned()));
        }
        Ok(self.logits[output].clone())
    }
}

/// Text in bytes: an id a byte.
pub struct ByteText {
    pub template: &'static str,
    /// Names of control tokens in a text stand for those tokens.
    pub controls: bool,
}

impl ByteText {
    pub const PLAIN: Self = Self {
        template: "{{ messages }}",
        controls: false,
    };
}

fn control_name(id: u32) -> Option<&'static str> {
    CONTROLS
        .get((id as usize).checked_sub(EOS as usize + 1)?)
        .copied()
}

impl Text for ByteText {
    fn encode(&self, prompt: &str) -> Result<Vec<u32>> {
        self.tokenize(prompt, false, true)
    }

    fn render(&self, messages: &Value) -> Result<String> {
        self.render_with(messages, None, true)
    }

    fn render_with(&self, messages: &Value, _: Option<&Value>, _: bool) -> Result<String> {
        let texts = messages.as_array().into_iter().flatten();
        Ok(texts.filter_map(|m| m["content"].as_str()).collect())
    }

    fn template(&self) -> Option<&str> {
        Some(self.template)
    }

    fn tokenize(&self, mut text: &str, _: bool, parse_special: bool) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        while let Some(first) = text.chars().next() {
            let names = (EOS + 1..).zip(CONTROLS);
            let control = names
                .filter(|_| self.controls && parse_special)
                .find_map(|(id, name)| Some((id, text.strip_prefix(name)?)));
            if let Some((id, rest)) = control {
                ids.push(id);
                text = rest;
                continue;
            }
            let (bytes, rest) = text.split_at(first.len_utf8());
            ids.extend(bytes.bytes().map(u32::from));
            text = rest;
        }
        Ok(ids)
    }

    fn token_bytes(&self, id: u32) -> Vec<u8> {
        match control_name(id) {
            Some(name) => name.as_bytes().to_vec(),
            None if id == EOS => b"<end>".to_vec(),
            None => vec![id as u8],
        }
    }

    fn is_control(&self, id: u32) -> bool {
        id >= EOS
    }

    fn detokenizer(&self) -> Box<dyn Detokenize + '_> {
        Box::new(ByteDecoder::default())
    }

    fn is_end_of_generation(&self, id: u32) -> bool {
        id == EOS
    }
}

#[derive(Default)]
struct ByteDecoder {
    held: Vec<u8>,
}

impl Detokenize for ByteDecoder {
    fn push(&mut self, id: u32) -> String {
        if id >= EOS {
            return String::new();
        }
        self.held.push(id as u8);
        match std::str::from_utf8(&self.held) {
            Ok(text) => {
                let text = text.to_owned();
                self.held.clear();
                text
            }
            Err(_) => String::new(),
        }
    }

    fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned()
    }
}
