"""What one seed does: the pool and its circumstances, and a list of operations. Nothing here looks
at the store or the oracle.

An operation is a kind, a pause after it, and three numbers from which the session chooses images,
addresses and lengths when it comes to it. So any part of the list is a list as well, which is what
makes shrinking and replaying simple.
"""

from dataclasses import dataclass
from random import Random
from typing import Final, NamedTuple

from tests.fuzz.store.device import Manner

WRITE, PARTIAL, MULTI, LONG, ATOMIC, FUA, READ, FLUSH, UNMAP, ZEROS, COPY, REPORT, COMPARE = (
    "write", "partial", "multi", "long", "atomic", "fua", "read", "flush", "unmap", "zeros", "copy",
    "report", "compare",
)  # fmt: skip
CREATE, DELETE, SNAPSHOT, SNAPSHOT_RM, CLONE, RENAME, RESIZE, START, PAUSE, RESUME, CANCEL = (
    "create", "delete", "snapshot", "snapshot-rm", "clone", "rename", "resize", "split", "pause",
    "resume", "cancel",
)  # fmt: skip
SHOW, ESTIMATE, LIST, CHECK, SCRUB, CONFIGURE, POINT = (
    "show",
    "estimate",
    "list",
    "check",
    "scrub",
    "configure",
    "point",
)
KILL, POWER, REOPEN, QUIET, TROUBLE, FILL, FORGET, SPREAD, BURST, RACE, SQUEEZE = (
    "kill", "power", "reopen", "quiet", "trouble", "fill", "forget", "spread", "burst", "race",
    "squeeze",
)  # fmt: skip

DATA: Final = {
    WRITE: 22, PARTIAL: 10, MULTI: 7, LONG: 1.2, ATOMIC: 3, FUA: 2, READ: 26, FLUSH: 4, UNMAP: 4,
    ZEROS: 2, COPY: 1.2, REPORT: 4, COMPARE: 2,
}  # fmt: skip
ADMIN: Final = {
    CREATE: 1.5, DELETE: 1.5, SNAPSHOT: 3, SNAPSHOT_RM: 2.5, CLONE: 3, RENAME: 0.7, RESIZE: 1.5,
    START: 2.5, PAUSE: 0.7, RESUME: 1, CANCEL: 0.5, SHOW: 1, ESTIMATE: 0.7, LIST: 0.4, CHECK: 0.15,
    SCRUB: 0.15, CONFIGURE: 0.3, POINT: 1.5,
}  # fmt: skip
CONTROL: Final = {
    KILL: 0.18, POWER: 0.22, REOPEN: 0.12, QUIET: 0.25, TROUBLE: 0.3, FILL: 0.1, FORGET: 0.15,
    SPREAD: 0.5, BURST: 0.5, RACE: 0.6, SQUEEZE: 0.15,
}  # fmt: skip

# What some seeds do much more often than others.
FOCUSES: Final[tuple[dict[str, float], ...]] = (
    {}, {},
    {REPORT: 8, START: 5, CLONE: 3, SNAPSHOT: 2, KILL: 0.3, POWER: 0.3, RACE: 4},
    {FILL: 6, SQUEEZE: 8, SNAPSHOT: 3, DELETE: 2, SNAPSHOT_RM: 2, UNMAP: 3, READ: 2},
    {RACE: 40, SNAPSHOT: 8, CLONE: 10},
    {CLONE: 6, SNAPSHOT: 4, START: 5, PAUSE: 4, CANCEL: 4, RESUME: 5, SNAPSHOT_RM: 3, RACE: 6},
    {COPY: 8, UNMAP: 3, RESIZE: 4, COMPARE: 3, PARTIAL: 2},
    {FLUSH: 4, FUA: 6, ATOMIC: 5, POWER: 6, KILL: 4},
)  # fmt: skip

POOL_MIB: Final = (8, 8, 8, 12, 16, 16, 24, 32, 64)
SPARSE_MIB: Final = (256, 512, 2048)
CACHE_NODES: Final = (16, 16, 18, 20, 24, 32, 48, 64, 128, 256, 4096)


class Operation(NamedTuple):
    """One step. ``pause`` is in virtual seconds."""

    kind: str
    pause: float
    a: int
    b: int
    c: int


@dataclass(frozen=True)
class Plan:
    """A pool, its circumstances, and what is done."""

    seed: int
    pool_bytes: int
    cache_nodes: int
    depth: int
    manner: Manner
    leaves: int
    stride: int
    spots: int
    operations: list[Operation]
    # Numbers of the operations that are left of the seed's own list, and which of many devices
    # carries them out.
    kept: list[int]
    kept_max: int
    device: int = 0

    @property
    def text(self) -> str:
        """What ``--replay`` takes."""
        text = str(self.seed)
        if len(self.kept) < self.kept_max:
            text += f":keep={ranges(self.kept)}"
        if self.cache_nodes != plan_of(self.seed).cache_nodes:
            text += f":nodes={self.cache_nodes}"
        return text + (f":device={self.device}" if self.device else "")


def plan_of(seed: int) -> Plan:
    """The plan of a seed."""
    random = Random(seed)
    sparse = random.random() < 0.12
    pool_mib = random.choice(SPARSE_MIB if sparse else POOL_MIB)
    stride = random.choice((1, 1, 1, 3, 256)) if not sparse else random.choice((1, 7, 256))
    leaves = (
        random.choice((1, 2, 4, 8, 24, 60, 200))
        if not sparse
        else random.choice((24, 200, 600, 4096))
    )
    count = random.choice((200, 400, 600, 900))
    manner = Manner(
        read_misses=random.choice((0.0, 0.02, 0.2, 0.5, 1.0)),
        write_misses=random.choice((0.0, 0.0, 0.1, 0.5, 1.0)),
        slow_seconds=random.choice((0.0005, 0.002, 0.01)),
        stall_rate=random.choice((0.0, 0.01, 0.05)),
        stall_seconds=random.choice((0.02, 0.2)),
        at_once=random.choice((0.0, 0.3, 0.7)),
    )
    return Plan(
        seed, pool_mib << 20, random.choice(CACHE_NODES), random.choice((1, 2, 4, 8, 16, 32)),
        manner, leaves, stride, random.choice((3, 8, 40, 256)), operations(random, count),
        list(range(count)), count,
    )  # fmt: skip


def operations(random: Random, count: int) -> list[Operation]:
    """The seed's own list: a few vdisks first, then what its weights say."""
    weights = {**DATA, **ADMIN, **CONTROL}
    admin, control, trouble = (
        random.choice((0.2, 1.0, 1.0, 3.0)),
        random.choice((0.3, 1.0, 2.0)),
        random.choice((0.0, 0.0, 1.0)),
    )
    for kind in ADMIN:
        weights[kind] *= admin
    for kind in CONTROL:
        weights[kind] *= control
    weights[TROUBLE] *= trouble
    for kind, factor in random.choice(FOCUSES).items():
        weights[kind] *= factor
    for kind in random.sample(sorted(weights), 6):  # what is common here is rare elsewhere
        weights[kind] *= random.choice((0.0, 0.2, 4.0))
    kinds = [
        CREATE,
        CREATE,
        SPREAD,
        *random.choices(list(weights), list(weights.values()), k=count),
    ][:count]
    hurry = random.choice((0.4, 0.7, 0.9))
    return [
        Operation(
            kind,
            pause(random, hurry),
            random.getrandbits(32),
            random.getrandbits(32),
            random.getrandbits(32),
        )
        for kind in kinds
    ]


def pause(random: Random, hurry: float) -> float:
    chance = random.random()
    if chance < hurry:
        return 0.0
    return random.random() * (0.3 if chance > 0.99 else 0.003)


def kept_of(plan: Plan, kept: list[int], device: int, nodes: int = 0) -> Plan:
    """The same plan with some of its operations only (numbers of the whole list)."""
    whole = plan_of(plan.seed)
    return Plan(
        plan.seed, plan.pool_bytes, nodes or plan.cache_nodes, plan.depth, plan.manner, plan.leaves,
        plan.stride, plan.spots, [whole.operations[number] for number in kept], kept, plan.kept_max,
        device,
    )  # fmt: skip


def replayed(text: str) -> Plan:
    """The plan that ``Plan.text`` names."""
    seed, *options = text.split(":")
    plan, device, kept, nodes = plan_of(int(seed)), 0, None, 0
    for option in options:
        name, _, value = option.partition("=")
        if name == "keep":
            kept = numbers(value)
        elif name == "device":
            device = int(value)
        elif name == "nodes":
            nodes = int(value)
        else:
            raise ValueError(
                f"{option}: not keep=NUMBERS, device=NUMBER or nodes=NUMBER (of the cache)"
            )
    return kept_of(plan, plan.kept if kept is None else kept, device, nodes)


def ranges(found: list[int]) -> str:
    """Numbers as ``1-4,7``."""
    parts: list[list[int]] = []
    for number in found:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def numbers(text: str) -> list[int]:
    """The reverse of ``ranges``."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found
