// Keeps the history of every model as the server sends it, and shows it.
//
// Events (see docs/board.md): `model` has the state of one model and the points that are new, or all
// of them with `anew`; `tick` comes after them every second and names the models.

import { Chart } from "./charts.js";
import { count, money, percent, rate, seconds, time, words } from "./format.js";

const TIERS = ["priority", "default", "flex"];
const FINE = { kept: 300, span: 300, period: 1 };
const COARSE = { kept: 180, span: 3600, period: 20 };
const LATE_MS = 4000;
const DEAD_MS = 15000;
const AGAIN_MS = 3000;

// The places of values in a point (Point.to_row).
const [AT, OF_TIER, SHEDS, DOWNGRADES, REPLICAS] = [0, 1, 2, 3, 4];
const [WAITING, OLDEST, RUNNING, SUSPENDED, P50, P99, USD, TOKENS, REQUESTS] = [0, 1, 2, 3, 4, 5, 6, 7, 8];

const page = {
  connection: document.getElementById("connection"),
  empty: document.getElementById("empty"),
  models: document.getElementById("models"),
  template: document.getElementById("model"),
};
const models = new Map();
let range = FINE;

const tierLines = (more = {}) => TIERS.map((tier) => ({ name: tier, colour: `--${tier}`, dot: tier, ...more }));
const sum = (reasons) => Object.values(reasons).reduce((all, one) => all + one, 0);

// The sums of the minute up to each point.
function inMinutes(counts) {
  const points = 60 / range.period;
  return counts.map((_, at) => counts.slice(Math.max(0, at + 1 - points), at + 1).reduce((all, one) => all + one, 0));
}

function element(name, text = "", attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function row(...cells) {
  const made = document.createElement("tr");
  made.append(...cells);
  return made;
}

// How many of the streams met it, in words.
function attained([met, missed]) {
  const streams = met + missed;
  return streams ? `${percent(met / streams)} of ${count(streams)}` : "no data";
}

const cell = (text) => element("td", text);
const number = (text) => element("td", text, { class: "number" });

function none(body, columns, text) {
  body.replaceChildren(row(element("td", text, { colspan: columns, class: "muted" })));
}

// A coarse point of the seconds that do not fill one yet, with counts as of a whole one.
function partial(points) {
  const whole = [...points.at(-1)];
  for (const place of [SHEDS, DOWNGRADES]) {
    const all = points.reduce((total, point) => total + sum(point[place]), 0);
    whole[place] = { all: (all * COARSE.period) / points.length };
  }
  return whole;
}

class Model {
  constructor() {
    this.fine = [];
    this.coarse = [];
    this.state = null;
    this.shown = "";
    this.section = page.template.content.cloneNode(true).firstElementChild;
    this.charts = {
      queue: new Chart("Waiting, by tier", tierLines({ fill: true }), count),
      ttft: new Chart(
        "Time to first token",
        [
          ...tierLines().map((line) => ({ ...line, name: `${line.name} p99` })),
          ...tierLines({ dash: [4, 4] }).map((line) => ({ ...line, name: `${line.name} p50 (dashed)` })),
        ],
        seconds,
        true,
      ),
      slots: new Chart(
        "Slots",
        [
          { name: "slots", colour: "--border-strong", dot: "slots" },
          { name: "running", colour: "--default", dot: "running", fill: true },
          { name: "suspended", colour: "--bad", dot: "suspended", fill: true },
        ],
        count,
      ),
      tokens: new Chart("Output tokens a second", tierLines(), rate),
      cost: new Chart("Cost in USD a minute", tierLines(), money),
      turned: new Chart(
        "Sheds and downgrades in a minute",
        [
          { name: "sheds", colour: "--bad", dot: "sheds", fill: true },
          { name: "downgrades", colour: "--priority", dot: "downgrades" },
        ],
        count,
      ),
    };
    this.select = element("select", "", { "aria-label": "Replica in the chart of slots" });
    this.select.addEventListener("change", () => this.draw());
    this.charts.slots.head.append(this.select);
    this.part(".charts").append(...Object.values(this.charts).map((chart) => chart.figure));
  }

  part(selector) {
    return this.section.querySelector(selector);
  }

  take(news) {
    if (news.anew) this.fine = this.coarse = [];
    this.state = news.state;
    this.fine = [...this.fine, ...news.fine].slice(-FINE.kept);
    this.coarse = [...this.coarse, ...news.coarse].slice(-COARSE.kept);
  }

  rows() {
    if (range === FINE) return this.fine;
    const last = this.coarse.at(-1)?.[AT] ?? 0;
    // What is newer than the last coarse point becomes one more.
    const rest = this.fine.filter((point) => point[AT] > last);
    return rest.length ? [...this.coarse, partial(rest)] : this.coarse;
  }

  show(away) {
    const { state } = this;
    this.part("h2").textContent = state.id;
    this.showTags(state);
    this.showNotice(state, away);
    this.section.classList.toggle("stale", away);
    if (this.fine.length) this.showTiers(state, this.fine.at(-1));
    this.showLists(state);
    this.draw();
  }

  showTags(state) {
    const ready = state.state === "ready";
    this.part(".tags").replaceChildren(
      element("span", words(state.state), { class: ready ? "tag good" : "tag" }),
      ...state.service_tiers.map((tier) => element("span", tier, { class: `tag ${tier}` })),
    );
    const ingresses = `${state.ingresses} ingress${state.ingresses === 1 ? "" : "es"}`;
    this.part('[data-part="about"]').textContent = `${ingresses} · history since ${time(state.began)}, when its Model was started`;
  }

  showNotice(state, away) {
    const notice = this.part('[data-part="notice"]');
    const missing = Object.entries(state.missing).map(([pool, why]) => `${pool}: ${why}`);
    let text = "";
    if (away) text = `Its Model does not answer. What is shown is from ${time(this.fine.at(-1)?.[AT] ?? state.began)}.`;
    else if (state.state === "asleep") text = "Asleep: it has no replicas. The first request wakes it.";
    else if (state.state === "starting") text = "No replica is ready: its engines are starting, or have failed.";
    const starts = state.starts.map(
      ({ pool, phase, began, usual_s }) =>
        `${pool}: ${phase || "starting"}, since ${time(began)}${usual_s === null ? "" : `, last time it took ${seconds(usual_s)}`}`,
    );
    if (starts.length && !away) text = `${state.state === "starting" ? "No replica is ready." : text} Starting: ${starts.join("; ")}.`.trim();
    if (missing.length) text = `${text} No node offers what a pool requires. ${missing.join("; ")}`.trim();
    notice.hidden = !text;
    notice.classList.toggle("bad", away);
    // Said once, not every second.
    if (notice.textContent !== text) notice.textContent = text;
  }

  showTiers(state, point) {
    const rows = TIERS.map((tier, rank) => {
      const now = point[OF_TIER][rank];
      const head = element("th", "", { scope: "row" });
      head.append(element("span", "", { class: `dot ${tier}` }), tier);
      return row(
        head,
        number(count(now[WAITING])),
        number(now[WAITING] ? seconds(now[OLDEST]) : "–"),
        number(count(now[RUNNING])),
        number(count(now[SUSPENDED])),
        number(seconds(now[P50])),
        number(seconds(now[P99])),
        number(rate(now[REQUESTS])),
        number(rate(now[TOKENS])),
        number(money(now[USD])),
        number(money(state.totals[tier].cost)),
      );
    });
    this.part(".tiers-now tbody").replaceChildren(...rows);
  }

  // Lists change seldom; who reads or selects in them is not disturbed every second.
  showLists(state) {
    const objectives = state.slo ?? {}; // A Model of an older version has none.
    const slo = Object.values(objectives).map(({ recent_s, ...one }) => one);
    const lists = JSON.stringify([state.replicas, state.sheds, state.downgrades, state.decisions, slo]);
    if (lists === this.shown) return;
    this.shown = lists;
    this.showReplicas(state.replicas);
    this.showReasons(state);
    this.showSlo(objectives);
    this.showDecisions(state.decisions);
  }

  showReplicas(replicas) {
    const body = this.part('[data-part="replicas"] tbody');
    if (!replicas.length) none(body, 6, "No replica.");
    else {
      body.replaceChildren(
        ...replicas.map((one) => {
          const priority = one.preempts ? "native, preempts" : one.priority ? "native" : "–";
          const head = element("th", one.name, { scope: "row" });
          const engine = one.engine ? `${one.engine} ${one.version}` : one.slots ? "" : "draining";
          return row(head, cell(engine), cell(priority), number(one.running), number(one.suspended), number(one.slots));
        }),
      );
    }
    this.offer(replicas.map((one) => one.name));
  }

  offer(names) {
    const chosen = this.select.value;
    const options = [element("option", "all replicas", { value: "" }), ...names.map((name) => element("option", name, { value: name }))];
    if (options.length === this.select.options.length && options.every((one, at) => one.value === this.select.options[at].value)) return;
    this.select.replaceChildren(...options);
    this.select.value = names.includes(chosen) ? chosen : "";
  }

  showReasons(state) {
    const body = this.part('[data-part="reasons"] tbody');
    const rows = [
      ...Object.entries(state.sheds).map((one) => ["shed", ...one]),
      ...Object.entries(state.downgrades).map((one) => ["downgraded", ...one]),
    ];
    if (!rows.length) none(body, 3, "None since the ingresses started.");
    else body.replaceChildren(...rows.map(([what, why, many]) => row(cell(what), cell(words(why)), number(count(many)))));
  }

  showSlo(slo) {
    const body = this.part('[data-part="slo"] tbody');
    const tiers = TIERS.filter((tier) => slo[tier]);
    if (!tiers.length) {
      none(body, 4, "No tier has one (slo in the model's settings).");
      return;
    }
    body.replaceChildren(
      ...tiers.map((tier) => {
        const one = slo[tier];
        const head = element("th", "", { scope: "row" });
        head.append(element("span", "", { class: `dot ${tier}` }), tier);
        const objective = `${percent(one.objective)} of streams begin within ${seconds(one.ttft_ms / 1000)}`;
        const lately = element("td", `${attained(one.recent)} `);
        if (one.kept !== null) lately.append(element("span", one.kept ? "met" : "not met", { class: one.kept ? "tag good" : "tag bad" }));
        return row(head, cell(objective), lately, cell(attained(one.total)));
      }),
    );
  }

  showDecisions(decisions) {
    const body = this.part('[data-part="decisions"] tbody');
    if (!decisions.length) {
      none(body, 3, "No pool was given more or fewer replicas lately.");
      return;
    }
    body.replaceChildren(
      ...decisions.toReversed().map((one) => {
        const pools = Object.entries(one.pools).map(([pool, [before, after]]) => `${pool} ${before} → ${after}`);
        return row(element("td", time(one.at), { class: "time" }), element("td", pools.join(", "), { class: "time" }), cell(one.why));
      }),
    );
  }

  draw() {
    const rows = this.rows();
    if (!rows.length || document.hidden) return;
    const times = rows.map((point) => point[AT]);
    const span = [times.at(-1) - range.span, times.at(-1)];
    const of = (place) => TIERS.map((_, rank) => rows.map((point) => point[OF_TIER][rank][place]));
    const slots = rows.map((point) => this.slotsOf(point[REPLICAS]));
    const columns = {
      queue: of(WAITING),
      ttft: [...of(P99), ...of(P50)],
      slots: [2, 0, 1].map((place) => slots.map((one) => one?.[place] ?? null)),
      tokens: of(TOKENS),
      cost: of(USD),
      turned: [SHEDS, DOWNGRADES].map((place) => inMinutes(rows.map((point) => sum(point[place])))),
    };
    for (const [name, chart] of Object.entries(this.charts)) chart.show([times, ...columns[name]], span);
  }

  slotsOf(replicas) {
    if (this.select.value) return replicas[this.select.value];
    return Object.values(replicas).reduce((all, one) => all.map((value, at) => value + one[at]), [0, 0, 0]);
  }
}

function tick({ models: names, away }) {
  for (const [name, model] of models) {
    if (names.includes(name)) continue;
    model.section.remove();
    models.delete(name);
  }
  for (const name of [...models.keys()].sort()) {
    const model = models.get(name);
    if (!model.section.isConnected) insert(name, model);
    model.show(away.includes(name));
  }
  page.empty.hidden = models.size > 0;
  page.empty.textContent = names.length ? "The models do not answer yet." : "No model is deployed.";
}

function insert(name, model) {
  model.section.dataset.application = name;
  const after = [...page.models.children].find((one) => one.dataset.application > name);
  page.models.insertBefore(model.section, after ?? null);
}

// The connection. A browser comes back by itself when a stream ends, which each does once a minute,
// but not when it is refused.
let source = null;
let heard = performance.now();

function connect() {
  source?.close();
  source = new EventSource("/board/events");
  source.addEventListener("model", ({ data }) => {
    const news = JSON.parse(data);
    if (!models.has(news.application)) models.set(news.application, new Model());
    models.get(news.application).take(news);
  });
  source.addEventListener("tick", ({ data }) => {
    heard = performance.now();
    say("Live", "good");
    tick(JSON.parse(data));
  });
  source.addEventListener("error", () => {
    if (source.readyState === EventSource.CLOSED) setTimeout(refused, AGAIN_MS);
  });
}

async function refused() {
  try {
    const answer = await fetch("/board/events", { method: "HEAD" });
    if (answer.status === 401) {
      location.assign("/login?next=/board");
      return;
    }
    if (answer.status === 403) {
      say("This key may no longer see the board", "bad");
      return;
    }
  } catch {
    // Nobody answers; the next try may find somebody.
  }
  connect();
}

function say(text, kind) {
  if (page.connection.textContent === text) return;
  page.connection.textContent = text;
  page.connection.className = `tag ${kind}`;
}

setInterval(() => {
  const silent = performance.now() - heard;
  if (silent > LATE_MS) say("Reconnecting", "bad");
  if (silent > DEAD_MS && source.readyState !== EventSource.CLOSED) {
    heard = performance.now() - LATE_MS;
    connect();
  }
}, 1000);

for (const input of document.querySelectorAll('input[name="range"]')) {
  input.addEventListener("change", () => {
    range = input.value === "coarse" ? COARSE : FINE;
    for (const model of models.values()) model.draw();
  });
}

document.addEventListener("visibilitychange", () => {
  for (const model of models.values()) model.draw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const model of models.values()) for (const chart of Object.values(model.charts)) chart.redraw();
});

connect();
