//! What a client is told when a request cannot be served: one type for HTTP statuses, `error` events
//! and the exit of a worker that could not start.

use crate::error::Error;
use schemars::JsonSchema;

/// Why a request failed, as machines read it. [`Code::ALL`] is the table of the documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Code {
    InvalidRequest,
    Unauthorized,
    NotFound,
    MethodNotAllowed,
    JobExists,
    PayloadTooLarge,
    Cancelled,
    QueueFull,
    ModelLoadFailed,
    ModelLoading,
    InsufficientVram,
    VramOom,
    CudaError,
    Draining,
    InferenceTimeout,
    Internal,
}

impl Code {
    pub const ALL: [Code; 16] = [
        Self::InvalidRequest,
        Self::Unauthorized,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::JobExists,
        Self::PayloadTooLarge,
        Self::Cancelled,
        Self::QueueFull,
        Self::ModelLoadFailed,
        Self::ModelLoading,
        Self::InsufficientVram,
        Self::VramOom,
        Self::CudaError,
        Self::Draining,
        Self::InferenceTimeout,
        Self::Internal,
    ];

    /// Name, HTTP status, whether the same request may succeed later or on another worker, meaning.
    fn row(self) -> (&'static str, u16, bool, &'static str) {
        match self {
            Self::InvalidRequest => (
                "INVALID_REQUEST",
                400,
                false,
                "The request itself is at fault; it would fail again.",
            ),
            Self::Unauthorized => (
                "UNAUTHORIZED",
                401,
                false,
                "No valid API key, or a page of another origin asks.",
            ),
            Self::NotFound => ("NOT_FOUND", 404, false, "No such path or model."),
            Self::MethodNotAllowed => (
                "METHOD_NOT_ALLOWED",
                405,
                false,
                "The path is there, but not for this method; `Allow` names those it has.",
            ),
            Self::JobExists => (
                "JOB_EXISTS",
                409,
                false,
                "A job of this `job_id` waits or runs; the id is free again once it has ended.",
            ),
            Self::PayloadTooLarge => ("PAYLOAD_TOO_LARGE", 413, false, "The body is too large."),
            Self::Cancelled => (
                "CANCELLED",
                499,
                false,
                "Somebody cancelled the job, or the worker stopped, before the whole answer was there.",
            ),
            Self::QueueFull => (
                "QUEUE_FULL",
                429,
                true,
                "`--max-queue` requests wait already; `Retry-After` says after how many seconds to try again.",
            ),
            Self::ModelLoadFailed => (
                "MODEL_LOAD_FAILED",
                500,
                false,
                "The model could not be loaded; the worker exits.",
            ),
            Self::ModelLoading => (
                "MODEL_LOADING",
                503,
                true,
                "The model is still being loaded; `/ready` says when it is there.",
            ),
            Self::InsufficientVram => (
                "INSUFFICIENT_VRAM",
                503,
                true,
                "The device has too little memory for the model and its cache; the worker exits.",
            ),
            Self::VramOom => (
                "VRAM_OOM",
                503,
                true,
                "The device ran out of memory at work.",
            ),
            Self::CudaError => (
                "CUDA_ERROR",
                500,
                true,
                "The CUDA device failed; the worker needs a restart.",
            ),
            Self::Draining => (
                "DRAINING",
                503,
                true,
                "The worker is shutting down and takes no new work.",
            ),
            Self::InferenceTimeout => (
                "INFERENCE_TIMEOUT",
                504,
                true,
                "The deadline came before the answer was whole.",
            ),
            Self::Internal => ("INTERNAL", 500, true, "Anything else that went wrong here."),
        }
    }

    pub fn name(self) -> &'static str {
        self.row().0
    }

    /// The HTTP status that says the same.
    pub fn status(self) -> u16 {
        self.row().1
    }

    /// The same request may succeed later, or on another worker.
    pub fn retriable(self) -> bool {
        self.row().2
    }

    pub fn meaning(self) -> &'static str {
        self.row().3
    }

    /// The table of the documentation, in Markdown.
    pub fn table() -> String {
        let mut table =
            "| code | status | retriable | meaning |\n| --- | ---: | --- | --- |\n".to_owned();
        for code in Self::ALL {
            let (name, status, retriable, meaning) = code.row();
            let retriable = if retriable { "yes" } else { "no" };
            table.push_str(&format!(
                "| `{name}` | {status} | {retriable} | {meaning} |\n"
            ));
        }
        table
    }
}

/// A failed request: a [`Code`] and a message for people. The message never holds a prompt's text.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub code: Code,
    pub message: String,
    /// Seconds after which to try again, where that is known.
    pub retry_after: Option<u64>,
}

impl Failure {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            retry_after: None,
        }
    }

    /// What a failure at work means to the client. `backend` is the device's
    /// ([`crate::device::DeviceInfo::backend`]).
    pub fn from_error(error: &Error, backend: &str) -> Self {
        let code = match error {
            Error::Request(_) => Code::InvalidRequest,
            Error::OutOfMemory { .. } => Code::VramOom,
            Error::Device { .. } if backend == "cuda" => Code::CudaError,
            _ => Code::Internal,
        };
        Self::new(code, error.to_string())
    }

    /// What a failure to load the model means.
    pub fn from_load_error(error: &Error) -> Self {
        let code = match error {
            Error::OutOfMemory { .. } => Code::InsufficientVram,
            _ => Code::ModelLoadFailed,
        };
        Self::new(code, error.to_string())
    }
}

impl serde::Serialize for Failure {
    /// `{code, message, retriable}`.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut s = serializer.serialize_struct("Failure", 3)?;
        s.serialize_field("code", &self.code)?;
        s.serialize_field("message", &self.message)?;
        s.serialize_field("retriable", &self.code.retriable())?;
        s.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_of_devices_and_of_memory_have_codes_of_their_own() {
        use super::super::fake::{device_failure, out_of_memory};
        let at_work = |error: Error, backend| Failure::from_error(&error, backend).code;
        assert_eq!(at_work(out_of_memory(), "cuda"), Code::VramOom);
        assert_eq!(at_work(device_failure(), "cuda"), Code::CudaError);
        assert_eq!(at_work(device_failure(), "cpu"), Code::Internal);
        let request = || Error::Request("no".to_owned());
        assert_eq!(at_work(request(), "cuda"), Code::InvalidRequest);
        let loading = |error: Error| Failure::from_load_error(&error).code;
        assert_eq!(loading(out_of_memory()), Code::InsufficientVram);
        assert_eq!(loading(device_failure()), Code::ModelLoadFailed);
        assert_eq!(loading(request()), Code::ModelLoadFailed);
    }

    #[test]
    fn names_are_those_on_the_wire() {
        for code in Code::ALL {
            assert_eq!(serde_json::to_value(code).unwrap(), code.name());
        }
    }
}
