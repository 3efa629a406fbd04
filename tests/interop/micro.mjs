// Asks for micro services as the `nats micro` commands do, with NATS's own JavaScript client, and prints a line for
// each answer. Then asks two operations of a worker by hand: one that is done and one that is refused.
import { connect } from "@nats-io/transport-node";
import { ServiceError, Svcm } from "@nats-io/services";

const [url, worker] = process.argv.slice(2);
const print = (kind, value) => console.log(JSON.stringify({ kind, value }));

const nc = await connect({ servers: url });
const client = new Svcm(nc).client();
for (const verb of ["ping", "info", "stats"]) {
  for await (const answer of await client[verb]()) print(verb, answer);
}
const [{ name, id }] = await Array.fromAsync(await client.ping("sglang-decode"));
for await (const answer of await client.info(name, id)) print("one", answer);

for (const operation of ["ping", "dance"]) {
  const message = await nc.request(`sglang.control.${worker}.${operation}`, "{}");
  const error = ServiceError.isServiceError(message) ? ServiceError.toServiceError(message) : null;
  print(operation === "ping" ? "done" : operation, { reply: message.json(), code: error?.code, message: error?.message });
}
await nc.close();
