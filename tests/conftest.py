"""What holds for every test run."""

import faulthandler

EXIT_S_MAX = 60.0


def pytest_unconfigure() -> None:
    """A thread or child that outlives the tests may keep the interpreter for ever: say which, and end with status 1."""
    faulthandler.dump_traceback_later(EXIT_S_MAX, exit=True)
