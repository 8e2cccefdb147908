"""split."""

from daemon.control.answering import answers
from daemon.control.context import Context, all_rows
from protocol.control import methods, rows
from protocol.control.rows import row_of


@answers(methods.SplitStart)
async def split_start(context: Context, call: methods.SplitStart) -> rows.Split:
    """It goes on by itself, over restarts too."""
    started = await context.pool.split_start(
        call.name, call.mode, call.rate_min_bytes, call.rate_max_bytes
    )
    return row_of(rows.Split, started)


@answers(methods.SplitShow)
async def split_show(context: Context, call: methods.SplitShow) -> rows.Split:
    """That under way, or the last one."""
    return row_of(rows.Split, context.pool.split_show(call.name))


@answers(methods.SplitList)
async def split_list(context: Context, call: methods.SplitList) -> list[rows.Split]:
    """All that run or are paused."""
    return await all_rows(rows.Split, context.pool.split_list())


@answers(methods.SplitPause)
async def split_pause(context: Context, call: methods.SplitPause) -> rows.Split:
    """Over restarts, too."""
    await context.pool.split_pause(call.name)
    return row_of(rows.Split, context.pool.split_show(call.name))


@answers(methods.SplitResume)
async def split_resume(context: Context, call: methods.SplitResume) -> rows.Split:
    """From where it was."""
    await context.pool.split_resume(call.name)
    return row_of(rows.Split, context.pool.split_show(call.name))


@answers(methods.SplitCancel)
async def split_cancel(context: Context, call: methods.SplitCancel) -> rows.Split:
    """What was separated stays so."""
    await context.pool.split_cancel(call.name)
    return row_of(rows.Split, context.pool.split_show(call.name))


@answers(methods.SplitEstimate)
async def split_estimate(context: Context, call: methods.SplitEstimate) -> rows.SplitEstimate:
    """For an idle daemon."""
    return row_of(rows.SplitEstimate, await context.pool.split_estimate(call.name))
