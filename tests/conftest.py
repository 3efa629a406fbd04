"""What holds for every test run."""

import asyncio
import faulthandler

import uvloop

EXIT_S_MAX = 60.0

# As the pipeline's processes run, and as SGLang sets when it is imported: a loop made before that would not fit.
asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def pytest_unconfigure() -> None:
    """A thread or child that outlives the tests may keep the interpreter for ever: say which, and end with status 1."""
    faulthandler.dump_traceback_later(EXIT_S_MAX, exit=True)
