"""Makes what failed short: leaves out operations, as long as the rest still fails in
the same way.
"""

import re
from collections.abc import Callable

from tests.fuzz.store.plan import Plan, kept_of
from tests.fuzz.store.session import carry_out

# With operations left out everything happens at other moments: each candidate is tried on a few
# devices.
DEVICES = 3
RUNS_MAX = 400

Report = Callable[[str], None]


def likeness(wrong: Exception | None) -> str | None:
    """What two failures of one cause have in common: the message without names and numbers."""
    if wrong is None:
        return None
    words = re.sub(r"\[.*|\{.*|'[^']*'|\b[a-h](@\w+)?\b|\d+", "", str(wrong)).split()
    return f"{type(wrong).__name__} {' '.join(words[:8])}"


def failing(plan: Plan, wanted: str | None) -> Plan | None:
    """The plan on a device on which it fails like that, cut off after the operation that it failed
    in; None if it does not.
    """
    for device in range(DEVICES):
        candidate = kept_of(plan, plan.kept, device or plan.device)
        _, wrong = carry_out(candidate)
        if likeness(wrong) == wanted:
            return candidate
    return None


def shrunk(plan: Plan, wrong: Exception, report: Report, runs_max: int = RUNS_MAX) -> Plan:
    """A plan with few operations that fails as this one does."""
    wanted, runs = likeness(wrong), 0
    size = len(plan.kept) // 2
    while size and runs < runs_max:
        at = 0
        while at < len(plan.kept) and runs < runs_max:
            runs += 1
            kept = plan.kept[:at] + plan.kept[at + size :]
            found = failing(kept_of(plan, kept, plan.device), wanted) if kept else None
            if found is None:
                at += size
            else:
                plan = found
        report(f"  {len(plan.kept)} operations")
        size = size // 2 if size > 1 or runs >= runs_max else 0
    return plan
