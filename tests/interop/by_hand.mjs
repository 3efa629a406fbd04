// Publishes one JSON request with NATS's own JavaScript client, as `nats pub` would, and prints what comes back:
// a line for the PubAck, a line for each frame heard live, and a line for each frame the stream still has.
import { connect } from "@nats-io/transport-node";
import { jetstream, jetstreamManager } from "@nats-io/jetstream";

const [url, model, request, choices] = process.argv.slice(2);
const print = (kind, value) => console.log(JSON.stringify({ kind, ...value }));

const nc = await connect({ servers: url });
const live = nc.subscribe("sglang.responses.anonymous.*", { timeout: 60_000 });
await nc.flush();

const ack = await jetstream(nc).publish(`sglang.requests.${model}`, request);
print("ack", { stream: ack.stream, seq: ack.seq });

let open = Number(choices);
let subject;
for await (const message of live) {
  const frame = message.json();
  subject = message.subject;
  print("live", { subject, frame });
  if (frame.finish_reason && --open === 0) break;
}

const streams = (await jetstreamManager(nc)).direct;
for (let seq = 0; ; ) {
  const stored = await streams.getMessage("RESPONSES", { next_by_subj: subject, seq: seq + 1 });
  if (!stored) break;
  seq = stored.seq;
  print("stored", { subject: stored.subject, frame: stored.json() });
}
await nc.close();
