//! What templates can call: Jinja's filters and Python's methods, metered where they make text.

use std::fmt::Write as _;
use std::sync::Arc;

use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, filters};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::limits::{self, ELEMENT, Meter, refuse};
use super::python::{JsonStyle, Text, weigh};

/// Operators and the weighing of results, as filters under names that no template can spell.
pub(super) const ADD: &str = "+";
pub(super) const MULTIPLY: &str = "*";
pub(super) const CONCAT: &str = "~";
pub(super) const WEIGH: &str = "weigh!";

/// An environment for one rendering.
pub(super) fn environment(meter: &Arc<Meter>) -> Environment<'static> {
    let mut env = Environment::new();
    env.set_fuel(Some(limits::FUEL));
    env.set_recursion_limit(limits::RECURSION);

    let m = Arc::clone(meter);
    env.set_formatter(move |out: &mut Output, _: &State, value: &Value| {
        let mut text = Text::new(&m);
        text.push_str_of(value)?;
        out.write_str(text.as_str()).map_err(Error::from)
    });
    let m = Arc::clone(meter);
    env.set_unknown_method_callback(move |state, value, method, args| {
        call_method(&m, state, value, method, args)
    });

    let m = Arc::clone(meter);
    env.add_filter(ADD, move |state: &State, a: &Value, b: &Value| {
        add(&m, state, a, b)
    });
    let m = Arc::clone(meter);
    env.add_filter(MULTIPLY, move |a: &Value, b: &Value| multiply(&m, a, b));
    let m = Arc::clone(meter);
    env.add_filter(CONCAT, move |a: &Value, b: &Value| {
        let mut text = Text::new(&m);
        text.push_str_of(a)?;
        text.push_str_of(b)?;
        Ok::<_, Error>(text.into_value())
    });
    let m = Arc::clone(meter);
    env.add_filter(WEIGH, move |value: &Value| {
        m.charge(value.as_str().map_or(1, str::len))?;
        weigh(value, &m, 0)?;
        Ok::<_, Error>(value.clone())
    });

    // Without bounds on what they make, and no template needs them.
    for name in [
        "format", "pprint", "batch", "slice", "zip", "chain", "groupby",
    ] {
        env.remove_filter(name);
    }
    env.remove_global("debug");

    let m = Arc::clone(meter);
    env.add_filter("tojson", move |value: &Value, args: Kwargs| {
        tojson(&m, value, &args)
    });
    let m = Arc::clone(meter);
    env.add_filter("string", move |value: &Value| string_of(&m, value));
    let m = Arc::clone(meter);
    env.add_filter("list", move |value: Value| list(&m, &value));
    let m = Arc::clone(meter);
    env.add_filter(
        "join",
        move |value: &Value, separator: Option<String>, attribute: Option<Kwargs>| {
            if let Some(kwargs) = attribute {
                kwargs.assert_all_used()?;
            }
            join(&m, value, separator.as_deref().unwrap_or_default())
        },
    );
    let m = Arc::clone(meter);
    env.add_filter(
        "replace",
        move |value: &Value, old: String, new: String, count: Option<usize>| {
            let text = string_of(&m, value)?;
            replace(&m, text.as_str().unwrap_or_default(), &old, &new, count)
        },
    );
    let m = Arc::clone(meter);
    env.add_filter("indent", move |value: &Value, args: Rest<Value>| {
        indent(&m, value, &args)
    });
    add_text_filters(&mut env, meter);
    // As Python has it: strings and dicts are sequences, None is not even iterable.
    env.add_test("iterable", |value: &Value| {
        !matches!(
            value.kind(),
            ValueKind::None | ValueKind::Bool | ValueKind::Number
        )
    });
    env.add_test("sequence", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::Seq | ValueKind::Map | ValueKind::String
        )
    });

    let m = Arc::clone(meter);
    env.add_function(
        "raise_exception",
        move |message: String| -> Result<Value, Error> { Err(m.raise(&message)) },
    );
    env.add_function("strftime_now", |format: String| {
        strftime(&jiff::Zoned::now(), &format)
    });
    env
}

/// Filters of text to no more text: what is not text is printed under the meter first.
fn add_text_filters(env: &mut Environment<'static>, meter: &Arc<Meter>) {
    type Change = fn(&str) -> String;
    let simple: [(&str, Change); 6] = [
        ("upper", |s| s.to_uppercase()),
        ("lower", |s| s.to_lowercase()),
        ("title", |s| filters::title(s.into())),
        ("capitalize", capitalize),
        ("safe", str::to_owned),
        ("e", escape_html),
    ];
    for (name, change) in simple {
        let m = Arc::clone(meter);
        env.add_filter(name, move |value: &Value| {
            let text = string_of(&m, value)?;
            Ok::<_, Error>(Value::from(change(text.as_str().unwrap_or_default())))
        });
    }
    let m = Arc::clone(meter);
    env.add_filter("escape", move |value: &Value| {
        let text = string_of(&m, value)?;
        Ok::<_, Error>(Value::from(escape_html(text.as_str().unwrap_or_default())))
    });
    let m = Arc::clone(meter);
    env.add_filter("trim", move |value: &Value, chars: Option<String>| {
        let text = string_of(&m, value)?;
        let text = text.as_str().unwrap_or_default();
        Ok::<_, Error>(Value::from(match chars {
            Some(chars) => text.trim_matches(&chars.chars().collect::<Vec<_>>()[..]),
            None => text.trim(),
        }))
    });
    let m = Arc::clone(meter);
    env.add_filter(
        "split",
        move |value: &Value, separator: Option<String>, limit: Option<i64>| {
            let text = string_of(&m, value)?;
            m.charge(text.as_str().map_or(0, str::len).saturating_mul(ELEMENT))?;
            filters::split(&text, separator.map(Into::into), limit)
        },
    );
}

fn capitalize(s: &str) -> String {
    let mut chars = s.chars();
    chars.next().map_or_else(String::new, |first| {
        first
            .to_uppercase()
            .chain(chars.flat_map(char::to_lowercase))
            .collect()
    })
}

fn escape_html(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    for c in s.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&#34;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// `str(value)`, charged unless it is a string already.
fn string_of(meter: &Meter, value: &Value) -> Result<Value, Error> {
    if value.kind() == ValueKind::String {
        return Ok(value.clone());
    }
    let mut text = Text::new(meter);
    text.push_str_of(value)?;
    Ok(text.into_value())
}

/// Python methods that minijinja does not have.
fn call_method(
    meter: &Meter,
    state: &State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let text = |i: usize| args.get(i).and_then(Value::as_str);
    match (value.as_str(), method) {
        // Width specifications make much text out of little.
        (Some(_), "format") => Err(Error::from(ErrorKind::UnknownMethod)),
        (Some(s), "join") => match args {
            [items] => join(meter, items, s),
            _ => Err(refuse("join takes one list".into())),
        },
        (Some(s), "replace") => {
            let (Some(old), Some(new)) = (text(0), text(1)) else {
                return Err(refuse("replace takes two strings".into()));
            };
            let count = args.get(2).and_then(|n| n.as_usize());
            replace(meter, s, old, new, count)
        }
        // The callback would count the empty string for ever.
        (Some(s), "count") if text(0) == Some("") => Ok(Value::from(s.chars().count() + 1)),
        (Some(s), "split" | "splitlines") => {
            meter.charge(s.len().saturating_mul(ELEMENT))?;
            unknown_method_callback(state, value, method, args)
        }
        (Some(s), "removeprefix") => {
            Ok(text(0).and_then(|p| s.strip_prefix(p)).unwrap_or(s).into())
        }
        (Some(s), "removesuffix") => {
            Ok(text(0).and_then(|p| s.strip_suffix(p)).unwrap_or(s).into())
        }
        _ => unknown_method_callback(state, value, method, args),
    }
}

fn add(meter: &Meter, state: &State, a: &Value, b: &Value) -> Result<Value, Error> {
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        let mut text = Text::new(meter);
        text.push(a)?;
        text.push(b)?;
        return Ok(text.into_value());
    }
    let list = |v: &Value| matches!(v.kind(), ValueKind::Seq | ValueKind::Iterable);
    if list(a) && list(b) {
        let mut items = Vec::new();
        for item in a.try_iter()?.chain(b.try_iter()?) {
            meter.charge(ELEMENT)?;
            items.push(item);
        }
        return Ok(Value::from(items));
    }
    if a.is_number() && b.is_number() {
        // Numbers make no text: the engine's own addition.
        let sum = state.env().compile_expression("a + b")?;
        return sum.eval(minijinja::context! { a, b });
    }
    Err(unsupported("+", a, b))
}

fn multiply(meter: &Meter, a: &Value, b: &Value) -> Result<Value, Error> {
    let (items, times) = if a.is_number() { (b, a) } else { (a, b) };
    if items.is_number() && times.is_number() {
        return match (a.is_integer(), b.is_integer()) {
            (true, true) => i128::try_from(a.clone())?
                .checked_mul(i128::try_from(b.clone())?)
                .map(|n| i64::try_from(n).map_or_else(|_| Value::from(n), Value::from))
                .ok_or_else(|| refuse(format!("{a} * {b} is out of range"))),
            _ => Ok(Value::from(
                f64::try_from(a.clone())? * f64::try_from(b.clone())?,
            )),
        };
    }
    if !times.is_integer() {
        return Err(unsupported("*", a, b));
    }
    // Python repeats a negative number of times like none.
    let n = usize::try_from(i128::try_from(times.clone())?.max(0)).unwrap_or(usize::MAX);
    match items.kind() {
        ValueKind::String => {
            let s = items.as_str().unwrap_or_default();
            meter.charge(s.len().saturating_mul(n))?;
            Ok(Value::from(s.repeat(n)))
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let one: Vec<Value> = items.try_iter()?.collect();
            meter.charge(one.len().saturating_mul(n).saturating_mul(ELEMENT))?;
            // Nothing, however often, is nothing.
            let n = if one.is_empty() { 0 } else { n };
            Ok(std::iter::repeat_n(one, n).flatten().collect())
        }
        _ => Err(unsupported("*", a, b)),
    }
}

fn unsupported(operator: &str, a: &Value, b: &Value) -> Error {
    let undefined = a.is_undefined() || b.is_undefined();
    let kind = if undefined {
        ErrorKind::UndefinedError
    } else {
        ErrorKind::InvalidOperation
    };
    Error::new(
        kind,
        format!(
            "unsupported operands of {operator}: {} and {}",
            a.kind(),
            b.kind()
        ),
    )
}

fn list(meter: &Meter, value: &Value) -> Result<Value, Error> {
    if value.is_undefined() || value.is_none() {
        return Ok(Value::from(Vec::<Value>::new()));
    }
    let mut items = Vec::new();
    for item in value.try_iter()? {
        meter.charge(ELEMENT)?;
        items.push(item);
    }
    Ok(Value::from(items))
}

fn join(meter: &Meter, items: &Value, separator: &str) -> Result<Value, Error> {
    let mut text = Text::new(meter);
    for (i, item) in items.try_iter()?.enumerate() {
        if i > 0 {
            text.push(separator)?;
        }
        text.push_str_of(&item)?;
    }
    Ok(text.into_value())
}

fn replace(
    meter: &Meter,
    s: &str,
    old: &str,
    new: &str,
    count: Option<usize>,
) -> Result<Value, Error> {
    let count = count.unwrap_or(usize::MAX);
    let found = s.matches(old).take(count).count();
    meter.charge(found.saturating_mul(new.len()).saturating_add(s.len()))?;
    Ok(Value::from(s.replacen(old, new, count)))
}

/// Jinja2's `indent(width=4, first=False, blank=False)`.
fn indent(meter: &Meter, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let (kwargs, args) = match args.split_last() {
        Some((last, rest)) if last.is_kwargs() => (Kwargs::try_from(last.clone())?, rest),
        _ => (Kwargs::from_iter(std::iter::empty::<(&str, Value)>()), args),
    };
    let arg = |i: usize, name: &str| -> Result<Option<Value>, Error> {
        Ok(match args.get(i) {
            Some(v) => Some(v.clone()),
            None => kwargs.get::<Option<Value>>(name)?,
        })
    };
    let width = arg(0, "width")?.unwrap_or_else(|| Value::from(4));
    let margin = match width.as_str() {
        Some(s) => Value::from(s),
        None => multiply(meter, &Value::from(" "), &width)?,
    };
    let first = arg(1, "first")?.is_some_and(|v| v.is_true());
    let blank = arg(2, "blank")?.is_some_and(|v| v.is_true());
    kwargs.assert_all_used()?;
    let source = string_of(meter, value)?;
    let mut text = Text::new(meter);
    for (i, line) in source.as_str().unwrap_or_default().split('\n').enumerate() {
        if i > 0 {
            text.push("\n")?;
        }
        if (i > 0 || first) && (blank || !line.is_empty()) {
            text.push(margin.as_str().unwrap_or_default())?;
        }
        text.push(line)?;
    }
    Ok(text.into_value())
}

/// `tojson(indent=None, separators=None, sort_keys=False, ensure_ascii=False)`, transformers' own.
fn tojson(meter: &Meter, value: &Value, args: &Kwargs) -> Result<Value, Error> {
    let indent = match args.get::<Option<Value>>("indent")? {
        None => None,
        Some(v) if v.is_none() => None,
        Some(v) => Some(match v.as_str() {
            Some(s) => s.to_owned(),
            None => multiply(meter, &Value::from(" "), &v)?
                .as_str()
                .unwrap_or_default()
                .to_owned(),
        }),
    };
    // Python leaves out the space after a comma at the end of a line.
    let mut item_separator = if indent.is_some() { "," } else { ", " }.to_owned();
    let mut key_separator = ": ".to_owned();
    if let Some(separators) = args
        .get::<Option<Value>>("separators")?
        .filter(|v| !v.is_none())
    {
        let parts: Vec<Value> = separators.try_iter()?.collect();
        let [item, key] = parts.as_slice() else {
            return Err(refuse("tojson: separators are two strings".into()));
        };
        item_separator = item.to_string();
        key_separator = key.to_string();
    }
    let style = JsonStyle {
        indent,
        item_separator,
        key_separator,
        sort_keys: args.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ensure_ascii: args.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    args.assert_all_used()?;
    let mut text = Text::new(meter);
    text.push_json(value, &style)?;
    Ok(text.into_value())
}

/// `datetime.now().strftime(format)`.
fn strftime(now: &jiff::Zoned, format: &str) -> Result<String, Error> {
    // A width in a directive makes much text out of little; Python has none.
    let widths = format
        .split('%')
        .skip(1)
        .any(|d| d.starts_with(|c: char| c.is_ascii_digit()));
    let mut out = String::new();
    if widths || write!(out, "{}", now.strftime(format)).is_err() {
        return Err(refuse(format!(
            "strftime_now: {format:?} is no format of dates"
        )));
    }
    Ok(out)
}
