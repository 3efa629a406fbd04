"""Two decode workers that do all, started once for all tests of this folder."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from aggregated_topology import Aggregated, started


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def two_engines(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Aggregated]:
    async with started(tmp_path_factory.mktemp("two-engines")) as running:
        yield running
