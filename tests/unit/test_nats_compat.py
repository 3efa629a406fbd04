"""What the bus leans on in nats-py, by name: a release that changes one of these fails here, not in an outage."""

import inspect

import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

CONNECT_OPTIONS = {
    "servers",
    "name",
    "error_cb",
    "disconnected_cb",
    "reconnected_cb",
    "closed_cb",
    "connect_timeout",
    "reconnect_time_wait",
    "max_reconnect_attempts",
    "ping_interval",
    "pending_size",
    "inbox_prefix",
    "skip_subject_validation",
}


def parameters(function) -> set[str]:
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (Client.connect, CONNECT_OPTIONS),
        (Client.publish, {"subject", "payload", "reply", "headers"}),
        (Client.subscribe, {"subject", "queue", "future"}),
        (Client.flush, {"timeout"}),
        (Client.close, set()),
        (Client._send_unsubscribe, {"sid"}),  # private: UNSUB without forgetting the subscription
        (Subscription.unsubscribe, set()),
    ],
)
def test_functions_take_what_the_bus_gives(function, wanted):
    assert inspect.iscoroutinefunction(function)
    assert wanted <= parameters(function)


@pytest.mark.parametrize("name", ["is_connected", "max_payload", "pending_data_size"])
def test_properties_of_the_client(name):
    assert isinstance(inspect.getattr_static(Client, name), property)


def test_fields_of_a_message():
    assert {"subject", "data", "headers", "reply"} <= parameters(Msg)


def test_errors():
    assert issubclass(nats.errors.AuthorizationError, nats.errors.Error)
    assert issubclass(nats.errors.ConnectionClosedError, nats.errors.Error)
    assert issubclass(nats.errors.OutboundBufferLimitError, nats.errors.Error)


def test_a_permission_violation_is_worded_as_the_bus_reads_it():
    """`Client._process_err` makes the broker's words lower case and tells `error_cb`."""
    source = inspect.getsource(Client._process_err)
    assert "PERMISSIONS_ERR in m" in source
    assert "self._error_cb(err)" in source


async def test_a_subscriptions_future_is_called_in_the_parser_for_every_message():
    """The bus gives `subscribe` an object with `cancelled` and `set_result` instead of a future."""

    class Sink:
        heard: list[bytes]

        def __init__(self) -> None:
            self.heard = []

        def cancelled(self) -> bool:
            return False

        def set_result(self, message: Msg) -> None:
            self.heard.append(message.data)

    client, sink = Client(), Sink()
    client._subs[1] = Subscription(client, 1, "here", future=sink)
    client._subs[1]._start(None)
    for data in (b"1", b"2"):
        await client._process_msg(1, b"here", b"", data, b"")
    await client._process_msg(1, b"here", b"", b"", b"NATS/1.0 100 Idle Heartbeat\r\n\r\n")
    assert sink.heard == [b"1", b"2", b""]
    assert isinstance(client._subs[1]._id, int)


def test_the_outage_callbacks_come_in_the_order_the_bus_counts_on():
    """Disconnected before any new try; connected before `reconnected_cb`; `closed_cb` at the end of a close."""
    reconnect = inspect.getsource(Client._attempt_reconnect)
    assert reconnect.index("_disconnected_cb()") < reconnect.index("_process_connect_init()")
    assert reconnect.index("self._status = Client.CONNECTED") < reconnect.index("_reconnected_cb()")
    assert "_closed_cb()" in inspect.getsource(Client._close)
