// A chat with the model over /v1/chat/completions, as any client would ask it.

import { ask, events, post, Refused } from "./api.js";
import { byId, el, rate, seconds } from "./dom.js";

const MODELS_MS = 3000;
const RESUMES_MAX = 8;
const RESUME_MS = 700;

/** Wire the chat up; `offerModels` fills the select. */
export function startChat(offerModels) {
  const conversation = []; // what the model is sent: {role, content}
  let running = null; // the AbortController of the answer under way

  async function keepModels() {
    try {
      await offerModels();
    } catch {
      // no connection, or no key yet: the page says so elsewhere
    }
    setTimeout(keepModels, byId("chat-model").options.length ? 5 * MODELS_MS : MODELS_MS);
  }

  async function send() {
    const text = byId("prompt").value.trim();
    if (!text || running) return;
    byId("prompt").value = "";
    conversation.push({ role: "user", content: text });
    say("user", text);
    running = new AbortController();
    busy(true);
    const shown = say("assistant", "");
    const answer = new Answer(shown, running.signal);
    try {
      await answer.run(byId("chat-model").value, conversation, Number(byId("max-tokens").value) || 256);
      conversation.push({ role: "assistant", content: answer.text });
    } catch (error) {
      answer.fail(error);
      if (answer.text) conversation.push({ role: "assistant", content: answer.text });
      else conversation.pop();
    }
    running = null;
    busy(false);
    byId("prompt").focus();
  }

  function busy(yes) {
    byId("send").disabled = yes;
    byId("stop").disabled = !yes;
    byId("new-chat").disabled = yes;
  }

  byId("chat-form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("new-chat").addEventListener("click", () => {
    conversation.length = 0;
    byId("messages").replaceChildren();
    byId("prompt").focus();
  });
  keepModels();
}

function say(role, text) {
  const said = el("p", { class: "said" }, text);
  const about = el("p", { class: "meta" });
  byId("messages").append(el("li", { "data-role": role }, said, about));
  byId("messages").scrollTop = byId("messages").scrollHeight;
  return { said, about };
}

/** One answer as it comes. */
class Answer {
  constructor({ said, about }, signal) {
    Object.assign(this, { said, about, signal, text: "", tokens: 0, last: null, id: null, first_ms: null, last_ms: null, end: "", resumed: 0 });
  }

  async run(model, messages, max_tokens) {
    this.began_ms = performance.now();
    const body = { model, messages, max_tokens, stream: true, stream_options: { include_usage: true } };
    let response = await post("../v1/chat/completions", body, { signal: this.signal });
    this.id = response.headers.get("X-Request-Id");
    for (;;) {
      try {
        if (await this.read(response)) return this.tell();
      } catch (error) {
        if (this.signal.aborted || error instanceof Refused || !this.last) throw error;
      }
      response = await this.resume();
    }
  }

  /** Whether the stream came to its end. */
  async read(response) {
    for await (const { id, data } of events(response)) {
      if (data === "[DONE]") return true;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(0, chunk);
      this.take(chunk, id);
    }
    return false;
  }

  take(chunk, id) {
    const [choice] = chunk.choices;
    if (chunk.usage) this.tokens = chunk.usage.completion_tokens;
    if (!choice) return this.tell();
    this.last = id ?? this.last;
    this.tokens = Number(/^\w+\+?\w*\/\d+\/(\d+)/.exec(id ?? "")?.[1] ?? this.tokens + 1);
    const text = choice.delta.content ?? "";
    if (text) {
      this.first_ms ??= performance.now();
      this.last_ms = performance.now();
      this.text += text;
      const follows = atEnd(byId("messages"));
      this.said.append(text);
      if (follows) byId("messages").scrollTop = byId("messages").scrollHeight;
    }
    if (choice.finish_reason) this.end = choice.finish_reason;
    this.tell();
  }

  /** The rest of the answer, from whichever gateway is there now: a stream's event ids are cursors. */
  async resume() {
    for (;;) {
      if (this.resumed++ >= RESUMES_MAX) throw new Error("the connection is lost");
      this.end = "connection lost, reading on";
      this.tell();
      await new Promise((resolve) => setTimeout(resolve, RESUME_MS));
      try {
        const response = await ask(`../v1/streams/${this.id}`, { signal: this.signal, headers: { "Last-Event-ID": this.last } });
        this.end = "";
        return response;
      } catch (error) {
        if (this.signal.aborted || error instanceof Refused) throw error;
      }
    }
  }

  fail(error) {
    const stopped = this.signal.aborted;
    this.about.dataset.failed = stopped ? "no" : "yes";
    this.end = stopped ? "stopped" : error.code ? `${error.code}: ${error.message}` : error.message;
    this.tell();
  }

  tell() {
    const parts = [];
    if (this.first_ms !== null) parts.push(`TTFT ${seconds((this.first_ms - this.began_ms) / 1e3)}`);
    if (this.tokens) parts.push(`${this.tokens} tokens`);
    const took_ms = this.last_ms - this.first_ms;
    if (this.tokens > 1 && took_ms > 0) parts.push(`${rate((1e3 * (this.tokens - 1)) / took_ms)} tokens/s`);
    if (this.end) parts.push(this.end);
    this.about.replaceChildren(parts.join(" · "));
    if (this.id) this.about.append(" · ", el("a", { href: `#timeline/${this.id}` }, "timeline"));
  }
}

const atEnd = (node) => node.scrollHeight - node.scrollTop - node.clientHeight < 40;
