"""Every pool that a test of the store opens or formats is held to the order of its writes
(tests/storage/ordering.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from storage.log.intent_log import IntentLog
from storage.pool.rooms import Rooms
from tests.storage.ordering import OrderingChecker


@pytest.fixture(autouse=True)
def order_is_held() -> Iterator[None]:
    with holding_order():
        yield


@contextmanager
def holding_order() -> Iterator[None]:
    """Every pool within has the checker around its device; raises AssertionError for
    what it found.
    """
    original_init, original_flush = Rooms.__init__, IntentLog.flush

    def init(self: Rooms, device: Any, *arguments: Any, **options: Any) -> None:
        original_init(self, OrderingChecker(device), *arguments, **options)

    def flush(self: IntentLog, done: Any) -> None:
        device = self._state.device
        if not isinstance(device, OrderingChecker):
            original_flush(self, done)  # a log by itself, with no pool around it
            return
        complete = device.complete_unsynced()

        def checked(error: Exception | None) -> None:
            if error is None:
                device.acknowledged(complete)
            done(error)

        original_flush(self, checked)

    OrderingChecker.violations.clear()
    with mock.patch.object(Rooms, "__init__", init), mock.patch.object(IntentLog, "flush", flush):
        yield
    assert not OrderingChecker.violations, OrderingChecker.violations[:5]
