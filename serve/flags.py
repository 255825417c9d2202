"""Reading the server's command line: the flags of `flag_table`, and those that `mimo-jax` has, too."""

import argparse
import difflib
from collections.abc import Sequence

from mimo_jax.arguments import host_arguments, loading_arguments, topology_arguments
from serve.flag_kinds import FlagError, Parser, Treatment
from serve.flag_table import ANSWERED, TABLE


def parser(program: str, more: str = "") -> Parser:
    """The parser of the whole command line; what is only answered is named in its help alone.

    Args:
        program: What the person typed.
        more: The last paragraph of the help.
    """
    tail = []
    for treatment in (Treatment.IGNORED, Treatment.REJECTED):
        tail.append(f"\n{treatment.value}:\n")
        for flag in ANSWERED:
            if flag.treatment is treatment:
                tail.append(f"  {', '.join(flag.names)}\n      {flag.help}\n")
    made = Parser(
        prog=program,
        usage=f"{program} [flags]",
        description="Serve a MiMo-V2 model over gRPC. Flags have SGLang's names, and its command lines can be pasted.",
        tail="".join(tail) + (f"\n{more}\n" if more else ""),
    )
    for title, flags in TABLE.items():
        made.add(title, flags)
    topology_arguments(made)
    host_arguments(made)
    loading_arguments(made.add_argument_group("loading"))
    return made


def parse(argv: Sequence[str], program: str = "launch_server", more: str = "") -> argparse.Namespace:
    """Flags as a namespace; its `notes` say which did not do what their name promises.

    Raises:
        FlagError: A flag is unknown or not supported, or a value is none that it takes.
    """
    made = parser(program, more)
    arguments, rest = made.parse_known_args(argv, argparse.Namespace(notes=[]))
    flag = None
    for word in rest:
        if word.startswith("-") and not word[1:2].isdecimal():
            flag = word.partition("=")[0]
            arguments.notes.append(_answer(flag, made))
        elif flag is None:
            raise FlagError(f"unexpected {word!r}: every value follows a flag")
    return arguments


def _answer(name: str, made: argparse.ArgumentParser) -> str:
    """The note on a flag that the parser does not know; raises unless it is ignored."""
    flag = next((flag for flag in ANSWERED if flag.matches(name)), None)
    if flag is None:
        near = difflib.get_close_matches(name, made._option_string_actions, n=1)
        raise FlagError(f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else "; --help lists all"))
    if flag.treatment is Treatment.REJECTED:
        raise FlagError(f"{name} is not supported: {flag.help}")
    return f"{name} has no effect: {flag.help}"
