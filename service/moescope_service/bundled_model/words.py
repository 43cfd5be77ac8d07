"""The words of the problems."""

PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "his", "him")}
"""``{he}``, ``{his}`` and ``{him}`` for each of the two."""

NAMES = {
    **dict.fromkeys(
        [
            "Mia",
            "Ana",
            "Lily",
            "Zoe",
            "Emma",
            "Nora",
            "Ruth",
            "Iris",
            "Kate",
            "Maya",
            "Sara",
            "Tina",
            "Rosa",
            "Ella",
            "Jane",
            "Amy",
        ],
        "she",
    ),
    **dict.fromkeys(
        [
            "Tom",
            "Ben",
            "Leo",
            "Sam",
            "Max",
            "Omar",
            "Paul",
            "Noah",
            "Luis",
            "Adam",
            "Jack",
            "Eric",
            "Hugo",
            "Ivan",
            "Ravi",
            "Finn",
        ],
        "he",
    ),
}
"""First names and the pronoun of each."""

WORDS = {
    "name": list(NAMES),
    "fruit": ["apples", "pears", "plums", "oranges", "lemons", "peaches", "cherries", "figs"],
    "crop": [
        "carrots",
        "onions",
        "potatoes",
        "cabbages",
        "pumpkins",
        "tomatoes",
        "beets",
        "peppers",
    ],
    "animal": ["sheep", "goats", "cows", "horses", "pigs", "ducks", "hens", "rabbits"],
    "toy": ["marbles", "stickers", "cards", "coins", "beads", "shells", "buttons", "stamps"],
    "supply": ["pencils", "notebooks", "erasers", "crayons", "markers", "folders"],
    "snack": ["cookies", "muffins", "pancakes", "waffles", "cupcakes", "pretzels"],
    "flower": ["roses", "tulips", "daisies", "lilies", "violets", "poppies"],
    "box": ["boxes", "bags", "baskets", "crates", "jars", "trays"],
    "garment": ["shirts", "hats", "scarves", "jackets", "sweaters", "dresses"],
    "relative": ["brother", "sister", "cousin", "uncle", "aunt", "neighbor"],
    "fish": ["trout", "salmon", "perch", "carp", "cod"],
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
}
"""What each word is drawn from."""
