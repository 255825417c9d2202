"""What the dialogues know: small tables of facts, advice and explanations in plain words."""

COUNTRIES = {
    # country: capital, continent, language, something it is known for
    "France": ("Paris", "Europe", "French", "bread, cheese and art"),
    "Germany": ("Berlin", "Europe", "German", "cars, music and old castles"),
    "Spain": ("Madrid", "Europe", "Spanish", "sunny beaches and dance"),
    "Italy": ("Rome", "Europe", "Italian", "pasta, art and old cities"),
    "Portugal": ("Lisbon", "Europe", "Portuguese", "the sea and painted tiles"),
    "Austria": ("Vienna", "Europe", "German", "music and high mountains"),
    "Norway": ("Oslo", "Europe", "Norwegian", "deep valleys and long winters"),
    "Greece": ("Athens", "Europe", "Greek", "islands and old temples"),
    "Poland": ("Warsaw", "Europe", "Polish", "forests and lakes"),
    "Ireland": ("Dublin", "Europe", "English", "green hills and songs"),
    "Japan": ("Tokyo", "Asia", "Japanese", "fast trains and quiet gardens"),
    "China": ("Beijing", "Asia", "Chinese", "tea and a very long wall"),
    "Thailand": ("Bangkok", "Asia", "Thai", "warm beaches and spicy food"),
    "Egypt": ("Cairo", "Africa", "Arabic", "the pyramids and the river Nile"),
    "Kenya": ("Nairobi", "Africa", "Swahili", "wild animals and wide plains"),
    "Canada": ("Ottawa", "North America", "English and French", "forests, lakes and snow"),
    "Mexico": ("Mexico City", "North America", "Spanish", "old pyramids and good food"),
    "Brazil": ("Brasilia", "South America", "Portuguese", "the Amazon forest and football"),
    "Argentina": ("Buenos Aires", "South America", "Spanish", "wide plains and dance"),
    "Australia": ("Canberra", "Australia", "English", "red deserts and coral reefs"),
}

ANIMALS = {
    # animal: kind, home, food, legs
    "cat": ("mammal", "houses and gardens", "meat and fish", 4),
    "dog": ("mammal", "houses with people", "meat", 4),
    "horse": ("mammal", "fields", "grass", 4),
    "lion": ("mammal", "the plains of Africa", "meat", 4),
    "bear": ("mammal", "forests and mountains", "fish, fruit and plants", 4),
    "whale": ("mammal", "the sea", "fish and other small sea animals", 0),
    "elephant": ("mammal", "the plains and forests of Africa and Asia", "grass, leaves and fruit", 4),
    "eagle": ("bird", "mountains", "small animals and fish", 2),
    "owl": ("bird", "forests", "mice", 2),
    "penguin": ("bird", "cold coasts", "fish", 2),
    "frog": ("amphibian", "lakes and rivers", "insects", 4),
    "snake": ("reptile", "warm countries", "small animals", 0),
    "turtle": ("reptile", "the sea and the land", "plants and small animals", 4),
    "shark": ("fish", "the sea", "fish", 0),
    "salmon": ("fish", "rivers and the sea", "small fish", 0),
    "bee": ("insect", "gardens and forests", "sugar from flowers", 6),
    "ant": ("insect", "the ground", "seeds and small insects", 6),
}

LISTS = {
    "fruits": ("apple", "banana", "cherry", "grape", "lemon", "orange", "peach", "plum"),
    "vegetables": ("carrot", "bean", "onion", "pea", "potato", "tomato", "cabbage", "corn"),
    "colors": ("red", "blue", "green", "yellow", "black", "white", "orange", "purple"),
    "farm animals": ("cow", "horse", "pig", "sheep", "goat", "duck", "hen", "donkey"),
    "sports": ("football", "tennis", "swimming", "running", "cycling", "golf", "boxing", "hockey"),
    "jobs": ("teacher", "doctor", "cook", "baker", "driver", "farmer", "writer", "painter"),
    "things in a kitchen": ("pan", "knife", "spoon", "cup", "bowl", "oven", "table", "glass"),
    "instruments": ("piano", "guitar", "violin", "drum", "flute", "trumpet", "harp", "organ"),
    "school subjects": ("math", "music", "history", "art", "biology", "physics", "English", "sport"),
}

ADVICE = {
    # goal: four tips, each a short rule and its reason
    "sleep better": (
        ("Go to bed at the same time every day", "Your body learns when the night begins."),
        ("Put your phone away one hour before bed", "Bright light keeps the brain awake."),
        ("Keep the room dark and cool", "Most people sleep best in a cool room."),
        ("Drink no coffee in the afternoon", "Coffee works for many hours."),
    ),
    "learn a language": (
        ("Learn ten new words every day", "Small steps are easy to keep."),
        ("Listen to songs and stories", "Your ear learns the sound of the language."),
        ("Speak from the first day", "Mistakes are the fastest way to learn."),
        ("Read short and simple books", "You meet the same words again and again."),
    ),
    "save money": (
        ("Write down what you spend", "You see where the money goes."),
        ("Cook at home", "A meal at home costs much less."),
        ("Wait one day before you buy something big", "Many wishes are gone the next day."),
        ("Put some money aside on the first day of the month", "You cannot spend what you do not see."),
    ),
    "be more active": (
        ("Walk for thirty minutes every day", "Walking needs no tools and no plan."),
        ("Take the stairs", "It trains your legs and your heart."),
        ("Do sport with a friend", "Together it is more fun."),
        ("Stand up once an hour", "Long sitting makes the back tired."),
    ),
    "study for a test": (
        ("Make a plan for the week", "You know what to do each day."),
        ("Study in short blocks with breaks", "The brain needs time to rest."),
        ("Explain the topic to a friend", "You find out what you do not know yet."),
        ("Solve old tests", "You get used to the kind of questions."),
    ),
    "grow tomatoes": (
        ("Put the plants in a sunny place", "Tomatoes need six hours of sun."),
        ("Water the ground and not the leaves", "Wet leaves get sick."),
        ("Tie the plants to a stick", "The fruit is heavy."),
        ("Pick the tomatoes when they are red", "Then they taste sweet."),
    ),
    "write a good letter": (
        ("Start with a friendly greeting", "The reader feels welcome."),
        ("Say the main point first", "The reader knows why you write."),
        ("Use short sentences", "Short sentences are easy to read."),
        ("Read it aloud before you send it", "You hear what sounds wrong."),
    ),
    "make new friends": (
        ("Join a club", "You meet people who like the same things."),
        ("Ask questions and listen", "People like to talk about what they love."),
        ("Smile and say hello", "Someone has to make the first step."),
        ("Invite people for tea", "A small meeting is easy to plan."),
    ),
    "keep a room clean": (
        ("Put each thing back after you use it", "Then nothing can pile up."),
        ("Clean ten minutes every day", "A little every day is easier than a lot on Sunday."),
        ("Give away what you do not need", "Fewer things need less space."),
        ("Open the window in the morning", "Fresh air makes the room pleasant."),
    ),
    "cook good rice": (
        ("Wash the rice", "The water takes away the loose starch."),
        ("Use two cups of water for one cup of rice", "Then all the water is used."),
        ("Keep the lid closed", "The steam cooks the rice."),
        ("Let it rest for five minutes", "The rice gets soft and light."),
    ),
    "write better code": (
        ("Give things clear names", "A good name explains the code."),
        ("Write small functions", "A small function is easy to test."),
        ("Test your code", "A test finds errors early."),
        ("Ask someone to read it", "Another person sees other things."),
    ),
    "start running": (
        ("Begin slowly", "Your body needs time."),
        ("Buy good shoes", "They protect your feet."),
        ("Rest for one day between two runs", "Muscles grow while you rest."),
        ("Run with a friend", "Together it is easier to go on."),
    ),
}

EXPLANATIONS = {
    # thing: what it is, how it works (two steps), an example
    "rain": ("Rain is water that falls from clouds", "The sun warms the sea and water rises into the air",
        "High up the air is cold, so the water forms drops and falls", "a cloud that meets cold air over a mountain"),
    "a rainbow": ("A rainbow is a band of colors in the sky", "Sunlight enters drops of rain",
        "Each drop splits the light into its colors", "the small rainbow you see near a garden hose"),
    "the moon": ("The moon is a ball of rock that travels around the earth", "It takes about one month for one round",
        "The sun lights one half of it, and we see a different part each night",
        "the full moon, when we see the whole half"),
    "a magnet": ("A magnet is a piece of metal that pulls iron", "It has two ends, a north end and a south end",
        "Different ends pull each other and equal ends push each other away", "the needle of a compass"),
    "a battery": ("A battery is a small store of energy", "Inside it two metals react with each other",
        "This pushes a current through the wire from one end to the other", "the battery in a lamp"),
    "a function in Python": ("A function is a named piece of code", "You give it values, which are called arguments",
        "It runs its lines and returns a result", "the function len, which returns how long a list is"),
    "a loop": ("A loop is code that runs again and again", "It takes one value after the other",
        "It stops when there is no value left", "a loop that prints every name in a list"),
    "a list in Python": ("A list is a row of values in a fixed order",
        "Each value has a position, and the first one is 0",
        "You can add, change and remove values", "a list of the names of your friends"),
    "a web page": ("A web page is a text with marks that a browser shows", "The marks are written in HTML",
        "The browser reads them and draws headings, links and pictures", "a page with the menu of a bakery"),
    "photosynthesis": ("Photosynthesis is how plants make their food", "The leaves take in light, water and air",
        "From these the plant makes sugar, and it gives oxygen back to the air", "a tree in the sun"),
    "the heart": ("The heart is a muscle that moves the blood", "It pulls together about seventy times a minute",
        "Each time it pushes blood through the whole body", "the beat you feel at your wrist"),
    "gravity": ("Gravity is the force that pulls things together", "The more mass a thing has, the stronger it pulls",
        "The earth is very heavy, so everything falls toward it", "an apple that falls from a tree"),
    "a fraction": ("A fraction is a part of a whole", "The lower number says into how many parts the whole is cut",
        "The upper number says how many of these parts you have", "one half of a cake"),
    "percent": ("Percent means out of one hundred", "You cut the whole into one hundred equal parts",
        "Then you count how many parts you have", "a price that falls from 100 to 80, which is 20 percent less"),
    "a bicycle gear": ("A gear changes how hard you push the pedals", "The chain joins two wheels with teeth",
        "A large wheel at the back makes hills easier", "the small gear you use on a steep road"),
    "bread": ("Bread is made from flour, water, salt and yeast", "The yeast makes small bubbles of gas in the dough",
        "In the oven the bubbles grow and the bread becomes light", "a white loaf from the bakery"),
}  # fmt: skip

TRIPS = {
    # kind of trip: what to pack, what to do
    "the beach": (("a towel", "sun cream", "a hat", "a book", "water"),
        ("swim in the sea", "build a sand castle", "eat fish")),
    "the mountains": (("strong boots", "a warm coat", "a map", "bread", "water"),
        ("walk to the lake", "climb a small hill", "watch the stars")),
    "the city": (("good shoes", "a map", "a camera", "an umbrella", "a ticket"),
        ("visit a museum", "eat in the old town", "walk along the river")),
    "the forest": (("a tent", "a lamp", "matches", "a knife", "a warm blanket"),
        ("look for birds", "cook soup on a fire", "follow the river")),
    "a farm": (("old shoes", "a coat", "a hat", "snacks", "water"),
        ("feed the animals", "pick apples", "ride a horse")),
}  # fmt: skip

NOTES = {
    # occasion: subject, first sentence, second sentence, what happens on the day
    "a birthday": ("Happy birthday", "All the best for your new year.",
        "I hope you have a wonderful time with good people.",
        "I will call you on {day}."),
    "a meeting": ("Our meeting", "I would like to talk about our plan.", "It takes about one hour.",
        "Do you have time on {day}?"),
    "a party": ("Party at my place", "I am having a small party.", "There will be music and cake.",
        "Please come on {day} at seven."),
    "a thank you": ("Thank you", "Thank you very much for your help.", "It was kind and it saved me a lot of time.",
        "See you on {day}!"),
    "a dinner": ("Dinner together", "I would like to cook for you.", "There will be soup, rice and apple cake.",
        "Can you come on {day}?"),
    "a lost key": ("A lost key", "I think I left my key at your place.", "It is small and has a red ring.",
        "May I come and look for it on {day}?"),
    "a trip": ("Our trip", "I would like to travel with you.", "We could take the train and walk along the river.",
        "Let us start on {day}."),
}  # fmt: skip

LIKES = ("tea", "coffee", "music", "books", "football", "cats", "dogs", "cooking", "painting", "trains", "gardens")
