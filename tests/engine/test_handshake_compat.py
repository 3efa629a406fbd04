"""The start-up check of upstream symbols, and the route table that answers with SGLang's own handlers."""

import json

import pytest

from pipeline.engine.sglang import cpu_platform
from pipeline.errors import EngineStartError

pytestmark = pytest.mark.engine
cpu_platform.prepare()

from pipeline.engine.sglang.handshake import compat  # noqa: E402, after prepare()
from pipeline.engine.sglang.handshake.routes import RouteBook  # noqa: E402


def test_this_sglang_has_every_symbol() -> None:
    assert list(compat.problems()) == []


@pytest.mark.parametrize(
    ("symbol", "sentence"),
    [
        (compat.Symbol(compat.COMMON, "CommonKVManager._renamed"), "CommonKVManager._renamed is missing"),
        (compat.Symbol("sglang.srt.gone", "anything"), "sglang.srt.gone.anything is missing"),
        (compat.Symbol(compat.COMMON, "get_local_ip_auto", ("host",)), "expected ('host',)"),
    ],
)
def test_a_changed_symbol_is_named(symbol: compat.Symbol, sentence: str) -> None:
    assert sentence in next(compat.problems((symbol,)))


def test_a_misfit_is_one_sentence_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "SOURCES", {"CommonKVManager.__init__": ("self.local_ip = another_way()",)})
    with pytest.raises(EngineStartError, match=r"SGLang \S+ does not fit .*another_way"):
        compat.check()


def row(tp_rank: int, tp_size: int = 2) -> bytes:
    """As `CommonKVManager.register_to_bootstrap` puts it."""
    ranks = {f"attn_{kind}_{what}": value for kind in ("cp", "dp") for what, value in (("size", 1), ("rank", 0))}
    place = {"rank_ip": "prefill-0.i1", "rank_port": 1001 + tp_rank, "page_size": 1, "kv_cache_dtype": "bf16"}
    sizes = {"pp_size": 1, "pp_rank": 0, "system_dp_size": 1, "system_dp_rank": 0}
    return json.dumps({"attn_tp_size": tp_size, "attn_tp_rank": tp_rank} | ranks | place | sizes).encode()


def query(tp_rank: int) -> dict[str, str]:
    return {
        "prefill_dp_rank": "0", "prefill_cp_rank": "0", "target_tp_rank": str(tp_rank), "target_pp_rank": "0",
    }  # fmt: skip


def test_a_worker_is_ready_once_each_of_its_ranks_has_registered() -> None:
    book = RouteBook()
    assert not book.ready("prefill-0.i1")
    for _ in range(3):  # a row put again is still one rank
        book.change("prefill-0.i1.dp0pp0tp0", row(0))
    assert not book.ready("prefill-0.i1")
    assert book.change("prefill-0.i1.dp0pp0tp1", row(1)) == "prefill-0.i1"
    assert book.ready("prefill-0.i1")
    assert book.route("prefill-0.i1", query(1)).json() == {"rank_ip": "prefill-0.i1", "rank_port": 1002}
    assert book.addresses("prefill-0.i1") == (("prefill-0.i1", 1001), ("prefill-0.i1", 1002))


def test_a_worker_whose_rank_went_is_not_ready() -> None:
    book = RouteBook()
    book.change("prefill-0.i1.dp0pp0tp0", row(0, tp_size=1))
    assert book.ready("prefill-0.i1")
    book.change("prefill-0.i1.dp0pp0tp0", None)
    assert not book.ready("prefill-0.i1")
    assert book.hosts() == frozenset()


def test_the_data_parallel_rank_of_a_room_is_answered() -> None:
    book = RouteBook()
    book.change("prefill-0.i1.room-42", b'{"bootstrap_room": 42, "dp_rank": 3}')
    assert book.dp_ranks("prefill-0.i1", [42, 43]).json() == {"42": 3}
