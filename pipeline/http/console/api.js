// The gateway as this page sees it: with the API key, if one is needed, and server-sent events read by fetch, which can
// send that key where EventSource cannot.

const KEY = "sglang-nats-key";
const EVENT_CHARS_MAX = 4_000_000;

export class Refused extends Error {
  constructor(status, body) {
    super(body?.error?.message ?? `the gateway answered ${status}`);
    this.status = status;
    this.code = body?.error?.code ?? "";
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** A response that is not an error. Throws Refused, TypeError (no connection), AbortError. */
export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  let body = null;
  try {
    body = await response.json();
  } catch {
    // no JSON: whatever stands before the gateway has answered
  }
  throw new Refused(response.status, body);
}

export const get = async (path, options) => (await ask(path, options)).json();

export const post = async (path, body, options = {}) =>
  ask(path, { ...options, method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });

/** A response's server-sent events, `{id, data}` each. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      text += value;
      const pieces = text.split("\n\n");
      text = pieces.pop();
      if (text.length > EVENT_CHARS_MAX) throw new Error("an event is too long");
      for (const piece of pieces) {
        const event = parsed(piece);
        if (event.data !== null) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(piece) {
  const event = { id: null, data: null };
  for (const line of piece.split("\n")) {
    if (line.startsWith("id: ")) event.id = line.slice(4);
    if (line.startsWith("data: ")) event.data = (event.data === null ? "" : `${event.data}\n`) + line.slice(6);
  }
  return event;
}
