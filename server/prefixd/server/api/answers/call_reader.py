"""Reads one call, character by character: its name first, then the text of its arguments."""

import json
from enum import Enum, auto

from prefixd.server.api.answers.json_scanner import JsonScanner, MalformedJson

_ARGUMENTS = ("arguments", "parameters")
_SPACE = " \t\r\n"
MAX_NAME = 256


class ArgumentsReader:
    """The arguments of a call whose name is known: a JSON object."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.has_started = False
        self.done = False
        self._scanner = JsonScanner()
        self._new = ""

    def push(self, character: str) -> None:
        """Add a character. Raises MalformedJson."""
        if not self.has_started:
            if character in _SPACE:
                return
            if character != "{":
                raise MalformedJson("arguments that are no object")
            self.has_started = True
        self._scanner.push(character)
        self._new += character
        self.done = self._scanner.done

    def take(self) -> str:
        """The text of the arguments since the last time."""
        new, self._new = self._new, ""
        return new


class _State(Enum):
    BEGIN = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    COMMA = auto()


class CallReader:
    """A call as an object: ``{"name": …, "arguments": {…}}``, in any order, also ``parameters``;
    other keys are ignored. ``has_started``: the name is known, and arguments have begun or the
    object has ended. Arguments that come before the name are held until it comes."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.has_started = False
        self.done = False
        self._state = _State.BEGIN
        self._scanner = JsonScanner()
        self._key = ""
        self._value = ""
        self._is_streamed = False
        self._arguments: str | None = None
        self._new = ""

    def push(self, character: str) -> None:
        """Add a character. Raises MalformedJson."""
        match self._state:
            case _State.VALUE:
                self._in_value(character)
            case _State.KEY:
                self._in_key(character)
            case _ if character in _SPACE:
                pass
            case _State.BEGIN if character == "{":
                self._begin_key()
            case _State.COLON if character == ":":
                self._state, self._scanner, self._value = _State.VALUE, JsonScanner(), ""
            case _State.COMMA if character == ",":
                self._begin_key()
            case _State.COMMA if character == "}":
                self._end()
            case _:
                raise MalformedJson(f"an unexpected {character!a}")

    def take(self) -> str:
        """The text of the arguments since the last time."""
        new, self._new = self._new, ""
        return new

    def _begin_key(self) -> None:
        self._state, self._scanner, self._key = _State.KEY, JsonScanner(), ""

    def _in_key(self, character: str) -> None:
        if not self._key:
            if character in _SPACE:
                return
            if character != '"':
                raise MalformedJson("a key that is no string")
        self._scanner.push(character)
        self._key += character
        if self._scanner.done:
            self._key, self._state = json.loads(self._key), _State.COLON

    def _in_value(self, character: str) -> None:
        if not self._value and character not in _SPACE:
            self._begin_value(character)
        belongs = self._scanner.push(character)
        if belongs and (self._value or character not in _SPACE):
            self._value += character
            if self._is_streamed:
                self._new += character
        if self._scanner.done:
            self._end_value()
            if not belongs:
                self.push(character)

    def _begin_value(self, character: str) -> None:
        if self._key not in _ARGUMENTS:
            return
        if self._arguments is not None:
            raise MalformedJson("arguments that come twice")
        if self.name is not None and character == "{":
            self._is_streamed = self.has_started = True

    def _end_value(self) -> None:
        self._state = _State.COMMA
        if self._is_streamed:
            self._is_streamed, self._arguments = False, ""
        elif self._key == "name" and self.name is None:
            name = json.loads(self._value)
            if not isinstance(name, str) or not is_name(name):
                raise MalformedJson("a name that is not a text")
            self.name = name
        elif self._key in _ARGUMENTS:
            self._arguments = _object_text(self._value)

    def _end(self) -> None:
        if self.name is None:
            raise MalformedJson("a call without a name")
        if not self.has_started:
            self._new += "{}" if self._arguments is None else self._arguments
        self.has_started = self.done = True


def is_name(text: str) -> bool:
    """Whether a function may be called so. Half of a surrogate pair is not printable."""
    return 0 < len(text) <= MAX_NAME and text.isprintable()


def _is_encodable(text: str) -> bool:
    """Whether no half of a surrogate pair is in a text."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _object_text(text: str) -> str:
    """The text of an object, which may be written as a string. Raises MalformedJson."""
    value = json.loads(text)
    if isinstance(value, str):
        text = value
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict) or not _is_encodable(text):
            raise MalformedJson("arguments that are no object")
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise MalformedJson("arguments that are no object")
    return text
