"""What holds for every test run."""

import asyncio
import faulthandler

import pytest
import uvloop
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

EXIT_S_MAX = 60.0

# As the pipeline's processes run, and as SGLang sets when it is imported: a loop made before that would not fit.
asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def pytest_unconfigure() -> None:
    """A thread or child that outlives the tests may keep the interpreter for ever: say which, and end with status 1."""
    faulthandler.dump_traceback_later(EXIT_S_MAX, exit=True)


class _EnginesTogether(LoadScopeScheduling):
    """Where several processes share the tests, one has all engines: two topologies at once are too much for a machine.

    Other tests stay together by file, for the sake of what a file's tests share.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "engines" if nodeid.startswith("tests/engine/") else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return _EnginesTogether(config, log)
