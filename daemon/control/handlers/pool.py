"""hello and pool."""

import os

from daemon import VERSION
from daemon.control.answering import answers
from daemon.control.context import Context
from protocol.control import methods, rows
from protocol.control.limits import PROTOCOL_VERSION
from protocol.control.rows import row_of


@answers(methods.Hello)
async def hello(context: Context, call: methods.Hello) -> rows.Greeting:
    """This daemon, and its pool."""
    return rows.Greeting(
        server="cleaved",
        version=VERSION,
        protocol=PROTOCOL_VERSION,
        pool=context.pool_path,
        pid=os.getpid(),
    )


@answers(methods.PoolShow)
async def pool_show(context: Context, call: methods.PoolShow) -> rows.Pool:
    """What the pool says, and what the watch over its space says."""
    return row_of(rows.Pool, {**context.pool.show(), **context.space.shown()})


@answers(methods.PoolCheck)
async def pool_check(context: Context, call: methods.PoolCheck) -> rows.CheckReport:
    """As of a consistency point, while the pool serves."""
    return row_of(rows.CheckReport, await context.pool.check(verify_data=call.verify_data))


@answers(methods.PoolScrub)
async def pool_scrub(context: Context, call: methods.PoolScrub) -> rows.Scrub:
    """It goes on by itself, to its end or the daemon's."""
    return row_of(rows.Scrub, await context.pool.scrub_start(call.rate_max_bytes))


@answers(methods.PoolScrubShow)
async def pool_scrub_show(context: Context, call: methods.PoolScrubShow) -> rows.Scrub:
    """That under way, or the last one since the daemon started."""
    return row_of(rows.Scrub, context.pool.scrub_show())


@answers(methods.PoolScrubCancel)
async def pool_scrub_cancel(context: Context, call: methods.PoolScrubCancel) -> rows.Scrub:
    """What it found so far stays to be shown."""
    return row_of(rows.Scrub, await context.pool.scrub_cancel())
