//! The calls in a text that comes in pieces.

use super::super::super::service::new_id;
use super::form::{Form, Layout};
use serde_json::Value;

/// A call that the model made.
#[derive(Clone, Debug, PartialEq)]
pub(in super::super) struct Call {
    pub id: String,
    pub name: String,
    /// JSON, as text.
    pub arguments: String,
}

/// What a piece of text brought.
#[derive(Clone, Debug, PartialEq)]
pub(in super::super) enum Part {
    Content(String),
    Call(Call),
}

/// Tells calls of one form from the text around them.
#[derive(Debug)]
pub(in super::super) struct CallParser {
    form: &'static Form,
    held: String,
    in_call: bool,
    /// Nothing came yet.
    at_start: bool,
    calls: usize,
}

impl CallParser {
    pub fn new(form: &'static Form) -> Self {
        Self {
            form,
            held: String::new(),
            in_call: false,
            at_start: true,
            calls: 0,
        }
    }

    /// Takes a piece; what may yet become a tag is held back.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        let mut parts = Vec::new();
        if text.is_empty() {
            return parts;
        }
        if std::mem::take(&mut self.at_start) && self.form.layout == Layout::Bare {
            self.in_call = text.starts_with('{');
        }
        self.held.push_str(text);
        let open = self.form.open;
        while let Some(tag) = self.next_tag() {
            let Some(at) = self.held.find(tag) else { break };
            let before: String = self.held.drain(..at + tag.len()).collect();
            let before = &before[..at];
            if self.in_call {
                self.calls(before, &mut parts);
                // Where what opens a call also ends the one before.
                self.in_call = tag == open;
            } else {
                self.content(before, &mut parts);
                self.in_call = true;
            }
        }
        if !self.in_call {
            let undecided = (1..open.len())
                .rev()
                .find(|&n| open.is_char_boundary(n) && self.held.ends_with(&open[..n]))
                .unwrap_or(0);
            let sure = self.held.len() - undecided;
            let sure: String = self.held.drain(..sure).collect();
            self.content(&sure, &mut parts);
        }
        parts
    }

    /// What ends the part that is being read, but for the end of the text.
    fn next_tag(&self) -> Option<&'static str> {
        match (&self.form.layout, self.in_call) {
            (Layout::Bare, _) | (Layout::List, true) => None,
            (Layout::Tagged { close }, true) => Some(close),
            (Layout::Named { .. }, true) | (_, false) => Some(self.form.open),
        }
    }

    /// The text has ended. A call that was not closed is one if it reads as one.
    pub fn finish(&mut self) -> Vec<Part> {
        let rest = std::mem::take(&mut self.held);
        let mut parts = Vec::new();
        if std::mem::take(&mut self.in_call) {
            self.calls(&rest, &mut parts);
        } else if !rest.is_empty() {
            parts.push(Part::Content(rest));
        }
        parts
    }

    /// White space between calls is none of the answer.
    fn content(&self, text: &str, parts: &mut Vec<Part>) {
        let between = self.calls > 0 && text.trim().is_empty();
        if !text.is_empty() && !between {
            parts.push(Part::Content(text.to_owned()));
        }
    }

    /// Reads what stood after an opening.
    fn calls(&mut self, text: &str, parts: &mut Vec<Part>) {
        let object = |value: &Value| {
            let name = value["name"].as_str()?;
            let arguments = value.get(self.form.arguments).filter(|a| a.is_object())?;
            Some((name.to_owned(), arguments.to_string()))
        };
        let json = |text: &str| serde_json::from_str::<Value>(text.trim()).unwrap_or_default();
        let calls = match &self.form.layout {
            Layout::Tagged { .. } | Layout::Bare => object(&json(text)).map(|call| vec![call]),
            Layout::List => {
                let list = json(text);
                list.as_array()
                    .and_then(|list| list.iter().map(object).collect())
            }
            Layout::Named { id, args } => text.split_once(args).and_then(|(name, arguments)| {
                let name = id
                    .and_then(|id| name.split_once(id))
                    .map_or(name, |(name, _)| name);
                let arguments = Some(json(arguments)).filter(Value::is_object)?;
                Some(vec![(name.trim().to_owned(), arguments.to_string())])
            }),
        };
        let Some(calls) = calls else {
            // Cut off in the middle, mostly: better shown than lost.
            let open = self.form.open;
            parts.push(Part::Content(format!("{open}{text}")));
            return;
        };
        self.calls += calls.len();
        let calls = calls.into_iter().map(|(name, arguments)| Call {
            id: self.call_id(),
            name,
            arguments,
        });
        parts.extend(calls.map(Part::Call));
    }

    /// An id that the model's template takes when the call comes back to it.
    fn call_id(&self) -> String {
        let id = new_id();
        match self.form.open {
            // Nine letters or digits; Mistral's templates insist.
            "[TOOL_CALLS]" => id[..9].to_owned(),
            _ => format!("call_{id}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::form::{
        HERMES, LLAMA3, MISTRAL_IDS, MISTRAL_LIST, MISTRAL_NAMED, TOOL_CALL_LIST,
    };
    use super::*;

    fn parse(form: &'static Form, text: &str, size: usize) -> (String, Vec<(String, String)>) {
        let mut parser = CallParser::new(form);
        let chars: Vec<char> = text.chars().collect();
        let pieces = chars.chunks(size).map(|c| c.iter().collect::<String>());
        let mut parts: Vec<Part> = pieces.flat_map(|p| parser.push(&p)).collect();
        parts.extend(parser.finish());
        let mut content = String::new();
        let mut calls = Vec::new();
        for part in parts {
            match part {
                Part::Content(text) => content.push_str(&text),
                Part::Call(call) => {
                    let mistral = form.open == "[TOOL_CALLS]";
                    assert_eq!(call.id.len(), if mistral { 9 } else { 29 });
                    calls.push((call.name, call.arguments));
                }
            }
        }
        (content, calls)
    }

    #[test]
    fn calls_are_found_however_the_text_is_cut() {
        let before = "Let me see: a < b <tool [TOOL\n";
        let cases: [(&Form, bool, &str); 6] = [
            (
                &HERMES,
                true,
                "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>\n\
                    <tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>",
            ),
            (
                &MISTRAL_LIST,
                true,
                "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"x\": 1}}, {\"name\": \"g\", \"arguments\": {}}]",
            ),
            (
                &MISTRAL_IDS,
                true,
                "[TOOL_CALLS]f[CALL_ID]aB3456789[ARGS]{\"x\": 1}[TOOL_CALLS]g[CALL_ID]aB3456788[ARGS]{}",
            ),
            (
                &MISTRAL_NAMED,
                true,
                "[TOOL_CALLS]f[ARGS]{\"x\": 1}[TOOL_CALLS]g[ARGS]{}",
            ),
            (
                &TOOL_CALL_LIST,
                true,
                "<|tool_call|>[{\"name\": \"f\", \"arguments\": {\"x\": 1}}, {\"name\": \"g\", \"arguments\": {}}]",
            ),
            (
                &LLAMA3,
                false,
                "{\"name\": \"f\", \"parameters\": {\"x\": 1}}",
            ),
        ];
        for (form, with_text, written) in cases {
            let before = if with_text { before } else { "" };
            let text = format!("{before}{written}");
            for size in 1..text.len() {
                let (content, calls) = parse(form, &text, size);
                assert_eq!(content, before, "{form:?} {size}");
                let mut expected = vec![("f".to_owned(), "{\"x\":1}".to_owned())];
                if with_text {
                    expected.push(("g".to_owned(), "{}".to_owned()));
                }
                assert_eq!(calls, expected, "{form:?} {size}");
            }
        }
    }

    #[test]
    fn what_is_no_call_is_content() {
        let cases: [(&Form, &str); 8] = [
            (&HERMES, "no call <tool_cal"),
            (&HERMES, "<tool_call>\n{\"name\": \"f"),
            (&MISTRAL_LIST, "[TOOL_CALLS] [{\"name\": \"f\", \"argum"),
            (&MISTRAL_NAMED, "[TOOL_CALLS]f[ARGS]{\"x"),
            (&TOOL_CALL_LIST, "<|tool_call|>"),
            (&LLAMA3, "{\"name\": \"f\", \"param"),
            (&LLAMA3, "A brace: {\"name\": \"f\", \"parameters\": {}}"),
            (&LLAMA3, ""),
        ];
        for (form, text) in cases {
            for size in 1..=text.len().max(1) {
                assert_eq!(parse(form, text, size), (text.to_owned(), vec![]));
            }
        }
    }
}
