// The playground: sends one chat to the model, shows the answer as it comes, and how it was served.

import { events } from "./sse.js";

const element = (id) => document.getElementById(id);
const form = element("playground");
const NONE = "–";

const REASONS = {
  model_does_not_offer_tier: "The model does not offer this tier, so you pay the default price.",
  key_may_not_use_tier: "Your key may not use this tier, so you pay the default price.",
  over_priority_share: "Your key has used up its share of priority, so you pay the default price.",
  route_does_not_honour_priority: "The engine has no priority on this route, so you pay the default price.",
  no_replica_honours_priority: "No engine with room has priority in force, so you pay the default price.",
};

const ERRORS = {
  invalid_api_key: "The key is missing, or does not work.",
  engine_overloaded: "The model is busy, and its queue is full.",
  engine_not_ready: "The model is not ready yet.",
  engine_not_offered: "No machine can run this model now.",
  model_not_found: "This model is not served here any more.",
  rate_limit_exceeded: "Your key has reached its limit for this minute.",
  concurrency_limit_exceeded: "Too many of your requests are under way.",
  insufficient_quota: "The budget of your key or its tenant is spent.",
  engine_error: "The engine failed.",
};

let running = null;

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) run();
});
element("stop").addEventListener("click", () => running?.abort());
element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});

async function run() {
  const prompt = element("prompt").value.trim();
  const limit = Number(element("limit").value);
  if (!prompt) return complain("Write a prompt first.", element("prompt"));
  if (!Number.isInteger(limit) || limit < 1) {
    return complain("Max tokens must be a whole number, 1 or more.", element("limit"));
  }
  begin();
  const began = performance.now();
  try {
    const answer = await ask(prompt, limit);
    if (!answer.ok) throw await refusal(answer);
    stampHeaders(answer.headers);
    await read(answer.body, began);
    say("Done.");
  } catch (error) {
    if (error.name === "AbortError") say("Stopped. You pay for what was generated until then.");
    else if (error instanceof Refused) complain(error.message);
    else complain("The connection to the server was lost. Try again.");
  } finally {
    end();
  }
}

function begin() {
  running = new AbortController();
  element("run").disabled = true;
  element("stop").disabled = false;
  element("answer").replaceChildren();
  element("answer").setAttribute("aria-busy", "true");
  element("reason").textContent = "";
  for (const stamp of element("stamps").querySelectorAll("dd")) stamp.textContent = NONE;
  // A button that is disabled loses the focus, and the keyboard would start from the top again.
  element("stop").focus({ preventScroll: true });
  say("Waiting for the first token…");
}

function end() {
  running = null;
  const focused = document.activeElement === element("stop");
  element("run").disabled = false;
  element("stop").disabled = true;
  element("answer").removeAttribute("aria-busy");
  if (focused) element("run").focus({ preventScroll: true });
}

function ask(prompt, limit) {
  const headers = { "content-type": "application/json" };
  const key = element("key")?.value.trim();
  if (key) headers.authorization = `Bearer ${key}`;
  const body = {
    model: form.dataset.model,
    messages: [{ role: "user", content: prompt }],
    service_tier: new FormData(form).get("tier"),
    max_tokens: limit,
    stream: true,
    stream_options: { include_usage: true },
  };
  return fetch("/v1/chat/completions", {
    method: "POST", headers, body: JSON.stringify(body), signal: running.signal, credentials: "omit",
  });
}

async function read(stream, began) {
  let first = true;
  for await (const data of events(stream)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Refused(inWords(event.error));
    const delta = event.choices?.[0]?.delta ?? {};
    const thought = delta.reasoning_content || delta.reasoning;
    const text = thought || delta.content;
    if (text && first) {
      first = false;
      element("stamp-ttft").textContent = milliseconds(performance.now() - began);
      say("Answering…");
    }
    if (text) append(text, thought ? "thought" : "said");
    if (event.service_tier) showTier(event.service_tier);
    if (event.usage) stampUsage(event.usage);
  }
  throw new Refused("The answer ended too early.");
}

// As text, whatever the model has written: nothing of it is taken for HTML.
function append(text, kind) {
  const answer = element("answer");
  const atEnd = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 8;
  if (answer.lastChild?.className !== kind) {
    answer.append(document.createElement("span"));
    answer.lastChild.className = kind;
  }
  answer.lastChild.append(text);
  if (atEnd) answer.scrollTop = answer.scrollHeight;
}

function stampHeaders(headers) {
  showTier(headers.get("x-service-tier"));
  element("stamp-queue").textContent = milliseconds(Number(headers.get("x-queue-time-ms")));
  const reason = headers.get("x-service-tier-reason");
  if (reason) element("reason").textContent = REASONS[reason] ?? reason;
}

function showTier(tier) {
  const tag = document.createElement("span");
  tag.className = `tag strong ${["priority", "default", "flex"].includes(tier) ? tier : ""}`;
  tag.textContent = tier;
  element("stamp-tier").replaceChildren(tag);
}

function stampUsage({ prompt_tokens: input, completion_tokens: output, estimated_cost: cost, prompt_tokens_details: details }) {
  const cached = details?.cached_tokens;
  element("stamp-input").textContent = cached ? `${input} (${cached} cached)` : `${input}`;
  element("stamp-output").textContent = `${output}`;
  if (cost !== undefined) element("stamp-cost").textContent = dollars(cost);
}

class Refused extends Error {}

async function refusal(answer) {
  const error = await answer.json().then((body) => body.error, () => ({}));
  const wait = Number(answer.headers.get("retry-after"));
  return new Refused(inWords(error ?? {}, answer.status) + (wait ? ` Try again in ${wait} s.` : ""));
}

function inWords(error, status) {
  return ERRORS[error.code] ?? error.message ?? `The server answered with status ${status}.`;
}

function say(text) {
  element("status").textContent = text;
  element("status").classList.remove("bad");
}

function complain(text, field) {
  say(text);
  element("status").classList.add("bad");
  field?.focus();
}

const milliseconds = (ms) => (ms < 10000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(1)} s`);

// Costs are small: enough digits to tell tiers apart, none that are noise.
const dollars = (cost) => (cost ? `$${cost.toFixed(12).replace(/0+$/, "").replace(/\.$/, "")}` : "$0");
