"""Scenario `code`: someone asks for a small Python function, the answer has a docstring with doctests."""

import random
import re
from collections.abc import Iterable

from mimo_jax.training.corpus import Document, capitalized, conversation
from mimo_jax.training.corpus.function_families import FAMILIES, Function

_REQUESTS = (
    "Complete this Python function:\n\n```python\n{stub}\n```",
    "Write a Python function {name}({arguments}) that {does}.",
    "Write a function called {name} that {does}. Add a docstring with examples.",
    "Implement {name}({arguments}) -> {returns} in Python. It {does}.",
    "I need a Python function that {does}. Call it {name}.",
)
_CALL_REQUESTS = ("What does {call} return?", "And what does {call} give?")
TEMPLATES: tuple[str, ...] = (*_REQUESTS, *_CALL_REQUESTS)
"""Format strings of all requests."""

# Examples of a function that the request shows none of: a model can know them, as it could not know drawn numbers.
_USUAL_SEEDS = range(3, 20)


def generate(rng: random.Random) -> Document:
    """One request and the function that answers it, at times with a question about one more call."""
    function = draw(rng)
    request = rng.choice(_REQUESTS)
    draws = [rng] * 20 if "{stub}" in request else [random.Random(seed) for seed in _USUAL_SEEDS]
    examples = _examples(function, draws)
    request = request.format(
        stub=source(function, examples, with_body=False),
        name=function.name,
        arguments=function.arguments,
        returns=function.returns,
        does=function.does,
    )
    code = source(function, examples)
    turns = [request, f"```python\n{code}\n```\n\n{_closing(function, code)}"]
    if rng.random() < 0.25 and (more := _examples(function, [rng] * 5)):
        call, result = more[0]
        turns += [rng.choice(_CALL_REQUESTS).format(call=call), f"`{call}` returns `{result}`."]
    return conversation("code", *turns)


def draw(rng: random.Random) -> Function:
    """A function of one of the families."""
    families, weights = zip(*FAMILIES, strict=True)
    return rng.choices(families, weights=weights)[0](rng)


def signature(function: Function) -> str:
    """The `def` line."""
    return f"def {function.name}({function.arguments}) -> {function.returns}:"


def docstring(function: Function, examples: list[tuple[str, str]]) -> list[str]:
    """The docstring's lines, indented."""
    lines = [f'    """{capitalized(function.does)}.', ""]
    for call, result in examples:
        lines += [f"    >>> {call}", f"    {result}"]
    return [*lines, '    """'] if examples else [f'    """{capitalized(function.does)}."""']


def source(function: Function, examples: list[tuple[str, str]], with_body: bool = True) -> str:
    """The function written out, with or without its body."""
    lines = [signature(function), *docstring(function, examples)]
    return "\n".join([*lines, *(f"    {line}" for line in function.body)] if with_body else lines)


def plain_source(function: Function) -> str:
    """The function without a docstring."""
    return "\n".join([signature(function), *(f"    {line}" for line in function.body)])


def _examples(function: Function, draws: Iterable[random.Random]) -> list[tuple[str, str]]:
    """Up to two different calls and what they return, found by running them; a None would show nothing."""
    space: dict[str, object] = {}
    exec(plain_source(function), space)
    examples: dict[str, str] = {}
    for rng in draws:
        arguments = ", ".join(_shown(argument) for argument in function.draw(rng))
        call = f"{function.name}({arguments})"
        result = eval(call, space)
        if result is not None:
            examples[call] = repr(result)
        if len(examples) == 2:
            break
    return list(examples.items())


def _shown(value: object) -> str:
    """A value as a person types it: text in double quotes."""
    return re.sub(r"'([^']*)'", r'"\1"', repr(value))


def _closing(function: Function, code: str) -> str:
    """A sentence on how the function works, told from its body."""
    if "while " in code:
        how = "It repeats the step as long as the condition holds."
    elif re.search(r"^    for ", code, re.MULTILINE):
        how = "It goes through the values one by one in a loop."
    elif " for " in code and "return" in code.split(" for ")[0]:
        how = "It uses a single expression that goes through all values."
    elif "if " in code:
        how = "It checks the limits first."
    else:
        how = "It needs one line only."
    return f"The function {function.does}. {how}"
