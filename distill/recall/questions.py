"""The tasks as text, for a model of any tokenizer; each question is drawn from a generator of its own.

Everything asked is drawn at random, so that nothing a model has read can stand in for reading the prompt.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

from distill.recall.example import CHOICES, Question, require_items, require_room, shuffled_in
from distill.recall.material import COLOURS, FILLER, FIRST_NAMES, LAST_NAMES, WORDS
from distill.recall.rows import Draw, random_gaps

Measure = Callable[[str], int]
"""How long a text is: in a tokenizer's tokens, or words."""

MOST_FAILURES = 3  # sentences in a row that are too long for the room left


def words(text: str) -> int:
    """The measure that needs no tokenizer."""
    return len(text.split())


def associative(rng: Draw, items: int, length: int, measure: Measure = words) -> Question:
    """Words with numbers; then some of them again, in any order, each but the last with its number."""
    require_items("associative", items, 1, len(WORDS))
    names = _drawn(rng, WORDS, items)
    values = [str(value) for value in 10 + rng.permutation(90)[:items]]
    shots = int(rng.integers(items))
    entries = [f"{name} = {value}" for name, value in zip(names, values, strict=True)]
    shown, asked = _shown(rng, entries, shots)
    tail = "".join(f"{line}\n" for line in ("Again:", *shown)) + f"{names[asked]} ="
    prompt, source = _prompt(rng, "associative", "", entries, "\n", tail, asked, length, measure)
    return _question(rng, prompt, source, values[asked], values, lambda: str(rng.integers(10, 100)))


def phonebook(rng: Draw, items: int, length: int, measure: Measure = words) -> Question:
    """Names with telephone numbers, two lookups with their numbers, and one without (Jelassi et al. 2024, §4.3)."""
    everyone = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    require_items("phonebook", items, 1, len(everyone))
    names = _drawn(rng, everyone, items)
    numbers = [_telephone(rng) for _ in names]
    entries = [f"{name}: {number}" for name, number in zip(names, numbers, strict=True)]
    shown, asked = _shown(rng, entries, 2)
    tail = "".join(f"{line}\n" for line in ("Numbers to look up:", *shown)) + f"{names[asked]}:"
    prompt, source = _prompt(rng, "phonebook", "", entries, "\n", tail, asked, length, measure)
    return _question(rng, prompt, source, numbers[asked], numbers, lambda: _telephone(rng))


def passkey(rng: Draw, items: int, length: int, measure: Measure = words) -> Question:
    """Pass keys hidden in sentences about other things; one is asked."""
    require_items("passkey", items, 1, len(COLOURS))
    doors, keys = _drawn(rng, COLOURS, items), [str(rng.integers(10_000, 100_000)) for _ in range(items)]
    entries = [f"The pass key of the {door} door is {key}." for door, key in zip(doors, keys, strict=True)]
    _, asked = _shown(rng, entries, 0)
    head, tail = (
        "Remember the pass keys in this text. ",
        f"Now open the door. The pass key of the {doors[asked]} door is",
    )
    prompt, source = _prompt(rng, "passkey", head, entries, " ", tail, asked, length, measure)
    return _question(rng, prompt, source, keys[asked], keys, lambda: str(rng.integers(10_000, 100_000)))


def copying(rng: Draw, items: int, length: int, measure: Measure = words) -> Question:
    """A line of random words, to be written again."""
    require_items("copying", items, 1, None)
    chosen = [WORDS[i] for i in rng.integers(len(WORDS), size=items)]
    line = " ".join(chosen)
    prompt, source = _prompt(rng, "copying", "", [f"Line: {line}"], "\n", "Line again:", 0, length, measure)

    def changed() -> str:
        at = int(rng.integers(items))
        return " ".join([*chosen[:at], WORDS[rng.integers(len(WORDS))], *chosen[at + 1 :]])

    return _question(rng, prompt, source, line, [], changed)


def parity(rng: Draw, items: int, length: int, measure: Measure = words) -> Question:
    """Whether a lamp is on or off after its switch was pressed, or not, so many times."""
    require_items("parity", items, 1, None)
    pressed = rng.integers(2, size=items)
    entries = ["The switch is pressed." if one else "The switch is left alone." for one in pressed]
    head, tail = "The lamp is off. Each press turns it on or off. ", "Now the lamp is"
    prompt, source = _prompt(rng, "parity", head, entries, " ", tail, 0, length, measure)
    answer, other = ("on", "off") if pressed.sum() % 2 else ("off", "on")
    label = int(rng.integers(2))
    return Question(prompt, shuffled_in(label, answer, (other,)), label, source)


def permutation(rng: Draw, items: int, length: int, measure: Measure = words) -> Question:
    """Five cups hold five things; the contents of two cups change places, so many times; what is in one of them?"""
    require_items("permutation", items, 1, None)
    held = _drawn(rng, WORDS, 5)
    head = "".join(f"Cup {cup} holds the {thing}. " for cup, thing in enumerate(held, start=1))
    entries, things, swaps = [], list(held), list(combinations(range(5), 2))
    for i in rng.integers(len(swaps), size=items):
        a, b = swaps[i]
        things[a], things[b] = things[b], things[a]
        entries.append(f"Swap cup {a + 1} and cup {b + 1}.")
    cup = int(rng.integers(5))
    prompt, _ = _prompt(rng, "permutation", head, entries, " ", f"Now cup {cup + 1} holds the", 0, length, measure)
    return Question(prompt, tuple(held), held.index(things[cup]), 0)


def _drawn(rng: Draw, pool: Sequence[str], number: int) -> list[str]:
    return [pool[i] for i in rng.choice(len(pool), number, replace=False)]


def _shown(rng: Draw, entries: Sequence[str], shots: int) -> tuple[list[str], int]:
    """Some of the entries, and the index of another one."""
    *shown, asked = rng.permutation(len(entries))[: shots + 1].tolist()
    return [entries[i] for i in shown], asked


def _telephone(rng: Draw) -> str:
    a, b, c = rng.integers(200, 1000), rng.integers(200, 1000), rng.integers(10_000)
    return f"{a}-{b}-{c:04}"


def _prompt(
    rng: Draw,
    task: str,
    head: str,
    entries: Sequence[str],
    gap: str,
    tail: str,
    asked: int,
    length: int,
    measure: Measure,
) -> tuple[str, int]:
    """Head, entries with sentences of no interest between them up to ``length``, tail; and where ``asked`` begins."""
    needed = measure(head) + sum(measure(entry + gap) for entry in entries) + measure(tail)
    require_room(task, len(entries), length, needed)
    sentences = _sentences(rng, length - needed, gap, measure)
    before = random_gaps(rng, len(sentences), len(entries))
    text, source = head, 0
    for place, piece in enumerate([*entries, tail]):
        text += "".join(sentences.pop() for _ in range(before[place]))
        source = len(text) if place == asked else source
        text += piece + (gap if place < len(entries) else "")
    return text, source


def _sentences(rng: Draw, room: int, gap: str, measure: Measure) -> list[str]:
    """Sentences of no interest, each with the gap behind it, that nearly fill the room."""
    sentences: list[str] = []
    failures = 0
    while failures < MOST_FAILURES and room > 0:
        sentence = FILLER[rng.integers(len(FILLER))] + gap
        if measure(sentence) > room:
            failures += 1
            continue
        room -= measure(sentence)
        sentences.append(sentence)
    return sentences


def _question(
    rng: Draw, prompt: str, source: int, answer: str, present: Sequence[str], make: Callable[[], str]
) -> Question:
    """With CHOICES − 1 wrong answers: of those present in the prompt, and made where these are too few.

    The answer stands in the prompt somewhere after ``source``.
    """
    others = [one for one in dict.fromkeys(present) if one != answer]
    others = [others[i] for i in rng.permutation(len(others))[: CHOICES - 1]]
    while len(others) < CHOICES - 1:
        one = make()
        if one != answer and one not in others:
            others.append(one)
    label = int(rng.integers(CHOICES))
    return Question(prompt, shuffled_in(label, answer, others), label, prompt.index(answer, source))
