// The pipeline as a picture: gateways -> preprocess -> decode <-> prefill, the queues between them, telemetry aside.
// Laid out anew for each state: side by side where there is room, else from top to bottom.

import { count, cut, el, rate, seconds, share, svg } from "./dom.js";

const WIDE_PX = 780;
const MARGIN = 6;
const HEAD = 24;
const GAP = 8;
const ROW_PX = { engine: 62, plain: 44, small: 26 };
const SMALL_FROM = 6; // boxes in a column
const BOXES_MAX = 16; // in a column
const QUEUE = { width: 122, height: 66 };
const STRIP_PX = 46; // a queue's height where it lies across
const RED_S = 10; // a death stays red so long, however soon its successor came
const CELLS_MAX = 16; // a queue's or a worker's, drawn one by one
const QUIET = new Set(["telemetry"]);

/** Draw a state for one model, or all where it is "". */
export function draw(place, state, model) {
  const width = Math.floor(place.clientWidth);
  if (width < 100) return;
  const view = viewOf(state, model);
  const picture = width >= WIDE_PX ? sideBySide(view, width) : topToBottom(view, width);
  place.replaceChildren(picture);
}

// --- what is drawn ---------------------------------------------------------------------------------------------------

function viewOf(state, model) {
  const mine = state.workers
    .filter((worker) => !model || !worker.model || worker.model === model)
    .map((worker) => ({ ...worker, ...afterDeath(worker, state.unix_s) }));
  const of = (...roles) => mine.filter((worker) => roles.includes(worker.role));
  const main = new Set(["gateway", "preprocess", "decode", "prefill"]);
  const others = mine.filter((worker) => !main.has(worker.role) && !QUIET.has(worker.role));
  const queue = (name) => queueOf(state, name, model);
  const tasks = (workers) => sum(workers, "tasks_per_s");
  const speed = (model ? state.models[model] : state.total) ?? {};
  const view = {
    unix_s: state.unix_s,
    gateways: of("gateway"),
    preprocess: of("preprocess"),
    decode: [...of("decode"), ...others],
    prefill: of("prefill"),
    aside: of(...QUIET).map((worker) => ({ ...worker, slots: 0 })), // they take no share of a request
    requests: { ...queue("requests"), per_s: tasks(of("preprocess")) },
    work: { ...queue("decode"), per_s: tasks(of("decode")) },
    prompts: { ...queue("prefill"), per_s: tasks(of("prefill")) },
    tokens_per_s: speed.tokens_per_s,
  };
  view.apart = view.prefill.length > 0 || view.prompts.waiting > 0;
  return view;
}

/** What is to be said of a worker that died of late and is back, and whether its death is fresh. */
function afterDeath(worker, unix_s) {
  if (!worker.died_unix_s || worker.state === "gone") return { note: "", red: false };
  const ago = (then_unix_s) => `${Math.max(0, Math.round(unix_s - then_unix_s))} s ago`;
  if (unix_s - worker.died_unix_s < RED_S) return { note: `died ${ago(worker.died_unix_s)}`, red: true };
  const note = worker.restarted_unix_s ? `restarted ${ago(worker.restarted_unix_s)}` : `was silent ${ago(worker.died_unix_s)}`;
  return { note, red: false };
}

const sum = (workers, field) => workers.reduce((total, worker) => total + (worker[field] ?? 0), 0);

function queueOf(state, name, model) {
  const held = state.depths.filter((depth) => depth.queue === name && (!model || depth.model === model));
  const leases = state.leases.filter((lease) => lease.queue === name && (!model || !lease.model || lease.model === model));
  const leased = leases.reduce((total, lease) => total + lease.leased, 0);
  const messages = held.reduce((total, depth) => total + depth.messages, 0);
  return {
    name,
    known: state.broker === true,
    leased,
    waiting: Math.max(0, messages - leased),
    oldest_s: Math.max(0, ...leases.map((lease) => lease.oldest_s)),
    paused: leases.some((lease) => lease.paused_until_unix_s),
  };
}

function describe(view) {
  const said = (name, workers) => {
    const gone = workers.filter((worker) => worker.state === "gone").length;
    return `${workers.length} ${name}${gone ? `, ${gone} gone` : ""}`;
  };
  const waits = [view.requests, view.work, view.prompts].map((queue) => `${queue.waiting} wait for ${queue.name}`);
  const workers = [["gateways", view.gateways], ["preprocess", view.preprocess], ["decode", view.decode], ["prefill", view.prefill]];
  return `The pipeline: ${workers.map(([name, of]) => said(name, of)).join("; ")}. ${waits.join("; ")}.`;
}

// --- side by side ----------------------------------------------------------------------------------------------------

function sideBySide(view, width) {
  const columns = [
    { name: "Clients and gateways", workers: view.gateways, clients: true },
    { name: "Preprocess", workers: view.preprocess },
    { name: "Decode", workers: view.decode },
    ...(view.apart ? [{ name: "Prefill", workers: view.prefill }] : []),
  ];
  const between = Math.max(QUEUE.width + 44, Math.min(210, width * 0.14));
  const boxWidth = Math.min(250, (width - 2 * MARGIN - (columns.length - 1) * between) / columns.length);
  const used = columns.length * boxWidth + (columns.length - 1) * between;
  const heights = columns.map((column) => stackHeight(column.workers) + (column.clients ? 44 : 0));
  const room = Math.max(150, ...heights);
  const top = HEAD + 4;
  const middle = top + room / 2;
  const drawing = { under: [], over: [] };
  columns.forEach((column, index) => {
    column.x = (width - used) / 2 + index * (boxWidth + between);
    column.width = boxWidth;
    place(drawing, column, middle - heights[index] / 2);
  });
  const queues = [view.requests, view.work, view.prompts];
  for (let index = 0; index + 1 < columns.length; index++)
    link(drawing, columns[index], columns[index + 1], queues[index], middle, index === 2);
  const bottom = top + room + 26;
  answers(drawing, columns, view.tokens_per_s, bottom);
  const height = aside(drawing, view.aside, width, bottom + 14);
  return canvas(view, width, height, drawing);
}

function stackHeight(workers) {
  const shown = Math.min(workers.length, BOXES_MAX) + (workers.length > BOXES_MAX ? 1 : 0);
  const row = rowHeight(workers);
  return Math.max(ROW_PX.plain, shown * (row + GAP) - GAP);
}

function rowHeight(workers) {
  if (workers.length > SMALL_FROM) return ROW_PX.small;
  if (workers.some((worker) => worker.kv_tokens > 0)) return ROW_PX.engine;
  return workers.some((worker) => worker.slots > 0 || worker.note) ? ROW_PX.plain : ROW_PX.small;
}

/** A column's head and boxes from `y` on; notes where edges end. */
function place(drawing, column, y) {
  const { x, width, workers } = column;
  drawing.over.push(svg("text", { class: "head", x: x + width / 2, y: 14, "text-anchor": "middle" }, column.name));
  column.ends = [];
  if (column.clients) {
    drawing.over.push(clients(x, y, width));
    column.ends.push(y + 18);
    y += 44;
  }
  const row = rowHeight(workers);
  const shown = troubleFirst(workers, BOXES_MAX);
  for (const worker of shown) {
    drawing.over.push(box(worker, x, y, width, row));
    column.ends.push(y + row / 2);
    y += row + GAP;
  }
  column.bottom = y - GAP;
  if (workers.length > shown.length) {
    drawing.over.push(svg("text", { class: "faint", x: x + width / 2, y: y + 14, "text-anchor": "middle" }, `and ${workers.length - shown.length} more`));
    column.bottom = y + 20;
  }
  if (workers.length === 0 && !column.clients) {
    drawing.over.push(svg("rect", { class: "none", x, y, width, height: ROW_PX.plain, rx: 7 }));
    drawing.over.push(svg("text", { class: "faint", x: x + width / 2, y: y + 27, "text-anchor": "middle" }, "nobody is up"));
    column.ends.push(y + ROW_PX.plain / 2);
    column.bottom = y + ROW_PX.plain;
  }
}

const TROUBLE = ["gone", "unhealthy", "draining", "paused", "starting", "ready"];

/** At most so many, in their order; those in trouble are never left out for those that are not. */
function troubleFirst(workers, most) {
  if (workers.length <= most) return workers;
  const rank = (worker) => TROUBLE.indexOf(worker.state);
  const kept = new Set([...workers].sort((a, b) => rank(a) - rank(b)).slice(0, most));
  return workers.filter((worker) => kept.has(worker));
}

function clients(x, y, width) {
  return svg("g", { class: "clients" },
    svg("rect", { class: "none", x, y, width, height: 36, rx: 18 }),
    svg("text", { class: "faint", x: x + width / 2, y: y + 22, "text-anchor": "middle" }, "clients: HTTP and NATS"));
}

/** What goes from one column to the next, through a queue; and back, where KV comes from prefill. */
function link(drawing, left, right, queue, middle, back) {
  const from = left.x + left.width;
  const to = right.x;
  const x = (from + to - QUEUE.width) / 2;
  const y = middle - (back ? 24 : 0);
  const flows = queue.per_s > 0 ? "edge flows" : "edge";
  const tip = queue.per_s > 0 ? "url(#arrow)" : "url(#arrow-still)";
  for (const end of left.ends) drawing.under.push(curve(from, end, x, y, flows));
  for (const end of right.ends) drawing.under.push(curve(x + QUEUE.width, y, to - 2, end, flows, tip));
  drawing.over.push(queueBox(queue, x, y - QUEUE.height / 2));
  const above = y - QUEUE.height / 2 - 8;
  drawing.over.push(svg("text", { class: "rate", x: (from + to) / 2, y: above, "text-anchor": "middle" },
    svg("tspan", { class: "small" }, `${queue.name} · `), `${rate(queue.per_s)}/s`));
  if (!back) return;
  const low = y + QUEUE.height / 2 + 13;
  drawing.under.push(svg("path", { class: queue.per_s > 0 ? "kv" : "kv idle", d: `M${to} ${low}H${from + 3}`, "marker-end": "url(#arrow-kv)" }));
  drawing.over.push(svg("text", { class: "rate", x: (from + to) / 2, y: low + 16, "text-anchor": "middle" }, "KV pages"));
}

function curve(x1, y1, x2, y2, how, tip) {
  const bend = (x2 - x1) / 2;
  return svg("path", { class: how, "marker-end": tip, d: `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}` });
}

/** The answers' way back, below everything: frames go from decode to whoever asked. */
function answers(drawing, columns, tokens_per_s, y) {
  const decode = columns[2];
  const first = columns[0];
  const from = decode.x + decode.width / 2;
  const to = first.x + first.width / 2;
  const flows = tokens_per_s > 0 ? "edge flows" : "edge";
  const start = decode.bottom + 3;
  const end = first.bottom + 4;
  drawing.under.push(svg("path", { class: flows, d: `M${from} ${Math.min(start, y - 8)}V${y - 8}Q${from} ${y} ${from - 8} ${y}H${to + 8}Q${to} ${y} ${to} ${y - 8}V${Math.min(end, y - 9)}`, "marker-end": tokens_per_s > 0 ? "url(#arrow)" : "url(#arrow-still)" }));
  drawing.over.push(svg("text", { class: "rate", x: (from + to) / 2, y: y - 6, "text-anchor": "middle" }, `answers: ${rate(tokens_per_s)} tokens/s`));
}

function aside(drawing, workers, width, y) {
  if (workers.length === 0) return y;
  const boxWidth = 190;
  const fit = Math.max(1, Math.floor((width - 120) / (boxWidth + GAP)));
  drawing.over.push(svg("text", { class: "faint", x: MARGIN, y: y + 16 }, "aside:"));
  troubleFirst(workers, fit).forEach((worker, index) =>
    drawing.over.push(box(worker, MARGIN + 48 + index * (boxWidth + GAP), y, boxWidth, ROW_PX.small)));
  return y + ROW_PX.small + 4;
}

// --- top to bottom ---------------------------------------------------------------------------------------------------

function topToBottom(view, width) {
  const drawing = { under: [], over: [] };
  const stages = [
    { name: "Gateways", workers: view.gateways },
    { queue: view.requests },
    { name: "Preprocess", workers: view.preprocess },
    { queue: view.work },
    { name: "Decode", workers: view.decode },
    ...(view.apart ? [{ queue: view.prompts }, { name: "Prefill", workers: view.prefill }] : []),
    ...(view.aside.length ? [{ name: "Aside", workers: view.aside }] : []),
  ];
  let y = 0;
  for (const stage of stages) y = stage.queue ? across(drawing, stage.queue, width, y) : grid(drawing, stage, width, y);
  return canvas(view, width, y, drawing);
}

function across(drawing, queue, width, y) {
  const how = queue.per_s > 0 ? { class: "edge flows", "marker-end": "url(#arrow)" } : { class: "edge", "marker-end": "url(#arrow-still)" };
  drawing.under.push(svg("path", { ...how, d: `M${width / 2} ${y - GAP}V${y + STRIP_PX + 22}` }));
  drawing.over.push(queueStrip(queue, MARGIN, y + 6, width - 2 * MARGIN));
  return y + STRIP_PX + 26;
}

function grid(drawing, stage, width, y) {
  const fit = width >= 520 ? 3 : width >= 330 ? 2 : 1;
  const boxWidth = (width - 2 * MARGIN - (fit - 1) * GAP) / fit;
  const row = rowHeight(stage.workers);
  drawing.over.push(svg("text", { class: "head", x: MARGIN, y: y + 14 }, stage.name));
  const shown = troubleFirst(stage.workers, 2 * BOXES_MAX);
  shown.forEach((worker, index) => {
    const x = MARGIN + (index % fit) * (boxWidth + GAP);
    drawing.over.push(box(worker, x, y + HEAD + Math.floor(index / fit) * (row + GAP), boxWidth, row));
  });
  if (!shown.length) drawing.over.push(svg("text", { class: "faint", x: MARGIN, y: y + HEAD + 14 }, "nobody is up"));
  const lines = Math.max(1, Math.ceil(shown.length / fit));
  return y + HEAD + lines * ((shown.length ? row : 12) + GAP) + 4;
}

// --- boxes -----------------------------------------------------------------------------------------------------------

function canvas(view, width, height, drawing) {
  const arrow = (id, how) => svg("marker", { id, class: how, viewBox: "0 0 8 8", refX: 6, refY: 4, markerWidth: 9, markerHeight: 9, markerUnits: "userSpaceOnUse", orient: "auto-start-reverse" },
    svg("path", { d: "M0 0.5L7 4L0 7.5Z" }));
  return svg("svg", { role: "img", "aria-label": describe(view), viewBox: `0 0 ${width} ${height}`, width, height },
    svg("defs", {}, arrow("arrow", "tip"), arrow("arrow-still", "tip still"), arrow("arrow-kv", "tip kv")), ...drawing.under, ...drawing.over);
}

function wordOf(worker) {
  if (worker.state !== "gone") return worker.state;
  return worker.silent_s < 3600 && worker.silent_s > 0 ? `gone ${Math.round(worker.silent_s)} s` : "gone";
}

/** All of it, for whoever points at the box. */
function titleOf(worker) {
  const wrong = worker.wrong.length ? ` (${worker.wrong.join(", ")})` : "";
  return [`${worker.worker}: ${wordOf(worker)}${wrong}`, worker.note, worker.engine].filter(Boolean).join(", ");
}

function box(worker, x, y, width, height) {
  const small = height === ROW_PX.small;
  const word = small && worker.note ? worker.note : wordOf(worker);
  const chars = Math.floor((width - 34 - 6.2 * word.length) / 6.9);
  const name = cut(worker.worker, Math.max(5, chars));
  const line = y + (small ? 17 : 18);
  const parts = [
    svg("title", {}, titleOf(worker)),
    svg("rect", { class: "body", x, y, width, height, rx: small ? 5 : 7 }),
    mark(worker.state === "gone" || worker.red, x + 12, line - 4),
    svg("text", { class: "name", x: x + 22, y: line }, name),
    svg("text", { class: small && worker.note ? "note" : "word", x: x + width - 9, y: line, "text-anchor": "end" }, word),
  ];
  if (small) parts.push(...load(worker, x + 30 + 8.2 * name.length, line - 6, width - 46 - 8.2 * name.length - 6.4 * word.length));
  else parts.push(...rows(worker, x + 10, y, width - 20, height));
  return svg("g", { class: "worker", "data-worker": worker.worker, "data-role": worker.role, "data-state": worker.state, "data-died": worker.red || worker.state === "gone" ? "yes" : null, "data-in-flight": worker.in_flight }, ...parts);
}

/** Below its name: places, then KV; the last line says what befell it. */
function rows(worker, x, y, width, height) {
  const engine = height === ROW_PX.engine;
  if (!engine && worker.note) return [svg("text", { class: "note", x, y: y + 34 }, worker.note)];
  const parts = slots(worker, x, y + 25, width);
  if (engine && worker.kv_tokens > 0) parts.push(...kv(worker, x, y + 43, width));
  else if (worker.note) parts.push(svg("text", { class: "note", x, y: y + 52 }, worker.note));
  return parts;
}

/** A worker's places as a bar on its only line. */
function load(worker, x, y, room) {
  if (!worker.slots || worker.state === "gone" || room < 20) return [];
  const width = Math.min(70, room);
  return bar(worker.in_flight / worker.slots, x + room - width, y, width, 5, "fill");
}

/** A dot, or a cross for who is gone: the state is never told by colour alone. */
function mark(gone, x, y) {
  if (!gone) return svg("circle", { class: "mark", cx: x, cy: y, r: 4 });
  return svg("path", { class: "mark cross", d: `M${x - 4} ${y - 4}l8 8m0 -8l-8 8` });
}

function slots(worker, x, y, width) {
  const label = worker.slots ? `${worker.in_flight}/${worker.slots}` : worker.in_flight ? count(worker.in_flight) : "";
  const works = !["starting", "gone"].includes(worker.state); // else the rate is its predecessor's
  const speed = !works ? "" : (worker.tokens_per_s ?? 0) > 0 ? `${rate(worker.tokens_per_s)} tok/s` : (worker.tasks_per_s ?? 0) > 0 ? `${rate(worker.tasks_per_s)}/s` : "";
  const right = [label, speed].filter(Boolean).join(" · ");
  const parts = [svg("text", { class: "small", x: x + width, y: y + 9, "text-anchor": "end" }, right)];
  const room = width - 6.4 * right.length - 8;
  if (worker.slots && room > 24) parts.push(...cells(worker.in_flight, worker.slots, x, y + 1, room, 9));
  return parts;
}

/** Used and free places, one by one where they are few, else as a bar. */
function cells(used, all, x, y, width, height) {
  if (all > CELLS_MAX || width / all < 5) return bar(used / all, x, y + 2, width, height - 4, "fill");
  const step = Math.min(14, width / all);
  return Array.from({ length: all }, (_, index) =>
    svg("rect", { class: index < used ? "cell used" : "cell", x: x + index * step, y, width: step - 2, height, rx: 1.5 }));
}

function bar(part, x, y, width, height, how) {
  return [
    svg("rect", { class: "track", x, y, width, height, rx: height / 2 }),
    part > 0 ? svg("rect", { class: how, x, y, width: Math.max(height, Math.min(1, part) * width), height, rx: height / 2 }) : null,
  ];
}

function kv(worker, x, y, width) {
  const part = worker.kv_tokens_used / worker.kv_tokens;
  const label = `KV ${share(part)}`;
  return [
    svg("text", { class: "small", x: x + width, y: y + 9, "text-anchor": "end" }, label),
    ...(worker.note
      ? [svg("text", { class: "note", x, y: y + 9 }, worker.note)]
      : bar(part, x, y + 3, width - 58, 5, part > 0.9 ? "fill full" : part > 0.7 ? "fill high" : "fill")),
  ];
}

/** What the last line of a queue says: what is in work, and for how long the oldest of it. */
function leasedOf(queue) {
  if (!queue.known) return "not known";
  if (queue.paused) return "paused";
  return queue.leased ? `${count(queue.leased)} leased · ${seconds(queue.oldest_s)}` : "none leased";
}

function queueGroup(queue, ...parts) {
  return svg("g", { class: "queue", "data-queue": queue.name, "data-waiting": queue.waiting, "data-busy": queue.waiting > 0 ? "yes" : null, "data-paused": queue.paused ? "yes" : null },
    svg("title", {}, `queue ${queue.name}: ${queue.waiting} waiting, ${queue.leased} leased, oldest ${seconds(queue.oldest_s)}`), ...parts);
}

/** What waits, one by one; the next to be taken on the right. */
function ticks(queue, x, y, width) {
  const shown = Math.min(queue.waiting, CELLS_MAX);
  const step = width / CELLS_MAX;
  return Array.from({ length: CELLS_MAX }, (_, index) =>
    svg("rect", { class: index >= CELLS_MAX - shown ? "cell used" : "cell", x: x + index * step, y, width: step - 2, height: 8, rx: 1 }));
}

const waitingOf = (queue) => [
  svg("tspan", { class: "depth" }, queue.known ? count(queue.waiting) : "–"), svg("tspan", { class: "small", dx: 4 }, "waiting")];

function queueBox(queue, x, y) {
  const middle = x + QUEUE.width / 2;
  return queueGroup(queue,
    svg("rect", { class: "body", x, y, width: QUEUE.width, height: QUEUE.height, rx: 9 }),
    svg("text", { x: middle, y: y + 23, "text-anchor": "middle" }, ...waitingOf(queue)),
    ...ticks(queue, x + 11, y + 32, QUEUE.width - 20),
    svg("text", { class: "small", x: middle, y: y + 56, "text-anchor": "middle" }, leasedOf(queue)));
}

/** The same on two lines, as wide as the picture. */
function queueStrip(queue, x, y, width) {
  return queueGroup(queue,
    svg("rect", { class: "body", x, y, width, height: STRIP_PX, rx: 9 }),
    svg("text", { x: x + 11, y: y + 20 }, ...waitingOf(queue), svg("tspan", { class: "small", dx: 3 }, `· ${queue.name}`)),
    svg("text", { x: x + width - 11, y: y + 20, "text-anchor": "end" }, `${rate(queue.per_s)}/s`),
    ...ticks(queue, x + 11, y + 29, Math.max(60, width - 160)),
    svg("text", { class: "small", x: x + width - 11, y: y + 37, "text-anchor": "end" }, leasedOf(queue)));
}

// --- the same in words -----------------------------------------------------------------------------------------------

/** As in "ready, restarted 12 s ago" and "unhealthy: stuck". */
function stateOf(worker, unix_s) {
  const said = worker.wrong.length ? `${worker.state}: ${worker.wrong.join(", ")}` : worker.state;
  return [said, afterDeath(worker, unix_s).note].filter(Boolean).join(", ");
}

export function tableRows(state, model) {
  const heads = ["Worker", "Role", "Model", "State", "In flight", "Running", "Waiting", "KV tokens", "Tasks/s", "Tokens/s", "Engine"];
  const mine = state.workers.filter((worker) => !model || !worker.model || worker.model === model);
  const rows = mine.map((worker) => el("tr", { "data-state": worker.state },
    el("th", { scope: "row" }, worker.worker), el("td", {}, worker.role), el("td", {}, worker.model ?? "–"),
    el("td", { class: "state" }, stateOf(worker, state.unix_s)),
    el("td", {}, worker.slots ? `${worker.in_flight}/${worker.slots}` : count(worker.in_flight)),
    el("td", {}, count(worker.running)), el("td", {}, count(worker.waiting)),
    el("td", {}, worker.kv_tokens ? `${count(worker.kv_tokens_used)}/${count(worker.kv_tokens)}` : "–"),
    el("td", {}, rate(worker.tasks_per_s)), el("td", {}, rate(worker.tokens_per_s)), el("td", {}, worker.engine ?? "–")));
  return [el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))), el("tbody", {}, ...rows)];
}
