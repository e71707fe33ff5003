//! `kigo tensor FILE NAME`: a tensor's values.

use std::io::{self, Write};

use gguf::{Gguf, Tensor};

use super::inspect::{Plain, dims};
use crate::error::{Error, Result};

/// Prints the dequantised values of a tensor: `count` of them (all that follow, if none) from
/// element `offset` of the flat, row-major array on.
///
/// With `json` one object `{"name","type","dims","offset","values"}`; each value is the f32 as an
/// exact double, and those that JSON has no number for are "NaN", "Infinity", "-Infinity".
///
/// # Errors
/// There is no such tensor, the elements are not in it, its type cannot be dequantised, or `out`
/// fails. Nothing is printed before the request is known to be good.
pub fn tensor(
    file: &Gguf,
    name: &str,
    offset: u64,
    count: Option<u64>,
    json: bool,
    out: &mut (impl Write + ?Sized),
) -> Result<()> {
    const CHUNK: usize = 4096;
    let stdout_error = |source| Error::Io {
        path: "stdout".into(),
        source,
    };
    let tensor = file.require(name)?;
    let count = count.unwrap_or(tensor.elements().saturating_sub(offset));
    // Both ends and the type, before the first character is out.
    tensor.dequantize_into(offset, &mut [])?;
    tensor.dequantize_into(offset.saturating_add(count), &mut [])?;

    let out = io::BufWriter::new(out);
    let mut sink = ValueSink::begin(&tensor, offset, count, json, out).map_err(stdout_error)?;
    let mut values = vec![0.0; CHUNK];
    let mut at = offset;
    while at < offset + count {
        let n = (offset + count - at).min(CHUNK as u64);
        let chunk = &mut values[..n as usize];
        tensor.dequantize_into(at, chunk)?;
        for value in chunk {
            sink.value(*value).map_err(stdout_error)?;
        }
        at += n;
    }
    sink.end().map_err(stdout_error)
}

/// Prints values one by one, in either form.
struct ValueSink<W> {
    out: W,
    json: bool,
    /// Index in the tensor of the next value.
    at: u64,
    first: u64,
}

impl<W: Write> ValueSink<W> {
    const PER_LINE: u64 = 8;

    fn begin(
        tensor: &Tensor<'_>,
        offset: u64,
        count: u64,
        json: bool,
        mut out: W,
    ) -> io::Result<Self> {
        if json {
            let name = serde_json::to_string(tensor.name())?;
            let (ty, dims) = (tensor.ty(), serde_json::to_string(tensor.dims())?);
            write!(
                out,
                "{{\"name\":{name},\"type\":\"{ty}\",\"dims\":{dims},\"offset\":{offset},\"values\":["
            )?;
        } else {
            write!(
                out,
                "{}  {}  {}  elements {offset} to {} of {}",
                Plain(tensor.name()),
                tensor.ty(),
                dims(tensor.dims()),
                offset + count,
                tensor.elements()
            )?;
        }
        Ok(ValueSink {
            out,
            json,
            at: offset,
            first: offset,
        })
    }

    fn value(&mut self, value: f32) -> io::Result<()> {
        if self.json {
            if self.at > self.first {
                self.out.write_all(b",")?;
            }
            if value.is_finite() {
                serde_json::to_writer(&mut self.out, &f64::from(value))?;
            } else if value.is_nan() {
                self.out.write_all(b"\"NaN\"")?;
            } else {
                let sign = if value < 0.0 { "-" } else { "" };
                write!(self.out, "\"{sign}Infinity\"")?;
            }
        } else {
            if (self.at - self.first).is_multiple_of(Self::PER_LINE) {
                write!(self.out, "\n{:>12} ", self.at)?;
            }
            write!(self.out, " {value:>13.6e}")?;
        }
        self.at += 1;
        Ok(())
    }

    fn end(mut self) -> io::Result<()> {
        self.out
            .write_all(if self.json { b"]}\n" } else { b"\n" })?;
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::super::inspect::tests::{printed, sample};
    use super::*;

    #[test]
    fn tensor_values_round_trip() {
        let file = sample();
        let text = printed(|out| tensor(&file, "a.weight", 0, None, true, out));
        // By hand: without its feature float_roundtrip, serde_json reads some doubles an ulp off.
        let values: Vec<&str> = text.split(['[', ']', ',']).rev().skip(1).take(6).collect();
        let bits = |i: usize| values[5 - i].parse::<f64>().map(f64::to_bits).ok();
        for (i, value) in [0.1f32, -0.0, 1e-45, f32::MAX].into_iter().enumerate() {
            assert_eq!(
                bits(i),
                Some(f64::from(value).to_bits()),
                "{value} in {text}"
            );
        }
        assert_eq!((values[1], values[0]), ("\"NaN\"", "\"-Infinity\""));
        serde_json::from_str::<serde_json::Value>(&text).unwrap();

        let text = printed(|out| tensor(&file, "b.weight", 30, Some(2), true, out));
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (
                json["offset"].as_u64(),
                json["values"].as_array().map(Vec::len)
            ),
            (Some(30), Some(2))
        );
        assert!(
            printed(|out| tensor(&file, "b.weight", 1, None, false, out))
                .contains("elements 1 to 32 of 32")
        );
    }

    #[test]
    fn bad_requests_print_nothing() {
        let file = sample();
        let cases: [(&str, u64, Option<u64>, &str); 5] = [
            ("z", 0, None, "\"z\" is missing"),
            ("a.weight", 7, None, "has 6 elements"),
            ("a.weight", 1, Some(6), "has 6 elements"),
            ("a.weight", 1, Some(u64::MAX), "has 6 elements"),
            ("c.weight", 0, None, "no dequantisation for type Q8_K"),
        ];
        for (name, offset, count, message) in cases {
            let mut out = Vec::new();
            let e = tensor(&file, name, offset, count, true, &mut out)
                .unwrap_err()
                .to_string();
            assert!(e.contains(message), "{e:?} does not say {message:?}");
            assert!(out.is_empty());
        }
    }
}
