"""Tool calls in an answer, as the family writes them.

<tool_call>
<function=NAME>
<parameter=KEY>value</parameter>
</function>
</tool_call>

Blanks between tags mean nothing; a value is all that stands between its two tags.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimo_jax.tokenizer import overlap
from serve.text.tool_arguments import typed_value

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"


@dataclass(frozen=True)
class ToolCall:
    """One call of a function that was offered."""

    name: str
    arguments: Mapping[str, Any]

    @property
    def arguments_json(self) -> str:
        """The arguments as JSON text."""
        return json.dumps(self.arguments, ensure_ascii=False)


class ToolCallParser:
    """Takes the calls out of a streamed text, wherever its pieces were cut.

    A call comes when it is complete. What begins like one and is none (a tag that does not belong there, a function
    that was not offered, a parameter given twice, the end of the text) is text, to the letter. Inside a value only its
    closing tag has a meaning.

    Args:
        parameters: For each function that was offered, the JSON schema of its parameters.
    """

    def __init__(self, parameters: Mapping[str, Mapping[str, Any]]) -> None:
        self._parameters = parameters
        self._held = ""
        self._call: _OpenCall | None = None
        """Reads the call that `_held` begins with, if it does."""

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Take more text; gives the text that is certain to be no call, and the calls that are complete now."""
        self._held += text
        plain: list[str] = []
        calls: list[ToolCall] = []
        while self._held:
            if self._call is None:
                start = self._held.find(OPEN)
                certain = start if start >= 0 else len(self._held) - overlap(self._held, OPEN)
                plain.append(self._held[:certain])
                self._held = self._held[certain:]
                if start < 0:
                    break
                self._call = _OpenCall(self._parameters)
            try:
                call = self._call.read(self._held)
            except _Malformed:
                plain.append(OPEN)
                self._held, self._call = self._held[len(OPEN) :], None
                continue
            if call is None:
                break
            calls.append(call)
            self._held, self._call = self._held[self._call.end :], None
        return "".join(plain), calls

    def flush(self) -> str:
        """End the text: gives what was held back, which is no call after all."""
        rest, self._held, self._call = self._held, "", None
        return rest


class _Malformed(Exception):
    """This is no call."""


class _OpenCall:
    """Reads one call from a text that grows at its end; every character is looked at once."""

    def __init__(self, parameters: Mapping[str, Mapping[str, Any]]) -> None:
        self._parameters = parameters
        self.end = len(OPEN)
        """All before it has been read."""
        self._looked = self.end
        """Up to here the mark that is sought does not begin."""
        self._name, self._key = "", ""
        self._arguments: dict[str, Any] = {}
        self._step = self._before_function

    def read(self, text: str) -> ToolCall | None:
        """Go on in `text`, which begins with what it was before; None if more is needed. Raises `_Malformed`."""
        while self._step(text):
            if self._step == self._done:
                return ToolCall(self._name, self._arguments)
        return None

    # Each step returns whether it has read what it waited for, and then names the next.

    def _before_function(self, text: str) -> bool:
        if not self._tag(text, FUNCTION):
            return False
        self._step = self._in_name
        return True

    def _in_name(self, text: str) -> bool:
        if (name := self._until(text, ">")) is None:
            return False
        if name not in self._parameters:
            raise _Malformed
        self._name, self._step = name, self._before_parameter
        return True

    def _before_parameter(self, text: str) -> bool:
        if not (tag := self._tag(text, PARAMETER, FUNCTION_END)):
            return False
        self._step = self._in_key if tag == PARAMETER else self._before_close
        return True

    def _in_key(self, text: str) -> bool:
        if (key := self._until(text, ">")) is None:
            return False
        if not key or key in self._arguments:
            raise _Malformed
        self._key, self._step = key, self._in_value
        return True

    def _in_value(self, text: str) -> bool:
        if (value := self._until(text, PARAMETER_END)) is None:
            return False
        self._arguments[self._key] = typed_value(value, self._key, self._parameters[self._name])
        self._step = self._before_parameter
        return True

    def _before_close(self, text: str) -> bool:
        if not self._tag(text, CLOSE):
            return False
        self._step = self._done
        return True

    def _done(self, text: str) -> bool:
        return True

    def _tag(self, text: str, *tags: str) -> str | None:
        """The tag that comes next, after blanks; None if it is not all there."""
        while self.end < len(text) and text[self.end].isspace():
            self.end += 1
        for tag in tags:
            if text.startswith(tag, self.end):
                self.end += len(tag)
                self._looked = self.end
                return tag
        rest = text[self.end : self.end + max(map(len, tags))]
        if any(tag.startswith(rest) for tag in tags):
            return None
        raise _Malformed

    def _until(self, text: str, mark: str) -> str | None:
        """What stands before the next mark; None if there is none yet."""
        found = text.find(mark, self._looked)
        if found < 0:
            self._looked = max(self._looked, len(text) - len(mark) + 1)
            return None
        piece = text[self.end : found]
        self.end = self._looked = found + len(mark)
        return piece
