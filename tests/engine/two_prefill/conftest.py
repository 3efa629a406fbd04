"""Two prefill workers and a decode worker, started once for all tests of this folder."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from disaggregated_topology import FLOAT32, Disaggregated, started, topology


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def two_prefill(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Disaggregated]:
    async with started(topology(2, 1, **FLOAT32), tmp_path_factory.mktemp("two-prefill")) as running:
        yield running
