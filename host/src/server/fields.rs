//! Request bodies: a table of fields is both the validator and the schema of the documentation, so the two
//! cannot disagree. Everything that is wrong with a body is said at once, and nothing of a prompt is.

use crate::sampling::Violation;
use serde_json::{Map, Value, json};

/// What a field may be.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    Integer {
        min: u64,
        max: u64,
    },
    Number {
        min: f64,
        max: f64,
    },
    /// As [`Kind::Number`], without `min` itself.
    Above {
        min: f64,
        max: f64,
    },
    Bool,
    /// A string of so many characters, without control characters unless `any` is set. Its text is never
    /// echoed.
    Text {
        min: usize,
        max: usize,
        any: bool,
    },
    OneOf(Vec<&'static str>),
    /// Read by the endpoint's own code; the schema says what it accepts, in words and in JSON Schema.
    Own {
        constraint: &'static str,
        schema: Value,
    },
}

/// A field of a request body.
#[derive(Clone, Debug)]
pub(super) struct Field {
    pub name: &'static str,
    pub kind: Kind,
    pub doc: &'static str,
    pub required: bool,
}

impl Field {
    pub fn new(name: &'static str, kind: Kind, doc: &'static str) -> Self {
        Self {
            name,
            kind,
            doc,
            required: false,
        }
    }

    pub fn required(mut self) -> Self {
        self.required = true;
        self
    }

    fn constraint(&self) -> String {
        match &self.kind {
            Kind::Integer { min, max } => format!("an integer from {min} to {max}"),
            Kind::Number { min, max } => format!("a number from {min} to {max}"),
            Kind::Above { min, max } => format!("a number above {min}, at most {max}"),
            Kind::Bool => "true or false".to_owned(),
            Kind::Text {
                min,
                max,
                any: true,
            } => format!("{min} to {max} characters"),
            Kind::Text { min, max, .. } => {
                format!("{min} to {max} characters, no control characters")
            }
            Kind::OneOf(names) => format!("one of {}", names.join(", ")),
            Kind::Own { constraint, .. } => (*constraint).to_owned(),
        }
    }

    fn schema(&self) -> Value {
        let mut schema = match &self.kind {
            Kind::Integer { min, max } => {
                json!({ "type": "integer", "minimum": min, "maximum": max })
            }
            Kind::Number { min, max } => {
                json!({ "type": "number", "minimum": min, "maximum": max })
            }
            Kind::Above { min, max } => {
                json!({ "type": "number", "exclusiveMinimum": min, "maximum": max })
            }
            Kind::Bool => json!({ "type": "boolean" }),
            Kind::Text { min, max, any } => {
                let mut text = json!({ "type": "string", "minLength": min, "maxLength": max });
                if !any {
                    text["pattern"] = json!(r"^[^\x00-\x1f\x7f-\x9f]*$");
                }
                text
            }
            Kind::OneOf(names) => json!({ "type": "string", "enum": names }),
            Kind::Own { schema, .. } => schema.clone(),
        };
        if !self.required {
            schema = nullable(schema);
        }
        schema["description"] = json!(self.doc);
        schema
    }
}

/// The schema, or null.
fn nullable(mut schema: Value) -> Value {
    if let Some(Value::String(kind)) = schema.get("type") {
        schema["type"] = json!([kind, "null"]);
        if let Some(Value::Array(names)) = schema.get_mut("enum") {
            names.push(Value::Null);
        }
        schema
    } else {
        json!({ "anyOf": [schema, { "type": "null" }] })
    }
}

/// The fields of one kind of body.
#[derive(Clone, Debug, Default)]
pub(super) struct Body {
    pub fields: Vec<Field>,
    /// Further rules, in JSON Schema, for the documentation: `oneOf` and the like.
    pub rules: Map<String, Value>,
}

impl Body {
    pub fn schema(&self) -> Value {
        let properties: Map<String, Value> = self
            .fields
            .iter()
            .map(|f| (f.name.to_owned(), f.schema()))
            .collect();
        let required: Vec<&str> = self
            .fields
            .iter()
            .filter(|f| f.required)
            .map(|f| f.name)
            .collect();
        let mut schema =
            json!({ "type": "object", "properties": properties, "additionalProperties": false });
        if !required.is_empty() {
            schema["required"] = json!(required);
        }
        if let Value::Object(map) = &mut schema {
            map.extend(self.rules.clone());
        }
        schema
    }

    /// Reads a body: an object, every field known and of its kind. What is wrong is collected in the
    /// result.
    ///
    /// # Errors
    /// The body is no JSON object at all.
    pub fn read(&self, body: &[u8]) -> Result<Fields, Violation> {
        let expected = "a JSON object";
        let map = match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => map,
            Ok(_) => return Err(violation("body", expected, "it is none", Value::Null)),
            Err(error) => {
                // serde_json's message could quote the text; the place cannot.
                let place = format!(
                    "not JSON at line {} column {}",
                    error.line(),
                    error.column()
                );
                return Err(violation("body", expected, &place, Value::Null));
            }
        };
        let mut fields = Fields {
            map,
            violations: Vec::new(),
        };
        fields.refuse_unknown(&self.fields);
        for field in &self.fields {
            fields.check(field);
        }
        Ok(fields)
    }
}

pub(super) fn violation(field: &str, constraint: &str, found: &str, value: Value) -> Violation {
    Violation {
        field: field.to_owned(),
        constraint: constraint.to_owned(),
        message: format!("{field}: {found}; expected {constraint}"),
        value,
    }
}

/// The kind of a JSON value, for messages that must not show it.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The value itself where it is a number or a boolean, else nothing: text may be the prompt's.
fn harmless(value: &Value) -> Value {
    match value {
        Value::Number(_) | Value::Bool(_) => value.clone(),
        _ => Value::Null,
    }
}

/// 3.0 is an integer in JSON Schema and to many a client.
pub(super) fn integer(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| {
        value
            .as_f64()
            .filter(|f| f.fract() == 0.0 && (0.0..1e15).contains(f))
            .map(|f| f as u64)
    })
}

/// A body's fields, and what is wrong with them.
pub(super) struct Fields {
    map: Map<String, Value>,
    pub violations: Vec<Violation>,
}

impl Fields {
    pub fn add(&mut self, field: &str, constraint: &str, found: &str, value: Value) {
        self.violations
            .push(violation(field, constraint, found, value));
    }

    /// A field's value; null is as good as absent. A value that is not of its field's kind is not
    /// there any more.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|v| !v.is_null())
    }

    pub fn has(&self, field: &str) -> bool {
        self.get(field).is_some()
    }

    pub fn take(&mut self, field: &str) -> Option<Value> {
        self.map.remove(field).filter(|v| !v.is_null())
    }

    pub fn u64(&self, field: &str) -> Option<u64> {
        self.get(field).and_then(integer)
    }

    pub fn f32(&self, field: &str) -> Option<f32> {
        let value = self.get(field).and_then(Value::as_f64)?;
        let single = value as f32;
        // Above 0 stays above 0.
        Some(if value > 0.0 && single == 0.0 {
            f32::MIN_POSITIVE
        } else {
            single
        })
    }

    pub fn bool(&self, field: &str) -> bool {
        self.get(field).and_then(Value::as_bool).unwrap_or(false)
    }

    pub fn str(&self, field: &str) -> Option<&str> {
        self.get(field).and_then(Value::as_str)
    }

    fn refuse_unknown(&mut self, known: &[Field]) {
        let unknown: Vec<String> = self
            .map
            .keys()
            .filter(|k| known.iter().all(|f| f.name != k.as_str()))
            .cloned()
            .collect();
        let names: Vec<&str> = known.iter().map(|f| f.name).collect();
        let constraint = format!("one of {}", names.join(", "));
        for field in unknown {
            self.map.remove(&field);
            // A key is the client's text too; a long one is no misspelt field.
            let field: String = field.chars().take(32).collect();
            self.add(&field, &constraint, "there is no such field", Value::Null);
        }
    }

    fn check(&mut self, field: &Field) {
        let Some(value) = self.get(field.name).cloned() else {
            if field.required {
                self.add(
                    field.name,
                    &field.constraint(),
                    "it is missing",
                    Value::Null,
                );
            }
            return;
        };
        let fits = match &field.kind {
            Kind::Integer { min, max } => {
                integer(&value).is_some_and(|n| (*min..=*max).contains(&n))
            }
            Kind::Number { min, max } => value.as_f64().is_some_and(|n| (*min..=*max).contains(&n)),
            Kind::Above { min, max } => value.as_f64().is_some_and(|n| n > *min && n <= *max),
            Kind::Bool => value.is_boolean(),
            Kind::Text { min, max, any } => value.as_str().is_some_and(|s| {
                (*min..=*max).contains(&s.chars().count())
                    && (*any || !s.chars().any(char::is_control))
            }),
            Kind::OneOf(names) => value.as_str().is_some_and(|s| names.contains(&s)),
            Kind::Own { .. } => true,
        };
        if !fits {
            let found = match (&field.kind, &value) {
                (_, Value::Number(n)) => format!("it is {n}"),
                (Kind::Text { .. }, Value::String(s)) => {
                    format!("it has {} characters", s.chars().count())
                }
                (_, other) => format!("it is {}", kind(other)),
            };
            self.map.remove(field.name);
            self.add(field.name, &field.constraint(), &found, harmless(&value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body() -> Body {
        Body {
            fields: vec![
                Field::new("n", Kind::Integer { min: 1, max: 5 }, "").required(),
                Field::new("p", Kind::Above { min: 0.0, max: 1.0 }, ""),
                Field::new(
                    "id",
                    Kind::Text {
                        min: 1,
                        max: 3,
                        any: false,
                    },
                    "",
                ),
                Field::new("mode", Kind::OneOf(vec!["a", "b"]), ""),
                Field::new("on", Kind::Bool, ""),
            ],
            rules: Map::new(),
        }
    }

    fn wrong(text: &str) -> Vec<String> {
        match body().read(text.as_bytes()) {
            Ok(fields) => fields.violations.into_iter().map(|v| v.field).collect(),
            Err(v) => vec![v.field],
        }
    }

    #[test]
    fn every_kind_is_checked() {
        assert!(wrong(r#"{"n": 5.0, "p": 1, "id": "äöü", "mode": "b", "on": false}"#).is_empty());
        assert!(wrong(r#"{"n": 1, "p": null}"#).is_empty());
        assert_eq!(
            wrong(r#"{"n": 6, "p": 0, "id": "a\n", "mode": "c", "on": 1}"#),
            ["n", "p", "id", "mode", "on"]
        );
        assert_eq!(wrong(r#"{"n": 1.5, "id": "", "x": 1}"#), ["x", "n", "id"]);
        assert_eq!(wrong("{}"), ["n"]);
        assert_eq!(wrong("[1]"), ["body"]);
        assert_eq!(wrong("{\"n\":"), ["body"]);
    }

    #[test]
    fn a_wrong_value_is_gone_and_text_is_not_echoed() {
        let fields = body().read(br#"{"n": "secret", "id": "secret"}"#).unwrap();
        assert!(!fields.has("n"));
        let said = serde_json::to_string(&fields.violations).unwrap();
        assert!(!said.contains("secret"), "{said}");
    }

    #[test]
    fn the_schema_says_the_same() {
        let schema = body().schema();
        assert_eq!(schema["properties"]["n"]["maximum"], 5);
        assert_eq!(schema["properties"]["p"]["type"], json!(["number", "null"]));
        assert_eq!(schema["required"], json!(["n"]));
    }
}
