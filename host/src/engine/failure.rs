//! What a client is told when a request cannot be served: one type for HTTP statuses and `error` events.

use crate::error::Error;

/// Why a request failed, as machines read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Code {
    /// The request itself is at fault; it would fail again.
    InvalidRequest,
    NotFound,
    MethodNotAllowed,
    PayloadTooLarge,
    /// The device ran out of memory.
    VramOom,
    /// The CUDA device failed.
    CudaError,
    /// Anything else that went wrong here.
    Internal,
}

impl Code {
    /// The HTTP status that says the same.
    pub fn status(self) -> u16 {
        match self {
            Self::InvalidRequest => 400,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::PayloadTooLarge => 413,
            Self::CudaError | Self::Internal => 500,
            Self::VramOom => 503,
        }
    }

    /// The same request may succeed later, or on another worker.
    pub fn retriable(self) -> bool {
        match self {
            Self::InvalidRequest
            | Self::NotFound
            | Self::MethodNotAllowed
            | Self::PayloadTooLarge => false,
            Self::VramOom | Self::CudaError | Self::Internal => true,
        }
    }
}

/// A failed request: a [`Code`] and a message for people. The message never holds a prompt's text.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub code: Code,
    pub message: String,
}

impl Failure {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// What the model's failure means to the client. `backend` is the device's
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
