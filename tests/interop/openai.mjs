// OpenAI's own Node client against a gateway: prints a line for what each call gave.
import OpenAI from "openai";

const [url] = process.argv.slice(2);
const print = (kind, value) => console.log(JSON.stringify({ kind, value }));
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0, timeout: 30_000 });
const asked = { model: "smollm2", messages: [{ role: "user", content: "hi" }], max_tokens: 6 };

for await (const model of await client.models.list()) print("model", model);
print("retrieved", await client.models.retrieve("smollm2"));

print("whole", await client.chat.completions.create(asked));
const options = { ...asked, stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create(options)) print("chunk", chunk);
print("helped", await client.chat.completions.stream(asked).finalContent());
print("completed", await client.completions.create({ model: "smollm2", prompt: "hi", max_tokens: 3 }));

for (const wrong of [{ model: "none" }, { temperature: 9 }, { max_tokens: -1 }]) {
  const error = await client.chat.completions.create({ ...asked, ...wrong }).catch((error) => error);
  print("error", { class: error.constructor.name, status: error.status, code: error.code, param: error.param });
}

const request_id = "left-by-node";
const endless = await client.chat.completions.create({ ...asked, stream: true, max_tokens: 4000, request_id });
for await (const chunk of endless) {
  print("left", chunk.id);
  endless.controller.abort();
  break;
}
const rest = await fetch(`${url}/v1/streams/${request_id}`);
print("cancelled", (await rest.text()).includes('"cancelled"'));
