//! The key-value pairs of a file, with typed getters.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::error::quote;
use crate::{Array, Error, Value};

/// A file's metadata, in file order.
///
/// The typed getters return an error that names the file, the key, what was found and what was
/// expected. Integer getters take any integer type whose value fits; float getters take f32 and
/// f64. The `opt_` forms return none for a missing key, but still an error for a wrong one.
#[derive(Debug, Clone)]
pub struct Metadata {
    path: PathBuf,
    entries: Vec<(String, Value)>,
    index: HashMap<String, usize>,
}

/// A typed getter and its `opt_` form, from a conversion.
macro_rules! getters {
    ($($(#[$doc:meta])* $name:ident, $opt:ident -> $ty:ty = $convert:expr, $expected:literal;)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Errors
            /// The key is missing, or its value is something else.
            pub fn $name(&self, key: &str) -> Result<$ty, Error> {
                self.$opt(key)?.ok_or_else(|| self.missing(key, $expected))
            }

            $(#[$doc])*
            /// None if the key is missing.
            ///
            /// # Errors
            /// The value is something else.
            pub fn $opt(&self, key: &str) -> Result<Option<$ty>, Error> {
                let Some(value) = self.get(key) else {
                    return Ok(None);
                };
                let convert: fn(&Value) -> Option<$ty> = $convert;
                match convert(value) {
                    Some(v) => Ok(Some(v)),
                    None => Err(self.wrong(key, value, $expected)),
                }
            }
        )*
    };
}

impl Metadata {
    /// Metadata made of pairs; `path` is what errors name.
    ///
    /// # Errors
    /// A key occurs twice.
    pub fn new(path: impl Into<PathBuf>, entries: Vec<(String, Value)>) -> Result<Metadata, Error> {
        let path = path.into();
        let mut index = HashMap::with_capacity(entries.len());
        for (i, (key, _)) in entries.iter().enumerate() {
            if index.insert(key.clone(), i).is_some() {
                let detail = format!("metadata key {} occurs twice", quote(key));
                return Err(Error::Malformed { path, detail });
            }
        }
        Ok(Metadata {
            path,
            entries,
            index,
        })
    }

    /// The pairs in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries
            .iter()
            .map(|(key, value)| (key.as_str(), value))
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True without pairs.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The value of a key, whatever its type.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|&i| &self.entries[i].1)
    }

    /// The file that the pairs came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    getters! {
        /// An integer that fits u32.
        u32, opt_u32 -> u32 = |v| v.as_integer()?.try_into().ok(), "an integer from 0 to 4294967295";
        /// An integer that fits u64.
        u64, opt_u64 -> u64 = |v| v.as_integer()?.try_into().ok(), "an integer of 0 or more";
        /// An integer that fits i32.
        i32, opt_i32 -> i32 = |v| v.as_integer()?.try_into().ok(), "an integer that fits 32 bits with sign";
        /// An f32; an f64 is rounded to f32.
        f32, opt_f32 -> f32 = |v| match v {
            Value::F32(x) => Some(*x),
            Value::F64(x) => Some(*x as f32),
            _ => None,
        }, "an f32";
        /// A bool.
        bool, opt_bool -> bool = |v| match v {
            Value::Bool(b) => Some(*b),
            _ => None,
        }, "a bool";
    }

    /// A string of valid UTF-8.
    ///
    /// # Errors
    /// The key is missing, or its value is something else.
    pub fn str(&self, key: &str) -> Result<&str, Error> {
        self.opt_str(key)?
            .ok_or_else(|| self.missing(key, "a string"))
    }

    /// A string of valid UTF-8; none if the key is missing.
    ///
    /// # Errors
    /// The value is something else.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(self.wrong(key, other, "a string of valid UTF-8")),
        }
    }

    /// An array of strings, all valid UTF-8.
    ///
    /// # Errors
    /// The key is missing, or its value is something else; the first string that is not UTF-8 is
    /// named by its index.
    pub fn strings(&self, key: &str) -> Result<&[String], Error> {
        self.opt_strings(key)?
            .ok_or_else(|| self.missing(key, "an array of strings"))
    }

    /// An array of strings, all valid UTF-8; none if the key is missing.
    ///
    /// # Errors
    /// As [`Metadata::strings`], but for a missing key.
    pub fn opt_strings(&self, key: &str) -> Result<Option<&[String]>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::String(v))) => Ok(Some(v)),
            Some(Value::Array(Array::Bytes(v))) => {
                let bad = v
                    .iter()
                    .enumerate()
                    .find(|(_, b)| std::str::from_utf8(b).is_err());
                let detail = match bad {
                    Some((i, bytes)) => format!(
                        "holds at index {i} the bytes {}, which are not valid UTF-8",
                        quote(&bytes.escape_ascii().to_string())
                    ),
                    None => "is an array of byte strings, expected strings".to_owned(),
                };
                Err(self.key_error(key, detail))
            }
            Some(other) => Err(self.wrong(key, other, "an array of strings")),
        }
    }

    /// An array of strings as raw bytes, valid UTF-8 or not; none if the key is missing.
    ///
    /// # Errors
    /// The value is no array of strings.
    pub fn opt_byte_strings(&self, key: &str) -> Result<Option<Vec<&[u8]>>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::String(v))) => {
                Ok(Some(v.iter().map(|s| s.as_bytes()).collect()))
            }
            Some(Value::Array(Array::Bytes(v))) => Ok(Some(v.iter().map(Vec::as_slice).collect())),
            Some(other) => Err(self.wrong(key, other, "an array of strings")),
        }
    }

    /// An array of f32 (f64 is rounded).
    ///
    /// # Errors
    /// The key is missing, or its value is something else.
    pub fn f32s(&self, key: &str) -> Result<Cow<'_, [f32]>, Error> {
        self.opt_f32s(key)?
            .ok_or_else(|| self.missing(key, "an array of f32"))
    }

    /// An array of f32 (f64 is rounded); none if the key is missing.
    ///
    /// # Errors
    /// The value is something else.
    pub fn opt_f32s(&self, key: &str) -> Result<Option<Cow<'_, [f32]>>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::F32(v))) => Ok(Some(Cow::Borrowed(v))),
            Some(Value::Array(Array::F64(v))) => Ok(Some(v.iter().map(|&x| x as f32).collect())),
            Some(other) => Err(self.wrong(key, other, "an array of f32")),
        }
    }

    /// An array of integers that fit i32.
    ///
    /// # Errors
    /// The key is missing, or its value is something else.
    pub fn i32s(&self, key: &str) -> Result<Cow<'_, [i32]>, Error> {
        self.opt_i32s(key)?
            .ok_or_else(|| self.missing(key, "an array of integers"))
    }

    /// An array of integers that fit i32; none if the key is missing.
    ///
    /// # Errors
    /// The value is something else.
    pub fn opt_i32s(&self, key: &str) -> Result<Option<Cow<'_, [i32]>>, Error> {
        match self.get(key) {
            Some(Value::Array(Array::I32(v))) => Ok(Some(Cow::Borrowed(v))),
            _ => self.integers(key).map(|v| v.map(Cow::Owned)),
        }
    }

    /// An array of integers that fit u32.
    ///
    /// # Errors
    /// The key is missing, or its value is something else.
    pub fn u32s(&self, key: &str) -> Result<Cow<'_, [u32]>, Error> {
        self.opt_u32s(key)?
            .ok_or_else(|| self.missing(key, "an array of integers"))
    }

    /// An array of integers that fit u32; none if the key is missing.
    ///
    /// # Errors
    /// The value is something else.
    pub fn opt_u32s(&self, key: &str) -> Result<Option<Cow<'_, [u32]>>, Error> {
        match self.get(key) {
            Some(Value::Array(Array::U32(v))) => Ok(Some(Cow::Borrowed(v))),
            _ => self.integers(key).map(|v| v.map(Cow::Owned)),
        }
    }

    /// An array of bytes, signed ones by their bits; none if the key is missing.
    ///
    /// # Errors
    /// The value is something else.
    pub fn opt_u8s(&self, key: &str) -> Result<Option<Cow<'_, [u8]>>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::U8(v))) => Ok(Some(Cow::Borrowed(v))),
            Some(Value::Array(Array::I8(v))) => Ok(Some(v.iter().map(|&b| b as u8).collect())),
            Some(other) => Err(self.wrong(key, other, "an array of u8")),
        }
    }

    fn integers<T: TryFrom<i128>>(&self, key: &str) -> Result<Option<Vec<T>>, Error> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let Value::Array(array) = value else {
            return Err(self.wrong(key, value, "an array of integers"));
        };
        (0..array.len())
            .map(|i| {
                let element = array.get(i);
                let fits = element
                    .as_ref()
                    .and_then(|v| v.as_integer()?.try_into().ok());
                fits.ok_or_else(|| {
                    let found = element.map_or("nothing".to_owned(), |v| describe(&v));
                    self.key_error(
                        key,
                        format!(
                            "holds at index {i} {found}, expected an integer that fits {}",
                            std::any::type_name::<T>()
                        ),
                    )
                })
            })
            .collect::<Result<_, _>>()
            .map(Some)
    }

    fn missing(&self, key: &str, expected: &str) -> Error {
        self.key_error(key, format!("is missing, expected {expected}"))
    }

    fn wrong(&self, key: &str, found: &Value, expected: &str) -> Error {
        self.key_error(key, format!("is {}, expected {expected}", describe(found)))
    }

    fn key_error(&self, key: &str, detail: String) -> Error {
        Error::Key {
            path: self.path.clone(),
            key: key.to_owned(),
            detail,
        }
    }
}

/// Type and value of what was found: `i32 -1`, `array of 2 string ["a", "b"]`.
fn describe(value: &Value) -> String {
    format!("{} {value}", value.type_name())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Metadata {
        let entries = vec![
            ("a".into(), Value::U8(7)),
            ("b".into(), Value::I32(-1)),
            ("c".into(), Value::F64(0.5)),
            ("d".into(), "text".into()),
            ("e".into(), vec![1i64, 2, 3].into()),
            ("f".into(), vec![1u32, 2].into()),
            (
                "g".into(),
                Value::Array(Array::Bytes(vec![b"ok".to_vec(), b"\xff".to_vec()])),
            ),
            ("h".into(), Value::U64(u64::MAX)),
        ];
        Metadata::new("m.gguf", entries).unwrap()
    }

    #[test]
    fn integers_of_any_type_that_fit() {
        let m = sample();
        assert_eq!(m.u32("a").unwrap(), 7);
        assert_eq!(m.i32("b").unwrap(), -1);
        assert_eq!(m.u64("h").unwrap(), u64::MAX);
        assert_eq!(&*m.u32s("e").unwrap(), [1, 2, 3]);
        assert!(matches!(m.u32s("f").unwrap(), Cow::Borrowed(_)));
        assert_eq!(m.f32("c").unwrap(), 0.5);
        assert_eq!(m.opt_u32("nope").unwrap(), None);
    }

    #[test]
    fn errors_name_file_key_found_and_expected() {
        let m = sample();
        assert_eq!(
            m.u32("b").unwrap_err().to_string(),
            "m.gguf: metadata key \"b\" is i32 -1, expected an integer from 0 to 4294967295"
        );
        assert_eq!(
            m.str("nope").unwrap_err().to_string(),
            "m.gguf: metadata key \"nope\" is missing, expected a string"
        );
        assert!(
            m.opt_u32("d")
                .unwrap_err()
                .to_string()
                .contains("string \"text\"")
        );
        assert!(m.u32("h").is_err() && m.strings("d").is_err() && m.f32("a").is_err());
    }

    #[test]
    fn strings_that_are_not_utf8_stay_reachable() {
        let m = sample();
        assert!(m.strings("g").unwrap_err().to_string().contains("index 1"));
        assert_eq!(
            m.opt_byte_strings("g").unwrap().unwrap(),
            [&b"ok"[..], b"\xff"]
        );
    }

    #[test]
    fn bytes_may_be_signed() {
        let entries = vec![
            ("a".into(), vec![1u8, 255].into()),
            ("b".into(), vec![1i8, -1].into()),
            ("c".into(), vec![1i32].into()),
        ];
        let m = Metadata::new("m.gguf", entries).unwrap();
        assert_eq!(m.opt_u8s("a").unwrap().as_deref(), Some(&[1, 255][..]));
        assert_eq!(m.opt_u8s("b").unwrap().as_deref(), Some(&[1, 255][..]));
        assert_eq!(m.opt_u8s("nope").unwrap(), None);
        let error = m.opt_u8s("c").unwrap_err().to_string();
        assert!(error.contains("expected an array of u8"), "{error}");
    }

    #[test]
    fn a_key_may_occur_once() {
        let twice = vec![("a".into(), Value::U8(1)), ("a".into(), Value::U8(2))];
        assert!(
            Metadata::new("m.gguf", twice)
                .unwrap_err()
                .to_string()
                .contains("\"a\" occurs twice")
        );
    }
}
