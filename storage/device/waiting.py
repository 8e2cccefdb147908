"""Waiting for several jobs of a device that were submitted together."""

import asyncio
from asyncio import Future
from collections.abc import Sequence


async def all_of(jobs: Sequence[Future[None]]) -> None:
    """Wait until every job is done, then raise the first error among them, if any. So none goes on unseen, and none fails unheard."""
    for outcome in await asyncio.gather(*jobs, return_exceptions=True):
        if outcome is not None:
            raise outcome
