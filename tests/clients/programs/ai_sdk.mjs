// Vercel's AI SDK with `@ai-sdk/openai-compatible`.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText, tool } from "ai";
import { z } from "zod";

const { URL: url, KEY: apiKey } = process.env;
const frontline = createOpenAICompatible({
  name: "frontline", baseURL: `${url}/v1`, apiKey, includeUsage: true,
});
const asked = {
  model: frontline("model"),
  prompt: "Tell me of the sea",
  maxOutputTokens: 12,
  maxRetries: 0,
  providerOptions: { frontline: { service_tier: "priority" } },
};
const gold = { frontline: { service_tier: "gold" } };
const weather = tool({ inputSchema: z.object({ city: z.string() }) });

const errorOf = (request) => request.then(null, (error) => [error.name, error.statusCode, JSON.parse(error.responseBody).error.param]);
const shown = (text, response, usage) => ({
  text,
  tier: response.headers["x-service-tier"],
  tokens: [usage.inputTokens, usage.outputTokens],
  cost: usage.raw.estimated_cost,
});

const answer = await generateText(asked);
const stream = streamText(asked);
const called = await generateText({ ...asked, tools: { weather }, toolChoice: "required" });
const [call] = called.toolCalls;
console.log(JSON.stringify({
  answer: shown(answer.text, answer.response, answer.usage),
  stream: shown(await stream.text, await stream.response, await stream.usage),
  tool: [call.toolName, call.input],
  unknown_model: await errorOf(generateText({ ...asked, model: frontline("no/such") })),
  bad_tier: await errorOf(generateText({ ...asked, providerOptions: gold })),
}));
