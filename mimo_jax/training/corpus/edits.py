"""Scenario `edits`: a file and an instruction, answered by a unified diff or by the whole file after the change."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import unified_diff

from mimo_jax.training.corpus import Document, conversation, sample
from mimo_jax.training.corpus.function_families import Function
from mimo_jax.training.corpus.functions import draw as draw_function
from mimo_jax.training.corpus.functions import plain_source, signature
from mimo_jax.training.corpus.web import FIRST, SECOND
from mimo_jax.training.corpus.words import NAMES

_INSTRUCTIONS = (
    "Rename the function {old} to {new}.",
    "Rename the argument {old} to {new}.",
    "Add this docstring to {name}: {text}",
    "Remove the type hints from {name}.",
    "If {argument} is empty, {name} should return {value} at once.",
    "Delete the function {name}.",
    "Add a function {name} to the end. It {does}.",
    "The function {name} has a bug. It should do this: it {does}.",
    "Set {key} to {value}.",
    "Add the setting {key} = {value} to the end.",
    "Remove the setting {key}.",
    "Change the heading to {text}.",
    "Add {item} to the end of the list.",
    "Remove {item} from the list.",
    "Mark {item} as done.",
    "Sort the items by name.",
)
_DIFF_MODES = ("Reply with a unified diff.", "Give me a patch.")
_FILE_MODES = ("Show the whole file.", "Write the file again.")
_FRAME = "{instruction} {mode}\n\nFile {{path}}:\n\n```{{language}}\n{{before}}```"
_SHOW = "Now show the whole file."
TEMPLATES: tuple[str, ...] = (
    *(_FRAME.format(instruction=i, mode=mode) for i in _INSTRUCTIONS for mode in (*_DIFF_MODES, *_FILE_MODES)),
    _SHOW,
)
"""Format strings of all requests."""


@dataclass(frozen=True)
class Edit:
    """A file before and after, and the instruction that leads from one to the other."""

    path: str
    language: str
    before: str
    after: str
    template: str
    """The instruction as a format string."""
    values: dict[str, str]
    """Its fields."""


def draw(rng: random.Random) -> Edit:
    """A file and a change to it."""
    kinds: tuple[Callable[[random.Random], Edit], ...] = (_python, _settings, _html, _notes)
    while True:
        edit = rng.choices(kinds, weights=(6, 2, 2, 2))[0](rng)
        if edit.before != edit.after:
            return edit


def generate(rng: random.Random) -> Document:
    """One request and its answer, at times with the whole file after the patch."""
    edit = draw(rng)
    as_diff = rng.random() < 0.65
    mode = rng.choice(_DIFF_MODES if as_diff else _FILE_MODES)
    request = _FRAME.format(instruction=edit.template, mode=mode).format(
        path=edit.path, language=edit.language, before=edit.before, **edit.values
    )
    whole = f"```{edit.language}\n{edit.after}```"
    if not as_diff:
        return conversation("edits", request, whole)
    turns = [request, f"```diff\n{diff(edit.path, edit.before, edit.after)}```"]
    return conversation("edits", *turns, *((_SHOW, whole) if rng.random() < 0.2 else ()))


def diff(path: str, before: str, after: str) -> str:
    """A unified diff between two versions of a file; both end with a line break."""
    lines = unified_diff(before.splitlines(True), after.splitlines(True), f"a/{path}", f"b/{path}")
    return "".join(lines)


_PLURALS = {
    "numbers": ("values", "items", "data"),
    "words": ("names", "parts", "items"),
    "text": ("line", "s", "message"),
}
_OTHERS = ("x", "given", "data")
_BUGS = ((" > ", " < "), (" < ", " > "), ("total += ", "total -= "), ("total = 0", "total = 1"), (" == 0", " != 0"),
         ("return None", "return 0"), ("not (", "("), ("any(", "all("), ("sum(", "max("), ("min(", "max("))  # fmt: skip


def _python(rng: random.Random) -> Edit:
    functions = [draw_function(rng) for _ in range(rng.randint(1, 3))]
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        functions = functions[:1]
    k = rng.randrange(len(functions))
    function = functions[k]
    sources = [plain_source(f) for f in functions]
    kind = rng.randrange(8)
    template, values, edited = _INSTRUCTIONS[kind], {"name": function.name}, list(sources)
    argument = function.arguments.split(":")[0]
    if kind == 0:
        new = rng.choice(("compute", "get", "find", "make")) + "_" + function.name
        values, edited[k] = {"old": function.name, "new": new}, _renamed(sources[k], function.name, new)
    elif kind == 1:
        new = rng.choice(_PLURALS.get(argument, _OTHERS))
        values, edited[k] = {"old": argument, "new": new}, _renamed(sources[k], argument, new)
        functions, sources, edited = [function], [sources[k]], [edited[k]]  # other functions may have the same argument
    elif kind == 2:
        text = f"It {function.does}."
        values["text"], edited[k] = text, _below_signature(function, f'    """{text}"""')
    elif kind == 3:
        edited[k] = sources[k].replace(signature(function), f"def {function.name}({argument}):")
    elif kind == 4:
        value = {"int": "0", "str": '""', "bool": "False", "list[int]": "[]", "list[str]": "[]"}.get(
            function.returns, "None"
        )
        if argument == "n":  # a number is never empty
            return _settings(rng)
        values |= {"argument": argument, "value": value}
        edited[k] = _below_signature(function, f"    if not {argument}:\n        return {value}")
    elif kind == 5:
        if len(functions) == 1:
            return _settings(rng)
        del edited[k]
    elif kind == 6:
        if len(functions) == 1:
            return _settings(rng)
        function = functions[-1]
        values = {"name": function.name, "does": function.does}
        sources.pop()
    else:
        body = "\n".join(f"    {line}" for line in function.body)
        bugs = [(right, wrong) for right, wrong in _BUGS if right in body]
        if not bugs:
            return _settings(rng)
        right, wrong = bugs[0]
        values["does"], sources[k] = function.does, signature(function) + "\n" + body.replace(right, wrong, 1)
    return Edit(
        rng.choice(("tools.py", "helpers.py", "lib.py")), "python", _module(sources), _module(edited), template, values
    )


def _module(sources: list[str]) -> str:
    return "\n\n\n".join(sources) + "\n"


def _renamed(source: str, old: str, new: str) -> str:
    return re.sub(rf"\b{re.escape(old)}\b", new, source)


def _below_signature(function: Function, lines: str) -> str:
    return "\n".join([signature(function), lines, *(f"    {line}" for line in function.body)])


_SETTINGS = {
    "name": ("demo", "shop", "notes", "garden", "music"), "port": ("8000", "8080", "9000", "5000"),
    "debug": ("true", "false"), "color": ("blue", "green", "red", "black"), "limit": ("10", "20", "50", "100"),
    "timeout": ("5", "30", "60"), "language": ("en", "fr", "de"), "retries": ("1", "2", "3", "5"),
    "cache": ("on", "off"), "width": ("640", "800", "1200"), "height": ("480", "600", "900"),
    "user": ("admin", "guest"),
}  # fmt: skip


def _settings(rng: random.Random) -> Edit:
    """A file of settings, one a line."""
    keys = sample(rng, tuple(_SETTINGS), 4, 9)
    file = {key: rng.choice(_SETTINGS[key]) for key in keys}
    after = dict(file)
    key, kind = rng.choice(keys), rng.choice((8, 8, 9, 10))
    value = rng.choice([v for v in _SETTINGS[key] if v != file[key]])
    if kind == 8:
        after[key] = value
    elif kind == 9:
        del file[key], after[key]
        after[key] = value
    else:
        del after[key]
    text, changed = ("".join(f"{k} = {v}\n" for k, v in settings.items()) for settings in (file, after))
    path = rng.choice(("settings.ini", "app.ini"))
    return Edit(path, "ini", text, changed, _INSTRUCTIONS[kind], {"key": key, "value": value})


_GOODS = ("apples", "bread", "butter", "cheese", "coffee", "eggs", "flour", "lemons", "milk", "onions", "rice", "tea")


def _html(rng: random.Random) -> Edit:
    """A page with a heading and a list."""
    goods = rng.sample(_GOODS, rng.randint(3, 6))
    title, new = (f"{first} {rng.choice(SECOND)}" for first in rng.sample(FIRST, 2))
    extra, kind = goods.pop(), rng.choice((11, 12, 13))
    after, item = list(goods), rng.choice(goods)
    if kind == 12:
        item = extra
        after.append(item)
    elif kind == 13:
        after.remove(item)
    values = {"text": new, "item": item}
    path, heading = rng.choice(("index.html", "shop.html")), new if kind == 11 else title
    return Edit(path, "html", _list_page(title, goods), _list_page(heading, after), _INSTRUCTIONS[kind], values)


def _list_page(title: str, items: Sequence[str]) -> str:
    lines = [
        "<body>",
        f"  <h1>{title}</h1>",
        "  <ul>",
        *(f"    <li>{item}</li>" for item in items),
        "  </ul>",
        "</body>",
    ]
    return "\n".join(lines) + "\n"


_TASKS = ("buy {}", "call {}", "write to {}", "cook for {}", "visit {}", "help {}")


def _notes(rng: random.Random) -> Edit:
    """A list of things to do."""
    tasks = [task.format(rng.choice(_GOODS if "buy" in task else NAMES)) for task in sample(rng, _TASKS, 4, 6)]
    rng.shuffle(tasks)
    extra, kind = tasks.pop(), rng.choice((12, 13, 14, 15))
    after, item = [f"- [ ] {task}" for task in tasks], rng.choice(tasks)
    k = tasks.index(item)
    if kind == 12:
        item = extra
        after.append(f"- [ ] {item}")
    elif kind == 13:
        del after[k]
    elif kind == 14:
        after[k] = f"- [x] {item}"
    else:
        after.sort()
    before, changed = ("\n".join(["# To do", "", *lines]) + "\n" for lines in ([f"- [ ] {t}" for t in tasks], after))
    return Edit("todo.md", "markdown", before, changed, _INSTRUCTIONS[kind], {"item": item})
