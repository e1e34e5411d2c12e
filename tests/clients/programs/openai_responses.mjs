// The official `openai` package for Node.js, on Responses.
import OpenAI from "openai";

const { URL: url, KEY: apiKey } = process.env;
const { responses } = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const input = "Tell me of the sea";
const asked = { model: "model", input, max_output_tokens: 12, service_tier: "priority" };
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const weather = { type: "function", name: "weather", parameters, strict: false };

const errorOf = (request) => request.then(null, (error) => [error.constructor.name, error.status, error.param]);
const shown = ({ output_text, service_tier, usage }) => ({
  text: output_text,
  tier: service_tier,
  tokens: [usage.input_tokens, usage.output_tokens],
  cost: usage.estimated_cost,
});

const answer = await responses.create(asked);
const streamed = await responses.stream(asked).finalResponse();
const { output: [call] } = await responses.create({ ...asked, tools: [weather], tool_choice: "required" });
console.log(JSON.stringify({
  answer: shown(answer),
  stream: shown(streamed),
  tool: [call.name, JSON.parse(call.arguments)],
  unknown_model: await errorOf(responses.create({ ...asked, model: "no/such" })),
  bad_tier: await errorOf(responses.create({ ...asked, service_tier: "gold" })),
}));
