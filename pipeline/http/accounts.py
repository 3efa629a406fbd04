"""Who asks: API keys, the client's name that stands behind each, and how much of one client runs at once."""

import asyncio
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from pipeline.bus import Bus
from pipeline.client import Client
from pipeline.config import GatewaySettings, read_tables
from pipeline.errors import ConfigError, Overloaded, Unauthorized
from pipeline.http import visits
from subjects.names import is_token

OPEN_CLIENT: Final = "http"
"""Everybody's name where there are no keys; the same at each gateway, so that any can resume any stream."""
RETRY_AFTER_S: Final = 1.0
KEYS_MAX: Final = 10_000


class Account:
    """One client at this gateway."""

    def __init__(self, client: Client, requests_max: int) -> None:
        """`requests_max` 0: any number."""
        self.client = client
        self._running, self._requests_max = 0, requests_max

    def begin(self) -> None:
        """Count a request in; `end` counts it out. Raises Overloaded."""
        if 0 < self._requests_max <= self._running:
            raise Overloaded(
                f"{self.client.name} has {self._running} requests in progress here, and may have no more",
                size=self._running + 1,
                limit=self._requests_max,
                retry_after_s=RETRY_AFTER_S,
            )
        self._running += 1

    def end(self) -> None:
        self._running -= 1


class Accounts:
    """All clients that have asked so far, on one connection."""

    def __init__(self, bus: Bus, keys: Mapping[bytes, str] | None, requests_max: int) -> None:
        """`keys`: the digest of each key, and its client; None: anyone may ask."""
        self._bus, self._keys, self._requests_max = bus, keys, requests_max
        self._accounts: dict[str, Account] = {}
        self._starting = asyncio.Lock()

    @property
    def open(self) -> bool:
        """Anyone may ask."""
        return self._keys is None

    async def of(self, authorization: str | None) -> Account:
        """The account behind an `Authorization` header. Raises Unauthorized."""
        visits.current().client = name = self._name(authorization)
        async with self._starting:
            if name not in self._accounts:
                client = Client(self._bus, name, shared=True)
                await client.start()
                self._accounts[name] = Account(client, self._requests_max)
        return self._accounts[name]

    def _name(self, authorization: str | None) -> str:
        if self._keys is None:
            return OPEN_CLIENT
        scheme, _, key = (authorization or "").partition(" ")
        name = self._keys.get(_digest(key.strip())) if scheme.lower() == "bearer" else None
        if name is None:
            what = "this API key is not known" if key else "an API key is needed"
            raise Unauthorized(f"{what}: send it as `Authorization: Bearer KEY`", field="Authorization")
        return name


def load_keys(settings: GatewaySettings, environment: Mapping[str, str] = os.environ) -> dict[bytes, str] | None:
    """The digest of every key with its client's name; None where the settings name no keys. Raises ConfigError."""
    if settings.keys_file is None and settings.keys_variable is None:
        return None
    keys: dict[bytes, str] = {}
    if settings.keys_file is not None:
        keys |= _checked(read_tables(Path(settings.keys_file)), settings.keys_file, "gateway.keys_file")
    if settings.keys_variable is not None:
        try:
            found = msgspec.json.decode(environment.get(settings.keys_variable, ""))
        except msgspec.DecodeError:
            raise ConfigError(f"{settings.keys_variable} is not JSON", field="gateway.keys_variable") from None
        keys |= _checked(found, settings.keys_variable, "gateway.keys_variable")
    if not 1 <= len(keys) <= KEYS_MAX:
        raise ConfigError(f"{len(keys)} API keys are named; 1 to {KEYS_MAX} are taken", field="gateway.keys_file")
    return keys


def _checked(table: Any, where: str, field: str) -> dict[bytes, str]:
    """Client names with a key or several. No error repeats a key."""
    try:
        clients = msgspec.convert(table, dict[str, str | list[str]])
    except msgspec.ValidationError:
        raise ConfigError(f"{where}: must give each client's name its API key or a list of them", field=field) from None
    keys: dict[bytes, str] = {}
    for name, given in clients.items():
        if not is_token(name):
            raise ConfigError(f"{where}: the client {name!r} is not 1 to 64 of A-Z a-z 0-9 _ -", field=field)
        for key in [given] if isinstance(given, str) else given:
            if not key or keys.setdefault(_digest(key), name) != name:
                raise ConfigError(f"{where}: a key of {name!r} is empty or another client's too", field=field)
    return keys


def _digest(key: str) -> bytes:
    """Looked up in place of the key itself: how long that takes tells nothing of other keys."""
    return hashlib.sha256(key.encode()).digest()
