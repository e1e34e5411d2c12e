// Vercel's AI SDK with `@ai-sdk/openai`, which leaves the tier of models out that it does not know:
// it is set by a `fetch` of one's own.
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, streamText, tool } from "ai";
import { z } from "zod";

const { URL: url, KEY: apiKey } = process.env;
globalThis.AI_SDK_LOG_WARNINGS = false;
const withTier = (tier) => (address, init) =>
  fetch(address, { ...init, body: JSON.stringify({ ...JSON.parse(init.body), service_tier: tier }) });
const provider = (tier) => createOpenAI({ baseURL: `${url}/v1`, apiKey, fetch: withTier(tier) });
const openai = provider("priority");
const asked = { model: openai("model"), prompt: "Tell me of the sea", maxOutputTokens: 12, maxRetries: 0 };
const weather = tool({ inputSchema: z.object({ city: z.string() }) });

const errorOf = (request) => request.then(null, (error) => [error.name, error.statusCode, JSON.parse(error.responseBody).error.param]);
const shown = (text, metadata, usage) => ({
  text,
  tier: metadata.openai.serviceTier,
  tokens: [usage.inputTokens, usage.outputTokens],
  cost: usage.raw.estimated_cost,
});

const answer = await generateText(asked);
const stream = streamText(asked);
const called = await generateText({ ...asked, tools: { weather }, toolChoice: "required" });
const [call] = called.toolCalls;
const plain = createOpenAI({ baseURL: `${url}/v1`, apiKey });
const providerOptions = { openai: { serviceTier: "priority" } };
const dropped = await generateText({ ...asked, model: plain("model"), providerOptions });
console.log(JSON.stringify({
  answer: shown(answer.text, answer.providerMetadata, answer.usage),
  stream: shown(await stream.text, await stream.providerMetadata, await stream.usage),
  tool: [call.toolName, call.input],
  unknown_model: await errorOf(generateText({ ...asked, model: openai("no/such") })),
  bad_tier: await errorOf(generateText({ ...asked, model: provider("gold")("model") })),
  option: [dropped.warnings[0].feature, dropped.providerMetadata.openai.serviceTier],
}));
