"""The stock of words that all generators share: one small vocabulary, so that a small model meets every word often."""

NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jack", "Kate", "Leo", "Maria", "Noah",
    "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Adam", "Bella", "Carl", "Diana", "Eric", "Fiona",
    "George", "Helen", "Ivan", "Julia", "Kevin", "Lucy", "Mark", "Nina", "Oscar", "Peter", "Ruth", "Simon", "Tom",
)  # fmt: skip

CITIES = (
    "Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Lisbon", "Dublin", "Oslo", "Prague", "Athens", "Boston",
    "Chicago", "Denver", "Toronto", "Sydney", "Tokyo", "Cairo", "Geneva", "Seattle",
)  # fmt: skip

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

THINGS = (
    "apples", "books", "cards", "coins", "cookies", "eggs", "flowers", "lemons", "marbles", "oranges", "pencils",
    "plums", "shells", "stamps", "stickers", "stones", "tickets", "toys", "cups", "keys", "buttons", "candles",
)  # fmt: skip

BOXES = ("bags", "boxes", "baskets", "crates", "packs", "trays", "jars", "shelves")

COLORS = {
    "blue": "#1d5fa8", "green": "#2e7d32", "red": "#b3261e", "orange": "#d9730d", "purple": "#6a3fa0",
    "brown": "#795548", "gray": "#546e7a", "pink": "#c2417c", "teal": "#00796b", "black": "#222222",
}  # fmt: skip
