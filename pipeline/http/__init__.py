"""OpenAI's API over HTTP: what the gateway needs. Nothing here knows NATS but through `pipeline.client`."""
