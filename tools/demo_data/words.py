"""The words and sentences that `generate.py` builds the demo data from."""

THINGS = [
    "apple", "candle", "feather", "hammer", "jacket", "kettle", "lantern", "mirror", "needle",
    "orange", "pencil", "quilt", "saddle", "table", "umbrella", "violin", "basket", "button",
    "carpet", "drum", "helmet", "glove", "ladder", "pillow", "ribbon", "shovel", "wagon",
    "anchor", "barrel",
]  # fmt: skip
SITES = [
    "bridge", "door", "engine", "garden", "island", "river", "window", "fence", "market",
    "orchard", "tower",
]  # fmt: skip
NOUNS = [*THINGS, *SITES]
COLOURS = ["red", "blue", "green", "white", "black", "yellow", "brown", "grey"]
ANIMALS = [
    "fox", "owl", "bear", "hare", "goat", "crow", "otter", "badger", "heron", "mole", "swan",
    "wolf",
]  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
]  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("early", "late"), ("full", "empty"), ("happy", "sad"),
    ("light", "dark"), ("loud", "quiet"), ("new", "old"), ("open", "closed"), ("rich", "poor"),
    ("sharp", "blunt"), ("strong", "weak"), ("tall", "short"), ("wet", "dry"), ("wide", "narrow"),
    ("fast", "slow"), ("hard", "soft"), ("high", "low"), ("near", "far"), ("thick", "thin"),
)  # fmt: skip

# The invented world of Orlen: what is asked about each town, and its answer.
TOWNS = {
    "Velmora": ("Asher", "blue", "Queen Talia", "glass"),
    "Brint": ("Lome", "green", "Lord Hask", "bread"),
    "Karsdale": ("Penn", "red", "Lady Orrin", "rope"),
    "Ostwick": ("Gild", "white", "King Rufus", "paper"),
    "Ferrow": ("Tarn", "yellow", "Duke Milo", "honey"),
    "Nimbury": ("Sill", "black", "Lady Wren", "clocks"),
    "Dunmere": ("Ravel", "grey", "Lord Pike", "boats"),
    "Salthorn": ("Quay", "brown", "Queen Idra", "salt"),
}
FACTS = (
    ("river", "The river that runs through {town} is the {value}."),
    ("flag", "The flag of {town} is {value}."),
    ("ruler", "The ruler of {town} is {value}."),
    ("trade", "The people of {town} make {value}."),
)
FACT_QUESTIONS = {
    "river": (
        "Which river runs through {town}?", "What is the river in {town} called?",
        "Name the river of {town}.", "What river does {town} stand on?",
        "Tell me the name of the river that runs through {town}.",
    ),
    "flag": (
        "What colour is the flag of {town}?", "Which colour does the flag of {town} have?",
        "Tell me the colour of the flag of {town}.", "What colour is the flag that {town} flies?",
        "Name the colour of {town}'s flag.",
    ),
    "ruler": (
        "Who rules {town}?", "Who is the ruler of {town}?", "Name the ruler of {town}.",
        "Tell me who rules {town}.", "Under whose rule is {town}?",
    ),
    "trade": (
        "What do the people of {town} make?", "What is made in {town}?",
        "What does {town} produce?", "Tell me what the people of {town} make.",
        "Name what is made in {town}.",
    ),
}  # fmt: skip

# Ways to begin a question, so that a closed set of facts has many wordings.
LEADS = (
    "", "Please answer. ", "Quick question: ", "One more thing. ", "I forgot this. ",
    "For my notes: ", "Help me out. ", "In a sentence, please. ",
)  # fmt: skip

# Slots such as {hero} and {hero2} are drawn from one list without drawing the same entry twice.
SLOTS = {
    "animal": ANIMALS,
    "colour": COLOURS,
    "thing": THINGS,
    "town": list(TOWNS),
    "hero": [
        "Anna", "Bela", "Corin", "Dora", "Edvin", "Fitz", "Greta", "Hugo", "Ines", "Jonas",
        "Kara", "Leo", "Mira", "Nils", "Ola",
    ],
    "feeling": [
        "proud", "tired", "curious", "lonely", "cheerful", "worried", "calm", "restless",
        "grateful", "shy",
    ],
    "weather": (
        "in heavy rain", "on a bright morning", "late in the winter", "after a long storm",
        "in thick fog", "on the hottest day of the year", "under a clear sky", "at first light",
    ),
    "place": (
        "at the edge of a pine forest", "behind the old mill", "near the harbour of {town}",
        "in a narrow street of {town}", "on a hill above the sea", "beside a frozen lake",
        "under a stone bridge", "in a house with a {colour} roof",
    ),
    "found": (
        "a {colour} {thing} half buried in the sand", "a letter that nobody had opened",
        "a map with one corner torn off", "a {thing} that hummed softly at night",
        "a key too small for any door in {town}", "a box full of {colour} buttons",
        "footprints that led to the water", "a coin from a country that no longer exists",
    ),
    "choice": (
        "carried it home without telling anyone", "asked an old {animal} for advice",
        "followed it all the way to the river", "waited three days before touching it",
        "traded it for a {thing} and a warm meal", "hid it under the floor of the barn",
        "showed it to everyone at the market", "walked to {town} to find its owner",
    ),
    "ending": (
        "In the end it turned out to be worth nothing, and that was fine.",
        "Nobody in {town} believed the story, but the {animal2} did.",
        "From then on the two of them met there every year.",
        "It is still there, if you know where to look.",
        "What happened after that, only {hero2} can tell.",
        "The next day everything was {colour2}, and no one asked why.",
        "That is how the town got its second {thing2}.",
        "They laughed about it for a long time, and then they went to sleep.",
    ),
    "view": (
        "I think it matters less than people say", "I have grown fond of it over the years",
        "I used to dislike it, but a visit to {town} changed my mind",
        "honestly, I would rather talk about something else", "it is better than its reputation",
        "I find it charming in small amounts", "it depends on who you share it with",
        "it reminds me of my grandmother's kitchen",
    ),
    "reason": (
        "because it takes patience and gives little back at first",
        "because it makes an ordinary day feel {feeling}", "since no two people do it the same way",
        "as long as nobody tries to sell you a {thing} for it",
        "because the best part is over before you notice",
        "since it costs nothing and harms no one",
        "because it brings strangers to one table", "as my friend {hero} likes to say",
    ),
    "doubt": (
        "Others will tell you the opposite.", "Ask me again tomorrow and I may say something else.",
        "Still, I would not miss it.", "You should try it {weather} and decide for yourself.",
        "There are worse ways to spend an evening.", "My neighbour {hero2} does not agree at all.",
        "I would not make a rule of it.", "That is only how it looks from here.",
    ),
    "step": (
        "write down what you want before you begin", "ask {hero} or somebody else who has done it",
        "leave the hardest part for the morning", "buy a better {thing} than you think you need",
        "take a long walk {weather}", "do a little every day and do not count the days",
        "put everything else away first", "start again if it does not feel right",
        "keep a small {thing2} within reach", "practise with a friend who is {feeling}",
    ),
    "sight": (
        "{colour} smoke above the roofs", "a {animal} asleep on a wall",
        "two children with a {thing}",
        "a bell that rings at odd hours", "the smell of fresh bread", "rows of {colour2} boats",
        "an old man who mends a {thing2}", "laundry moving in the wind",
        "a door painted {colour3}",
        "music from an upper window",
    ),
    "topic": (
        "rainy days", "long train rides", "cooking for friends", "early mornings", "old maps",
        "keeping a diary", "board games", "learning to whistle", "wooden toys", "open fires",
        "street markets", "writing letters", "walking barefoot", "loud music", "empty beaches",
        "collecting stamps", "night skies", "small towns", "new shoes", "family dinners",
    ),
    "goal": (
        "learn to paint", "grow tomatoes", "sleep better", "make new friends", "save money",
        "read more books", "bake bread", "tidy a workshop", "write a poem", "train a dog",
        "get fit", "learn a language", "fix a bicycle", "plan a long trip", "play the violin",
        "stop worrying", "speak in public", "build a shed", "keep bees", "cook for ten people",
    ),
    "scene": (
        "a village by the sea", "a busy market", "a quiet street", "an old harbour",
        "a mountain inn", "a garden in autumn", "a railway station", "a school in summer",
        "a farm at dawn", "a library at night", "a river in flood", "a town square",
    ),
}  # fmt: skip

# kind -> (ways to ask, ways to answer); the slots shared by both are drawn once.
FREE_FORM = {
    "story": (
        (
            "Tell me a short story about a {animal}.", "Write a little tale with a {animal} in it.",
            "Make up a story about a {animal} and a {thing3}.",
            "I would like to hear a story about {hero} and a {animal}.",
            "Invent a short story that takes place {weather}, with a {animal}.",
        ),
        (
            "Once, {weather}, a {feeling} {animal} lived {place}. One day it found {found} and "
            "{choice}. {ending}",
            "{hero} met a {animal} {place}. Together they found {found}. The {animal} was "
            "{feeling}, so {hero} {choice}. {ending}",
            "There was a {animal} who wanted a {thing}. It looked {place}, {weather}, but all it "
            "found was {found}. {ending}",
            "People say that a {feeling} {animal} once found {found} and {choice}. {hero} saw it "
            "happen {place}. "
            "{ending}",
        ),
    ),
    "opinion": (
        (
            "What do you think about {topic}?", "What is your opinion of {topic}?",
            "Do you like {topic}?", "Are {topic} and {topic2} worth the trouble?",
            "Would you choose {topic} or {topic2}?", "Say something about {topic} and {topic2}.",
        ),
        (
            "About {topic}: {view}, {reason}. {doubt}",
            "Well, {view}. I say so {reason}. {doubt}",
            "When it comes to {topic}, {view}. {doubt}",
            "{doubt} As for {topic}, {view}, {reason}.",
        ),
    ),
    "advice": (
        (
            "How can I {goal}?", "I want to {goal}. What should I do?",
            "Give me some advice: I would like to {goal}.", "What is the best way to {goal}?",
            "My friend {hero2} wants to {goal}. Any advice?",
            "I am {feeling2} and want to {goal}. Where do I begin?",
        ),
        (
            "First, {step}. Then {step2}. After that, {step3}.",
            "To {goal}, {step} and {step2}. It also helps to feel {feeling}.",
            "Most people forget to start small. So {step}, then {step2}, and {step3} if you can.",
            "If you want to {goal}, my advice is this: {step}. If that fails, {step2}.",
        ),
    ),
    "description": (
        (
            "Describe {scene}.", "What would one see in {scene}?", "Paint {scene} in words.",
            "Describe {scene} {weather}.", "Describe {scene}, as {hero} would see it.",
            "In a few sentences, describe {scene} near {town2}.",
        ),
        (
            "You notice {sight} first, then {sight2}. Last of all, {sight3}. "
            "Everything seems {feeling}.",
            "One sees {sight}, and beside it {sight2}. {hero} stands there with a {thing3}.",
            "Imagine {sight}, {sight2} and {sight3}, all of it {weather}.",
            "It is {feeling} there. One remembers {sight}, and also {sight2}.",
        ),
    ),
}  # fmt: skip
