"""The order of writes is held here too (tests/storage/ordering.py), but where bugs are planted that
break it.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from tests.storage.conftest import holding_order


@pytest.fixture(autouse=True)
def order_is_held(request: pytest.FixtureRequest) -> Iterator[None]:
    with nullcontext() if request.node.get_closest_marker("disorder") else holding_order():
        yield
