// The official `@anthropic-ai/sdk` package for Node.js.
import Anthropic from "@anthropic-ai/sdk";

const { URL: url, KEY: apiKey } = process.env;
const client = new Anthropic({ baseURL: `${url}/anthropic`, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "Tell me of the sea" }];
const asked = { model: "model", messages, max_tokens: 12, service_tier: "priority" };
const input_schema = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const weather = { name: "weather", input_schema };

const errorOf = (request) => request.then(null, (error) => [error.constructor.name, error.status, error.error.error.param]);
const shown = ({ content, usage }) => ({
  text: content[0].text,
  tier: usage.service_tier,
  tokens: [usage.input_tokens, usage.output_tokens],
  cost: usage.estimated_cost ?? null,
});

const answer = await client.messages.create(asked);
const stream = client.messages.stream(asked);
let cost;
stream.on("streamEvent", (event) => { cost = event.usage?.estimated_cost ?? cost; });
const streamed = await stream.finalMessage();
const called = await client.messages.create({ ...asked, tools: [weather], tool_choice: { type: "any" } });
const [call] = called.content;
const models = [];
for await (const model of client.models.list()) models.push(model.id);
console.log(JSON.stringify({
  answer: shown(answer),
  stream: shown(streamed),
  events: { cost },
  tool: [call.name, call.input],
  models,
  unknown_model: await errorOf(client.messages.create({ ...asked, model: "no/such" })),
  bad_tier: await errorOf(client.messages.create({ ...asked, service_tier: "gold" })),
}));
