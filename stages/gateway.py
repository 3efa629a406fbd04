"""Gateway: OpenAI's API over HTTP, in front of the pipeline. It keeps nothing that another gateway could not find."""

import structlog

from pipeline.http.accounts import Accounts, load_keys
from pipeline.http.app import Gateway, make_app
from pipeline.http.server import listen, serving, url_of
from pipeline.http.visits import Visits
from pipeline.worker import Worker

log = structlog.get_logger()


async def serve(worker: Worker) -> None:
    """Listen, and answer until the worker drains. Raises ConfigError for keys or an address that cannot be had."""
    settings = worker.settings.gateway
    accounts = Accounts(worker.bus, load_keys(settings), settings.client_requests_max)
    gateway = Gateway(worker.bus, worker.presence, accounts, settings, worker.health, lambda: worker.draining)
    listener = listen(settings.host, settings.port)
    visits = Visits(make_app(gateway, settings.cors_origins), worker.presence.known)
    worker.works_without_tasks(lambda: visits.in_progress)
    async with serving(visits, listener):
        log.info("gateway_served", worker=worker.name, url=url_of(listener))
        worker.ready = True
        await worker.until_drained()
