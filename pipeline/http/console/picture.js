// The pipeline as a picture: gateways -> preprocess -> decode <-> prefill, the queues between them, telemetry aside.
// Laid out anew for each state: side by side where there is room, else from top to bottom.

import { count, cut, el, rate, seconds, share, svg } from "./dom.js";

const WIDE_PX = 780;
const MARGIN = 6;
const HEAD = 24;
const GAP = 8;
const ROW_PX = { engine: 62, plain: 44, small: 24 };
const SMALL_FROM = 6; // boxes in a column
const BOXES_MAX = 16; // in a column
const QUEUE = { width: 92, height: 64 };
const DIED_SHOWN_S = 20; // a worker that is back is marked so long
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
  const mine = state.workers.filter((worker) => !model || !worker.model || worker.model === model);
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
    aside: of(...QUIET),
    requests: { ...queue("requests"), per_s: tasks(of("preprocess")) },
    work: { ...queue("decode"), per_s: tasks(of("decode")) },
    prompts: { ...queue("prefill"), per_s: tasks(of("prefill")) },
    tokens_per_s: speed.tokens_per_s,
  };
  view.apart = view.prefill.length > 0 || view.prompts.waiting > 0;
  return view;
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
  const between = Math.max(136, Math.min(190, width * 0.125));
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
  return workers.some((worker) => worker.kv_tokens > 0) ? ROW_PX.engine : ROW_PX.plain;
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
  if (workers.length > shown.length)
    drawing.over.push(svg("text", { class: "faint", x: x + width / 2, y: y + 14, "text-anchor": "middle" }, `and ${workers.length - shown.length} more`));
  if (workers.length === 0 && !column.clients) {
    drawing.over.push(svg("rect", { class: "none", x, y, width, height: ROW_PX.plain, rx: 7 }));
    drawing.over.push(svg("text", { class: "faint", x: x + width / 2, y: y + 27, "text-anchor": "middle" }, "nobody is up"));
    column.ends.push(y + ROW_PX.plain / 2);
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
  const y = middle - (back ? 14 : 0);
  const flows = queue.per_s > 0 ? "edge flows" : "edge";
  for (const end of left.ends) drawing.under.push(curve(from, end, x, y, flows));
  for (const end of right.ends) drawing.under.push(curve(x + QUEUE.width, y, to, end, flows));
  drawing.over.push(queueBox(queue, x, y - QUEUE.height / 2));
  drawing.over.push(svg("text", { class: "rate", x: (from + to) / 2, y: y - QUEUE.height / 2 - 8, "text-anchor": "middle" }, `${rate(queue.per_s)}/s`));
  if (!back) return;
  const low = y + QUEUE.height / 2 + 20;
  drawing.under.push(svg("path", { class: "kv", d: `M${to - 2} ${low}H${from + 7}`, "marker-end": "url(#arrow-kv)" }));
  drawing.over.push(svg("text", { class: "rate", x: (from + to) / 2, y: low + 15, "text-anchor": "middle" }, "KV pages"));
}

function curve(x1, y1, x2, y2, how) {
  const bend = (x2 - x1) / 2;
  return svg("path", { class: how, d: `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}` });
}

/** The answers' way back, below everything: frames go from decode to whoever asked. */
function answers(drawing, columns, tokens_per_s, y) {
  const decode = columns[2];
  const first = columns[0];
  const from = decode.x + decode.width / 2;
  const to = first.x + first.width / 2;
  const flows = tokens_per_s > 0 ? "edge flows" : "edge";
  const start = Math.max(...decode.ends) + 34;
  const end = Math.max(...first.ends) + 26;
  drawing.under.push(svg("path", { class: flows, d: `M${from} ${Math.min(start, y - 8)}V${y - 8}Q${from} ${y} ${from - 8} ${y}H${to + 8}Q${to} ${y} ${to} ${y - 8}V${Math.min(end, y - 9)}`, "marker-end": "url(#arrow)" }));
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
  const x = (width - QUEUE.width) / 2;
  const flows = queue.per_s > 0 ? "edge flows" : "edge";
  drawing.under.push(svg("path", { class: flows, d: `M${width / 2} ${y}V${y + QUEUE.height + 30}`, "marker-end": "url(#arrow)" }));
  drawing.over.push(queueBox(queue, x, y + 12));
  drawing.over.push(svg("text", { class: "rate", x: x + QUEUE.width + 10, y: y + 12 + QUEUE.height / 2 }, `${rate(queue.per_s)}/s`));
  return y + QUEUE.height + 40;
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
  const arrow = (id, how) => svg("marker", { id, class: how, viewBox: "0 0 8 8", refX: 6, refY: 4, markerWidth: 8, markerHeight: 8, orient: "auto-start-reverse" },
    svg("path", { d: "M0 0.5L7 4L0 7.5Z" }));
  return svg("svg", { role: "img", "aria-label": describe(view), viewBox: `0 0 ${width} ${height}`, width, height },
    svg("defs", {}, arrow("arrow", "tip"), arrow("arrow-kv", "tip kv")), ...drawing.under, ...drawing.over);
}

function wordOf(worker, died) {
  if (worker.state === "gone") return worker.silent_s < 3600 && worker.silent_s > 0 ? `gone ${Math.round(worker.silent_s)} s` : "gone";
  return died ? `died; ${worker.state}` : worker.state;
}

function box(worker, x, y, width, height) {
  const died = worker.died_unix_s && Date.now() / 1e3 - worker.died_unix_s < DIED_SHOWN_S;
  const small = height === ROW_PX.small;
  const word = wordOf(worker, died);
  const chars = Math.floor((width - 30 - 6.2 * word.length) / 6.9);
  const parts = [
    svg("title", {}, `${worker.worker}: ${word}${worker.wrong.length ? ` (${worker.wrong.join(", ")})` : ""}${worker.engine ? `, ${worker.engine}` : ""}`),
    svg("rect", { class: "body", x, y, width, height, rx: small ? 5 : 7 }),
    mark(worker.state === "gone", x + 12, y + (small ? 12 : 14)),
    svg("text", { class: "name", x: x + 22, y: y + (small ? 16 : 18) }, cut(worker.worker, Math.max(5, chars))),
    svg("text", { class: "word", x: x + width - 9, y: y + (small ? 16 : 18), "text-anchor": "end" }, word),
  ];
  if (!small) parts.push(...slots(worker, x + 10, y + 25, width - 20));
  if (height === ROW_PX.engine && worker.kv_tokens > 0) parts.push(...kv(worker, x + 10, y + 43, width - 20));
  return svg("g", { class: "worker", "data-worker": worker.worker, "data-role": worker.role, "data-state": worker.state, "data-died": died ? "yes" : null, "data-in-flight": worker.in_flight }, ...parts);
}

/** A dot, or a cross for who is gone: the state is never told by colour alone. */
function mark(gone, x, y) {
  if (!gone) return svg("circle", { class: "mark", cx: x, cy: y, r: 4 });
  return svg("path", { class: "mark cross", d: `M${x - 4} ${y - 4}l8 8m0 -8l-8 8` });
}

function slots(worker, x, y, width) {
  const label = worker.slots ? `${worker.in_flight}/${worker.slots}` : worker.role === "gateway" || !worker.in_flight ? "" : count(worker.in_flight);
  const right = [label, (worker.tokens_per_s ?? 0) > 0 ? `${rate(worker.tokens_per_s)} tok/s` : (worker.tasks_per_s ?? 0) > 0 ? `${rate(worker.tasks_per_s)}/s` : ""].filter(Boolean).join(" · ");
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
    ...bar(part, x, y + 3, width - 58, 5, part > 0.9 ? "fill full" : part > 0.7 ? "fill high" : "fill"),
  ];
}

function queueBox(queue, x, y) {
  const middle = x + QUEUE.width / 2;
  const busy = queue.waiting > 0;
  const shown = Math.min(queue.waiting, CELLS_MAX);
  const ticks = Array.from({ length: CELLS_MAX }, (_, index) =>
    svg("rect", { class: index >= CELLS_MAX - shown ? "cell used" : "cell", x: x + 10 + index * 4.5, y: y + 36, width: 3, height: 8, rx: 1 }));
  const below = queue.paused ? "paused" : queue.leased || busy ? `${count(queue.leased)} leased · ${seconds(queue.oldest_s)}` : "empty";
  return svg("g", { class: "queue", "data-queue": queue.name, "data-waiting": queue.waiting, "data-busy": busy ? "yes" : null, "data-paused": queue.paused ? "yes" : null },
    svg("title", {}, `queue ${queue.name}: ${queue.waiting} waiting, ${queue.leased} leased, oldest ${seconds(queue.oldest_s)}`),
    svg("rect", { class: "body", x, y, width: QUEUE.width, height: QUEUE.height, rx: 9 }),
    svg("text", { class: "depth", x: middle, y: y + 20, "text-anchor": "middle" }, queue.known ? count(queue.waiting) : "–"),
    svg("text", { class: "small", x: middle, y: y + 31, "text-anchor": "middle" }, "waiting"),
    ...ticks,
    svg("text", { class: "small", x: middle, y: y + 57, "text-anchor": "middle" }, queue.known ? below : "not known"));
}

// --- the same in words -----------------------------------------------------------------------------------------------

export function tableRows(state, model) {
  const heads = ["Worker", "Role", "Model", "State", "In flight", "Running", "Waiting", "KV tokens", "Tasks/s", "Tokens/s", "Engine"];
  const mine = state.workers.filter((worker) => !model || !worker.model || worker.model === model);
  const rows = mine.map((worker) => el("tr", { "data-state": worker.state },
    el("th", { scope: "row" }, worker.worker), el("td", {}, worker.role), el("td", {}, worker.model ?? "–"),
    el("td", { class: "state" }, worker.wrong.length ? `${worker.state}: ${worker.wrong.join(", ")}` : worker.state),
    el("td", {}, worker.slots ? `${worker.in_flight}/${worker.slots}` : count(worker.in_flight)),
    el("td", {}, count(worker.running)), el("td", {}, count(worker.waiting)),
    el("td", {}, worker.kv_tokens ? `${count(worker.kv_tokens_used)}/${count(worker.kv_tokens)}` : "–"),
    el("td", {}, rate(worker.tasks_per_s)), el("td", {}, rate(worker.tokens_per_s)), el("td", {}, worker.engine ?? "–")));
  return [el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))), el("tbody", {}, ...rows)];
}
