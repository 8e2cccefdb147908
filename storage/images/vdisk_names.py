"""The names of vdisks. A vdisk's name becomes part of an iSCSI name, and those have no case: no two
new vdisks get names that differ in case alone. Pools of earlier versions may have such names, and
keep them.
"""


class VdiskNames(dict[str, int]):
    """Numbers of vdisks by name. ``with_case`` maps the lower case of names that have upper-case
    letters to those names. Changed by ``add`` and ``remove`` only.
    """

    __slots__ = ("with_case",)

    def __init__(self) -> None:
        super().__init__()
        self.with_case: dict[str, set[str]] = {}

    def add(self, name: str, number: int) -> None:
        """A vdisk has this name now."""
        self[name] = number
        if (folded := name.lower()) != name:
            self.with_case.setdefault(folded, set()).add(name)

    def remove(self, name: str) -> None:
        """It has it no longer."""
        del self[name]
        if (folded := name.lower()) != name:
            self.with_case[folded].discard(name)
            if not self.with_case[folded]:
                del self.with_case[folded]

    def alike(self, name: str) -> list[str]:
        """Those that are this one in any case, sorted."""
        folded = name.lower()
        return sorted([*self.with_case.get(folded, ()), *([folded] if folded in self else [])])
