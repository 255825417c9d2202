"""Story problems as data: what is asked, which numbers are drawn, the steps of the solution.

A field of a format string is an expression over the drawn values: `{a}`, `{a+b}`, `{mul(a,b)}` (a worked product).
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Story:
    """A family of word problems."""

    request: str
    """Format string; its fields are names only."""
    draws: dict[str, tuple[int, int]]
    """Smallest and largest value of each number."""
    steps: tuple[str, ...]
    """Format strings of the solution."""
    answer: str
    """Expression of the result, a whole number."""
    lets: dict[str, str] = field(default_factory=dict)
    """Numbers that follow from the drawn ones, in order."""
    when: str = "True"
    """Condition on the numbers."""


STORIES: tuple[Story, ...] = (
    Story(
        "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
        {"a": (5, 90), "b": (3, 90)},
        ("{name} starts with {a} {things}.", "Buying more means adding: {a} + {b} = {a+b}."),
        "a+b",
    ),
    Story(
        "{name} had {a} {things}, gave {b} of them to {other} and lost {c}. How many {things} are left?",
        {"a": (30, 99), "b": (3, 20), "c": (1, 9)},
        ("After giving {b} to {other}, {name} has {a} - {b} = {a-b} {things}.",
         "After losing {c} there are {a-b} - {c} = {a-b-c} {things} left."),
        "a-b-c",
    ),
    Story(
        "{name} has {a} {boxes} with {b} {things} each. How many {things} are there in total?",
        {"a": (3, 40), "b": (2, 12)},
        ("There are {a} {boxes} and each one holds {b} {things}.", "Multiply: {mul(a,b)}."),
        "a*b",
    ),
    Story(
        "There are {a} {boxes} with {b} {things} each, and {c} {things} on the table. How many {things} are there?",
        {"a": (3, 25), "b": (2, 12), "c": (2, 40)},
        ("The {boxes} hold {mul(a,b)} {things}.", "Add those on the table: {a*b} + {c} = {a*b+c}."),
        "a*b+c",
    ),
    Story(
        "{name} shares {t} {things} equally among {a} friends. How many {things} does each friend get?",
        {"a": (2, 12), "b": (2, 20)},
        ("Sharing equally means dividing: {t} / {a} = {b}.", "Check: {mul(b,a)}."),
        "b",
        {"t": "a*b"},
    ),
    Story(
        "{name} puts {t} {things} into {boxes} of {a}. How many full {boxes} are there and how many {things} are left "
        "over? Give the number left over as the answer.",
        {"a": (3, 12), "b": (2, 15), "r": (0, 11)},
        ("{b} full {boxes} hold {mul(b,a)} {things}.", "Left over are {t} - {a*b} = {r}, which is less than {a}."),
        "r",
        {"t": "a*b+r"},
        "r < a",
    ),
    Story(
        "{name} buys {a} {things} for ${b} each and pays with ${p}. How much money does {name} get back?",
        {"a": (2, 9), "b": (2, 9), "k": (1, 5)},
        ("The {things} cost {a} * {b} = {a*b} dollars.", "The change is {p} - {a*b} = {p-a*b} dollars."),
        "p-a*b",
        {"p": "(a*b//10+k)*10"},
        "p > a*b",
    ),
    Story(
        "A box of {things} costs ${a} and a ticket costs ${b}. {name} buys {c} of the first and {d} tickets. "
        "How many dollars is that?",
        {"a": (2, 15), "b": (2, 15), "c": (2, 9), "d": (2, 9)},
        ("The {things} cost {mul(a,c)} dollars.", "The tickets cost {mul(b,d)} dollars.",
         "Together: {a*c} + {b*d} = {a*c+b*d} dollars."),
        "a*c+b*d",
    ),
    Story(
        "{name} reads {a} pages every day. How many pages does {name} read in {b} weeks?",
        {"a": (5, 30), "b": (2, 6)},
        ("{b} weeks have {b} * 7 = {b*7} days.", "Pages: {mul(a,b*7) if b*7 < 10 else mul(b*7,a)}."),
        "a*b*7",
        {},
        "a < 13 or a % 10 == 0",
    ),
    Story(
        "{name} wants to read a book of {t} pages in {b} days, as many every day as any other. How many pages a day?",
        {"a": (5, 40), "b": (2, 12)},
        ("Divide the pages by the days: {t} / {b} = {a}.", "Check: {mul(a,b)}."),
        "a",
        {"t": "a*b"},
    ),
    Story(
        "{name} is {a} years old. {other} is {b} years older. How old are they together?",
        {"a": (5, 45), "b": (2, 20)},
        ("{other} is {a} + {b} = {a+b} years old.", "Together they are {a} + {a+b} = {a+a+b} years old."),
        "a+a+b",
    ),
    Story(
        "{name} is {a} years old and {other} is {k} times as old. How many years older is {other}?",
        {"a": (4, 15), "k": (2, 5)},
        ("{other} is {mul(a,k)} years old.", "The difference is {a*k} - {a} = {a*k-a} years."),
        "a*k-a",
    ),
    Story(
        "A train to {city} drives {a} km in one hour. How many km does it drive in {b} hours?",
        {"a": (40, 99), "b": (2, 9)},
        ("Each hour adds {a} km, and there are {b} hours.", "Multiply: {mul(a,b)}."),
        "a*b",
    ),
    Story(
        "A bus drives {t} km to {city} in {b} hours at constant speed. What is its speed in km per hour?",
        {"a": (30, 90), "b": (2, 8)},
        ("Speed is distance divided by time.", "{t} / {b} = {a} km per hour.", "Check: {mul(a,b)}."),
        "a",
        {"t": "a*b"},
    ),
    Story(
        "A garden is {a} meters long and {b} meters wide. What is its area in square meters?",
        {"a": (4, 40), "b": (3, 12)},
        ("The area of a rectangle is length times width.", "{mul(a,b)} square meters."),
        "a*b",
    ),
    Story(
        "A room is {a} meters long and {b} meters wide. How long is the line around it in meters?",
        {"a": (3, 60), "b": (2, 40)},
        ("Length and width together: {a} + {b} = {a+b}.", "There are two of each: {a+b} * 2 = {(a+b)*2}."),
        "(a+b)*2",
    ),
    Story(
        "What is {p} percent of {t}?",
        {"k": (1, 9), "h": (1, 12)},
        ("One percent of {t} is {t} / 100 = {h}.", "{p} percent are {mul(p,h)}."),
        "p*h",
        {"p": "k*5", "t": "h*100"},
    ),
    Story(
        "A coat costs ${t}. On {day} it is {p} percent cheaper. What is the new price in dollars?",
        {"k": (1, 5), "h": (1, 4)},
        ("One percent of {t} is {t} / 100 = {h}.", "{p} percent are {p} * {h} = {p*h}.",
         "The new price is {t} - {p*h} = {t-p*h}."),
        "t-p*h",
        {"p": "k*10", "t": "h*100"},
    ),
    Story(
        "{name} earns ${a} an hour and works {b} hours on {day}. After lunch for ${c}, how much is left?",
        {"a": (10, 30), "b": (3, 9), "c": (4, 15)},
        ("{name} earns {mul(a,b)} dollars.", "After lunch {a*b} - {c} = {a*b-c} dollars are left."),
        "a*b-c",
    ),
    Story(
        "{name} saves ${a} every week and already has ${b}. After how many weeks does {name} have ${t}?",
        {"a": (3, 15), "b": (5, 60), "w": (2, 12)},
        ("The money still missing is {t} - {b} = {t-b} dollars.",
         "Divide by the savings of a week: {t-b} / {a} = {w}."),
        "w",
        {"t": "a*w+b"},
    ),
    Story(
        "What is the average of {a}, {b} and {c}?",
        {"a": (1, 40), "b": (1, 40), "m": (5, 35)},
        ("Add the numbers: {a} + {b} + {c} = {a+b+c}.", "There are 3 numbers: {a+b+c} / 3 = {m}."),
        "m",
        {"c": "3*m-a-b"},
        "0 < c < 60",
    ),
    Story(
        "{name} has {a} {things} and {b} {others}. {other} has {k} times as many {things} and {c} {others} more. How "
        "many {things} and {others} does {other} have together?",
        {"a": (2, 20), "b": (2, 30), "k": (2, 5), "c": (2, 15)},
        ("{other} has {mul(a,k)} {things}.", "{other} has {b} + {c} = {b+c} {others}.",
         "Together: {a*k} + {b+c} = {a*k+b+c}."),
        "a*k+b+c",
    ),
    Story(
        "Half of the {t} {things} in a box are red. {name} takes {a} red ones out. How many red ones are left?",
        {"h": (10, 50), "a": (2, 9)},
        ("Half of {t} is {t} / 2 = {h}.", "After taking {a} out, {h} - {a} = {h-a} are left."),
        "h-a",
        {"t": "h*2"},
    ),
    Story(
        "A class in {city} has {t} children. There are {d} more girls than boys. How many boys are there?",
        {"b": (6, 16), "d": (1, 8)},
        ("Without the {d} extra girls there are {t} - {d} = {t-d} children.",
         "Half of them are boys: {t-d} / 2 = {b}.", "Check: {b} + {b+d} = {t}."),
        "b",
        {"t": "2*b+d"},
    ),
    Story(
        "A film starts at {h}:00 and takes {a} minutes. After it, {name} walks {b} minutes home. How many minutes "
        "after {h}:00 is {name} home?",
        {"h": (13, 20), "a": (70, 140), "b": (5, 40)},
        ("The film ends {a} minutes after {h}:00.", "The walk adds {b} minutes: {a} + {b} = {a+b}."),
        "a+b",
    ),
    Story(
        "{a} workers build a wall in {b} days. How many days do {c} workers need at the same speed?",
        {"c": (2, 6), "k": (2, 5), "b": (2, 8)},
        ("The wall takes {mul(a,b)} days of work.", "With {c} workers this is {a*b} / {c} = {k*b} days."),
        "k*b",
        {"a": "c*k"},
    ),
    Story(
        "A recipe for {a} people needs {t} eggs. How many eggs are needed for {c} people?",
        {"a": (2, 6), "k": (1, 4), "c": (3, 15)},
        ("For one person: {t} / {a} = {k} eggs.", "For {c} people: {mul(c,k)} eggs."),
        "c*k",
        {"t": "a*k"},
        "c != a",
    ),
    Story(
        "{name} thinks of a number, multiplies it by {a} and adds {b}. The result is {t}. What is the number?",
        {"x": (2, 20), "a": (2, 9), "b": (1, 30)},
        ("Undo the adding: {t} - {b} = {t-b}.", "Undo the multiplying: {t-b} / {a} = {x}.",
         "Check: {a} * {x} + {b} = {t}."),
        "x",
        {"t": "a*x+b"},
    ),
)  # fmt: skip
