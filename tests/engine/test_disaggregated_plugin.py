"""SGLang goes on without a plugin that raises; ours ends the process instead, as the handshake would not be ours."""

import subprocess
import sys

import pytest

BROKEN = """
from pipeline.engine.sglang import cpu_platform, plugin

cpu_platform.prepare()

def broken():
    raise AttributeError("a name is gone")

plugin.from_environment = broken
plugin.register()
print("SGLang went on")
"""


@pytest.mark.engine
def test_a_plugin_that_fails_ends_its_process() -> None:
    ended = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "SGLang went on" not in ended.stdout
    assert "the SGLang plugin failed" in ended.stderr and "a name is gone" in ended.stderr
