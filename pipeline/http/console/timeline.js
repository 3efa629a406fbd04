// One request's timeline: what it did and waited for as bars, and every event below them.

import { get, Refused } from "./api.js";
import { byId, cut, el, seconds, svg } from "./dom.js";

const ROW = 24;
const WATCHED_MS = 2000;

/** Wire the panel up; `reveal` shows its tab. */
export function startTimeline(reveal) {
  let timer = null;

  async function load(request_id, client) {
    clearTimeout(timer);
    const of = client ? `?client=${encodeURIComponent(client)}` : "";
    try {
      const found = await get(`api/trace/${encodeURIComponent(request_id)}${of}`);
      if (byId("request-id").value.trim() !== request_id) return;
      show(found);
      const goes_on = found.phases.some((phase) => phase.end_unix_s === null);
      if (goes_on) timer = setTimeout(() => !byId("timeline").hidden && load(request_id, client), WATCHED_MS);
    } catch (error) {
      const said = error instanceof Refused ? error.message : "no connection to the gateway";
      byId("timeline-shown").replaceChildren(el("p", { class: "error" }, said));
    }
  }

  /** `#timeline/ID` or `#timeline/ID/CLIENT` in the address. */
  function followAddress() {
    const [kind, request_id, client] = location.hash.slice(1).split("/").map(decodeURIComponent);
    if (kind !== "timeline" || !request_id) return;
    reveal();
    byId("request-id").value = request_id;
    byId("request-client").value = client ?? "";
    load(request_id, client);
  }

  byId("timeline-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const [request_id, client] = [byId("request-id").value.trim(), byId("request-client").value.trim()];
    const hash = `#timeline/${encodeURIComponent(request_id)}${client ? `/${encodeURIComponent(client)}` : ""}`;
    if (location.hash === hash) load(request_id, client);
    else location.hash = hash;
  });
  addEventListener("hashchange", followAddress);
  document.addEventListener("click", (event) => {
    // the same link again changes no address, and is to read anew all the same
    if (event.target.closest?.("a")?.hash === location.hash && location.hash) followAddress();
  });
  return { followAddress };
}

function show(found) {
  const of = found.client ? ` of client ${found.client}` : "";
  byId("timeline-shown").replaceChildren(
    el("p", { class: "whose" }, el("b", {}, found.request_id), of, found.trace_id ? el("span", { class: "faint" }, ` trace ${found.trace_id}`) : ""),
    ...(found.phases.length ? [bars(found)] : []),
    events(found.events),
    ...found.missing.map((sentence) => el("p", { class: "hint" }, `Not known: ${sentence}.`)));
}

function bars(found) {
  const width = Math.max(300, Math.floor(byId("timeline-shown").clientWidth));
  const zero = Math.min(...found.phases.map((phase) => phase.begin_unix_s));
  const end = Math.max(zero + 1e-4, ...found.phases.map((phase) => phase.end_unix_s ?? found.now_unix_s));
  const left = Math.min(228, 0.36 * width);
  const scale = (width - left - 70) / (end - zero);
  const rows = found.phases.map((phase, index) => {
    const begin = left + (phase.begin_unix_s - zero) * scale;
    const took_s = (phase.end_unix_s ?? found.now_unix_s) - phase.begin_unix_s;
    const length = Math.max(2, took_s * scale);
    const y = index * ROW;
    return svg("g", { class: "phase", "data-kind": phase.kind, "data-open": phase.end_unix_s === null ? "yes" : null },
      svg("title", {}, `${phase.what}${phase.where ? ` on ${phase.where}` : ""}: ${seconds(took_s)}`),
      svg("text", { x: 0, y: y + 16 }, cut(phase.where ? `${phase.what} · ${phase.where}` : phase.what, Math.floor(left / 6.1))),
      svg("rect", { x: begin, y: y + 5, width: length, height: ROW - 10, rx: 3 }),
      svg("text", { class: "small", x: begin + length + 6, y: y + 16 }, phase.end_unix_s === null ? `${seconds(took_s)} so far` : seconds(took_s)));
  });
  const height = ROW * rows.length + 4;
  const said = found.phases.map((phase) => phase.what).join(", ");
  return svg("svg", { class: "bars", role: "img", "aria-label": `The request's time: ${said}. ${seconds(end - zero)} in all.`, viewBox: `0 0 ${width} ${height}`, width, height },
    svg("path", { class: "axis", d: `M${left} 0V${height}` }), ...rows);
}

function events(all) {
  const zero = all.length ? all[0].unix_s : 0;
  const rows = all.map((event) => el("tr", {},
    el("td", { class: "figure" }, (1e3 * (event.unix_s - zero)).toLocaleString("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 })),
    el("td", {}, event.what), el("td", {}, event.where), el("td", { class: "faint" }, event.detail)));
  return el("div", { class: "wide" }, el("table", {},
    el("thead", {}, el("tr", {}, ...["ms", "What", "Where", ""].map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, ...rows)));
}
