"""Checks JSON character by character, and says where a value ends."""

import re
from enum import Enum, auto

_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORDS = {"t": "true", "f": "false", "n": "null"}
_SPACE = " \t\r\n"
MAX_DEPTH = 200


class MalformedJson(ValueError):
    """The text is malformed."""


class _Expects(Enum):
    VALUE = auto()
    VALUE_OR_END = auto()
    KEY = auto()
    KEY_OR_END = auto()
    COLON = auto()
    COMMA_OR_END = auto()
    STRING = auto()
    ESCAPE = auto()
    HEX = auto()
    WORD = auto()
    NUMBER = auto()


class JsonScanner:
    """Scans one value. ``done`` is whether it has ended."""

    def __init__(self) -> None:
        self.done = False
        self._expects = _Expects.VALUE
        self._open: list[str] = []
        self._is_key = False
        self._token = ""  # of a number, or what is left of a word or of an escape

    def push(self, character: str) -> bool:
        """Add a character. Returns whether it belongs to the value: the one that ends a number
        does not. Raises MalformedJson."""
        expects = self._expects
        if expects is _Expects.STRING:
            self._in_string(character)
        elif expects is _Expects.ESCAPE:
            self._escape(character)
        elif expects is _Expects.HEX:
            self._hex(character)
        elif expects is _Expects.WORD:
            self._word(character)
        elif expects is _Expects.NUMBER:
            return self._number(character)
        elif character not in _SPACE:
            self._structure(character)
        return True

    def _in_string(self, character: str) -> None:
        if character == '"':
            if self._is_key:
                self._is_key, self._expects = False, _Expects.COLON
            else:
                self._end_value()
        elif character == "\\":
            self._expects = _Expects.ESCAPE
        elif character < " ":
            raise MalformedJson("a control character in a string")

    def _escape(self, character: str) -> None:
        if character == "u":
            self._token, self._expects = "", _Expects.HEX
        elif character in '"\\/bfnrt':
            self._expects = _Expects.STRING
        else:
            raise MalformedJson("an unknown escape")

    def _hex(self, character: str) -> None:
        if character not in "0123456789abcdefABCDEF":
            raise MalformedJson("an unknown escape")
        self._token += character
        if len(self._token) == 4:
            self._expects = _Expects.STRING

    def _word(self, character: str) -> None:
        if character != self._token[0]:
            raise MalformedJson("an unknown word")
        self._token = self._token[1:]
        if not self._token:
            self._end_value()

    def _number(self, character: str) -> bool:
        if character in "+-.eE0123456789":
            self._token += character
            if len(self._token) > 400:
                raise MalformedJson("a number that is too long")
            return True
        if not _NUMBER.fullmatch(self._token):
            raise MalformedJson("a number that is none")
        self._end_value()
        return False if self.done else self.push(character)

    def _structure(self, character: str) -> None:
        expects = self._expects
        if character == '"' and expects in _VALUES | _KEYS:
            self._is_key = expects in _KEYS
            self._expects = _Expects.STRING
        elif expects in _VALUES and self._begin_value(character):
            pass
        elif character == ":" and expects is _Expects.COLON:
            self._expects = _Expects.VALUE
        elif character == "," and expects is _Expects.COMMA_OR_END:
            self._expects = _Expects.KEY if self._open[-1] == "}" else _Expects.VALUE
        elif self._open and character == self._open[-1] and expects in _ENDS:
            self._open.pop()
            self._end_value()
        else:
            raise MalformedJson(f"an unexpected {character!a}")

    def _begin_value(self, character: str) -> bool:
        if character in "{[":
            if len(self._open) >= MAX_DEPTH:
                raise MalformedJson("JSON that is nested too deep")
            self._open.append("}" if character == "{" else "]")
            is_object = character == "{"
            self._expects = _Expects.KEY_OR_END if is_object else _Expects.VALUE_OR_END
        elif character in _WORDS:
            self._token, self._expects = _WORDS[character][1:], _Expects.WORD
        elif character in "-0123456789":
            self._token, self._expects = character, _Expects.NUMBER
        else:
            return False
        return True

    def _end_value(self) -> None:
        self.done = not self._open
        self._expects = _Expects.COMMA_OR_END


_VALUES = {_Expects.VALUE, _Expects.VALUE_OR_END}
_KEYS = {_Expects.KEY, _Expects.KEY_OR_END}
_ENDS = {_Expects.VALUE_OR_END, _Expects.KEY_OR_END, _Expects.COMMA_OR_END}
