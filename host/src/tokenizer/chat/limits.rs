//! How much a template may do.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use minijinja::{Error, ErrorKind};

/// Bytes of source. Real templates have up to 20 KiB.
pub(super) const SOURCE: usize = 128 << 10;
/// Bytes in one `{{ … }}` or `{% … %}`: bounds how deep an expression can be.
pub(super) const TAG: usize = 8 << 10;
/// Instructions: some 50 per message in real templates.
pub(super) const FUEL: u64 = 2_000_000;
/// Depth of calls and scopes; a macro call counts 4.
pub(super) const RECURSION: usize = 400;
/// Depth of lists in lists.
pub(super) const NESTING: usize = 64;
/// Times that a constant text may be repeated within a tag.
pub(super) const REPEAT: u64 = 1_000_000;
/// Bytes that may be made, in all, intermediate results included. A prompt of a million tokens
/// through a template that adds five strings per message needs about 20 MiB.
const BYTES: usize = 24 << 20;
/// What an element of a list counts as.
pub(super) const ELEMENT: usize = 8;
const TIME: Duration = Duration::from_millis(800);

/// One rendering's consumption so far.
pub(super) struct Meter {
    made: AtomicUsize,
    deadline: Instant,
    /// What the template said in `raise_exception`.
    raised: Mutex<Option<String>>,
}

impl Meter {
    pub fn start() -> Self {
        Self {
            made: AtomicUsize::new(0),
            deadline: Instant::now() + TIME,
            raised: Mutex::new(None),
        }
    }

    /// Counts `bytes` before they are made.
    pub fn charge(&self, bytes: usize) -> Result<(), Error> {
        // One rendering runs on one thread: no update is lost.
        let made = self.made.load(Ordering::Relaxed).saturating_add(bytes);
        self.made.store(made, Ordering::Relaxed);
        if made > BYTES {
            return Err(refuse(format!(
                "makes more than {} MiB of text and lists",
                BYTES >> 20
            )));
        }
        if Instant::now() > self.deadline {
            return Err(refuse(format!("runs longer than {} ms", TIME.as_millis())));
        }
        Ok(())
    }

    pub fn raise(&self, message: &str) -> Error {
        if let Ok(mut raised) = self.raised.lock() {
            *raised = Some(message.to_owned());
        }
        refuse(message.to_owned())
    }

    pub fn raised(&self) -> Option<String> {
        self.raised.lock().ok().and_then(|mut r| r.take())
    }
}

/// An error with a message of ours.
pub(super) fn refuse(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
