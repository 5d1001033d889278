"""What the tasks in text are made of: plain words that any tokenizer of English can write."""

_FIRST_NAMES = """
Alice Brian Clara David Emma Frank Grace Henry Irene James Karen Louis Maria Nancy Oscar Paula Ralph Sarah Tom Victor
"""
_LAST_NAMES = """
Adams Baker Clark Davis Evans Fisher Green Hill Irving Jones King Lewis Miller Nelson Owens Parker Reed Smith Turner
Young
"""
_WORDS = """
apple bird boat book bread bridge chair clock cloud coin door dream drum field fire fish flag flower forest garden glass
gold hammer hat horse house island key lake lamp leaf letter mirror moon mountain night ocean paper pencil piano plate
rain ring river road rope salt sand ship shoe snow spoon star stone street sugar table tower train tree wall water wheel
window winter
"""
_COLOURS = """
amber black blue bronze brown copper gray green indigo ivory orange pink purple red silver white yellow
"""

FIRST_NAMES, LAST_NAMES, WORDS, COLOURS = (
    tuple(names.split()) for names in (_FIRST_NAMES, _LAST_NAMES, _WORDS, _COLOURS)
)
FILLER = (
    "The shop opens at nine and closes at six.",
    "It rained in the morning, but the afternoon was dry.",
    "Nobody had seen the old road for many years.",
    "The train was late again.",
    "She put the letter on the table and went out.",
    "There is a small garden behind the house.",
    "They talked about the weather for a while.",
    "Most of the boats had left the harbour.",
    "He read the same page twice.",
    "A dog slept in the shade of the wall.",
)
