//! Values as Python writes them: `str`, `repr`, `json.dumps`.

use std::fmt::Write as _;

use minijinja::Error;
use minijinja::value::{Value, ValueKind};

use super::limits::{ELEMENT, Meter, NESTING, refuse};

/// A string under construction, each byte of it charged before it is made.
pub(super) struct Text<'m> {
    text: String,
    meter: &'m Meter,
}

impl<'m> Text<'m> {
    pub fn new(meter: &'m Meter) -> Self {
        Self {
            text: String::new(),
            meter,
        }
    }

    pub fn push(&mut self, s: &str) -> Result<(), Error> {
        self.meter.charge(s.len())?;
        self.text.push_str(s);
        Ok(())
    }

    pub fn into_value(self) -> Value {
        Value::from(self.text)
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// `str(value)`; an undefined value is empty, as Jinja prints it.
    pub fn push_str_of(&mut self, value: &Value) -> Result<(), Error> {
        match value.as_str() {
            Some(s) => self.push(s),
            None => self.push_repr(value, 0),
        }
    }

    fn push_repr(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        check_depth(depth)?;
        match value.kind() {
            ValueKind::Undefined => Ok(()),
            ValueKind::None => self.push("None"),
            ValueKind::Bool => self.push(if value.is_true() { "True" } else { "False" }),
            ValueKind::Number => self.push(&number(value, "inf", "nan")),
            ValueKind::String => self.push(&quoted(value.as_str().unwrap_or_default())),
            ValueKind::Seq | ValueKind::Iterable => {
                self.push("[")?;
                for (i, item) in value.try_iter()?.enumerate() {
                    if i > 0 {
                        self.push(", ")?;
                    }
                    self.push_repr(&item, depth + 1)?;
                }
                self.push("]")
            }
            ValueKind::Map => {
                self.push("{")?;
                for (i, key) in value.try_iter()?.enumerate() {
                    if i > 0 {
                        self.push(", ")?;
                    }
                    self.push_repr(&key, depth + 1)?;
                    self.push(": ")?;
                    self.push_repr(&value.get_item(&key)?, depth + 1)?;
                }
                self.push("}")
            }
            _ => self.push(&value.to_string()),
        }
    }

    /// `json.dumps(value, ensure_ascii=False, …)`.
    pub fn push_json(&mut self, value: &Value, style: &JsonStyle) -> Result<(), Error> {
        self.push_json_at(value, style, 0)
    }

    fn push_json_at(
        &mut self,
        value: &Value,
        style: &JsonStyle,
        depth: usize,
    ) -> Result<(), Error> {
        check_depth(depth)?;
        match value.kind() {
            ValueKind::Undefined => Err(refuse("tojson: the value is undefined".into())),
            ValueKind::None => self.push("null"),
            ValueKind::Bool => self.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.push(&number(value, "Infinity", "NaN")),
            ValueKind::String => self.push(&json_string(
                value.as_str().unwrap_or_default(),
                style.ensure_ascii,
            )),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.push("[")?;
                for (i, item) in items.iter().enumerate() {
                    self.separate(style, i, depth + 1)?;
                    self.push_json_at(item, style, depth + 1)?;
                }
                self.close(style, items.is_empty(), depth)?;
                self.push("]")
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if style.sort_keys {
                    keys.sort();
                }
                self.push("{")?;
                for (i, key) in keys.iter().enumerate() {
                    self.separate(style, i, depth + 1)?;
                    let name = match key.as_str() {
                        Some(s) => s.to_owned(),
                        None if key.is_none() => "null".into(),
                        // JSON's spelling of numbers, `true` and `false`.
                        None => key.to_string(),
                    };
                    self.push(&json_string(&name, style.ensure_ascii))?;
                    self.push(&style.key_separator)?;
                    self.push_json_at(&value.get_item(key)?, style, depth + 1)?;
                }
                self.close(style, keys.is_empty(), depth)?;
                self.push("}")
            }
            kind => Err(refuse(format!(
                "tojson: a {kind} cannot be written as JSON"
            ))),
        }
    }

    fn separate(&mut self, style: &JsonStyle, index: usize, depth: usize) -> Result<(), Error> {
        if index > 0 {
            self.push(&style.item_separator)?;
        }
        self.break_line(style, depth)
    }

    fn close(&mut self, style: &JsonStyle, empty: bool, depth: usize) -> Result<(), Error> {
        if empty {
            return Ok(());
        }
        self.break_line(style, depth)
    }

    fn break_line(&mut self, style: &JsonStyle, depth: usize) -> Result<(), Error> {
        let Some(indent) = &style.indent else {
            return Ok(());
        };
        self.push("\n")?;
        (0..depth).try_for_each(|_| self.push(indent))
    }
}

/// The arguments of `json.dumps` that `tojson` takes.
pub(super) struct JsonStyle {
    pub indent: Option<String>,
    pub item_separator: String,
    pub key_separator: String,
    pub sort_keys: bool,
    pub ensure_ascii: bool,
}

/// Counts the elements in a value, lists in lists included; refuses too deep ones.
pub(super) fn weigh(value: &Value, meter: &Meter, depth: usize) -> Result<(), Error> {
    check_depth(depth)?;
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            for item in value.try_iter()? {
                meter.charge(ELEMENT)?;
                weigh(&item, meter, depth + 1)?;
            }
        }
        ValueKind::Map => {
            for key in value.try_iter()? {
                meter.charge(2 * ELEMENT)?;
                weigh(&value.get_item(&key)?, meter, depth + 1)?;
            }
        }
        _ => {}
    }
    Ok(())
}

fn check_depth(depth: usize) -> Result<(), Error> {
    if depth > NESTING {
        return Err(refuse(format!("lists are nested deeper than {NESTING}")));
    }
    Ok(())
}

/// `repr(float)` or `repr(int)`.
fn number(value: &Value, infinity: &str, nan: &str) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(x) = f64::try_from(value.clone()) else {
        return value.to_string();
    };
    if x.is_nan() {
        return nan.into();
    }
    if x.is_infinite() {
        return if x > 0.0 {
            infinity.into()
        } else {
            format!("-{infinity}")
        };
    }
    // Both languages find the shortest digits; Python switches to exponents at other places.
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        return format!("{x:?}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// `repr(str)`: single quotes unless only they occur inside.
fn quoted(s: &str) -> String {
    let quote = if s.contains('\'') && !s.contains('"') {
        '"'
    } else {
        '\''
    };
    let mut out = String::with_capacity(s.len() + 2);
    out.push(quote);
    for c in s.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

fn json_string(s: &str, ensure_ascii: bool) -> String {
    // Escapes exactly what Python escapes: quotes, backslashes and control characters.
    let plain = serde_json::Value::from(s).to_string();
    if !ensure_ascii || plain.is_ascii() {
        return plain;
    }
    let mut out = String::with_capacity(plain.len());
    for c in plain.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(out, "\\u{unit:04x}");
            }
        }
    }
    out
}
