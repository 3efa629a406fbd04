"""Gateway: OpenAI's API over HTTP, in front of the pipeline. It keeps nothing that another gateway could not find."""

import structlog

from pipeline.batch_runner import BatchRunner, Pace, Stores, working
from pipeline.batches import Batches
from pipeline.files import Files
from pipeline.http.accounts import Accounts, load_keys
from pipeline.http.app import Gateway, make_app
from pipeline.http.batches import BatchRoutes
from pipeline.http.console import console_routes
from pipeline.http.files import FileRoutes
from pipeline.http.response_routes import ResponseRoutes
from pipeline.http.server import listen, serving, url_of
from pipeline.http.visits import Visits
from pipeline.worker import Worker
from subjects import limits, streams

FLUSH_S_MAX = 30.0
"""A batch's answers wait so long for others to be kept with; the log of frames has them for longer."""

log = structlog.get_logger()


async def serve(worker: Worker) -> None:
    """Listen, and answer until the worker drains. Raises ConfigError for keys or an address that cannot be had."""
    settings = worker.settings.gateway
    accounts = Accounts(worker.bus, load_keys(settings), settings.client_requests_max)
    gateway = Gateway(worker.bus, worker.presence, accounts, settings, worker.health, lambda: worker.draining)
    stores = await _stores(worker)
    more = [
        *FileRoutes(accounts, stores.files).routes(),
        *BatchRoutes(accounts, stores.files, stores.batches).routes(),
        *ResponseRoutes(gateway, accounts, settings, worker.bus, await worker.bus.bucket(streams.ANSWERS)).routes(),
    ]
    listener = listen(settings.host, settings.port)
    bus, presence = worker.bus, worker.presence
    runner = BatchRunner(stores, f"{worker.name}-{worker.incarnation}", _pace(worker))
    async with console_routes(bus, presence, accounts, settings, lambda: worker.draining) as console:
        visits = Visits(make_app(gateway, settings.cors_origins, [*more, *console]), presence.known)
        worker.works_without_tasks(lambda: visits.in_progress)
        async with serving(visits, listener), working(runner):
            log.info("gateway_served", worker=worker.name, url=url_of(listener))
            worker.set_ready()
            await worker.until_drained()


async def _stores(worker: Worker) -> Stores:
    """Raises ProvisionError, BusUnavailable."""
    objects = await worker.bus.objects(streams.FILES)
    batches = Batches(await worker.bus.bucket(streams.BATCHES))
    return Stores(bus=worker.bus, objects=objects, batches=batches, files=Files(objects))


def _pace(worker: Worker) -> Pace:
    settings = worker.settings.gateway
    kept_s = max(worker.settings.responses_kept_s, limits.RESPONSES_KEPT_S_MIN)
    return Pace(
        batches_max=settings.batches_max,
        in_flight=settings.batch_in_flight,
        flush_s=min(FLUSH_S_MAX, kept_s / 4),
    )
