"""The gateway's own description: an OpenAPI 3.1 document, made from its routes."""
