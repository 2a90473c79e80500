"""Pickles of ``torch.save`` as plain data. Nothing in them is ever called or imported.

This is not ``pickle.Unpickler`` with a filter: each opcode is interpreted here, and a name such as
``torch._utils._rebuild_tensor_v2`` is a key of the fixed table in ``symbols``. Any other name and
any other opcode ends the reading. No function here recurses over the data, so a deep nest cannot
exhaust the stack.
"""

import io
import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prefixd.client.convert.symbols import (
    Builder,
    ParameterList,
    Storage,
    pairs_of,
    parameters_of,
    shown,
    storage_of,
    symbol,
)
from prefixd.client.errors import FormatError

MAX_PICKLE_BYTES = 1024 * 1024
"""A checkpoint of a thousand tensors has a pickle of 250 KiB: the values are stored outside."""

MAX_STACK = 8192
"""``pickle`` writes a container in batches of 1000 items."""

MAX_MARKS = 64
"""Marks open at once: six in the deepest checkpoint read here."""

MAX_COPIED = 128 * 1024
"""Values that calls may copy in all: one list in a pickle can be the argument of 100,000 calls."""


@dataclass(frozen=True, slots=True)
class Pickled:
    """``value`` is made of strings, numbers, lists, tuples, dicts, ``StoredTensor`` and
    ``ParameterList``; ``storages`` are those its tensors are stored in, by key."""

    value: object
    storages: dict[str, Storage]


def read_pickle(stream: io.BytesIO) -> Pickled:
    """The pickle at the stream's position, which is then behind it.

    Raises FormatError for a pickle of anything else. The caller bounds the length of the stream.
    """
    machine = _Machine()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in names, which pickletools decodes
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "STOP":
                    return Pickled(machine.pop(), machine.storages)
                machine.run(opcode.name, argument)
        # From genops: an unknown or truncated opcode, a number or a text that does not parse.
        except (ValueError, AssertionError, OverflowError) as error:
            raise FormatError(f"damaged pickle: {str(error)[:80]!a}") from None
    raise FormatError("damaged pickle: it has no end")


class _Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._copied = 0

    def run(self, name: str, argument: Any) -> None:
        """Interpret one opcode."""
        if name in _PUSH_ARGUMENT:
            self.push(argument)
        elif name in _PUSH_NEW:
            self.push(_PUSH_NEW[name]())
        elif name in _STEPS:
            _STEPS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise FormatError(f"expected a pickle of tensors, found the opcode {name}: refused")

    def push(self, value: object) -> None:
        """Put a value on the stack."""
        if len(self._stack) >= MAX_STACK:
            raise FormatError(f"expected at most {MAX_STACK} values on the stack of a pickle")
        self._stack.append(value)

    def pop(self) -> Any:
        """Take the value on top of the stack."""
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise FormatError("damaged pickle: an opcode has no operand")
        return self._stack.pop()

    def top(self) -> Any:
        """The value on top of the stack, which stays."""
        value = self.pop()
        self._stack.append(value)
        return value

    def mark(self, _: Any) -> None:
        """MARK: remember the height of the stack."""
        if len(self._marks) >= MAX_MARKS:
            raise FormatError(f"expected at most {MAX_MARKS} nested values in a pickle")
        self._marks.append(len(self._stack))

    def pop_to_mark(self, _: Any = None) -> list[Any]:
        """Take all values above the last mark, and the mark."""
        if not self._marks:
            raise FormatError("damaged pickle: an opcode has no mark")
        begin = self._marks.pop()
        items = self._stack[begin:]
        del self._stack[begin:]
        return items

    def push_tuple(self, count: int) -> None:
        """TUPLE1 to TUPLE3."""
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def append(self, items: list[Any]) -> None:
        """APPEND and APPENDS: to the list on top of the stack."""
        target = self.top()
        if type(target) is not list:
            raise FormatError(f"damaged pickle: expected a list, found {shown(target)}")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        """SETITEM and SETITEMS: keys and values, in turn, into the dict on top of the stack."""
        target = self.top()
        if type(target) is not dict:
            raise FormatError(f"damaged pickle: expected a dict, found {shown(target)}")
        target.update(pairs_of(items))

    def remember(self, index: int | None) -> None:
        """PUT, MEMOIZE: store the top of the stack under a number, by default the next one."""
        self._memo[len(self._memo) if index is None else index] = self.top()

    def recall(self, index: int) -> None:
        """GET: push the value stored under a number."""
        if index not in self._memo:
            raise FormatError("damaged pickle: it refers to a value that it does not have")
        self.push(self._memo[index])

    def named(self, argument: str) -> None:
        """GLOBAL: module and name in one argument."""
        module, _, name = argument.partition(" ")
        self.push(symbol(module, name))

    def stack_named(self, _: Any) -> None:
        """STACK_GLOBAL: module and name on the stack."""
        name, module = self.pop(), self.pop()
        self.push(symbol(module, name))

    def reduce(self, _: Any) -> None:
        """REDUCE: data from one of the builders."""
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Builder) or type(arguments) is not tuple:
            raise FormatError(f"expected a pickle of tensors, found a call of {shown(function)}")
        self._count_copied(arguments)
        for argument in arguments:
            self._count_copied(argument)
        self.push(function.build(arguments))

    def new_object(self, _: Any) -> None:
        """NEWOBJ: a ParameterList, which is filled by ``set_state``."""
        arguments, kind = self.pop(), self.pop()
        if kind is not ParameterList or type(arguments) is not tuple or arguments:
            raise FormatError(f"expected a pickle of tensors, found an object of {shown(kind)}")
        self.push(ParameterList())

    def set_state(self, _: Any) -> None:
        """BUILD: the tensors of a ParameterList. A dict's own state is the ``_metadata`` of a state
        dict, which is not needed."""
        state, target = self.pop(), self.top()
        if isinstance(target, ParameterList) and type(state) is dict:
            self._count_copied(state.get("_parameters"))
            target.extend(parameters_of(state))
        elif type(target) is not dict:
            raise FormatError(f"expected a pickle of tensors, found the state of {shown(target)}")

    def storage(self, _: Any) -> None:
        """BINPERSID: a storage; one key stands for one storage. Before PyTorch 1.6 also the class
        of a module, with its source text, which is left out."""
        identity = self.pop()
        if type(identity) is tuple and identity[:1] == ("module",):
            if len(identity) != 4 or identity[1] is not ParameterList:
                raise FormatError("expected a pickle of tensors, found another module: refused")
            self.push(ParameterList)
            return
        storage = storage_of(identity)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise FormatError(f"damaged pickle: the storage {shown(storage.key)} has two types")
        self.push(storage)

    def _count_copied(self, values: object) -> None:
        if isinstance(values, list | tuple | dict):
            self._copied += len(values)
        if self._copied > MAX_COPIED:
            raise FormatError(f"expected at most {MAX_COPIED} values in the calls of a pickle")


_PUSH_ARGUMENT = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    )
)

_PUSH_NEW: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}

_STEPS: dict[str, Callable[[_Machine, Any], object]] = {
    "MARK": _Machine.mark,
    "POP": lambda machine, _: machine.pop(),
    "POP_MARK": _Machine.pop_to_mark,
    "DUP": lambda machine, _: machine.push(machine.top()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.push_tuple(1),
    "TUPLE2": lambda machine, _: machine.push_tuple(2),
    "TUPLE3": lambda machine, _: machine.push_tuple(3),
    "LIST": lambda machine, _: machine.push(machine.pop_to_mark()),
    "DICT": lambda machine, _: machine.push(dict(pairs_of(machine.pop_to_mark()))),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "ADDITEMS": _Machine.pop_to_mark,  # what a set holds is never needed
    "PUT": _Machine.remember,
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": _Machine.remember,
    "GET": _Machine.recall,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": _Machine.stack_named,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new_object,
    "BUILD": _Machine.set_state,
    "BINPERSID": _Machine.storage,
}
