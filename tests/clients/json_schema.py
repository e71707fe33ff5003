"""Answers held to a JSON schema, at temperature 1: python json_schema.py URL N. All must parse and validate."""

import json
import sys

import jsonschema
import openai

url, n = sys.argv[1], int(sys.argv[2])
client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
model = client.models.list().data[0].id
SCHEMAS = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {"kind": {"const": "point"}, "x": {"type": "number"}, "y": {"type": "number"}, "label": {"type": ["string", "null"], "maxLength": 12}},
        "required": ["kind", "x", "y"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"$ref": "#/$defs/word"}, "minItems": 2, "maxItems": 4, "$defs": {"word": {"type": "string", "pattern": "^[a-z]{2,8}$"}}},
    {"anyOf": [{"type": "boolean"}, {"type": "object", "properties": {"when": {"type": "string", "format": "date"}}, "required": ["when"], "additionalProperties": False}]},
]
good = 0
for i in range(n):
    schema = SCHEMAS[i % len(SCHEMAS)]
    # Arrays and the like are schemas too, which the API's own servers do not take.
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Invent something and write it as JSON."}], temperature=1, seed=i,
        max_tokens=400, response_format={"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}},
    )
    choice = answer.choices[0]
    try:
        jsonschema.validate(json.loads(choice.message.content), schema)
        good += 1
    except (ValueError, jsonschema.ValidationError) as error:
        print(f"{i}: {choice.finish_reason} {choice.message.content!r}: {error}")
print(f"{good} of {n} parse and validate")
sys.exit(good != n)
