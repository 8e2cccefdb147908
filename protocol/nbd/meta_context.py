"""Metadata contexts: the two that every export has, and how the client's queries find them
("Metadata querying").
"""

from collections.abc import Iterable
from typing import Final

from protocol.nbd import wire
from protocol.nbd.errors import OptionRefused
from protocol.nbd.export import Export, ExtentsCompletion, MetaContext, ReportsDepth
from protocol.volume import BlockVolume, ReportsAllocation

BASE_ALLOCATION: Final = "base:allocation"
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
_HOLE: Final = wire.STATE_HOLE | wire.STATE_ZERO


class BaseAllocation:
    """``base:allocation``: what is not allocated is a hole and reads as zeros. A volume that cannot
    tell is allocated throughout.
    """

    __slots__ = ("_volume",)
    name = BASE_ALLOCATION

    def __init__(self, volume: BlockVolume) -> None:
        self._volume = volume

    def extents(
        self, offset_bytes: int, length_bytes: int, extents_max: int, done: ExtentsCompletion
    ) -> None:
        """Ask the volume."""

        def reported(runs: list[tuple[int, bool]] | None, error: Exception | None) -> None:
            if runs is None:
                done(None, error)
            else:
                done([(length, 0 if allocated else _HOLE) for length, allocated in runs], None)

        if isinstance(self._volume, ReportsAllocation):
            self._volume.allocation(offset_bytes, length_bytes, extents_max, reported)
        else:
            reported([(length_bytes, True)], None)


class AllocationDepth:
    """``qemu:allocation-depth`` (QEMU's docs/interop/nbd): 0 not allocated, 1 the volume's own,
    more from as far behind it.
    """

    __slots__ = ("_volume",)
    name = ALLOCATION_DEPTH

    def __init__(self, volume: ReportsDepth) -> None:
        self._volume = volume

    def extents(
        self, offset_bytes: int, length_bytes: int, extents_max: int, done: ExtentsCompletion
    ) -> None:
        """Ask the volume."""
        self._volume.allocation_depth(offset_bytes, length_bytes, extents_max, done)


def names(export: Export) -> list[str]:
    """Every context of an export."""
    own = [BASE_ALLOCATION]
    if isinstance(export.volume, ReportsDepth):
        own.append(ALLOCATION_DEPTH)
    return [*own, *export.context_names()]


def find(export: Export, name: str) -> MetaContext | None:
    """The context of exactly that name."""
    volume = export.volume
    if name == BASE_ALLOCATION:
        return BaseAllocation(volume)
    if name == ALLOCATION_DEPTH:
        return AllocationDepth(volume) if isinstance(volume, ReportsDepth) else None
    return export.context(name)


def listed(export: Export, queries: Iterable[str]) -> list[str]:
    """Names that NBD_OPT_LIST_META_CONTEXT answers: all of them without a query; with an empty leaf
    name, those of the namespace. Raises OptionRefused.
    """
    asked = list(queries)
    known = names(export)
    if not asked:
        return known
    found: dict[str, None] = {}
    for query in asked:
        if _leaf(query):
            if find(export, query) is not None:
                found[query] = None
        else:
            found.update((name, None) for name in known if name.startswith(query))
    return list(found)


def selected(export: Export, queries: Iterable[str]) -> list[MetaContext]:
    """Contexts that NBD_OPT_SET_META_CONTEXT selects, each once: an empty leaf name selects
    nothing. Raises OptionRefused.
    """
    found: dict[str, MetaContext] = {}
    for query in queries:
        context = find(export, query) if _leaf(query) else None
        if context is not None:
            found[context.name] = context
    return list(found.values())


def _leaf(query: str) -> str:
    namespace, colon, leaf = query.partition(":")
    if not (namespace and colon):
        raise OptionRefused(wire.REP_ERR_INVALID, "a query begins with a namespace and a colon")
    return leaf
