"""Families of small Python functions: a name, what it does, its lines, and how to draw arguments for examples.

A family multiplies conditions, changes and sums; `functions` turns a draw into source with a docstring and doctests.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

Draw = Callable[[random.Random], tuple[object, ...]]


@dataclass(frozen=True)
class Function:
    """A function before it is written out."""

    name: str
    """Its name."""
    arguments: str
    """Its parameters with types."""
    returns: str
    """Type of the result."""
    does: str
    """Completes `The function ...`, as in `returns the sum of the numbers`."""
    body: tuple[str, ...]
    """Lines below the docstring, without their first indent."""
    draw: Draw
    """Arguments for an example."""


# part of a name: words, condition on `n`
_NUMBER_TESTS = {
    "even": ("even", "n % 2 == 0"),
    "odd": ("odd", "n % 2 == 1"),
    "positive": ("positive", "n > 0"),
    "negative": ("negative", "n < 0"),
    **{f"above_{k}": (f"greater than {k}", f"n > {k}") for k in (3, 5, 10, 20, 50)},
    **{f"below_{k}": (f"less than {k}", f"n < {k}") for k in (3, 5, 10, 20, 50)},
    **{f"divisible_by_{k}": (f"divisible by {k}", f"n % {k} == 0") for k in (3, 4, 5, 7, 10)},
}
# two conditions at once
_DOUBLE_TESTS = {
    f"{one}_{other}": (f"{_NUMBER_TESTS[one][0]} and {words}", f"{_NUMBER_TESTS[one][1]} and {test}")
    for one in ("even", "odd", "divisible_by_3", "divisible_by_5", "divisible_by_10")
    for other, (words, test) in _NUMBER_TESTS.items()
    if other.startswith(("above", "below"))
}
# part of a name: words, expression of `n`
_NUMBER_CHANGES = {
    "doubles": ("its double", "2 * n"),
    "squares": ("its square", "n * n"),
    "opposites": ("its opposite", "-n"),
    "absolutes": ("its absolute value", "abs(n)"),
    **{f"plus_{k}": (f"itself plus {k}", f"n + {k}") for k in (1, 2, 3, 5, 10)},
    **{f"minus_{k}": (f"itself minus {k}", f"n - {k}") for k in (1, 2, 3)},
    **{f"times_{k}": (f"itself times {k}", f"{k} * n") for k in (3, 4, 10)},
}
# part of a name: words, condition on `c`
_LETTER_TESTS = {
    "vowels": ("vowels", 'c in "aeiou"'),
    "digits": ("digits", "c.isdigit()"),
    "blanks": ("blanks", 'c == " "'),
    "uppercase": ("uppercase letters", "c.isupper()"),
    "lowercase": ("lowercase letters", "c.islower()"),
    **{f"letter_{c}": (f"letters {c}", f'c == "{c}"') for c in "aeost"},
}
_WORD_TESTS = {
    **{f"longer_than_{k}": (f"have more than {k} letters", f"len(word) > {k}") for k in (2, 3, 4, 5)},
    **{f"shorter_than_{k}": (f"have less than {k} letters", f"len(word) < {k}") for k in (4, 5, 6)},
    **{f"starting_with_{c}": (f"start with the letter {c}", f'word.startswith("{c}")') for c in "abcgt"},
    **{f"ending_with_{c}": (f"end with the letter {c}", f'word.endswith("{c}")') for c in "enrt"},
    **{f"containing_{c}": (f"contain the letter {c}", f'"{c}" in word') for c in "aeio"},
}
_WORDS = (
    "apple", "bear", "bird", "blue", "bread", "cat", "cloud", "corn", "dog", "green", "gate", "garden", "hat", "ice",
    "lemon", "moon", "nine", "orange", "paper", "rain", "river", "salt", "stone", "sun", "table", "tea", "tiger",
    "tree", "water", "winter",
)  # fmt: skip
_TEXTS = ("Hello World", "Green Tea", "a cat and 2 dogs", "Room 42", "sunny day", "Rain in May", "tree house", "Top 10")


def numbers(rng: random.Random) -> tuple[list[int]]:
    """A list of small numbers."""
    return ([rng.randint(-9, 60) for _ in range(rng.randint(3, 5))],)


def words(rng: random.Random) -> tuple[list[str]]:
    """A list of different words."""
    return (rng.sample(_WORDS, rng.randint(3, 5)),)


def text(rng: random.Random) -> tuple[str]:
    """A short text."""
    return (rng.choice(_TEXTS),)


def _number_test(rng: random.Random) -> tuple[str, tuple[str, str]]:
    return rng.choice(tuple((_NUMBER_TESTS if rng.random() < 0.6 else _DOUBLE_TESTS).items()))


def _number_lists(rng: random.Random) -> Function:
    key, (are, test) = _number_test(rng)
    name, does, loop, returns = rng.choice(
        (
            ("count", f"counts the numbers that are {are}", ("total = 0", f"if {test}:", "total += 1"), "int"),
            ("sum", f"adds the numbers that are {are}", ("total = 0", f"if {test}:", "total += n"), "int"),
            ("keep", f"keeps only the numbers that are {are}", ("result = []", f"if {test}:", "result.append(n)"),
             "list"),
            ("drop", f"removes the numbers that are {are}", ("result = []", f"if not ({test}):", "result.append(n)"),
             "list"),
            ("has", f"checks whether any number is {are}", (f"any({test} for n in numbers)",), "bool"),
            ("all", f"checks whether all numbers are {are}", (f"all({test} for n in numbers)",), "bool"),
            ("first", f"returns the first number that is {are}, or None", (f"if {test}:", "return n"), "int | None"),
        )
    )  # fmt: skip
    returns = "list[int]" if returns == "list" else returns
    if len(loop) == 1:
        body = (f"return {loop[0]}",)
    elif len(loop) == 2:
        body = ("for n in numbers:", f"    {loop[0]}", f"        {loop[1]}", "return None")
    else:
        variable = loop[0].split()[0]
        body = (loop[0], "for n in numbers:", f"    {loop[1]}", f"        {loop[2]}", f"return {variable}")
    return Function(f"{name}_{key}", "numbers: list[int]", returns, does, body, numbers)


def _number_changes(rng: random.Random) -> Function:
    key, (what, change) = rng.choice(tuple(_NUMBER_CHANGES.items()))
    if rng.random() < 0.4:
        does = f"replaces each number by {what}"
        body = ("result = []", "for n in numbers:", f"    result.append({change})", "return result")
        return Function(f"all_{key}", "numbers: list[int]", "list[int]", does, body, numbers)
    where, (are, test) = _number_test(rng)
    if rng.random() < 0.5:
        does, returns = f"takes the numbers that are {are} and replaces each by {what}", "list[int]"
        body, name = (f"return [{change} for n in numbers if {test}]",), f"{key}_of_{where}"
    else:
        does, returns = f"takes the numbers that are {are}, replaces each by {what} and adds them", "int"
        body, name = (f"return sum({change} for n in numbers if {test})",), f"sum_{key}_of_{where}"
    return Function(name, "numbers: list[int]", returns, does, body, numbers)


def _letters(rng: random.Random) -> Function:
    key, (what, test) = rng.choice(tuple(_LETTER_TESTS.items()))
    name, does, returns, body = rng.choice(
        (
            ("count", f"counts the {what} in a text", "int", (f"return sum(1 for c in text if {test})",)),
            ("remove", f"removes the {what} from a text", "str",
             ("result = []", "for c in text:", f"    if not ({test}):", "        result.append(c)",
              'return "".join(result)')),
            ("keep", f"keeps only the {what} of a text", "str", (f'return "".join(c for c in text if {test})',)),
            ("has", f"checks whether a text has {what}", "bool", (f"return any({test} for c in text)",)),
            ("positions_of", f"returns the positions of the {what} in a text", "list[int]",
             (f"return [i for i, c in enumerate(text) if {test}]",)),
            ("star", f"replaces the {what} of a text by stars", "str",
             ("result = []", "for c in text:", f"    if {test}:", '        result.append("*")', "    else:",
              "        result.append(c)", 'return "".join(result)')),
        )
    )  # fmt: skip
    return Function(f"{name}_{key}", "text: str", returns, does, body, text)


def _word_lists(rng: random.Random) -> Function:
    key, (which, test) = rng.choice(tuple(_WORD_TESTS.items()))
    name, does, returns, body = rng.choice(
        (
            ("count_words", f"counts the words that {which}", "int", (f"return sum(1 for word in words if {test})",)),
            ("words", f"keeps the words that {which}", "list[str]",
             ("result = []", "for word in words:", f"    if {test}:", "        result.append(word)", "return result")),
            ("upper_words", f"takes the words that {which} and writes them in upper case", "list[str]",
             (f"return [word.upper() for word in words if {test}]",)),
            ("join_words", f"joins the words that {which} with a comma", "str",
             (f'return ",".join(word for word in words if {test})',)),
            ("word_lengths", f"returns the lengths of the words that {which}", "dict[str, int]",
             ("result = {}", "for word in words:", f"    if {test}:", "        result[word] = len(word)",
              "return result")),
        )
    )  # fmt: skip
    return Function(f"{name}_{key}", "words: list[str]", returns, does, body, words)


def _one_number(rng: random.Random) -> Function:
    k = rng.randint(2, 9)
    name, does, body = rng.choice(
        (
            (f"sum_to_times_{k}", f"adds the numbers from 1 to n and multiplies the sum by {k}",
             ("total = 0", "for i in range(1, n + 1):", "    total += i", f"return {k} * total")),
            (f"power_of_{k}", f"returns {k} to the power n",
             ("result = 1", "for _ in range(n):", f"    result *= {k}", "return result")),
            (f"count_multiples_of_{k}", f"counts the multiples of {k} between 1 and n", (f"return n // {k}",)),
            (f"round_up_to_{k}", f"returns the smallest multiple of {k} that is not less than n",
             (f"while n % {k} != 0:", "    n += 1", "return n")),
            (f"steps_to_zero_by_{k}", f"counts how often {k} can be taken away from n before it is below {k}",
             ("steps = 0", f"while n >= {k}:", f"    n -= {k}", "    steps += 1", "return steps")),
            (f"remainder_by_{k}", f"returns what is left when n is divided by {k}", (f"return n % {k}",)),
        )
    )  # fmt: skip
    largest = 4 if name.startswith("power") else 12  # short results
    return Function(name, "n: int", "int", does, body, lambda rng: (rng.randint(1, largest),))


def _limits(rng: random.Random) -> Function:
    low, high = rng.randint(0, 5), rng.randint(8, 30)
    any_number: Draw = lambda rng: (rng.randint(-9, 40),)
    name, returns, does, body = rng.choice(
        (
            ("clamp", "int", f"limits a number to the range from {low} to {high}",
             (f"if n < {low}:", f"    return {low}", f"if n > {high}:", f"    return {high}", "return n")),
            ("is_inside", "bool", f"checks whether a number is between {low} and {high}",
             (f"return {low} <= n <= {high}",)),
            ("distance", "int", f"returns how far a number is outside the range from {low} to {high}",
             (f"if n < {low}:", f"    return {low} - n", f"if n > {high}:", f"    return n - {high}", "return 0")),
            ("label", "str", f"returns low, middle or high for a number, with limits {low} and {high}",
             (f"if n < {low}:", '    return "low"', f"if n > {high}:", '    return "high"', 'return "middle"')),
        )
    )  # fmt: skip
    return Function(f"{name}_{low}_{high}", "n: int", returns, does, body, any_number)


def _tables(rng: random.Random) -> Function:
    k = rng.choice((3, 5, 10, 20))
    what = rng.choice(("prices", "ages", "scores", "counts"))

    def draw(rng: random.Random) -> tuple[dict[str, int]]:
        return ({word: rng.randint(1, 30) for word in rng.sample(_WORDS, 3)},)

    name, does, returns, body = rng.choice(
        (
            (f"names_above_{k}", f"returns the names whose value is greater than {k}", "list[str]",
             (f"return [name for name, value in {what}.items() if value > {k}]",)),
            (f"sum_{what}_above_{k}", f"adds the values that are greater than {k}", "int",
             (f"return sum(value for value in {what}.values() if value > {k})",)),
            (f"raise_{what}_by_{k}", f"adds {k} to every value", "dict[str, int]",
             (f"return {{name: value + {k} for name, value in {what}.items()}}",)),
            (f"best_of_{what}", "returns the name with the largest value", "str",
             (f"return max({what}, key={what}.get)",)),
            (f"lowest_of_{what}", "returns the name with the smallest value", "str",
             (f"return min({what}, key={what}.get)",)),
            (f"sort_{what}", "returns the names sorted by their values", "list[str]",
             (f"return sorted({what}, key={what}.get)",)),
            (f"count_{what}_below_{k}", f"counts the values that are less than {k}", "int",
             ("total = 0", f"for value in {what}.values():", f"    if value < {k}:", "        total += 1",
              "return total")),
        )
    )  # fmt: skip
    return Function(name, f"{what}: dict[str, int]", returns, does, body, draw)


FAMILIES = (
    (_number_lists, 4),
    (_number_changes, 4),
    (_letters, 2),
    (_word_lists, 3),
    (_one_number, 1),
    (_limits, 2),
    (_tables, 2),
)
"""Each family with how often it is drawn."""
