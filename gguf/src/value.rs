//! Metadata values: every type that the format has.

use std::fmt;

use serde::Serialize;

use crate::cursor::{Cursor, Detail};

/// How deep arrays may nest. No known writer nests at all; the limit keeps the parser's recursion
/// and the drop of the value shallow.
const MAX_NESTING: usize = 8;

/// Elements to reserve memory for before they are read: enough for any vocabulary, harmless if the
/// count lies.
const RESERVE: usize = 1 << 18;

/// The format's number of an array value.
const ARRAY: u32 = 9;
/// The format's number of a string value.
const STRING: u32 = 8;
/// The format's number of a bool value.
const BOOL: u32 = 7;

macro_rules! values {
    ($($variant:ident($ty:ty) = $id:literal;)*) => {
        /// One metadata value.
        #[derive(Clone, Debug, PartialEq, Serialize)]
        #[serde(untagged)]
        pub enum Value {
            $($variant($ty),)*
            Bool(bool),
            String(String),
            /// A string that is not valid UTF-8, as its bytes.
            Bytes(Vec<u8>),
            Array(Array),
        }

        /// A metadata array: all elements of one type.
        #[derive(Clone, Debug, PartialEq, Serialize)]
        #[serde(untagged)]
        pub enum Array {
            $($variant(Vec<$ty>),)*
            Bool(Vec<bool>),
            String(Vec<String>),
            /// An array of strings of which at least one is not valid UTF-8, all as bytes.
            Bytes(Vec<Vec<u8>>),
            Array(Vec<Array>),
        }

        $(
            impl From<$ty> for Value {
                fn from(value: $ty) -> Value {
                    Value::$variant(value)
                }
            }

            impl From<Vec<$ty>> for Value {
                fn from(value: Vec<$ty>) -> Value {
                    Value::Array(Array::$variant(value))
                }
            }
        )*

        impl Value {
            /// The format's number of this value's type.
            pub(crate) fn type_id(&self) -> u32 {
                match self {
                    $(Value::$variant(_) => $id,)*
                    Value::Bool(_) => BOOL,
                    Value::String(_) | Value::Bytes(_) => STRING,
                    Value::Array(_) => ARRAY,
                }
            }

            /// Reads a value of type `id`. `what` names the key in errors.
            pub(crate) fn read(id: u32, cursor: &mut Cursor<'_>, what: &dyn Fn() -> String) -> Result<Value, Detail> {
                Ok(match id {
                    $($id => {
                        let mut bytes = [0; size_of::<$ty>()];
                        bytes.copy_from_slice(cursor.take(size_of::<$ty>(), what)?);
                        Value::$variant(<$ty>::from_le_bytes(bytes))
                    })*
                    BOOL => Value::Bool(read_bool(cursor.take(1, what)?[0], what)?),
                    STRING => match String::from_utf8(cursor.string(what)?.to_vec()) {
                        Ok(s) => Value::String(s),
                        Err(e) => Value::Bytes(e.into_bytes()),
                    },
                    ARRAY => Value::Array(Array::read(cursor, what, 0)?),
                    _ => return Err(unknown_type(id, what)),
                })
            }

            /// Appends the value as the format has it, without its type.
            pub(crate) fn write(&self, out: &mut Vec<u8>) {
                match self {
                    $(Value::$variant(v) => out.extend_from_slice(&v.to_le_bytes()),)*
                    Value::Bool(v) => out.push(u8::from(*v)),
                    Value::String(s) => write_string(s.as_bytes(), out),
                    Value::Bytes(s) => write_string(s, out),
                    Value::Array(a) => a.write(out),
                }
            }
        }

        impl Array {
            fn read(cursor: &mut Cursor<'_>, what: &dyn Fn() -> String, depth: usize) -> Result<Array, Detail> {
                if depth >= MAX_NESTING {
                    return Err(format!("{} nests arrays deeper than {MAX_NESTING}", what()));
                }
                let id = cursor.u32(&|| format!("the element type of {}", what()))?;
                let count_of = || format!("the element count of {}", what());
                Ok(match id {
                    $($id => {
                        const SIZE: usize = size_of::<$ty>();
                        let count = cursor.count(SIZE, &count_of)?;
                        let bytes = cursor.take(count * SIZE, what)?;
                        Array::$variant(bytes.as_chunks::<SIZE>().0.iter().map(|b| <$ty>::from_le_bytes(*b)).collect())
                    })*
                    BOOL => {
                        let count = cursor.count(1, &count_of)?;
                        let bytes = cursor.take(count, what)?;
                        Array::Bool(bytes.iter().map(|b| read_bool(*b, what)).collect::<Result<_, _>>()?)
                    }
                    STRING => {
                        let count = cursor.count(8, &count_of)?;
                        read_strings(count, cursor, what)?
                    }
                    ARRAY => {
                        let count = cursor.count(12, &count_of)?;
                        Array::Array(
                            (0..count)
                                .map(|i| Array::read(cursor, &|| format!("{}[{i}]", what()), depth + 1))
                                .collect::<Result<_, _>>()?,
                        )
                    }
                    _ => return Err(unknown_type(id, &|| format!("an element of {}", what()))),
                })
            }

            fn write(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.element_type_id().to_le_bytes());
                out.extend_from_slice(&(self.len() as u64).to_le_bytes());
                match self {
                    $(Array::$variant(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),)*
                    Array::Bool(v) => v.iter().for_each(|x| out.push(u8::from(*x))),
                    Array::String(v) => v.iter().for_each(|s| write_string(s.as_bytes(), out)),
                    Array::Bytes(v) => v.iter().for_each(|s| write_string(s, out)),
                    Array::Array(v) => v.iter().for_each(|a| a.write(out)),
                }
            }

            fn element_type_id(&self) -> u32 {
                match self {
                    $(Array::$variant(_) => $id,)*
                    Array::Bool(_) => BOOL,
                    Array::String(_) | Array::Bytes(_) => STRING,
                    Array::Array(_) => ARRAY,
                }
            }

            /// Number of elements.
            pub fn len(&self) -> usize {
                match self {
                    $(Array::$variant(v) => v.len(),)*
                    Array::Bool(v) => v.len(),
                    Array::String(v) => v.len(),
                    Array::Bytes(v) => v.len(),
                    Array::Array(v) => v.len(),
                }
            }

            /// A copy of element `i`; none past the end.
            pub fn get(&self, i: usize) -> Option<Value> {
                Some(match self {
                    $(Array::$variant(v) => Value::$variant(*v.get(i)?),)*
                    Array::Bool(v) => Value::Bool(*v.get(i)?),
                    Array::String(v) => Value::String(v.get(i)?.clone()),
                    Array::Bytes(v) => Value::Bytes(v.get(i)?.clone()),
                    Array::Array(v) => Value::Array(v.get(i)?.clone()),
                })
            }
        }
    };
}

values! {
    U8(u8) = 0;
    I8(i8) = 1;
    U16(u16) = 2;
    I16(i16) = 3;
    U32(u32) = 4;
    I32(i32) = 5;
    F32(f32) = 6;
    U64(u64) = 10;
    I64(i64) = 11;
    F64(f64) = 12;
}

impl From<bool> for Value {
    fn from(value: bool) -> Value {
        Value::Bool(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Value {
        Value::String(value.to_owned())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Value {
        Value::String(value)
    }
}

impl From<Vec<String>> for Value {
    fn from(value: Vec<String>) -> Value {
        Value::Array(Array::String(value))
    }
}

impl Value {
    /// The type's name: "u32", "string", "array of 3 f32".
    pub fn type_name(&self) -> String {
        match self {
            Value::Array(a) => format!("array of {} {}", a.len(), a.element_type_name()),
            scalar => type_name(scalar.type_id()).to_owned(),
        }
    }

    /// The value of any integer type; none of other types.
    pub fn as_integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            _ => return None,
        })
    }
}

impl Array {
    /// True without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements' type: "u32", "string", "array".
    pub fn element_type_name(&self) -> &'static str {
        type_name(self.element_type_id())
    }
}

/// One line, strings escaped and shortened, of arrays the first elements.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 6;
        match self {
            Value::U8(v) => v.fmt(f),
            Value::I8(v) => v.fmt(f),
            Value::U16(v) => v.fmt(f),
            Value::I16(v) => v.fmt(f),
            Value::U32(v) => v.fmt(f),
            Value::I32(v) => v.fmt(f),
            Value::U64(v) => v.fmt(f),
            Value::I64(v) => v.fmt(f),
            // Debug prints 1e-6 as 1e-6 and 10000 as 10000.0: short, and plainly a float.
            Value::F32(v) => write!(f, "{v:?}"),
            Value::F64(v) => write!(f, "{v:?}"),
            Value::Bool(v) => v.fmt(f),
            Value::String(s) => f.write_str(&crate::error::quote(s)),
            Value::Bytes(b) => {
                f.write_str("b")?;
                f.write_str(&crate::error::quote(&String::from_utf8_lossy(b)))
            }
            Value::Array(a) => {
                f.write_str("[")?;
                for i in 0..a.len().min(SHOWN) {
                    if i > 0 {
                        f.write_str(", ")?;
                    }
                    if let Some(v) = a.get(i) {
                        v.fmt(f)?;
                    }
                }
                if a.len() > SHOWN {
                    write!(f, ", ... {} more", a.len() - SHOWN)?;
                }
                f.write_str("]")
            }
        }
    }
}

fn type_name(id: u32) -> &'static str {
    match id {
        0 => "u8",
        1 => "i8",
        2 => "u16",
        3 => "i16",
        4 => "u32",
        5 => "i32",
        6 => "f32",
        BOOL => "bool",
        STRING => "string",
        ARRAY => "array",
        10 => "u64",
        11 => "i64",
        12 => "f64",
        _ => "unknown",
    }
}

fn unknown_type(id: u32, what: &dyn Fn() -> String) -> Detail {
    format!(
        "{} has value type {id}; the format has types 0 to 12",
        what()
    )
}

fn read_bool(byte: u8, what: &dyn Fn() -> String) -> Result<bool, Detail> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(format!(
            "{} is a bool stored as {byte}, expected 0 or 1",
            what()
        )),
    }
}

/// `count` strings; all of them as bytes as soon as one is not UTF-8.
fn read_strings(
    count: usize,
    cursor: &mut Cursor<'_>,
    what: &dyn Fn() -> String,
) -> Result<Array, Detail> {
    let mut strings = Vec::with_capacity(count.min(RESERVE));
    let mut bytes: Option<Vec<Vec<u8>>> = None;
    for i in 0..count {
        let raw = cursor.string(&|| format!("{}[{i}]", what()))?.to_vec();
        match &mut bytes {
            Some(all) => all.push(raw),
            None => match String::from_utf8(raw) {
                Ok(s) => strings.push(s),
                Err(e) => {
                    let mut all: Vec<Vec<u8>> = std::mem::take(&mut strings)
                        .into_iter()
                        .map(String::into_bytes)
                        .collect();
                    all.push(e.into_bytes());
                    bytes = Some(all);
                }
            },
        }
    }
    Ok(match bytes {
        Some(all) => Array::Bytes(all),
        None => Array::String(strings),
    })
}

pub(crate) fn write_string(s: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&(s.len() as u64).to_le_bytes());
    out.extend_from_slice(s);
}
