"""Scenario `web`: someone asks for a page, a form or a table, the answer is its HTML."""

import random

from mimo_jax.training.corpus import Document, a_or_an, capitalized, conversation, listed, sample
from mimo_jax.training.corpus import web_parts as parts
from mimo_jax.training.corpus.words import CITIES, COLORS, DAYS, MONTHS, NAMES

# kind: colour, what it promises, and what it sells for how much
BUSINESSES: dict[str, tuple[str, str, dict[str, int]]] = {
    "bakery": ("orange", "Fresh bread every morning", {"Bread": 4, "Rolls": 2, "Apple cake": 5, "Cookies": 3}),
    "book shop": ("brown", "Good books for long evenings", {"Novels": 12, "Maps": 8, "Cards": 2, "Comics": 9}),
    "bike shop": ("green", "Bikes for every road", {"City bike": 400, "Helmet": 45, "Bike lock": 30, "Lamp": 20}),
    "coffee shop": ("brown", "A quiet place and good coffee", {"Coffee": 3, "Tea": 2, "Hot chocolate": 4, "Cake": 5}),
    "flower shop": ("pink", "Flowers for every day", {"Roses": 15, "Tulips": 9, "Garden plants": 12, "Vases": 20}),
    "garden center": ("green", "Everything that grows", {"Seeds": 3, "Pots": 7, "Young trees": 35, "Tools": 18}),
    "gym": ("red", "Train well and feel well", {"Day ticket": 10, "Month ticket": 45, "Yoga class": 12, "Coach": 30}),
    "hair salon": ("purple", "A new look in one hour", {"Haircut": 30, "Color": 55, "Wash": 10, "Beard trim": 15}),
    "hotel": ("blue", "Sleep well near the old town", {"Single room": 70, "Double room": 95, "Breakfast": 12}),
    "ice cream shop": ("pink", "Twelve kinds made by hand", {"Small cup": 3, "Large cup": 5, "Milk shake": 6}),
    "language school": ("blue", "Speak after ten lessons", {"English": 120, "French": 120, "Spanish": 110}),
    "music school": ("purple", "Play your first song this month", {"Piano": 35, "Guitar": 30, "Violin": 40}),
    "pet shop": ("teal", "Happy animals, happy people", {"Dog food": 14, "Cat food": 12, "Bird seed": 5, "Toys": 8}),
    "photo studio": ("black", "Pictures that stay with you", {"Portrait": 60, "Family photo": 90, "Frame": 25}),
    "pizza place": ("red", "Hot from the stone oven", {"Tomato pizza": 8, "Cheese pizza": 9, "Salad": 6, "Juice": 3}),
    "repair shop": ("gray", "We fix what others throw away", {"Phone repair": 50, "Laptop repair": 80, "Check": 10}),
    "shoe shop": ("brown", "Shoes that fit", {"Boots": 90, "Running shoes": 75, "Sandals": 40, "Socks": 6}),
    "swim school": ("teal", "Safe and happy in the water", {"First course": 80, "Second course": 85, "Swim cap": 7}),
    "tea house": ("green", "Tea from six countries", {"Green tea": 4, "Black tea": 3, "Mint tea": 3, "Rice cake": 5}),
    "toy shop": ("orange", "Small things that make big smiles", {"Puzzle": 11, "Train": 28, "Ball": 6, "Kite": 16}),
}  # fmt: skip

HELD_OUT_BUSINESSES = ("cheese shop", "dance school", "fish market", "museum", "dentist", "car wash", "theater", "farm")
"""Kinds the generator never writes about; frozen prompts do."""

FIRST = ("Golden", "Blue", "Green", "Little", "Old", "Happy", "Silver", "North", "Sunny", "Quiet", "Red", "Bright")
SECOND = ("Oak", "Harbor", "Garden", "Corner", "Star", "River", "Mill", "Door", "Bridge", "Hill", "Lamp", "Field")

SECTIONS = {
    "a price table": "prices",
    "product cards": "products",
    "an about section": "about",
    "opening hours": "hours",
    "a contact form": "contact",
    "customer reviews": "reviews",
    "questions and answers": "questions",
    "a newsletter form": "newsletter",
}

_BUSINESS_REQUESTS = (
    "Write a web page for {name}, {kind} in {city}. Include {sections}.",
    "Make a page for {kind} called {name} in {city} with {sections}.",
    "Create an HTML page for {name} ({kind}, {city}) that has {sections}.",
    "I need a website for my {plain} {name} in {city}. It should have {sections}.",
    "Build a landing page for {name}, {kind} in {city}, with {sections}.",
)
_WISHES = ("", " Use {color} as the main color.", " We sell {items}.", " Main color: {color}. Items: {items}.")
_EVENT_REQUESTS = (
    "Make a page for the {event} in {city} on {date}. Program: {program}.",
    "Write an event page: {event}, {city}, {date}. The program is {program}.",
)
_PERSON_REQUESTS = (
    "Write a portfolio page for {name}, {job} from {city}. Skills: {skills}. Projects: {projects}.",
    "Create a personal page for {name}. Job: {job}. City: {city}. Skills: {skills}. Projects: {projects}.",
)
_RECIPE_REQUESTS = (
    "Write a recipe page for {dish} for {people} people.",
    "Make an HTML page with a recipe for {dish}. It is for {people} people.",
)
_FORM_REQUESTS = (
    "Write an HTML form with fields for {fields} and a button that says {button}.",
    "Make a {title} page with a form. Fields: {fields}. Button: {button}.",
)
_TABLE_REQUESTS = (
    "Make an HTML table with the columns {columns}. Rows: {rows}.",
    "Write a page called {title} with a table. Columns: {columns}. Rows: {rows}.",
)
TEMPLATES: tuple[str, ...] = (
    *(base + wish for base in _BUSINESS_REQUESTS for wish in _WISHES),
    *_EVENT_REQUESTS,
    *_PERSON_REQUESTS,
    *_RECIPE_REQUESTS,
    *_FORM_REQUESTS,
    *_TABLE_REQUESTS,
)
"""Format strings of all requests."""

_EVENTS = ("Summer Festival", "Book Fair", "Music Night", "Science Day", "Garden Party", "City Run", "Art Week")
_ACTS = (
    "opening", "a short talk", "lunch", "live music", "a workshop", "games for children", "a market", "dinner",
    "the show",
)  # fmt: skip
_JOBS = {
    "a designer": (("drawing", "color", "layout", "printing"), ("a shop logo", "a travel poster", "a book cover")),
    "a developer": (("Python", "HTML", "testing", "databases"), ("a weather app", "a chat server", "a small game")),
    "a photographer": (("portraits", "light", "printing", "video"), ("a city at night", "birds", "old doors")),
    "a teacher": (("math", "music", "planning", "writing"), ("a school garden", "a reading club", "a science fair")),
    "an architect": (("drawing", "planning", "models", "wood"), ("a small library", "a bridge", "a family house")),
    "a writer": (("stories", "editing", "research", "reading"), ("a novel", "a travel blog", "a book of letters")),
}
# dish: minutes, amount of each ingredient for one person, what to do
_DISHES: dict[str, tuple[int, dict[str, tuple[int, str]], tuple[str, ...]]] = {
    "tomato soup": (30, {"tomatoes": (3, ""), "onions": (1, ""), "water": (200, " ml")},
        ("Cut the tomatoes and the onions.", "Cook them in the water for 20 minutes.", "Mix the soup and add salt.")),
    "pancakes": (20, {"eggs": (1, ""), "flour": (60, " g"), "milk": (100, " ml")},
        ("Mix the eggs, the flour and the milk.", "Heat a little oil in a pan.", "Bake each pancake on both sides.")),
    "fruit salad": (15, {"apples": (1, ""), "oranges": (1, ""), "grapes": (50, " g")},
        ("Wash the fruit.", "Cut the apples and the oranges.", "Mix everything in a bowl.")),
    "vegetable rice": (35, {"rice": (80, " g"), "carrots": (1, ""), "peas": (40, " g")},
        ("Cook the rice for 15 minutes.", "Fry the carrots and the peas.", "Mix the rice with the vegetables.")),
    "potato salad": (40, {"potatoes": (3, ""), "eggs": (1, ""), "oil": (20, " ml")},
        ("Cook the potatoes and the eggs.", "Cut them and let them cool.", "Add the oil, salt and pepper.")),
    "cheese omelet": (10, {"eggs": (2, ""), "cheese": (30, " g"), "butter": (10, " g")},
        ("Beat the eggs with salt.", "Melt the butter in a pan.", "Add the eggs and the cheese and fold it.")),
}  # fmt: skip
_FIELDS = ("Name", "Email", "Phone", "Date", "City", "Password", "Message", "Comment")
_BUTTONS = {"Send": "Contact", "Sign up": "New account", "Log in": "Login", "Book": "Booking", "Join": "Club"}
_TABLES = {
    "Team": ("Name", "City", "Age"), "Scores": ("Player", "Points", "Rank"), "Stock": ("Product", "Price", "Count"),
    "Lessons": ("Day", "Subject", "Room"),
}  # fmt: skip


def generate(rng: random.Random) -> Document:
    """One request and the page that answers it."""
    kinds = (_business, _event, _person, _recipe, _form, _table)
    return rng.choices(kinds, weights=(8, 2, 2, 1, 2, 2))[0](rng)


def _answer(request: str, html: str) -> Document:
    return conversation("web", request, f"```html\n{html}\n```")


def _business(rng: random.Random) -> Document:
    kind = rng.choice(tuple(BUSINESSES))
    color, promise, prices = BUSINESSES[kind]
    name, city = f"{rng.choice(FIRST)} {rng.choice(SECOND)}", rng.choice(CITIES)
    wanted = sample(rng, tuple(SECTIONS), 2, 4)
    base, wish = rng.choice(_BUSINESS_REQUESTS), rng.choice(_WISHES)
    if "{color}" in wish:
        color = rng.choice(tuple(COLORS))
    if "{items}" in wish:
        prices = {item: rng.randint(2, 99) for item in sample(rng, tuple(prices), 2, len(prices))}
    items = ", ".join(f"{item} (${price})" for item, price in prices.items())
    request = (base + wish).format(
        name=name, kind=a_or_an(kind), plain=kind, city=city, sections=listed(wanted), color=color, items=items
    )
    sections = [_section(SECTIONS[phrase], name, kind, city, prices) for phrase in wanted]
    return _answer(
        request, parts.page(f"{name} - {capitalized(kind)} in {city}", name, promise, COLORS[color], sections)
    )


def _section(section: str, name: str, kind: str, city: str, prices: dict[str, int]) -> tuple[str, str, str]:
    """A business page's part: identifier, heading, HTML."""
    first, second = list(prices)[:2]
    lower = [item.lower() if item not in ("English", "French", "Spanish") else item for item in prices]
    bodies = {
        "prices": lambda: parts.table(("Item", "Price"), [(item, f"${price}") for item, price in prices.items()]),
        "products": lambda: parts.cards([(item, f"Only ${price} at {name}.") for item, price in prices.items()]),
        "about": lambda: parts.paragraph(
            f"{name} is {a_or_an(kind)} in the center of {city}. Here you find: {listed(lower)}. Come in and say hello!"
        ),
        "hours": lambda: parts.table(
            ("Day", "Hours"),
            [("Monday to Friday", "9:00 - 18:00"), ("Saturday", "10:00 - 16:00"), ("Sunday", "Closed")]
        ),
        "contact": lambda: parts.form(("Name", "Email", "Message"), "Send"),
        "reviews": lambda: parts.quotes(
            [(f"The best {kind} in {city}!", "Anna"), (f"I come here every week for the {lower[0]}.", "Tom")]
        ),
        "questions": lambda: parts.questions(
            [
                (f"Where is {name}?", f"You find us in the center of {city}."),
                (f"How much is the item {first}?", f"{first}: ${prices[first]}."),
                (f"Do you have {second} too?", f"Yes, for ${prices[second]}."),
            ]
        ),
        "newsletter": lambda: parts.form(("Your email",), "Sign up"),
    }  # fmt: skip
    heading = {"hours": "Opening hours", "about": f"About {name}"}.get(section, capitalized(section))
    return section, heading, bodies[section]()


def _event(rng: random.Random) -> Document:
    event, city = rng.choice(_EVENTS), rng.choice(CITIES)
    date = f"{rng.choice(DAYS)}, {rng.randint(1, 28)} {rng.choice(MONTHS)}"
    hours = sorted(rng.sample(range(9, 22), rng.randint(3, 5)))
    program = [(f"{hour}:00", act) for hour, act in zip(hours, rng.sample(_ACTS, len(hours)), strict=True)]
    request = rng.choice(_EVENT_REQUESTS).format(
        event=event, city=city, date=date, program=", ".join(f"{hour} {act}" for hour, act in program)
    )
    sections = [
        ("about", "About", parts.paragraph(f"The {event} takes place in {city} on {date}. Everyone is welcome.")),
        ("program", "Program", parts.table(("Time", "What"), [(hour, capitalized(act)) for hour, act in program])),
        ("tickets", "Tickets", parts.form(("Name", "Email"), "Book")),
    ]
    return _answer(request, parts.page(f"{event} {city}", event, f"{city}, {date}", COLORS["purple"], sections))


def _person(rng: random.Random) -> Document:
    job = rng.choice(tuple(_JOBS))
    name, city = rng.choice(NAMES), rng.choice(CITIES)
    skills, projects = sample(rng, _JOBS[job][0], 2, 4), sample(rng, _JOBS[job][1], 2, 3)
    request = rng.choice(_PERSON_REQUESTS).format(
        name=name, job=job, city=city, skills=", ".join(skills), projects=", ".join(projects)
    )
    sections = [
        ("about", "About me", parts.paragraph(f"Hello, I am {name}, {job} from {city}. My main skill is {skills[0]}.")),
        ("skills", "Skills", parts.bullets([capitalized(skill) for skill in skills])),
        ("projects", "Projects", parts.cards([(capitalized(p), f"A project by {name}.") for p in projects])),
        ("contact", "Contact", parts.form(("Name", "Email", "Message"), "Send")),
    ]
    return _answer(request, parts.page(name, name, f"{capitalized(job)} from {city}", COLORS["blue"], sections))


def _recipe(rng: random.Random) -> Document:
    dish, people = rng.choice(tuple(_DISHES)), rng.randint(2, 9)
    minutes, ingredients, steps = _DISHES[dish]
    amounts = [f"{amount * people}{unit} {what}" for what, (amount, unit) in ingredients.items()]
    request = rng.choice(_RECIPE_REQUESTS).format(dish=dish, people=people)
    sections = [
        ("ingredients", "Ingredients", parts.bullets(amounts)),
        ("steps", "Steps", parts.bullets(steps, "ol")),
        ("time", "Time", parts.paragraph(f"This dish is ready in {minutes} minutes.")),
    ]
    title = capitalized(dish)
    return _answer(request, parts.page(f"{title} recipe", title, f"For {people} people", COLORS["green"], sections))


def _form(rng: random.Random) -> Document:
    fields, button = sample(rng, _FIELDS, 2, 5), rng.choice(tuple(_BUTTONS))
    request = rng.choice(_FORM_REQUESTS)
    body = parts.form(fields, button)
    if "{title}" in request:
        title = _BUTTONS[button]
        body = parts.page(title, title, "Please fill in the form", COLORS["blue"], [("form", title, body)])
    else:
        body = _outdented(body)
    return _answer(request.format(fields=listed(fields), button=button, title=_BUTTONS[button]), body)


def _table(rng: random.Random) -> Document:
    title = rng.choice(tuple(_TABLES))
    cells = {
        "Team": lambda: (rng.choice(NAMES), rng.choice(CITIES), str(rng.randint(20, 60))),
        "Scores": lambda: (rng.choice(NAMES), str(rng.randint(10, 99)), str(rng.randint(1, 9))),
        "Stock": lambda: (*rng.choice(tuple(rng.choice(tuple(BUSINESSES.values()))[2].items())), rng.randint(1, 50)),
        "Lessons": lambda: (rng.choice(DAYS), rng.choice(("Math", "Music", "Art", "History")), str(rng.randint(1, 30))),
    }[title]
    rows = [[str(cell) for cell in cells()] for _ in range(rng.randint(2, 5))]
    request = rng.choice(_TABLE_REQUESTS)
    body = parts.table(_TABLES[title], rows)
    if "{title}" in request:
        body = parts.page(title, title, f"{len(rows)} rows", COLORS["teal"], [("table", title, body)])
    else:
        body = _outdented(body)
    text = "; ".join(", ".join(row) for row in rows)
    return _answer(request.format(columns=listed(_TABLES[title]), rows=text, title=title), body)


def _outdented(body: str) -> str:
    return "\n".join(line[6:] for line in body.split("\n"))
