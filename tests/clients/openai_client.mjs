// The official `openai` package for Node against a live worker: node openai_client.mjs URL FOLDER
// FOLDER is where the package was installed.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [url, folder] = process.argv.slice(2);
const OpenAI = createRequire(`${folder}/`)("openai");
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "Name three colours." }];
let passed = 0;

async function test(name, run) {
  await run();
  passed += 1;
  console.log(`ok ${name}`);
}

await test("chat", async () => {
  const answer = await client.chat.completions.create({ model, messages, max_tokens: 16, temperature: 0 });
  assert.ok(answer.choices[0].message.content.trim());
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
});

await test("a stream is the answer in pieces", async () => {
  const options = { model, messages, max_tokens: 16, temperature: 0 };
  const whole = await client.chat.completions.create(options);
  const stream = await client.chat.completions.create({ ...options, stream: true, stream_options: { include_usage: true } });
  let text = "", chunks = 0, usage = null;
  for await (const chunk of stream) {
    chunks += 1;
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.deepEqual(usage, whole.usage);
  assert.ok(chunks > 5);
});

await test("a stream can be left", async () => {
  const stream = await client.chat.completions.create({ model, messages, max_tokens: 500, temperature: 1.5, stream: true });
  let seen = 0;
  for await (const _ of stream) if (++seen === 4) break;
  assert.equal(seen, 4);
});

const tool = {
  type: "function",
  function: {
    name: "add", description: "Adds two numbers",
    parameters: { type: "object", properties: { a: { type: "integer" }, b: { type: "integer" } }, required: ["a", "b"], additionalProperties: false },
  },
};

await test("tools", async () => {
  const answer = await client.chat.completions.create({
    model, messages: [{ role: "user", content: "What is 2 plus 3?" }], tools: [tool], tool_choice: "required", parallel_tool_calls: false,
    temperature: 0, max_tokens: 80,
  });
  assert.equal(answer.choices[0].finish_reason, "tool_calls");
  const [call] = answer.choices[0].message.tool_calls;
  assert.equal(call.function.name, "add");
  const { a, b } = JSON.parse(call.function.arguments);
  assert.ok(Number.isInteger(a) && Number.isInteger(b));
});

await test("json schema", async () => {
  const schema = { type: "object", properties: { colour: { enum: ["red", "green"] } }, required: ["colour"], additionalProperties: false };
  const answer = await client.chat.completions.create({
    model, messages, temperature: 1, max_tokens: 40,
    response_format: { type: "json_schema", json_schema: { name: "colour", schema } },
  });
  assert.ok(["red", "green"].includes(JSON.parse(answer.choices[0].message.content).colour));
});

await test("logprobs", async () => {
  const answer = await client.chat.completions.create({ model, messages, max_tokens: 5, temperature: 0, logprobs: true, top_logprobs: 2 });
  for (const token of answer.choices[0].logprobs.content) {
    assert.equal(token.top_logprobs.length, 2);
    assert.ok(token.logprob <= 0);
  }
});

await test("errors", async () => {
  await assert.rejects(client.chat.completions.create({ model: "another", messages }), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create({ model, messages, temperature: 9 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
});

console.log(`${passed} passed`);
