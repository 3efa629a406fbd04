// Elements made one by one. Text only ever becomes a text node: nothing that a model, a client or a worker said is HTML.

const SVG = "http://www.w3.org/2000/svg";

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** An HTML element; `on...` attributes are listeners, children are elements or text. */
export const el = (name, attributes = {}, ...children) => filled(document.createElement(name), attributes, children);

/** An SVG element. */
export const svg = (name, attributes = {}, ...children) =>
  filled(document.createElementNS(SVG, name), attributes, children);

export const byId = (id) => document.getElementById(id);

/** A string in at most so many characters: its end tells names apart as much as its beginning. */
export function cut(text, chars) {
  if (text.length <= chars) return text;
  const end = Math.max(1, Math.floor((chars - 1) / 2));
  return `${text.slice(0, Math.max(1, chars - 1 - end))}…${text.slice(-end)}`;
}

export const count = (value) => (value ?? null) === null ? "–" : Math.round(value).toLocaleString("en");

export function rate(value) {
  if ((value ?? null) === null) return "–";
  return value < 100 ? value.toFixed(1) : Math.round(value).toLocaleString("en");
}

export function seconds(value) {
  if (value < 0.0995) return `${(1e3 * value).toFixed(1)} ms`;
  if (value < 0.9995) return `${Math.round(1e3 * value)} ms`;
  if (value < 120) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  return value < 7200 ? `${Math.round(value / 60)} min` : `${Math.round(value / 3600)} h`;
}

export const share = (value) => (value ?? null) === null ? "–" : `${Math.round(100 * value)} %`;

export const clock = (unix_s) => new Date(1e3 * unix_s).toLocaleTimeString("en-GB");
