// The console: one stream of the pipeline's state, and what is drawn of it.

import { ask, events, get, key, Refused } from "./api.js";
import { startChat } from "./chat.js";
import { startLetters } from "./dead.js";
import { byId, clock, count, el, rate, seconds, share, svg } from "./dom.js";
import { draw, tableRows } from "./picture.js";
import { startTimeline } from "./timeline.js";

const RETRY_MS = [500, 1000, 2000, 4000];
const SILENT_MS = 4000; // the state comes once a second
const HISTORY_MAX = 90;
const HAPPENED_MAX = 200;

const history = new Map(); // a figure's name: its last values
let before = new Map(); // a worker's key: its state, a moment ago
let now = null;
let open = null; // resolves when the right key is given

// --- the key ---------------------------------------------------------------------------------------------------------

/** Wait until the console may be asked: at once where no key is needed, or the one of this tab is good. */
async function admitted() {
  for (;;) {
    try {
      const session = await get("api/session");
      byId("key-form").hidden = true;
      byId("console").hidden = false;
      byId("forget-key").hidden = session.open;
      return;
    } catch (error) {
      if (!(error instanceof Refused) || ![401, 403].includes(error.status)) throw error;
      byId("key-error").textContent = key.get() || error.status === 403 ? error.message : "";
      key.forget();
      await asked();
    }
  }
}

function asked() {
  live("no", "an API key is needed");
  byId("console").hidden = true;
  byId("key-form").hidden = false;
  byId("key").focus();
  return new Promise((resolve) => { open = resolve; });
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(byId("key").value.trim());
  byId("key").value = "";
  open?.();
});

byId("forget-key").addEventListener("click", () => {
  key.forget();
  location.reload();
});

// --- the state, once a second ----------------------------------------------------------------------------------------

function live(state, text) {
  byId("live").parentNode.dataset.live = state;
  if (byId("live").textContent !== text) byId("live").textContent = text; // read aloud where it changes
}

async function follow() {
  for (let failures = 0; ; ) {
    const silence = new AbortController();
    let alarm = setTimeout(() => silence.abort(), 2 * SILENT_MS);
    try {
      await admitted();
      for await (const event of events(await ask("api/state", { signal: silence.signal }))) {
        clearTimeout(alarm);
        alarm = setTimeout(() => silence.abort(), SILENT_MS);
        failures = 0;
        take(JSON.parse(event.data));
      }
      live("no", "the gateway ended the stream; asking again");
    } catch (error) {
      live("no", error instanceof Refused ? error.message : "no connection to the gateway; asking again");
    }
    clearTimeout(alarm);
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS[Math.min(failures++, RETRY_MS.length - 1)]));
  }
}

function take(state) {
  now = state;
  live("yes", "live");
  byId("at").textContent = clock(state.unix_s);
  note(state);
  offer(byId("model"), Object.keys(state.models), true);
  show();
  letters.heard(state.dead_letters);
}

function show() {
  if (!now) return;
  const model = byId("model").value;
  trouble(now);
  figures(now, model);
  draw(byId("picture"), now, model);
  if (byId("workers").closest("details").open) byId("workers").replaceChildren(...tableRows(now, model));
}

/** The models in a select, with the choice kept. */
function offer(select, models, all) {
  const there = [...select.options].map((option) => option.value).filter(Boolean);
  if (there.join() === models.join()) return;
  const chosen = select.value;
  const first = all ? [el("option", { value: "" }, "all models")] : [];
  select.replaceChildren(...first, ...models.map((model) => el("option", { value: model }, model)));
  if (all ? chosen && models.includes(chosen) : models.includes(chosen)) select.value = chosen;
}

function trouble(state) {
  const said = [];
  if (state.broker === false) said.push("The broker does not answer: queues and deaths are as they were last known.");
  if (state.workers_left_out) said.push(`${state.workers_left_out} more workers are not shown.`);
  for (const lease of state.leases) {
    if (lease.paused_until_unix_s) {
      const until = lease.paused_until_unix_s - state.unix_s > 86_400 * 365 ? "" : ` until ${clock(lease.paused_until_unix_s)}`;
      said.push(`${lease.model ?? "every model"}: ${lease.queue} is paused${until}.`);
    }
  }
  byId("trouble").hidden = said.length === 0;
  const text = [...new Set(said)].join(" ");
  if (byId("trouble").textContent !== text) byId("trouble").textContent = text;
}

// --- figures ---------------------------------------------------------------------------------------------------------

function figures(state, model) {
  const speed = (model ? state.models[model] : state.total) ?? {};
  const leases = state.leases.filter((lease) => !model || !lease.model || lease.model === model);
  const leased = state.leases.length ? leases.reduce((sum, lease) => sum + lease.leased, 0) : null;
  const oldest_s = Math.max(0, ...leases.map((lease) => lease.oldest_s));
  const errors = Object.entries(speed.errors ?? {});
  const failed = errors.reduce((sum, [, value]) => sum + value, 0);
  const two = (p50, p95) => [(p50 ?? null) === null ? "–" : seconds(p50), (p95 ?? null) === null ? "" : `p95 ${seconds(p95)}`];
  const tiles = [
    ["Requests/s", rate(speed.requests_per_s), `last ${Math.round(state.watched_s)} s`, speed.requests_per_s],
    ["Tokens/s", rate(speed.tokens_per_s), "generated", speed.tokens_per_s],
    ["TTFT p50", ...two(speed.ttft_s_p50, speed.ttft_s_p95), speed.ttft_s_p50],
    ["ITL p50", ...two(speed.itl_s_p50, speed.itl_s_p95), speed.itl_s_p50],
    ["KV hit rate", share(speed.hit_rate), "of prompt tokens", speed.hit_rate],
    ["Leases", count(leased), leased ? `oldest ${seconds(oldest_s)}` : "tasks in work", leased],
    ["Redeliveries", count(speed.redeliveries), "taken again", null, speed.redeliveries >= 1 ? "warn" : ""],
    ["Errors", count(failed), errors.map(([code, value]) => `${code} ${Math.round(value)}`).join(", ") || "none", null, failed ? "bad" : ""],
    ["Dead letters", count(state.dead_letters), "given up", null, state.dead_letters ? "bad" : ""],
  ];
  byId("figures").replaceChildren(...tiles.map(([name, value, about, figure, how]) => tile(name, value, about, figure, how)));
}

function tile(name, value, about, figure, how) {
  const values = history.get(name) ?? [];
  if (figure !== null) {
    values.push(figure ?? null);
    if (values.length > HISTORY_MAX) values.shift();
    history.set(name, values);
  }
  return el("div", { class: how || null },
    el("dt", {}, name), el("dd", {}, ...withUnit(value)), el("dd", { class: "about", title: about }, about),
    figure === null ? null : sparkline(values));
}

/** "18.3 ms" with its unit in small letters. */
function withUnit(value) {
  const [number, unit] = value.split(" ");
  return unit ? [number, el("span", { class: "unit" }, ` ${unit}`)] : [number];
}

/** The latest value is at the right edge. */
function sparkline(values) {
  const top = Math.max(1e-9, ...values.map((value) => value ?? 0));
  const points = values
    .map((value, index) => (value === null ? null : `${(100 * (HISTORY_MAX - values.length + index)) / (HISTORY_MAX - 1)},${(15 - (13 * value) / top).toFixed(1)}`))
    .filter(Boolean);
  return svg("svg", { class: "spark", viewBox: "0 0 100 16", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("polyline", { points: points.join(" ") }));
}

// --- what happened ---------------------------------------------------------------------------------------------------

/** Say what has changed with the workers since the last moment. */
function note(state) {
  const after = new Map(state.workers.map((worker) => [`${worker.role} ${worker.worker}`, worker]));
  const lines = [];
  for (const [name, worker] of after) {
    const known = before.get(name);
    const died = worker.died_unix_s && worker.died_unix_s !== known?.died_unix_s;
    if (died && before.size) lines.push([worker.died_unix_s, `${worker.worker} died: nothing was heard of it, or its successor came`, "gone"]);
    const restarted = worker.restarted_unix_s && worker.restarted_unix_s !== known?.restarted_unix_s;
    if (restarted && before.size) lines.push([worker.restarted_unix_s, `${worker.worker} was restarted (${worker.state})`, worker.state]);
    if (!known && before.size) lines.push([state.unix_s, `${worker.worker} came (${worker.state})`, worker.state]);
    else if (known && known.state !== worker.state && worker.state !== "gone" && !restarted)
      lines.push([state.unix_s, `${worker.worker} is ${worker.state}${worker.wrong.length ? `: ${worker.wrong.join(", ")}` : ""}`, worker.state]);
  }
  for (const [name, worker] of before)
    if (!after.has(name)) lines.push([state.unix_s, `${worker.worker} left`, "left"]);
  before = after;
  for (const [unix_s, text, how] of lines)
    byId("happened").prepend(el("li", { "data-state": how }, el("time", {}, clock(unix_s)), ` ${text}`));
  while (byId("happened").children.length > HAPPENED_MAX) byId("happened").lastChild.remove();
}

// --- tabs ------------------------------------------------------------------------------------------------------------

const tabs = [...document.querySelectorAll("[role=tab]")];

function choose(tab) {
  for (const one of tabs) {
    one.setAttribute("aria-selected", String(one === tab));
    one.tabIndex = one === tab ? 0 : -1;
    byId(one.getAttribute("aria-controls")).hidden = one !== tab;
  }
  if (tab.id === "tab-dead") letters.load();
}

for (const tab of tabs) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    next.focus();
    choose(next);
  });
}

const timeline = startTimeline(() => choose(byId("tab-timeline")));
const letters = startLetters(() => choose(byId("tab-timeline")));
startChat(async () => {
  const models = (await get("../v1/models")).data.map((model) => model.id);
  offer(byId("chat-model"), models, false);
});

byId("model").addEventListener("change", show);
byId("workers").closest("details").addEventListener("toggle", show);
new ResizeObserver(show).observe(byId("picture"));
timeline.followAddress();
follow();
