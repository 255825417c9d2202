"""Scenario `chat`: short conversations about facts, advice, explanations, lists, plans and letters."""

import random
from collections.abc import Sequence

from mimo_jax.training.corpus import Document, a_or_an, capitalized, conversation, listed, sample
from mimo_jax.training.corpus.dialogue_facts import (
    ADVICE,
    ANIMALS,
    COUNTRIES,
    EXPLANATIONS,
    LIKES,
    LISTS,
    NOTES,
    TRIPS,
)
from mimo_jax.training.corpus.words import CITIES, DAYS, NAMES

_COUNTRY = (
    "What is the capital of {country}?",
    "Tell me about {country}.",
    "Which language do people speak in {country}?",
)
_COUNTRY_MORE = ("And what is the capital of {country}?", "On which continent is it?", "What is {country} known for?")
_ANIMAL = ("What does {animal} eat?", "Tell me something about {animal}.", "Where does {animal} live?")
_ANIMAL_MORE = ("How many legs does it have?", "What kind of animal is it?", "And {animal}?")
_LIST = ("Give me a list of {n} {kind}.", "Name {n} {kind}.", "Can you list {n} {kind}?")
_LIST_MORE = (
    "Sort the list by the alphabet.",
    "Reverse the list.",
    "Remove number {k} from the list.",
    "Which of them is the longest word?",
    "How many of them have more than five letters?",
    "Which ones start with the letter {letter}?",
)
_ADVICE = (
    "How can I {goal}?",
    "Can you help me {goal}?",
    "Give me some tips to {goal}.",
    "I want to {goal}. What helps?",
)
_ADVICE_MORE = (
    "Why does tip {k} help?",
    "Tell me more about tip {k}.",
    "Which tip is the easiest?",
    "Give me the short form.",
)
_EXPLAIN = (
    "Explain {thing} in simple words.",
    "How would you explain {thing} to a child?",
    "Tell me how {thing} works.",
)
_EXPLAIN_MORE = ("Can you give me an example?", "Say it in one sentence.")
_TRIP = ("I am going to {place} for {n} days. What should I pack?", "Plan a trip of {n} days to {place}.")
_TRIP_MORE = ("What can I do there?", "What should I pack?", "I already have {item}. What else do I need?")
_NOTE = (
    "Write a short email to {name} about {occasion} on {day}.",
    "Help me write a letter to {name}. It is about {occasion} on {day}.",
)
_NOTE_MORE = ("Sign it with {name}.", "Move it to {day}.", "Make it shorter.")
_HELLO = ("Hello! My name is {name} and I like {like}.", "Hi, I am {name} from {city} and I like {like}.")
_HELLO_MORE = ("What is my name?", "What do I like?", "Do you remember who I am?")
_THANKS = ("Thank you!", "Thanks, that helps.", "Great, thank you.")
TEMPLATES: tuple[str, ...] = (
    *_COUNTRY,
    *_COUNTRY_MORE,
    *_ANIMAL,
    *_ANIMAL_MORE,
    *_LIST,
    *_LIST_MORE,
    *_ADVICE,
    *_ADVICE_MORE,
    *_EXPLAIN,
    *_EXPLAIN_MORE,
    *_TRIP,
    *_TRIP_MORE,
    *_NOTE,
    *_NOTE_MORE,
    *_HELLO,
    *_HELLO_MORE,
    *_THANKS,
)
"""Format strings of all requests, the later turns' too."""


def generate(rng: random.Random) -> Document:
    """One conversation."""
    topics = (_countries, _animals, _list, _advice, _explain, _trip, _note, _hello)
    turns = rng.choices(topics, weights=(2, 2, 4, 4, 3, 2, 3, 1))[0](rng)
    if rng.random() < 0.3:
        turns += [rng.choice(_THANKS), "You are welcome! Just ask if you have another question."]
    return conversation("chat", *turns)


def _countries(rng: random.Random) -> list[str]:
    country, other = rng.sample(tuple(COUNTRIES), 2)
    capital, continent, language, known = COUNTRIES[country]
    whole = f"{country} is a country in {continent}. Its capital is {capital}, and people there speak {language}."
    first = rng.choice(_COUNTRY)
    answers = {
        _COUNTRY[0]: f"The capital of {country} is {capital}. {whole}",
        _COUNTRY[1]: f"{whole} It is known for {known}.",
        _COUNTRY[2]: f"People in {country} speak {language}. {whole}",
    }
    turns = [first.format(country=country), answers[first]]
    for more in rng.sample(_COUNTRY_MORE, rng.randint(1, 3)):
        turns += [more.format(country=country if more == _COUNTRY_MORE[2] else other)]
        if more == _COUNTRY_MORE[0]:
            country = other
            turns += [f"The capital of {country} is {COUNTRIES[country][0]}."]
        elif more == _COUNTRY_MORE[1]:
            turns += [f"{country} is in {COUNTRIES[country][1]}."]
        else:
            turns += [f"{country} is known for {COUNTRIES[country][3]}."]
    return turns


def _animals(rng: random.Random) -> list[str]:
    animal, other = rng.sample(tuple(ANIMALS), 2)
    first, more = rng.choice(_ANIMAL), rng.choice(_ANIMAL_MORE)
    turns = [first.format(animal=a_or_an(animal)), _about(animal, first)]
    kind, _, _, legs = ANIMALS[animal]
    if more == _ANIMAL_MORE[0]:
        counted = (
            f"{capitalized(a_or_an(animal))} has {legs} legs."
            if legs
            else f"{capitalized(a_or_an(animal))} has no legs."
        )
        return [*turns, more, counted]
    if more == _ANIMAL_MORE[1]:
        same = [name for name, facts in ANIMALS.items() if facts[0] == kind and name != animal]
        also = f" So is {a_or_an(same[0])}." if same else " No other animal that I know well is one."
        return [
            *turns,
            more,
            f"{capitalized(a_or_an(animal))} is {a_or_an(kind) if kind != 'fish' else 'a fish'}.{also}",
        ]
    return [*turns, more.format(animal=a_or_an(other)), _about(other, first)]


def _about(animal: str, question: str) -> str:
    kind, home, food, legs = ANIMALS[animal]
    name = capitalized(a_or_an(animal))
    eats, lives = f"eats {food}", f"lives in {home}"
    if question == _ANIMAL[0]:
        return f"{name} {eats}. It is {a_or_an(kind)} and {lives}."
    if question == _ANIMAL[2]:
        return f"{name} {lives}. It is {a_or_an(kind)} and {eats}."
    return f"{name} is {a_or_an(kind)}. It {lives} and {eats}. It has {legs or 'no'} legs."


def _numbered(items: Sequence[str]) -> str:
    return "\n".join(f"{i}. {capitalized(item)}" for i, item in enumerate(items, 1))


def _list(rng: random.Random) -> list[str]:
    kind, n = rng.choice(tuple(LISTS)), rng.randint(3, 8)
    items = list(LISTS[kind][:n])
    turns = [rng.choice(_LIST).format(n=n, kind=kind), f"Here are {n} {kind}:\n\n{_numbered(items)}"]
    for more in rng.sample(_LIST_MORE, rng.randint(1, 3)):
        k, letter = rng.randint(1, len(items)), rng.choice([item[0].upper() for item in items])
        turns += [more.format(k=k, letter=letter)]
        if more == _LIST_MORE[0]:
            items.sort(key=str.lower)
            turns += [f"Here is the sorted list:\n\n{_numbered(items)}"]
        elif more == _LIST_MORE[1]:
            items.reverse()
            turns += [f"Here is the list in reverse order:\n\n{_numbered(items)}"]
        elif more == _LIST_MORE[2]:
            gone = items.pop(k - 1)
            turns += [f"I removed {gone}. The list is now:\n\n{_numbered(items)}"]
        elif more == _LIST_MORE[3]:
            longest = max(items, key=len)
            turns += [f"The longest word is {longest}. It has {len(longest)} letters."]
        elif more == _LIST_MORE[4]:
            long = [item for item in items if len(item) > 5]
            counted = "\n".join(f"- {capitalized(item)}: {len(item)}" for item in items)
            turns += [f"I count the letters:\n\n{counted}\n\nSo the answer is {len(long)}."]
        else:
            found = [item for item in items if item[0].upper() == letter]
            turns += [f"These start with the letter {letter}: {listed(found)}."]
    return turns


def _advice(rng: random.Random) -> list[str]:
    goal = rng.choice(tuple(ADVICE))
    tips = ADVICE[goal]
    whole = "\n".join(f"{i}. {rule}. {reason}" for i, (rule, reason) in enumerate(tips, 1))
    opening = f"Here are {len(tips)} tips to {goal}:"
    turns = [
        rng.choice(_ADVICE).format(goal=goal),
        f"{opening}\n\n{whole}\n\nStart with one tip and add the others later.",
    ]
    for more in rng.sample(_ADVICE_MORE, rng.randint(1, 2)):
        k = rng.randint(1, len(tips))
        rule, reason = tips[k - 1]
        turns += [more.format(k=k)]
        if more == _ADVICE_MORE[0]:
            turns += [f"Tip {k} is: {rule}. It helps for a simple reason. {reason}"]
        elif more == _ADVICE_MORE[1]:
            turns += [f"Tip {k} says: {rule}. {reason} Try it for one week and see how it goes."]
        elif more == _ADVICE_MORE[2]:
            turns += [f"I think tip 1 is the easiest: {tips[0][0]}. {tips[0][1]}"]
        else:
            turns += ["\n".join(f"- {rule}" for rule, _ in tips)]
    return turns


def _explain(rng: random.Random) -> list[str]:
    thing = rng.choice(tuple(EXPLANATIONS))
    what, one, two, example = EXPLANATIONS[thing]
    whole = f"{what}. It works like this:\n\n1. {one}.\n2. {two}.\n\nA good example is {example}."
    turns = [rng.choice(_EXPLAIN).format(thing=thing), whole]
    answers = {_EXPLAIN_MORE[0]: f"Yes. Think of {example}.", _EXPLAIN_MORE[1]: f"{what}."}
    for more in rng.sample(_EXPLAIN_MORE, rng.randint(1, 2)):
        turns += [more, answers[more]]
    return turns


def _trip(rng: random.Random) -> list[str]:
    place, n = rng.choice(tuple(TRIPS)), rng.randint(2, 5)
    pack, plans = TRIPS[place]
    packing = "Pack these things:\n\n" + "\n".join(f"- {capitalized(item)}" for item in pack)
    days = [f"Day {day}: {capitalized(plans[(day - 1) % len(plans)])}." for day in range(1, n)] + [f"Day {n}: Go home."]
    doing = f"You can {listed(plans)}."
    first, item = rng.choice(_TRIP), rng.choice(pack)
    if first == _TRIP[0]:
        more, answer = _TRIP_MORE[0], doing
        turns = [
            first.format(place=place, n=n),
            f"{packing}\n\nWith clothes for {n} days your bag is ready. Have a good trip!",
        ]
    else:
        more, answer = _TRIP_MORE[1], packing
        turns = [first.format(place=place, n=n), f"Here is a plan for {n} days:\n\n" + "\n".join(days)]
    turns += [more, answer]
    if rng.random() < 0.5:
        rest = [other for other in pack if other != item]
        turns += [_TRIP_MORE[2].format(item=item), f"Good! Then you still need {listed(rest)}."]
    return turns


def _note(rng: random.Random) -> list[str]:
    (name, sender), (day, later) = rng.sample(NAMES, 2), rng.sample(DAYS, 2)
    occasion = rng.choice(tuple(NOTES))
    subject, text, detail, when = NOTES[occasion]
    signature = "Your friend"

    def letter(day: str) -> str:
        body = " ".join(part for part in (text, detail, when.format(day=day)) if part)
        return f"Subject: {subject}\n\nDear {name},\n\n{body}\n\nBest wishes,\n{signature}"

    turns = [rng.choice(_NOTE).format(name=name, occasion=occasion, day=day), letter(day)]
    for more in rng.sample(_NOTE_MORE, rng.randint(1, 2)):
        turns += [more.format(name=sender, day=later)]
        if more == _NOTE_MORE[0]:
            signature = sender
            turns += [letter(day)]
        elif more == _NOTE_MORE[1]:
            day = later
            turns += [letter(day)]
        else:
            detail = ""
            turns += [letter(day)]
    return turns


def _hello(rng: random.Random) -> list[str]:
    name, city = rng.choice(NAMES), rng.choice(CITIES)
    likes = listed(sample(rng, LIKES, 1, 3))
    first = rng.choice(_HELLO)
    place = f" How is life in {city}?" if "{city}" in first else ""
    turns = [
        first.format(name=name, like=likes, city=city),
        f"Hello {name}! Nice to meet you.{place} I can talk about {likes}.",
    ]
    answers = {
        _HELLO_MORE[0]: f"Your name is {name}.",
        _HELLO_MORE[1]: f"You like {likes}.",
        _HELLO_MORE[2]: f"Yes! You are {name} and you like {likes}.",
    }
    for more in rng.sample(_HELLO_MORE, rng.randint(1, 3)):
        turns += [more, answers[more]]
    return turns
