"""What schemathesis cannot know of the gateway's requests: most name a model that is served, none has another's id."""

import itertools
import os
from typing import Any

import schemathesis

from subjects import names

MODELS = {
    "/v1/chat/completions": "talk",
    "/v1/completions": "talk",
    "/v1/responses": "talk",
    "/v1/embeddings": "vectors",
}
UNKNOWN_EVERY = 8
_numbers = itertools.count()


@schemathesis.hook
def before_call(_: Any, case: Any, **__: Any) -> None:
    """Only what is right already is replaced: a wrong value must stay one."""
    body, path = case.body, case.operation.path
    if path not in MODELS or not isinstance(body, dict):
        return
    number, body = next(_numbers), dict(body)
    if isinstance(body.get("model"), str) and body["model"] and number % UNKNOWN_EVERY:
        body["model"] = MODELS[path]
    if isinstance(body.get("request_id"), str) and names.is_token(body["request_id"]):
        body["request_id"] = (
            f"asked-{os.getpid()}-{number}"  # the same id twice is the same request: it has the first one's answer
        )
    if type(body.get("deadline")) in (int, float):
        body["deadline"] = None  # one that has passed is a 504
    case.body = body
