// Asks the front door as `nats req --replies=0` does, with NATS's own JavaScript client, which ends its answer at the
// first empty message; prints what `nats micro info` shows of the door, a line for each reply, and an error as a
// service's client reads it.
import { connect } from "@nats-io/transport-node";
import { ServiceError, Svcm } from "@nats-io/services";

const [url, request] = process.argv.slice(2);
const print = (kind, value) => console.log(JSON.stringify({ kind, value }));

const nc = await connect({ servers: url });
const ask = { strategy: "sentinel", maxWait: 30_000 };
for await (const reply of await nc.requestMany("sglang.generate.smollm2", request, ask)) {
  if (reply.data.length) print("frame", reply.json());
}
const first = await nc.request("sglang.generate.smollm2", request, { timeout: 30_000 });
print("first", first.json());

for await (const reply of await nc.requestMany("sglang.generate.nobody", request, ask)) {
  if (reply.data.length) print("refused", { frame: reply.json(), code: ServiceError.toServiceError(reply)?.code });
}
const client = new Svcm(nc).client();
for await (const answer of await client.info("sglang-generate")) print("info", answer);
for await (const answer of await client.stats("sglang-generate")) print("stats", answer);
await nc.close();
