//! Constrained decoding: grammars over tokens, through `llguidance`.
//!
//! A [`Grammars`] knows a vocabulary; [`Grammars::compile`] makes a [`Constraint`] that says before each token which
//! ones may come, and is told which one did.

use super::Text;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use std::sync::Arc;

/// What an answer must be.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// JSON that this schema describes.
    JsonSchema(Value),
    /// A grammar in llguidance's dialect of Lark.
    Lark(String),
}

/// Compiles grammars for one vocabulary.
pub struct Grammars {
    factory: ParserFactory,
}

impl Grammars {
    /// `vocabulary` is the number of logits, which may be more than `text` has tokens.
    ///
    /// # Errors
    /// A vocabulary that llguidance cannot use.
    pub fn new(text: &dyn Text, vocabulary: usize) -> Result<Self, String> {
        let words: Vec<Vec<u8>> = (0..vocabulary as u32)
            .map(|id| {
                let bytes = text.token_bytes(id);
                if text.is_control(id) {
                    // Text never stands for a control token.
                    [&[TokTrie::SPECIAL_TOKEN_MARKER], &bytes[..]].concat()
                } else {
                    bytes
                }
            })
            .collect();
        let ends: Vec<u32> = (0..vocabulary as u32)
            .filter(|&id| text.is_end_of_generation(id))
            .collect();
        let Some(&end) = ends.first() else {
            return Err("the vocabulary has no token that ends an answer".to_owned());
        };
        let trie =
            TokTrie::from(&TokRxInfo::new(vocabulary as u32, end), &words).with_eos_tokens(&ends);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let capabilities = InferenceCapabilities {
            ff_tokens: false,
            ..InferenceCapabilities::default()
        };
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory =
            ParserFactory::new(&env, capabilities, &slices).map_err(|e| e.to_string())?;
        factory.quiet();
        // An error must not repeat the grammar: it is the client's text.
        factory.limits_mut().verbose_errors = false;
        Ok(Self { factory })
    }

    /// # Errors
    /// What is wrong with the grammar, or that it is too large.
    pub fn compile(&self, grammar: &Grammar) -> Result<Constraint, String> {
        let top = match grammar {
            Grammar::JsonSchema(schema) => {
                TopLevelGrammar::from_json_schema(with_separators(schema))
            }
            Grammar::Lark(lark) => TopLevelGrammar::from_lark(lark.clone()),
        };
        let parser = self.factory.create_parser(top).map_err(|e| e.to_string())?;
        let matcher = Matcher::new(Ok(parser));
        match matcher.get_error() {
            Some(error) => Err(error),
            None => Ok(Constraint { matcher }),
        }
    }
}

/// The schema with one way to write white space: free white space lets a small model write nothing else.
pub fn with_separators(schema: &Value) -> Value {
    let mut schema = match schema {
        Value::Object(map) => map.clone(),
        // `true`: anything at all.
        _ => serde_json::Map::new(),
    };
    schema.entry("x-guidance").or_insert_with(|| {
        json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": true })
    });
    Value::Object(schema)
}

/// A grammar at work in one sequence.
pub struct Constraint {
    matcher: Matcher,
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constraint").finish_non_exhaustive()
    }
}

impl Clone for Constraint {
    /// A constraint of its own, as far along as this one.
    fn clone(&self) -> Self {
        Self {
            matcher: self.matcher.deep_clone(),
        }
    }
}

impl Constraint {
    /// Sets the logits of tokens that may not come next to `-inf`.
    ///
    /// # Errors
    /// The grammar became too large to go on with.
    pub fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let mask = self
            .matcher
            .compute_mask_or_eos()
            .map_err(|e| e.to_string())?;
        for (id, l) in logits.iter_mut().enumerate() {
            if !mask.is_allowed(id as u32) {
                *l = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// Goes on by a token; true when nothing but an end can follow.
    ///
    /// # Errors
    /// The token is none that the grammar allows.
    pub fn take(&mut self, id: u32) -> Result<bool, String> {
        self.matcher.consume_token(id).map_err(|e| e.to_string())?;
        Ok(self.matcher.is_stopped())
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::{ByteText, EOS, VOCABULARY};
    use super::*;

    fn grammars() -> Grammars {
        Grammars::new(&ByteText::PLAIN, VOCABULARY).unwrap()
    }

    /// Whether a text, ended by the end token, is of the grammar.
    fn accepts(grammar: &Grammar, text: &str) -> bool {
        let mut constraint = grammars().compile(grammar).unwrap();
        for id in text.bytes().map(u32::from) {
            let mut logits = vec![0.0; VOCABULARY];
            constraint.mask(&mut logits).unwrap();
            if logits[id as usize] < 0.0 {
                return false;
            }
            if constraint.take(id).unwrap() {
                // Nothing can follow.
                return text.ends_with(char::from(id as u8));
            }
        }
        let mut logits = vec![0.0; VOCABULARY];
        constraint.mask(&mut logits).unwrap();
        logits[EOS as usize] == 0.0
    }

    #[test]
    fn a_schema_allows_what_it_describes() {
        let schema = json!({ "type": "object", "properties": { "n": { "type": "integer" } },
            "required": ["n"], "additionalProperties": false });
        let grammar = Grammar::JsonSchema(schema);
        assert!(accepts(&grammar, "{\"n\": 12}"));
        assert!(!accepts(&grammar, "{\"n\": \"x\"}"));
        assert!(!accepts(&grammar, "{}"));
        assert!(!accepts(&grammar, "{\"n\": 1"));
    }

    #[test]
    fn what_is_no_schema_is_refused_with_a_reason() {
        let schema = json!({ "type": "colour" });
        assert!(
            !grammars()
                .compile(&Grammar::JsonSchema(schema))
                .unwrap_err()
                .is_empty()
        );
        assert!(
            grammars()
                .compile(&Grammar::Lark("start: (".to_owned()))
                .is_err()
        );
    }
}
