"""What services want of constraints."""

from typing import Any, Protocol

from serve.generation import Constraint, Unsupported


class Compiler(Protocol):
    """What makes constraints (see `serve.constraint.ConstraintCompiler`)."""

    def compile(self, kind: Any, text: str) -> Constraint:
        """Raises `InvalidRequest` for a bad one."""
        ...


def compiled(compiler: Compiler | None, kind: str | None, text: str | None) -> Constraint | None:
    """The constraint that is asked for, if one is.

    Raises:
        Refused: It is a bad one, or this server makes none.
    """
    if text is None:
        return None
    if compiler is None:
        raise Unsupported("this server does not constrain its output (--grammar-backend none)")
    return compiler.compile(kind, text)
