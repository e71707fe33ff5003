"""The official `openai` package for Python against a live worker: python openai_client.py URL

The worker serves a model that can chat and call tools. Everything is checked; nothing is skipped.
"""

import json
import math
import sys

import jsonschema
import openai

URL = sys.argv[1]
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="unused", max_retries=0)
model = client.models.list().data[0].id
HELLO = [{"role": "user", "content": "Name three colours."}]
passed = []


def test(function):
    function()
    passed.append(function.__name__)
    print(f"ok {function.__name__}", flush=True)


@test
def models():
    assert client.models.retrieve(model).id == model
    try:
        client.models.retrieve("another")
        raise AssertionError("accepted")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found", error


@test
def chat():
    answer = client.chat.completions.create(model=model, messages=HELLO, max_completion_tokens=20, temperature=0, seed=1)
    assert answer.object == "chat.completion" and len(answer.choices) == 1
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content.strip()
    assert choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert 1 <= usage.completion_tokens <= 20
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0


@test
def a_stream_is_the_answer_in_pieces():
    options = dict(model=model, messages=HELLO, max_tokens=24, temperature=0)
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([p for p in pieces if p]) > 3
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


@test
def the_beginning_of_a_prompt_is_cached():
    numbers = ", ".join(str(n) for n in range(100, 300))
    ask = lambda end: client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": f"{numbers}. {end}"}], temperature=0, max_tokens=12)
    first, again, other = ask("What comes next?"), ask("What comes next?"), ask("Which is the least?")
    assert again.choices[0].message.content == first.choices[0].message.content
    assert first.usage.prompt_tokens > 600 and first.usage.prompt_tokens_details.cached_tokens == 0
    for answer in (again, other):
        assert answer.usage.prompt_tokens_details.cached_tokens >= 512, answer.usage


@test
def streaming_helper():
    with client.chat.completions.stream(model=model, messages=HELLO, max_tokens=12, temperature=0) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content


@test
def several_answers():
    answer = client.chat.completions.create(model=model, messages=HELLO, n=3, max_tokens=12, temperature=1.5, seed=5)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert len({c.message.content for c in answer.choices}) > 1
    again = client.chat.completions.create(model=model, messages=HELLO, n=3, max_tokens=12, temperature=1.5, seed=5)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]
    chunks = client.chat.completions.create(model=model, messages=HELLO, n=2, max_tokens=5, stream=True)
    assert {c.choices[0].index for c in chunks} == {0, 1}


@test
def logprobs():
    options = dict(model=model, messages=HELLO, max_tokens=8, temperature=0, logprobs=True, top_logprobs=4)
    answer = client.chat.completions.create(**options)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 4
        # Greedy: the likeliest was taken.
        assert token.token == token.top_logprobs[0].token and token.logprob == token.top_logprobs[0].logprob
        assert bytes(token.bytes).decode(errors="replace") == token.token
        assert sum(math.exp(t.logprob) for t in token.top_logprobs) <= 1.0001
    text = b"".join(bytes(t.bytes) for t in content).decode(errors="ignore")
    assert text.startswith(answer.choices[0].message.content)
    streamed = client.chat.completions.create(**options, stream=True)
    pieces = [t for c in streamed if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.logprob for t in pieces] == [t.logprob for t in content]


@test
def logit_bias():
    tokens = client.post("/../tokenize", body={"content": " green"}, cast_to=object)["tokens"]
    answer = client.chat.completions.create(
        model=model, messages=HELLO, max_tokens=3, temperature=0, logit_bias={str(tokens[0]): 100}
    )
    assert answer.choices[0].message.content.strip().startswith("green"), answer


@test
def stop():
    options = dict(model=model, messages=[{"role": "user", "content": "Count: 1, 2, 3, 4, 5, 6"}], temperature=0, max_tokens=40)
    whole = client.chat.completions.create(**options).choices[0].message.content
    cut = whole[2:6]
    answer = client.chat.completions.create(**options, stop=[cut, "zzz"]).choices[0]
    assert answer.message.content == whole[: whole.index(cut)] and answer.finish_reason == "stop"


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 30}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time", "description": "The time now"}}
ASK = [{"role": "user", "content": "What is the weather in Kyoto, in celsius?"}]


def check_call(call, name="get_weather"):
    assert call.type == "function" and call.id and call.function.name == name
    arguments = json.loads(call.function.arguments)
    if name == "get_weather":
        jsonschema.validate(arguments, WEATHER["function"]["parameters"])
    return arguments


@test
def tools_required_and_answered():
    options = dict(model=model, tools=[WEATHER, TIME], temperature=0, max_tokens=80, parallel_tool_calls=False)
    answer = client.chat.completions.create(messages=ASK, tool_choice="required", **options)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and len(choice.message.tool_calls) == 1, choice
    call = choice.message.tool_calls[0]
    assert "kyoto" in check_call(call)["city"].lower()
    # The result goes back, and the model answers in words.
    messages = [*ASK, choice.message, {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21}'}]
    last = client.chat.completions.create(model=model, messages=messages, tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=40)
    assert "21" in last.choices[0].message.content, last


@test
def a_named_tool():
    choice = {"type": "function", "function": {"name": "get_time"}}
    answer = client.chat.completions.create(model=model, messages=ASK, tools=[WEATHER, TIME], tool_choice=choice, temperature=0, max_tokens=60)
    [call] = answer.choices[0].message.tool_calls
    assert check_call(call, "get_time") == {}


@test
def tools_in_a_stream():
    chunks = list(client.chat.completions.create(
        model=model, messages=ASK, tools=[WEATHER], tool_choice="required", temperature=0, max_tokens=80, stream=True,
        parallel_tool_calls=False,
    ))
    calls = [c for chunk in chunks if chunk.choices for c in chunk.choices[0].delta.tool_calls or []]
    assert len(calls) == 1 and calls[0].index == 0
    check_call(calls[0])
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any((chunk.choices[0].delta.content or "").strip() for chunk in chunks if chunk.choices)


@test
def tools_if_the_model_likes():
    answer = client.chat.completions.create(model=model, messages=ASK, tools=[WEATHER], temperature=0, max_tokens=80)
    message = answer.choices[0].message
    # Either is an answer; a call is one of the tool.
    for call in message.tool_calls or []:
        check_call(call)
    assert message.tool_calls or message.content


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@test
def json_schema():
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Invent a person."}], max_tokens=80, temperature=1, seed=3,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}},
    )
    assert answer.choices[0].finish_reason == "stop", answer
    jsonschema.validate(json.loads(answer.choices[0].message.content), PERSON)


@test
def json_object():
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": 'Answer in JSON: {"colour": ...} with one colour.'}], max_tokens=60,
        temperature=0, response_format={"type": "json_object"},
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    else:
        assert answer.choices[0].message.content.startswith("{")


@test
def completions():
    answer = client.completions.create(model=model, prompt=["Once upon", "fn main"], max_tokens=6, temperature=0, logprobs=2)
    assert answer.object == "text_completion" and len(answer.choices) == 2
    for choice in answer.choices:
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(choice.logprobs.text_offset)
        assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)
    one = client.completions.create(model=model, prompt="Once upon", max_tokens=6, temperature=0)
    assert one.choices[0].text == answer.choices[0].text
    pieces = client.completions.create(model=model, prompt="Once upon", max_tokens=6, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in pieces) == one.choices[0].text
    ids = client.post("/../tokenize", body={"content": "Once upon"}, cast_to=object)["tokens"]
    assert client.completions.create(model=model, prompt=ids, max_tokens=6, temperature=0).choices[0].text == one.choices[0].text


def refused(kind, function):
    try:
        function()
    except kind as error:
        return error
    raise AssertionError("accepted")


@test
def errors():
    create = client.chat.completions.create
    error = refused(openai.NotFoundError, lambda: create(model="another", messages=HELLO))
    assert error.code == "model_not_found" and error.param == "model"
    for field, value in [("temperature", 3), ("n", 0), ("top_logprobs", 3), ("logit_bias", {"-1": 1}), ("stop", [""])]:
        error = refused(openai.BadRequestError, lambda: create(model=model, messages=HELLO, **{field: value}))
        assert error.param == field and error.type == "invalid_request_error" and field in error.message, error
    error = refused(openai.BadRequestError, lambda: create(model=model, messages=HELLO, store=True))
    assert "store" in error.message
    error = refused(openai.BadRequestError, lambda: create(model=model, messages=[{"role": "user", "content": "x " * 20000}]))
    assert error.param == "messages" and "tokens" in error.message and "x x" not in error.message
    error = refused(openai.BadRequestError, lambda: create(model=model, messages=[{"role": "wizard", "content": "x"}]))
    assert error.param == "messages"
    error = refused(openai.BadRequestError, lambda: create(model=model, messages=HELLO, response_format={
        "type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "colour"}}}))
    assert error.param == "response_format"
    error = refused(openai.BadRequestError, lambda: client.embeddings.create(model=model, input="x"))
    assert "embeddings" in error.message
    error = refused(openai.InternalServerError, lambda: create(model=model, messages=HELLO, max_tokens=400, temperature=2, extra_body={"timeout_ms": 30}))
    assert error.status_code == 504 and error.code == "inference_timeout"


print(f"{len(passed)} passed")
