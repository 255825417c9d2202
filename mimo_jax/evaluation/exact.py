"""Whether an answer to a frozen prompt is right: a number, a file after an edit, a function that passes its checks."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import batched

from mimo_jax.evaluation.prompts import Prompt

_NUMBER = re.compile(r"Answer:\s*(-?[\d.,/]+)")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_HUNK = re.compile(r"^@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@.*\n?", re.MULTILINE)
_SECONDS = 5.0

# Run in a process of its own: the function is defined first, then every call's repr is compared.
_CHECKS = """
import json, sys
code, checks = json.load(sys.stdin)
names = {}
exec(code, names)
if all(repr(eval(call, names)) == result for call, result in checks):
    print("passed")
"""


def is_right(prompt: Prompt, text: str) -> bool:
    """Whether a completion's text answers a prompt that has an `answer` or `check`.

    The last number or fenced block counts. A function of `code` is run in a Python process of its own, for at most five
    seconds: that is no sandbox.
    """
    blocks = _BLOCK.findall(text)
    if prompt.check:
        return bool(blocks) and _passes(blocks[-1][1], prompt.check)
    if prompt.answer is None:
        raise ValueError(f"{prompt.id}: has nothing to check an answer by")
    if prompt.answer.endswith("\n"):  # a file
        if not blocks:
            return False
        language, block = blocks[-1]
        before = _BLOCK.findall(prompt.messages[-1]["content"] + "\n")[-1][1]
        return (patched(before, block) if language == "diff" else block) == prompt.answer
    numbers = _NUMBER.findall(text)
    return bool(numbers) and numbers[-1].rstrip(".,") == prompt.answer


def patched(before: str, diff: str) -> str | None:
    """A text after a unified diff; None if the diff does not fit it."""
    lines, out, at = before.splitlines(), [], 0
    for start, hunk in _hunks(diff):
        old = [line[1:] for line in hunk if line[0] in " -"]
        begin = max(start - 1, 0)
        if begin < at or lines[begin : begin + len(old)] != old:
            return None
        out += lines[at:begin] + [line[1:] for line in hunk if line[0] in " +"]
        at = begin + len(old)
    return "\n".join([*out, *lines[at:], ""])


def _hunks(diff: str) -> Iterator[tuple[int, list[str]]]:
    """Every hunk's first line in the old text, from 1, and its lines with their signs."""
    _, *parts = _HUNK.split(diff)
    for start, hunk in batched(parts, 2):
        yield int(start), [line if line[:1] in ("+", "-", " ") else " " + line for line in hunk.splitlines()]


def _passes(code: str, checks: tuple[tuple[str, str], ...]) -> bool:
    command = [sys.executable, "-I", "-c", _CHECKS]
    try:
        ran = subprocess.run(
            command, input=json.dumps([code, checks]), text=True, capture_output=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return ran.returncode == 0 and ran.stdout.endswith("passed\n")
