//! The forms in which models write calls, each as the chat templates of a family teach it, and the grammars that
//! keep a model to them.

use super::{Choice, Tool, Tools};
use crate::engine::grammar::with_separators;
use crate::engine::{Grammar, Text};
use serde_json::{Value, json};

/// How calls are written.
#[derive(Debug, PartialEq)]
pub(in super::super) struct Form {
    pub layout: Layout,
    /// What opens a call, or all of them.
    pub open: &'static str,
    /// The field with a call's arguments.
    pub arguments: &'static str,
}

#[derive(Debug, PartialEq)]
pub(in super::super) enum Layout {
    /// `open`, a line with `{"name", "arguments"}`, `close`; more of them on lines of their own.
    Tagged { close: &'static str },
    /// `open` and a JSON array of `{"name", "arguments"}`, to the answer's end.
    List,
    /// `open`, the name, `id` and an id of nine characters where the form has ids, `args`, the arguments; more of
    /// them right after it.
    Named {
        id: Option<&'static str>,
        args: &'static str,
    },
    /// `{"name", "arguments"}` and nothing else: an answer that begins with a brace is a call, and one alone.
    Bare,
}

/// Qwen 2.5 and 3, Hermes, SmolLM3.
pub(super) static HERMES: Form = Form {
    layout: Layout::Tagged {
        close: "</tool_call>",
    },
    open: "<tool_call>",
    arguments: "arguments",
};
/// Llama 3.1 to 3.3.
pub(super) static LLAMA3: Form = Form {
    layout: Layout::Bare,
    open: "",
    arguments: "parameters",
};
/// Mistral, until tokenizer version 7.
pub(super) static MISTRAL_LIST: Form = Form {
    layout: Layout::List,
    open: "[TOOL_CALLS]",
    arguments: "arguments",
};
/// Mistral, tokenizer version 11.
pub(super) static MISTRAL_IDS: Form = Form {
    layout: Layout::Named {
        id: Some("[CALL_ID]"),
        args: "[ARGS]",
    },
    open: "[TOOL_CALLS]",
    arguments: "arguments",
};
/// Mistral, tokenizer version 13.
pub(super) static MISTRAL_NAMED: Form = Form {
    layout: Layout::Named {
        id: None,
        args: "[ARGS]",
    },
    open: "[TOOL_CALLS]",
    arguments: "arguments",
};
/// Granite 3, Phi-4 mini.
pub(super) static TOOL_CALL_LIST: Form = Form {
    layout: Layout::List,
    open: "<|tool_call|>",
    arguments: "arguments",
};

/// Calls in one answer at most.
const MAX_CALLS: usize = 16;

impl Form {
    /// The form that a chat template teaches, by the words in which templates do.
    pub fn of(template: &str) -> Option<&'static Form> {
        let has = |words: &str| template.contains(words);
        if !has("tools") {
            return None;
        }
        // Qwen3-Coder and GLM write arguments as XML between the same tags.
        let xml = has("<function=") || has("<arg_key>");
        if has("<tool_call>") && !xml {
            Some(&HERMES)
        } else if has("[TOOL_CALLS]") {
            Some(match (has("[ARGS]"), has("[CALL_ID]")) {
                (true, true) => &MISTRAL_IDS,
                (true, false) => &MISTRAL_NAMED,
                (false, _) => &MISTRAL_LIST,
            })
        } else if has("<|tool_call|>") {
            Some(&TOOL_CALL_LIST)
        } else if has("\"parameters\": dictionary of argument name") {
            Some(&LLAMA3)
        } else {
            None
        }
    }

    /// The strings of the form that are control tokens of the vocabulary: no text stands for them, and they show
    /// as text only where a request says so.
    pub fn control_tokens(&self, text: &dyn Text) -> Vec<u32> {
        let mut strings = vec![self.open];
        match self.layout {
            Layout::Tagged { close } => strings.push(close),
            Layout::Named { id, args } => strings.extend(id.into_iter().chain([args])),
            Layout::List | Layout::Bare => {}
        }
        strings
            .into_iter()
            .filter_map(|s| control_token(text, s))
            .collect()
    }

    /// What keeps the model to `choice` of `tools`; `parallel` allows several calls in one answer.
    pub fn grammar(
        &self,
        tools: &Tools,
        choice: &Choice,
        parallel: bool,
        text: &dyn Text,
    ) -> Option<Grammar> {
        if *choice == Choice::None {
            return None;
        }
        let several = parallel && !matches!(choice, Choice::Named(_));
        let literal = |s: &str| match control_token(text, s) {
            Some(id) => format!("<[{id}]>"),
            None => Value::from(s).to_string(),
        };
        let tools: Vec<&Tool> = tools.left_by(choice).collect();
        let object = |tool: &&Tool| {
            json!({ "type": "object", "required": ["name", self.arguments], "additionalProperties": false,
                "properties": { "name": { "const": tool.name }, self.arguments: tool.parameters } })
        };
        let any = || json!({ "anyOf": tools.iter().map(object).collect::<Vec<_>>() });
        let json = |schema: Value| format!("%json {}", with_separators(&schema));
        // `calls` without the opening of its first call, and its other rules.
        let (rest, rules) = match &self.layout {
            Layout::Tagged { close } => {
                let rules = format!("call: \"\\n\" {} \"\\n\" {}\n", json(any()), literal(close));
                let more = format!("(\"\\n\" {} call)*", literal(self.open));
                (format!("call {}", if several { &*more } else { "" }), rules)
            }
            Layout::List => {
                let most = if several { MAX_CALLS } else { 1 };
                let list =
                    json!({ "type": "array", "items": any(), "minItems": 1, "maxItems": most });
                (format!("\" \"? {}", json(list)), String::new())
            }
            Layout::Named { id, args } => {
                let id = id.map_or(String::new(), |id| {
                    format!("{} /[a-zA-Z0-9]{{9}}/", literal(id))
                });
                let call = |tool: &&Tool| {
                    let arguments = json(tool.parameters.clone());
                    format!("\"{}\" {id} {} {arguments}", tool.name, literal(args))
                };
                let calls: Vec<String> = tools.iter().map(call).collect();
                let more = format!("({} call)*", literal(self.open));
                let rules = format!("call: {}\n", calls.join("\n    | "));
                (format!("call {}", if several { &*more } else { "" }), rules)
            }
            Layout::Bare => (json(any()), String::new()),
        };
        let rules = format!("rest: {rest}\n{rules}");
        let open = literal(self.open);
        let auto = *choice == Choice::Auto;
        let start = match (control_token(text, self.open), &self.layout) {
            (_, Layout::Bare) if auto => "start: TEXT? | rest\nTEXT: /[^{](.|\\n)*/\n".to_owned(),
            (_, Layout::Bare) => "start: rest\n".to_owned(),
            _ if !auto => format!("start: {open} rest\n"),
            // Text first, if any; once it opens a call, the call must be one.
            (Some(_), _) => format!("start: TEXT? | TEXT? {open} rest\nTEXT: /(.|\\n)+/\n"),
            (None, _) => {
                let pattern = regex_of(self.open);
                format!(
                    "start: TEXT | opening rest\nopening[lazy]: /(.|\\n)*{pattern}/\n\
                     TEXT: /(.|\\n)*/ & ~/(.|\\n)*{pattern}(.|\\n)*/\n"
                )
            }
        };
        Some(Grammar::Lark(format!("{start}{rules}")))
    }
}

/// The id of a text that is one control token.
fn control_token(text: &dyn Text, name: &str) -> Option<u32> {
    match text.tokenize(name, false, true).ok()?[..] {
        [id] if text.is_control(id) => Some(id),
        _ => None,
    }
}

/// A pattern of this text alone, for Lark.
fn regex_of(text: &str) -> String {
    let escaped = |c: char| match c {
        '[' | ']' | '|' | '(' | ')' | '/' => format!("\\{c}"),
        c => c.to_string(),
    };
    text.chars().map(escaped).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Tools, tool};
    use super::*;
    use crate::engine::Grammars;
    use crate::engine::fake::{ByteText, EOS, VOCABULARY};

    fn tools() -> Tools {
        let f = json!({ "type": "function", "function": { "name": "f", "parameters": {
            "properties": { "x": { "type": "integer" } }, "required": ["x"], "additionalProperties": false } } });
        let g = json!({ "type": "function", "function": { "name": "g" } });
        Tools([f, g].iter().map(|t| tool(t).unwrap()).collect())
    }

    /// Whether an answer may be `text`, in which the names of control tokens stand for those where `controls` says so.
    fn allows(form: &Form, choice: &Choice, parallel: bool, text: &str, controls: bool) -> bool {
        let vocabulary = ByteText {
            controls,
            ..ByteText::PLAIN
        };
        let grammar = form
            .grammar(&tools(), choice, parallel, &vocabulary)
            .unwrap();
        let grammars = Grammars::new(&vocabulary, VOCABULARY).unwrap();
        let mut constraint = grammars.compile(&grammar).unwrap();
        let ids = vocabulary.tokenize(text, false, true).unwrap();
        for (i, &id) in ids.iter().enumerate() {
            let mut logits = vec![0.0; VOCABULARY];
            constraint.mask(&mut logits).unwrap();
            if logits[id as usize] < 0.0 {
                return false;
            }
            if constraint.take(id).unwrap() {
                return i + 1 == ids.len();
            }
        }
        let mut logits = vec![0.0; VOCABULARY];
        constraint.mask(&mut logits).unwrap();
        logits[EOS as usize] == 0.0
    }

    /// A form with `{"x": X}` for f and `{}` for g as it writes them, and how several are put together.
    fn written(form: &Form, calls: &[(&str, &str)]) -> String {
        let object = |(name, arguments): &(&str, &str)| {
            format!(
                "{{\"name\": \"{name}\", \"{}\": {arguments}}}",
                form.arguments
            )
        };
        match form.layout {
            Layout::Tagged { close } => {
                let call = |c| format!("{}\n{}\n{close}", form.open, object(c));
                calls.iter().map(call).collect::<Vec<_>>().join("\n")
            }
            Layout::List => {
                let calls: Vec<String> = calls.iter().map(object).collect();
                format!("{}[{}]", form.open, calls.join(", "))
            }
            Layout::Named { id, args } => {
                let id = id.map_or(String::new(), |id| format!("{id}aB3456789"));
                let call = |(name, arguments): &(&str, &str)| {
                    format!("{}{name}{id}{args}{arguments}", form.open)
                };
                calls.iter().map(call).collect()
            }
            Layout::Bare => calls.iter().map(object).collect(),
        }
    }

    #[test]
    fn a_grammar_allows_calls_of_the_tools_only() {
        let f = ("f", "{\"x\": 1}");
        let g = ("g", "{}");
        for form in [
            &HERMES,
            &LLAMA3,
            &MISTRAL_LIST,
            &MISTRAL_IDS,
            &MISTRAL_NAMED,
            &TOOL_CALL_LIST,
        ] {
            for controls in [false, true] {
                let allows = |choice: &Choice, parallel, text: &str| {
                    allows(form, choice, parallel, text, controls)
                };
                let write = |calls: &[_]| written(form, calls);
                let context = format!("{form:?}, {controls}");
                let alone = form.layout == Layout::Bare;
                for choice in [Choice::Required, Choice::Auto] {
                    assert!(allows(&choice, true, &write(&[f])), "{context}");
                    assert!(allows(&choice, true, &write(&[g])), "{context}");
                    assert_eq!(allows(&choice, true, &write(&[f, g])), !alone, "{context}");
                    assert!(!allows(&choice, false, &write(&[f, g])), "{context}");
                    for wrong in [("f", "{\"x\": true}"), ("h", "{}"), ("f", "{}")] {
                        assert!(!allows(&choice, true, &write(&[wrong])), "{context}");
                    }
                }
                let named = Choice::Named("g".to_owned());
                assert!(allows(&named, true, &write(&[g])), "{context}");
                assert!(!allows(&named, true, &write(&[f])), "{context}");
                for text in ["hello", "hello <tool> [TOOL <|tool_ca", " {}", ""] {
                    assert!(!allows(&Choice::Required, true, text), "{context}");
                    assert!(allows(&Choice::Auto, true, text), "{context}: {text}");
                }
                if !alone {
                    let after = |call| format!("First this.\n{}", write(&[call]));
                    assert!(allows(&Choice::Auto, true, &after(f)), "{context}");
                    let wrong = after(("f", "{\"x\": true}"));
                    assert!(!allows(&Choice::Auto, true, &wrong), "{context}");
                }
            }
        }
    }

    #[test]
    fn forms_are_known_by_the_words_of_their_templates() {
        // As the models' own templates say it.
        let cases = [
            (
                "{%- if tools %}within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\\"name\\\": <function-name>",
                Some(&HERMES),
            ),
            (
                "{%- if tools %}<tool_call>\\n<function=example_function_name>\\n<parameter=p>",
                None,
            ),
            (
                "{{- \"[AVAILABLE_TOOLS] [\" }}{% for tool in tools %}{{- \"[TOOL_CALLS] [\" }}",
                Some(&MISTRAL_LIST),
            ),
            (
                "{% for tool in tools %}{{- \"[TOOL_CALLS]\" }}{{- name + \"[CALL_ID]\" + id + \"[ARGS]\" + arguments }}",
                Some(&MISTRAL_IDS),
            ),
            (
                "{% for tool in tools %}{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}",
                Some(&MISTRAL_NAMED),
            ),
            (
                "{%- if tools %}Respond in the format {\"name\": function name, \"parameters\": dictionary of argument name and its value}.",
                Some(&LLAMA3),
            ),
            (
                "{%- if tools %}respond with <|tool_call|> followed by a JSON list of tools used.",
                Some(&TOOL_CALL_LIST),
            ),
            ("{% if tools %}Action:```json", None),
            ("<tool_call>", None),
        ];
        for (template, form) in cases {
            assert_eq!(Form::of(template), form, "{template}");
        }
    }

    #[test]
    fn control_tokens_of_a_form_are_found_by_name() {
        let with = ByteText {
            controls: true,
            ..ByteText::PLAIN
        };
        assert_eq!(MISTRAL_IDS.control_tokens(&with).len(), 3);
        assert_eq!(HERMES.control_tokens(&with).len(), 2);
        assert!(LLAMA3.control_tokens(&with).is_empty());
        assert!(HERMES.control_tokens(&ByteText::PLAIN).is_empty());
    }
}
