"""Prefixes that are loading or in the pool, and the order of use of those that are compiled."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

from prefixd.server.engine.prefix_source import StagedPrefix
from prefixd.server.engine.request import PrefixKey
from prefixd.server.engine.step import GatedRows


class Stage(Enum):
    """How far a prefix has come; ``residency`` has the table of what holds at each."""

    FETCHING = auto()
    STAGED = auto()
    COMPILING = auto()
    RESIDENT = auto()
    LEAVING = auto()


COMPILED = frozenset({Stage.RESIDENT, Stage.LEAVING})


@dataclass(eq=False, slots=True)
class Entry:
    """One prefix that is loading or in the pool. Only Residency changes the first group of fields.

    ``side_blocks`` hold its state, in a model that has one: after ``num_compiled`` tokens.
    ``num_compiled`` counts the tokens of steps in flight too. ``forced``: it was placed by force,
    for a sequence that had waited too long. ``last_use`` orders compiled entries by when a sequence
    last started or stopped under them. ``cap``: virtual tokens its tenant may have in the pool, as
    of the last request. ``requested_at``: the last step that requested it. ``gated_from`` is that
    of its payload.
    """

    key: PrefixKey
    num_tokens: int
    gated_from: int | None = None
    stage: Stage = Stage.FETCHING
    payload: StagedPrefix | None = None
    blocks: list[int] = field(default_factory=list)
    side_blocks: list[int] = field(default_factory=list)
    num_compiled: int = 0
    num_users: int = 0
    num_uses: int = 0
    last_use: int = 0
    forced: bool = False

    cap: int | None = None
    requested_at: int = 0

    @property
    def num_blocks(self) -> int:
        """Blocks that it holds, side blocks included."""
        return len(self.blocks) + len(self.side_blocks)

    @property
    def is_compiled(self) -> bool:
        """Whether all its KV is in the pool."""
        return self.stage in COMPILED

    @property
    def idle(self) -> bool:
        """Compiled, and no running sequence under it."""
        return self.num_users == 0 and self.stage in COMPILED

    def head(self, block_size: int) -> list[int]:
        """The full blocks, with which the block tables under it begin; none where it is gated."""
        return [] if self.is_gated else self.blocks[: self.num_tokens // block_size]

    @property
    def is_gated(self) -> bool:
        """Whether it takes no positions of its sequences."""
        return self.gated_from is not None

    @property
    def gated(self) -> GatedRows | None:
        """What the tokens under a gated prefix attend to, in addition to their positions."""
        if self.gated_from is None:
            return None
        return GatedRows(tuple(self.blocks), self.num_tokens, self.gated_from)

    @property
    def tier(self) -> str:
        """The stage in the words of the API."""
        return "resident" if self.stage in COMPILED else self.stage.name.lower()


_Entries = dict[PrefixKey, Entry]


class UseOrder:
    """Compiled entries that are not pinned, least recently used first: idle and busy ones apart.

    A step looks at the first of them and not at all: its cost must not grow with what is resident.
    """

    def __init__(self) -> None:
        self._idle: _Entries = {}
        self._idle_by_tenant: dict[str, _Entries] = {}
        self._busy: _Entries = {}
        self._num_uses = 0

    def idle(self, tenant: str | None = None) -> Iterator[Entry]:
        """Entries without running sequences, of one tenant or of all. None may be used or removed
        before the iteration has ended."""
        entries = self._idle if tenant is None else self._idle_by_tenant.get(tenant, {})
        return iter(entries.values())

    def busy(self, tenant: str | None = None) -> list[Entry]:
        """Entries with running sequences, of one tenant or of all."""
        return [e for e in self._busy.values() if tenant is None or e.key.tenant == tenant]

    def use(self, entry: Entry, *, pinned: bool) -> None:
        """Make ``entry`` the most recently used: it was compiled, or a sequence started or stopped
        under it."""
        self._num_uses += 1
        entry.last_use = self._num_uses
        self.remove(entry)
        if not pinned:
            self._append(entry)

    def remove(self, entry: Entry) -> None:
        """Forget ``entry``, if it is here."""
        self._busy.pop(entry.key, None)
        if self._idle.pop(entry.key, None) is not None:
            of_tenant = self._idle_by_tenant[entry.key.tenant]
            del of_tenant[entry.key]
            if not of_tenant:
                del self._idle_by_tenant[entry.key.tenant]

    def rebuild(self, entries: Iterable[Entry], *, pinned: Collection[PrefixKey]) -> None:
        """Start again from ``entries``, all that are compiled: the pins have changed."""
        self._idle, self._idle_by_tenant, self._busy = {}, {}, {}
        for entry in sorted(entries, key=lambda entry: entry.last_use):
            if entry.key not in pinned:
                self._append(entry)

    def _append(self, entry: Entry) -> None:
        if entry.num_users:
            self._busy[entry.key] = entry
        else:
            self._idle[entry.key] = entry
            self._idle_by_tenant.setdefault(entry.key.tenant, {})[entry.key] = entry
