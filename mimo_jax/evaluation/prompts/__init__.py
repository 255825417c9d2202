"""Frozen prompts for measuring a model: five scenarios, none of whose requests the training text can contain.

They are worded by other templates, and about other kinds of shops, stories and functions, than
`mimo_jax.training.corpus` makes.
"""

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

SCENARIOS = ("web", "math", "code", "chat", "edits")
"""Names of the prompt files."""


@dataclass(frozen=True)
class Prompt:
    """One prompt and, where its answer can be checked, what to expect."""

    id: str
    """Unique among all scenarios, such as `math-07`."""
    messages: tuple[dict[str, str], ...]
    """Role and content each; the last one is the user's."""
    answer: str | None = None
    """`math`: the number after `Answer: `. `edits`: the whole file after the change."""
    check: tuple[tuple[str, str], ...] = ()
    """`code`: calls of the function asked for, each with the `repr` of its result."""


def load(scenario: str) -> tuple[Prompt, ...]:
    """The prompts of a scenario, always the same in the same order.

    Raises:
        ValueError: There is no such scenario.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"no such scenario: {scenario}; there are {', '.join(SCENARIOS)}")
    entries = json.loads(resources.files(__name__).joinpath(f"{scenario}.json").read_text(encoding="utf-8"))
    return tuple(_prompt(entry) for entry in entries)


def _prompt(entry: dict[str, Any]) -> Prompt:
    check = tuple((call, result) for call, result in entry.get("check", ()))
    return Prompt(entry["id"], tuple(entry["messages"]), entry.get("answer"), check)
