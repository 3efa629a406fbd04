// Reads an object with NATS's own JavaScript client, prints what it is, and puts another one.
import { createHash } from "node:crypto";
import { connect } from "@nats-io/transport-node";
import { Objm } from "@nats-io/obj";

const [url, bucket, theirs, ours] = process.argv.slice(2);
const nc = await connect({ servers: url });
const store = await new Objm(nc).open(bucket);

const info = await store.info(theirs);
const content = await store.getBlob(theirs);
console.log(JSON.stringify({
  size: info.size,
  chunks: info.chunks,
  description: info.description,
  metadata: info.metadata,
  sha256: createHash("sha256").update(content).digest("hex"),
  listed: (await store.list()).map((entry) => entry.name),
}));

await store.putBlob({ name: ours, description: "from JavaScript", options: { max_chunk_size: 1000 } }, content.subarray(0, 5_500));
await store.delete(theirs);
await nc.close();
