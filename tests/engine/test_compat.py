"""The installed SGLang has what the adapter leans on; a difference is a sentence that names it."""

import pytest

from pipeline.engine.sglang import cpu_platform

cpu_platform.prepare()
from pipeline.engine.sglang import compat  # noqa: E402
from pipeline.engine.sglang.compat import SYMBOLS, Symbol  # noqa: E402
from pipeline.errors import EngineStartError  # noqa: E402

pytestmark = pytest.mark.engine


def test_the_installed_sglang_fits():
    assert list(compat.differences()) == []


def test_every_symbol_is_listed_once():
    assert len({(symbol.module, symbol.name) for symbol in SYMBOLS}) == len(SYMBOLS)


@pytest.mark.parametrize(
    ("symbol", "says"),
    [
        (Symbol("sglang.srt.server_args", "ServerArguments"), "sglang.srt.server_args.ServerArguments is missing"),
        (
            Symbol("sglang.srt.server_args", "ServerArgs.add_cli_args", ("lexer",)),
            "sglang.srt.server_args.ServerArgs.add_cli_args takes no lexer",
        ),
        (Symbol("sglang.no_such_module", "Thing"), "sglang.no_such_module cannot be imported"),
    ],
)
def test_a_difference_names_the_symbol(symbol: Symbol, says: str):
    (found,) = compat.differences((symbol,), ())
    assert found.startswith(says)


def test_a_changed_body_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(compat._LINES, "Engine.__init__", ("self.no_such_line()",))
    assert any("no longer has `self.no_such_line()`" in found for found in compat.differences())
    with pytest.raises(EngineStartError, match=r"SGLang 0\.5\.\d+ does not fit.*no_such_line"):
        compat.check()
