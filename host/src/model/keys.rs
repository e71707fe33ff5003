//! Metadata of one architecture: keys by their suffix, checked.

use crate::error::{Error, Result};
use gguf::Gguf;

/// Reads `NAME.suffix` for the architecture `NAME` of a file.
pub struct Keys<'a> {
    file: &'a Gguf,
    architecture: &'a str,
}

impl<'a> Keys<'a> {
    pub fn new(file: &'a Gguf, architecture: &'a str) -> Self {
        Keys { file, architecture }
    }

    /// The whole key.
    pub fn name(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.architecture)
    }

    /// The error that the file is no model Kigo can run.
    pub fn bad(&self, what: String) -> Error {
        Error::Model {
            file: self.file.path().to_owned(),
            what,
        }
    }

    pub fn has_tensor(&self, name: &str) -> bool {
        self.file.tensor(name).is_some()
    }

    fn ranged(&self, suffix: &str, value: u64, max: usize) -> Result<usize> {
        match usize::try_from(value) {
            Ok(v) if v >= 1 && v <= max => Ok(v),
            _ => Err(self.bad(format!(
                "{} is {value}, expected 1 to {max}",
                self.name(suffix)
            ))),
        }
    }

    /// A whole number from 1 to `max`.
    ///
    /// # Errors
    /// It is missing, of another type or out of range; so below.
    pub fn required(&self, suffix: &str, max: usize) -> Result<usize> {
        let value = self.file.metadata().u64(&self.name(suffix))?;
        self.ranged(suffix, value, max)
    }

    pub fn optional(&self, suffix: &str, max: usize) -> Result<Option<usize>> {
        match self.file.metadata().opt_u64(&self.name(suffix))? {
            Some(value) => self.ranged(suffix, value, max).map(Some),
            None => Ok(None),
        }
    }

    /// A whole number of which 0 means that there is none.
    pub fn nonzero(&self, suffix: &str, max: usize) -> Result<Option<usize>> {
        match self.file.metadata().opt_u64(&self.name(suffix))? {
            None | Some(0) => Ok(None),
            Some(value) => self.ranged(suffix, value, max).map(Some),
        }
    }

    fn checked(&self, suffix: &str, value: f32) -> Result<f32> {
        if value.is_finite() && value > 0.0 {
            Ok(value)
        } else {
            Err(self.bad(format!(
                "{} is {value}, expected a positive finite number",
                self.name(suffix)
            )))
        }
    }

    /// A positive number.
    pub fn positive(&self, suffix: &str) -> Result<f32> {
        let value = self.file.metadata().f32(&self.name(suffix))?;
        self.checked(suffix, value)
    }

    pub fn positive_or(&self, suffix: &str, default: f32) -> Result<f32> {
        match self.file.metadata().opt_f32(&self.name(suffix))? {
            Some(value) => self.checked(suffix, value),
            None => Ok(default),
        }
    }

    /// A positive number, or `None` where it is missing or 0.
    pub fn positive_if_any(&self, suffix: &str) -> Result<Option<f32>> {
        match self.file.metadata().opt_f32(&self.name(suffix))? {
            None => Ok(None),
            Some(0.0) => Ok(None),
            Some(value) => self.checked(suffix, value).map(Some),
        }
    }

    pub fn opt_str(&self, suffix: &str) -> Result<Option<&'a str>> {
        Ok(self.file.metadata().opt_str(&self.name(suffix))?)
    }

    pub fn flag(&self, suffix: &str) -> Result<bool> {
        let flag = self.file.metadata().opt_bool(&self.name(suffix))?;
        Ok(flag.unwrap_or(false))
    }
}
