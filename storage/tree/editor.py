"""Changing a buffer tree. One rule: before a node changes for the first time in an epoch it gets a
new VBN (so the location that the last consistency point knows is never overwritten), and so does
every node above it, from the root down. Because the VBN is known at once, a parent's field always
names its child's newest location; only the CRC32C in it is filled in by the consistency point.

That happens in two parts within one step. The *plan* finds the nodes on the way and looks whether
everything is at hand: it may load, and may fail, and changes nothing. Carrying it out changes
everything, cannot load, and cannot fail.

Lazy sharing (design section 4): a node whose block another tree also refers to gives its children
one more reference each when it is copied, and takes one from the shared block. A block born after
``shared_cp`` cannot be shared, and costs no look-up.
"""

from storage.fields import set_field
from storage.layout import FIELDS_SHIFT, HOLE, ZERO_POINTER
from storage.tree.attempt import when_possible
from storage.tree.buffer_tree import BufferTree
from storage.tree.interfaces import Epoch, Owner, PoolState, ShareCounts, Space
from storage.tree.node import CLEAN, ZEROS, Node, filled_buffer


class Plan:
    """What has to be done in an epoch before some nodes of one tree may be changed.

    ``steps`` are the nodes that get a new location, from the root down, by level and index; HOLES
    or ZEROS stand for one that has to be made. ``grows``: the tree takes more blocks than it gives
    back, because nodes are made, or shared ones are copied.
    """

    __slots__ = ("epoch", "grows", "steps")

    def __init__(self, epoch: Epoch) -> None:
        self.epoch = epoch
        self.grows = False
        self.steps: dict[tuple[int, int], Node] = {}


class TreeEditor:
    """Changes ``tree``. ``owner`` is None for a metafile, whose root the superblock names."""

    __slots__ = ("_nodes", "_owner", "_shares", "_space", "_state", "tree")

    def __init__(
        self,
        state: PoolState,
        tree: BufferTree,
        space: Space,
        shares: ShareCounts,
        owner: Owner | None,
    ) -> None:
        self._state = state
        self._nodes = tree.nodes
        self._space = space
        self._shares = shares
        self._owner = owner
        self.tree = tree

    def writable(self, index: int, epoch: Epoch, level: int = 1) -> Node | None:
        """The node, made (from the field above) if it did not exist, and free to be changed in
        ``epoch``. None: nothing was changed, and ``state.missing`` says what to wait for. Raises
        BlockDamaged.
        """
        node = self._nodes[level].get(index)
        if node is not None and node.epoch == epoch.number:
            node.referenced = True
            return node
        plan = Plan(epoch)
        if not self.plan(plan, index, level) or not self.at_hand(plan):
            return None
        self.carry_out(plan)
        return self._nodes[level][index]

    async def make_writable(self, index: int, level: int = 1) -> Node:
        """``writable`` in the current epoch, waiting where it must; the caller changes the node in
        the same step.

        Raises BlockDamaged, DeviceFailed, PoolFull.
        """
        state = self._state
        return await when_possible(state, lambda: self.writable(index, state.epoch, level))

    # --- Planning ---------------------------------------------------------------------------------

    def plan(self, plan: Plan, index: int, level: int = 1) -> bool:
        """Add to the plan what makes this node writable. False: something has to be waited for.
        Raises BlockDamaged.
        """
        tree, number = self.tree, plan.epoch.number
        parent: Node | None = None
        for at in range(tree.levels, level - 1, -1):
            here = index >> FIELDS_SHIFT * (at - level)
            node = plan.steps.get((at, here))
            if node is None:
                if parent is None:
                    node = tree.enter_root()
                else:
                    node = tree.enter(parent, here) if parent.tree is not None else parent
                if node is None or (
                    node.epoch != number and not self._plan_step(plan, node, at, here)
                ):
                    return False
            parent = node
        return True

    def _plan_step(self, plan: Plan, node: Node, level: int, index: int) -> bool:
        """One node that needs a new location. False: its share count has to be waited for."""
        if node.tree is None:
            plan.grows = True
        elif node.birth <= self.tree.shared_cp:
            count = self._shares.try_count(node.vbn)
            if count is None:
                return False
            plan.grows |= count > 0
        plan.steps[level, index] = node
        return True

    def at_hand(self, plan: Plan) -> bool:
        """Whether there are VBNs for the whole plan, and for the table entry that changes with it.
        False: they have to be waited for.
        """
        blocks = len(plan.steps)
        if not blocks:
            return True
        space, owner = self._space, self._owner
        # What is left of a deleted image: taking that apart must go on where clients have to wait.
        grows = plan.grows and (owner is None or not owner.being_reclaimed)
        return space.nodes_at_hand(
            blocks, space.floor(plan.epoch, grows), self._needs_entry(plan.epoch)
        )

    def _needs_entry(self, epoch: Epoch) -> bool:
        """Whether the first change in an epoch makes a table entry be written."""
        return self._owner is not None and not self._owner.is_promised(epoch)

    # --- Carrying out -----------------------------------------------------------------------------

    def carry_out(self, plan: Plan) -> None:
        """Give every node of the plan its new location. Everything it needs is at hand, so nothing
        here loads, waits or fails.
        """
        if not plan.steps:
            return
        if self._owner is not None:
            self._owner.touch()  # before the change: a frozen table entry must keep the old root
        levels = self.tree.levels
        for (level, index), node in plan.steps.items():
            parent = self._nodes[level + 1][index >> FIELDS_SHIFT] if level < levels else None
            if node.tree is None:
                self._create(node, level, index, plan.epoch, parent)
            else:
                self._make_dirty(node, parent, plan.epoch)

    def _create(
        self, filler: Node, level: int, index: int, epoch: Epoch, parent: Node | None
    ) -> None:
        """A pointer block where a hole or a zero pointer was: its fields all say what the one above
        them said.
        """
        fill = ZERO_POINTER if filler is ZEROS and level else HOLE
        self._point_at(self._new_node(level, index, filled_buffer(fill), epoch), parent)

    def _new_node(self, level: int, index: int, buf: bytearray, epoch: Epoch) -> Node:
        vbn, number = self._space.take_node(epoch.ledger), epoch.number
        node = Node(self.tree, level, index, buf, vbn, number)
        node.epoch = number
        self._nodes[level][index] = node
        epoch.dirty.nodes[node] = None
        self._state.cache.add(node)
        return node

    def _make_dirty(self, node: Node, parent: Node | None, epoch: Epoch) -> None:
        """Give ``node`` a new location in ``epoch``, and give up the old one."""
        assert self._nodes[node.level].get(node.index) is node, (
            "a node that is not listed would be changed for nothing"
        )
        # Not as planned: a parent that was copied just now has given it one more reference.
        shared = node.birth <= self.tree.shared_cp and self._shares.try_count(node.vbn)
        assert shared is not None, "the plan has looked at it"
        if shared:
            self._unshare(node, epoch)
        else:
            epoch.ledger.freed.append(node.vbn)
        if node.epoch != CLEAN:
            frozen, old_vbn, old_birth = self._state.frozen, node.vbn, node.birth
            assert frozen is not None and node.epoch == frozen.number, "what is dirty was planned"
            frozen.dirty.saved[node] = (node.replace_buffer(), old_vbn, old_birth)
        node.vbn = self._space.take_node(epoch.ledger)
        node.birth = node.epoch = epoch.number
        node.referenced = True
        epoch.dirty.nodes[node] = None
        self._point_at(node, parent)

    def _unshare(self, node: Node, epoch: Epoch) -> None:
        """The shared block loses this tree's reference; its children gain one each,
        from the copy.
        """
        ledger = epoch.ledger
        ledger.count_pointer(node.vbn, -1)
        vbns = node.vbns()
        children = vbns[vbns > ZERO_POINTER]
        if node.level == 1:
            ledger.added.append(children)
        else:
            for child in children.tolist():
                ledger.count_pointer(child, 1)

    def _point_at(self, node: Node, parent: Node | None) -> None:
        """Enter a node's new location in the field above it; the consistency point will add the
        CRC32C.
        """
        if parent is None:
            tree = self.tree
            tree.root_vbn, tree.root_crc, tree.root_birth = node.vbn, 0, node.birth
        else:
            set_field(parent.q, node.index, (node.vbn, 0, node.birth))

    # --- Growing ----------------------------------------------------------------------------------

    def grow(self, levels: int, epoch: Epoch) -> bool | None:
        """Put new root blocks on top until the tree has ``levels`` levels. None: nothing was
        changed, it has to be waited for.
        """
        tree = self.tree
        more = levels - tree.levels
        if more <= 0:
            return True
        if tree.root_vbn != HOLE and not self._space.nodes_at_hand(
            more, self._space.floor(epoch, grows=True), self._needs_entry(epoch)
        ):
            return None
        if self._owner is not None:
            self._owner.touch()
        if tree.root_vbn == HOLE:
            tree.levels = levels
        for level in range(tree.levels + 1, levels + 1):
            below = (tree.root_vbn, tree.root_crc, tree.root_birth)
            root = self._new_node(level, 0, filled_buffer(HOLE), epoch)
            set_field(root.q, 0, below)
            tree.levels = level
            self._point_at(root, None)
        return True

    # --- Giving up --------------------------------------------------------------------------------

    def forget(self, node: Node, epoch: Epoch) -> None:
        """Take out of memory a node whose block this tree no longer refers to (the caller settled
        the reference).
        """
        if self._nodes[node.level].get(node.index) is node:
            del self._nodes[node.level][node.index]
        if node.epoch == epoch.number:
            epoch.dirty.nodes.pop(node, None)

    def forget_below(self, node: Node, epoch: Epoch) -> None:
        """Take out of memory what lies below a node that is given up as one: it must not be found
        any more.
        """
        for level in range(node.level - 1, 0, -1):
            shift = FIELDS_SHIFT * (node.level - level)
            nodes = self._nodes[level]
            for index in [index for index in nodes if index >> shift == node.index]:
                self.forget(nodes[index], epoch)

    def forget_all(self, epoch: Epoch) -> None:
        """Make this an empty tree, without a node in memory (the caller settled the references)."""
        if self._owner is not None:
            self._owner.touch()
        self.tree.root_vbn, self.tree.root_crc, self.tree.root_birth = HOLE, 0, 0
        for nodes in self._nodes:
            for node in list(nodes.values()):
                self.forget(node, epoch)
