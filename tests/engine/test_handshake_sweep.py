"""What decode notes of rooms that are over, without an engine."""

import pytest

from pipeline.engine.sglang import cpu_platform

cpu_platform.prepare()
cpu_platform.patch()

from pipeline.engine.sglang.handshake import managers  # noqa: E402


def test_a_notification_after_the_end_of_its_room_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(managers.time, "monotonic", lambda: now_s)
    decode = object.__new__(managers._NatsKVManager)
    decode.request_status, decode._late_s = {1: 0}, {}
    decode.transfer_statuses = {1: object(), 2: object()}
    decode._sweep_late()
    assert set(decode.transfer_statuses) == {1, 2}, "the request may be about to come"
    now_s += managers.LATE_S + 1
    decode._sweep_late()
    assert set(decode.transfer_statuses) == {1}
    decode._sweep_late()
    assert decode._late_s == {}
