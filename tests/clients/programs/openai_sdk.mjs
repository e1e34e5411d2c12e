// The official `openai` package for Node.js, on chat completions.
import OpenAI from "openai";

const { URL: url, KEY: apiKey } = process.env;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "Tell me of the sea" }];
const asked = { model: "model", messages, max_tokens: 12, service_tier: "priority" };
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const weather = { type: "function", function: { name: "weather", parameters } };

const { chat } = client;
const errorOf = (request) => request.then(null, (error) => [error.constructor.name, error.status, error.param]);

const answer = await chat.completions.create(asked);
const stream = chat.completions.stream({ ...asked, stream_options: { include_usage: true } });
const streamed = await stream.finalChatCompletion();
const called = await chat.completions.create({ ...asked, tools: [weather], tool_choice: "required" });
const [{ function: call }] = called.choices[0].message.tool_calls;
const models = [];
for await (const model of client.models.list()) models.push(model.id);
const shown = ({ choices, service_tier, usage }) => ({
  text: choices[0].message.content,
  tier: service_tier,
  tokens: [usage.prompt_tokens, usage.completion_tokens],
  cost: usage.estimated_cost,
});
console.log(JSON.stringify({
  answer: shown(answer),
  stream: shown(streamed),
  tool: [call.name, JSON.parse(call.arguments)],
  models,
  unknown_model: await errorOf(chat.completions.create({ ...asked, model: "no/such" })),
  bad_tier: await errorOf(chat.completions.create({ ...asked, service_tier: "gold" })),
}));
