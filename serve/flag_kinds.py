"""What a flag of the server can be: what each kind does when a person gives it, and how its value is read."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum
from typing import Any, NoReturn


class FlagError(ValueError):
    """A command line that cannot be followed; the message is for the person."""


class Treatment(Enum):
    """What becomes of a flag."""

    HONOURED = "honoured"
    """It does what its name says."""
    MAPPED = "mapped"
    """Its value is translated to the nearest that is here; a note says so where that is not the same."""
    IGNORED = "accepted without effect"
    """There is nothing here for it to change; a note says why."""
    REJECTED = "not supported"
    """Serving without it would not be what the person asked for; the error says why."""


@dataclass(frozen=True)
class Flag:
    """One row of the table."""

    names: tuple[str, ...]
    """What may be written; a last `*` stands for any ending, in flags that are ignored or rejected."""
    treatment: Treatment
    help: str
    """What it does; of flags that are ignored or rejected, why."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """For argparse."""

    def matches(self, name: str) -> bool:
        """Whether this row speaks of a flag so written."""
        return any(name.startswith(n[:-1]) if n.endswith("*") else name == n for n in self.names)


@dataclass(frozen=True)
class To:
    """What a value of a mapped flag becomes."""

    value: Any
    note: str = ""
    """For the person, where it is not the same thing."""


@dataclass(frozen=True)
class Not:
    """A value that a mapped flag does not take."""

    reason: str


def honoured(*names: str, help: str, **settings: Any) -> Flag:
    """A flag with a value."""
    return Flag(names, Treatment.HONOURED, help, settings)


def switch(*names: str, help: str) -> Flag:
    """A flag without a value."""
    return Flag(names, Treatment.HONOURED, help, {"action": "store_true"})


def mapped(*names: str, help: str, values: Mapping[str, To | Not], default: Any = None) -> Flag:
    """A flag whose values are known; they are given in small letters, and case does not matter."""
    taken = ",".join(name for name, meaning in values.items() if isinstance(meaning, To))
    settings = {"action": _Mapped, "values": values, "default": default, "metavar": f"{{{taken}}}"}
    return Flag(names, Treatment.MAPPED, help, settings)


def ignored(*names: str, why: str) -> Flag:
    """A flag that changes nothing, whatever its value."""
    return Flag(names, Treatment.IGNORED, why)


def rejected(*names: str, why: str) -> Flag:
    """A flag that ends the start, whatever its value."""
    return Flag(names, Treatment.REJECTED, why)


class _Mapped(argparse.Action):
    def __init__(self, *, values: Mapping[str, To | Not], **settings: Any) -> None:
        super().__init__(**settings)
        self.values = values

    def __call__(self, parser: Any, namespace: Any, given: Any, option_string: str | None = None) -> None:
        meaning = self.values.get(given.lower())
        if meaning is None:
            takes = ", ".join(name for name, meaning in self.values.items() if isinstance(meaning, To))
            raise FlagError(f"{option_string} must be one of {takes}, not {given!r}")
        if isinstance(meaning, Not):
            raise FlagError(f"{option_string} {given} is not supported: {meaning.reason}")
        if meaning.note:
            namespace.notes.append(f"{option_string} {given}: {meaning.note}")
        setattr(namespace, self.dest, meaning.value)


_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def tokens(text: str) -> int:
    """A number of tokens of at least 1, perhaps with a unit: 65536, 64k (64,000), 64Ki (65,536), 1M, 1Mi."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(|k|M|G|Ki|Mi|Gi)", text.strip())
    count = Decimal(match[1]) * _UNITS[match[2]] if match else Decimal(0)
    if count < 1 or count != int(count):
        raise argparse.ArgumentTypeError(
            f"must be a number of tokens of at least 1, such as 65536, 64k (64,000), 64Ki (65,536) or 1M, not {text!r}"
        )
    return int(count)


def whole(low: int, high: int) -> Callable[[str], int]:
    """A reader of whole numbers between two bounds, which belong to them."""

    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text!r}")
        return int(text)

    return read


def seconds(text: str) -> float:
    """A time above 0."""
    return _number(text, "a number of seconds above 0", 0, 10**9)


def fraction(text: str) -> float:
    """A share above 0 and below 1."""
    return _number(text, "a number above 0 and below 1", 0, 1)


def _number(text: str, what: str, above: float, below: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = above
    if not above < number < below:
        raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
    return number


port = whole(0, 65535)
"""0: any that is free."""


class Parser(argparse.ArgumentParser):
    """A parser that raises `FlagError`, and takes no shortened names: a pasted one could mean another flag."""

    def __init__(self, *, tail: str = "", **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self._tail = tail

    def error(self, message: str) -> NoReturn:
        """Raise rather than print and exit."""
        raise FlagError(message.removeprefix("argument "))

    def format_help(self) -> str:
        """The usual, and `tail` as it is."""
        return super().format_help() + self._tail

    def add(self, title: str, flags: Sequence[Flag]) -> None:
        """A group of flags that have an effect."""
        group = self.add_argument_group(title)
        for flag in flags:
            group.add_argument(*flag.names, help=flag.help.replace("%", "%%"), **flag.settings)
