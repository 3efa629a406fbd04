"""Every error of the pipeline, in one tree.

    PipelineError
    ├── Permanent               the request can never succeed: terminal error frame, then term
    │   ├── InvalidRequest      400  a field is malformed, unknown or out of its limits
    │   ├── Unauthorized        401  no API key, or one that nobody has
    │   ├── UnknownModel        404  no such model here
    │   ├── ModelUnavailable    503  a served model's tokenizer cannot be had here, now
    │   ├── PayloadTooLarge     413  more bytes than a subject carries
    │   ├── PromptTooLong       400  more prompt tokens than the model's context
    │   ├── DeadlineExceeded    504  the deadline passed before the answer was whole
    │   ├── Cancelled           499  by the client or an operator
    │   ├── NotFound            404  a client has no such file, batch or response, or no longer
    │   ├── OutputGone          410  frames that are asked for are no longer kept
    │   ├── ObjectNotFound      404  an object bucket has nothing under a name
    │   ├── ObjectDamaged       500  what an object bucket has under a name is not what was put there
    │   ├── NotPermitted        403  the broker does not let this connection use the subject, or we this API key
    │   ├── NotSupported        501  this worker or its engine cannot do what an operator asks for
    │   ├── EngineFailed        500  the engine gave up on this request
    │   └── AttemptsExhausted   500  handed out too often without an end
    ├── Transient               may succeed later: nak with a delay
    │   ├── Overloaded          429  a queue is full; carries retry_after_s
    │   ├── Busy                409  an operation does not fit what the worker is doing now
    │   ├── EngineSuspended     503  an operator took the engine's memory or weights; another worker can go on
    │   ├── EngineDied          503  the engine ended with the request in it; another worker can take it
    │   ├── PrefillLost         503  the KV of a prompt did not come; another prefill worker can make it
    │   └── BusUnavailable      503  the broker cannot be reached or did not acknowledge in time
    │       ├── NoResponders    503  nobody listens on the subject of a request
    │       └── BrokerRefused   503  JetStream answered with an error; carries its error number
    └── SetupError              a process cannot start: printed as a sentence, exit code 1
        ├── ConfigError              a setting is unknown or out of range
        ├── BusConnectError          no NATS server answers at the URL, or it refuses the credentials
        ├── ServerStartError         the nats-server executable is missing or does not start
        ├── ProvisionError           a stream, consumer or bucket differs from its declaration
        ├── WorkerStartError         a worker of a local topology ended before it was ready
        └── EngineStartError         the engine or its model cannot be loaded

Each class has a stable `code`, an HTTP `status` and typed fields; `failure()` gives its wire form.
"""

from typing import ClassVar

from subjects.messages import Failure


class PipelineError(Exception):
    """Base of all errors that the pipeline raises on purpose."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        size: float | None = None,
        limit: float | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.field, self.size, self.limit, self.retry_after_s = field, size, limit, retry_after_s

    def failure(self) -> Failure:
        """The error as clients see it."""
        return Failure(
            code=self.code,
            message=str(self),
            status=self.status,
            field=self.field,
            size=self.size,
            limit=self.limit,
            retry_after_s=self.retry_after_s,
        )


class Permanent(PipelineError):
    """The request can never succeed."""


class InvalidRequest(Permanent):
    code, status = "invalid_request", 400


class Unauthorized(Permanent):
    code, status = "unauthorized", 401


class UnknownModel(Permanent):
    code, status = "unknown_model", 404


class ModelUnavailable(Permanent):
    code, status = "model_unavailable", 503


class PayloadTooLarge(Permanent):
    code, status = "payload_too_large", 413


class PromptTooLong(Permanent):
    code, status = "prompt_too_long", 400


class DeadlineExceeded(Permanent):
    code, status = "deadline_exceeded", 504


class Cancelled(Permanent):
    code, status = "cancelled", 499


class NotFound(Permanent):
    code, status = "not_found", 404


class OutputGone(Permanent):
    code, status = "output_gone", 410


class ObjectNotFound(Permanent):
    code, status = "object_not_found", 404


class ObjectDamaged(Permanent):
    code, status = "object_damaged", 500


class NotPermitted(Permanent):
    code, status = "not_permitted", 403


class NotSupported(Permanent):
    code, status = "not_supported", 501


class EngineFailed(Permanent):
    code, status = "engine_failed", 500


class AttemptsExhausted(Permanent):
    code, status = "attempts_exhausted", 500


class Transient(PipelineError):
    """May succeed later."""


class Overloaded(Transient):
    code, status = "overloaded", 429


class Busy(Transient):
    code, status = "busy", 409


class EngineSuspended(Transient):
    code, status = "engine_suspended", 503


class EngineDied(Transient):
    code, status = "engine_died", 503


class PrefillLost(Transient):
    code, status = "prefill_lost", 503


class WorkerGone(Transient):
    code, status = "worker_gone", 503


class BusUnavailable(Transient):
    code, status = "bus_unavailable", 503


class NoResponders(BusUnavailable):
    code = "no_responders"


class BrokerRefused(BusUnavailable):
    code = "broker_refused"

    def __init__(self, message: str, *, error_number: int = 0) -> None:
        super().__init__(message)
        self.error_number = error_number  # JetStream's err_code, e.g. 10059: stream not found


class SetupError(PipelineError):
    """A process cannot start."""


class ConfigError(SetupError):
    code = "config"


class BusConnectError(SetupError):
    code = "bus_connect"


class ServerStartError(SetupError):
    code = "server_start"


class ProvisionError(SetupError):
    code = "provision"


class WorkerStartError(SetupError):
    code = "worker_start"


class EngineStartError(SetupError):
    code = "engine_start"


def from_failure(failure: Failure) -> PipelineError:
    """The error behind its wire form; an unknown code, of a newer release, gives a plain PipelineError."""
    kinds = [PipelineError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    kind = next((kind for kind in kinds if kind.code == failure.code), PipelineError)
    return kind(
        failure.message,
        field=failure.field,
        size=failure.size,
        limit=failure.limit,
        retry_after_s=failure.retry_after_s,
    )
