// Dead letters: the work that was given up, to be looked at, tried again as a new request, or dropped.

import { get, post } from "./api.js";
import { byId, el, seconds } from "./dom.js";

/** Wire the panel up. */
export function startLetters() {
  let known = null; // how many there were

  async function load() {
    byId("letters").setAttribute("aria-busy", "true");
    try {
      const { letters } = await get("api/dead");
      byId("letters").replaceChildren(letters.length ? list(letters) : el("p", { class: "hint" }, "No dead letters: nothing was given up."));
    } catch (error) {
      byId("letters").replaceChildren(el("p", { class: "error" }, error.message));
    }
    byId("letters").setAttribute("aria-busy", "false");
  }

  function list(letters) {
    const heads = ["Letter", "Error", "Request", ""];
    return el("div", { class: "wide" }, el("table", {},
      el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))),
      el("tbody", {}, ...letters.map(row))));
  }

  function row(letter) {
    const shown = el("pre", { hidden: true });
    const ago = `${seconds(Math.max(0, Date.now() / 1e3 - letter.died_unix_s))} ago, ${letter.attempts} attempts`;
    const request = letter.request_id ? el("a", { href: `#timeline/${encodeURIComponent(letter.request_id)}` }, letter.request_id) : "–";
    return el("tr", { "data-letter": letter.seq },
      el("td", {}, String(letter.seq), el("br"), el("span", { class: "faint" }, letter.stage)),
      el("td", {}, el("b", {}, letter.code), el("br"), letter.message, el("br"), el("span", { class: "faint" }, ago), shown),
      el("td", {}, request),
      el("td", { class: "doing" },
        button("Show", () => show(letter.seq, shown)),
        button("Retry", () => retry(letter.seq)),
        sure("Drop", () => drop(letter.seq))));
  }

  async function show(seq, shown) {
    shown.hidden = !shown.hidden;
    if (!shown.hidden) shown.textContent = JSON.stringify(await get(`api/dead/${seq}`), null, 2);
  }

  async function retry(seq) {
    const again = await (await post(`api/dead/${seq}/retry`, {})).json();
    const to = `#timeline/${encodeURIComponent(again.request_id)}/${encodeURIComponent(again.client)}`;
    byId("dead-said").replaceChildren(`Letter ${seq} runs again as `, el("a", { href: to }, again.request_id), ".");
    taken(seq);
  }

  async function drop(seq) {
    await post(`api/dead/${seq}/drop`, {});
    byId("dead-said").replaceChildren(`Letter ${seq} is dropped.`);
    taken(seq);
  }

  /** Its row goes; the others stay as they are, with what is open in them. */
  function taken(seq) {
    document.querySelector(`[data-letter="${seq}"]`)?.remove();
    if (!rows()) load();
  }

  const rows = () => document.querySelectorAll("[data-letter]").length;

  return {
    load,
    /** Their number, as the state tells it: a list that is open is read anew. */
    heard(number) {
      if (number !== known && number !== rows() && !byId("dead").hidden) load();
      known = number;
      byId("tab-dead").textContent = number ? `Dead letters (${number})` : "Dead letters";
    },
  };
}

function button(text, work) {
  return el("button", { type: "button", class: "quiet", onclick: async (event) => {
    event.target.disabled = true;
    try {
      await work();
    } catch (error) {
      byId("dead-said").replaceChildren(el("span", { class: "error" }, error.message));
    }
    event.target.disabled = false;
  } }, text);
}

/** A button that asks once more. */
function sure(text, work) {
  const asked = button(text, async () => {
    if (asked.dataset.sure) return work();
    asked.dataset.sure = "yes";
    asked.textContent = `${text}: sure?`;
    setTimeout(() => { delete asked.dataset.sure; asked.textContent = text; }, 4000);
  });
  return asked;
}
