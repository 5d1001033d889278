"""The tasks in token ids, for a model that has learned their vocabulary; each row is drawn from a generator of its own.

Ids of a vocabulary of V, h = V // 2. Answers are never below h, so that no answer is a model's end of text:

    0            filler of the original recall task, before it is replaced by random ids
    1 … h−1      keys; there LOOKUP, PASSKEY, … mark what is asked, FIRST and LAST are the names of a phone book
    h … V−1      values; there DIGITS, the 120 permutations of five things, and noise, which is nothing else

Multi-query associative recall is that of Zoology (Arora et al. 2023, arXiv:2312.04927), with its distribution of gaps.
Phone book: Jelassi et al. 2024 (arXiv:2402.01032). Parity and the word problem of S5: Merrill et al. 2024
(arXiv:2404.08819).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from distill.errors import UserError
from distill.recall.example import CHOICES, Example, require_items, require_room, shuffled_in

LOOKUP, PASSKEY, BEGIN, END, COPY, PARITY, PRODUCT = range(1, 8)
FIRST, LAST = range(8, 24), range(24, 40)
DIGITS, PERMUTATIONS = 10, 120
SMALLEST = 2 * (DIGITS + PERMUTATIONS + 30)
S5 = tuple(permutations(range(5)))

POWER = 0.01
"""Zoology's a: a key is asked again after a gap of i slots with a probability proportional to i^(a−1)."""

NOTHING = -100
"""The label of a position where nothing is asked."""

Ids = tuple[int, ...]
Draw = np.random.Generator


@dataclass(frozen=True)
class Ask:
    """A place in a row where an answer is due.

    Attributes:
        at: the last position of the prompt.
        source: where the answer, or the first thing it depends on, begins.
        others: wrong answers, to choose from.
    """

    at: int
    answer: Ids
    source: int
    others: tuple[Ids, ...]


@dataclass(frozen=True)
class Row:
    """A sequence to train on, and what is asked in it; the last of the asks is the one to examine a model on."""

    ids: Ids
    asks: tuple[Ask, ...]

    def labels(self) -> NDArray[np.int64]:
        """(T,): what should follow each position, NOTHING where that is not asked."""
        labels_T = np.full(len(self.ids), NOTHING)
        for ask in self.asks:
            labels_T[ask.at : ask.at + len(ask.answer)] = ask.answer
        return labels_T

    def answered(self) -> Ids:
        """The ids with every answer in its place, also where the row has something else there: a text to learn from."""
        ids = [*self.ids, NOTHING]
        for ask in self.asks:
            ids[ask.at + 1 : ask.at + 1 + len(ask.answer)] = ask.answer
        return tuple(ids if ids[-1] != NOTHING else ids[:-1])

    def example(self, rng: Draw) -> Example:
        """The last of the asks, its right answer anywhere among the choices."""
        ask = self.asks[-1]
        label = int(rng.integers(len(ask.others) + 1))
        choices = shuffled_in(label, ask.answer, ask.others)
        return Example(self.ids[: ask.at + 1], choices, label, ask.at + 1 - ask.source)


def associative(rng: Draw, items: int, length: int, vocabulary: int) -> Row:
    """Keys and values k₁ v₁ … kₙ vₙ, then each key once more somewhere among random ids; its value should follow.

    The value does not stand in the row after the second key: an answer helps with no other.
    """
    half, context = vocabulary // 2, 2 * items
    length = length or 4 * items
    require_items("associative", items, 1, half - 1)
    require_room("associative", items, length, 4 * items)
    if length % 2:
        raise UserError(f"associative: the length is {length}; it must be even, since keys and values come in pairs")
    keys_N = rng.choice(np.arange(1, half), items, replace=False)
    values_N = rng.choice(np.arange(half, vocabulary), items, replace=False)
    slots = (length - context) // 2
    weights = np.arange(1.0, slots + 1) ** (POWER - 1)
    at_N = context + 2 * rng.choice(slots, items, replace=False, p=weights / weights.sum())
    ids_T = np.zeros(length, dtype=np.int64)
    ids_T[0:context:2], ids_T[1:context:2], ids_T[at_N] = keys_N, values_N, keys_N
    ids_T = np.where(ids_T == 0, rng.integers(vocabulary, size=length), ids_T)
    values = [(value,) for value in values_N.tolist()]
    asks = [
        Ask(int(at_N[i]), values[i], 2 * i + 1, _some(rng, values, lambda: _value(rng, vocabulary), but=values[i]))
        for i in rng.permutation(items).tolist()
    ]
    return Row(tuple(ids_T.tolist()), tuple(asks))


def phonebook(rng: Draw, items: int, length: int, vocabulary: int, shots: int = 2) -> Row:
    """Entries of first name, last name and four digits; after LOOKUP names, each but the last followed by its number.

    First and last names repeat, so that only both together find the number.
    """
    require_items("phonebook", items, 1, len(FIRST) * len(LAST))
    places = rng.choice(len(FIRST) * len(LAST), items, replace=False)
    names = [(FIRST[place % len(FIRST)], LAST[place // len(FIRST)]) for place in places.tolist()]
    return _lookups(rng, "phonebook", names, 4, (LOOKUP,), shots, length, vocabulary)


def passkey(rng: Draw, items: int, length: int, vocabulary: int) -> Row:
    """Named keys of five digits hidden in noise; one name is asked."""
    require_items("passkey", items, 1, len(FIRST))
    names = [(PASSKEY, FIRST[place]) for place in rng.choice(len(FIRST), items, replace=False).tolist()]
    return _lookups(rng, "passkey", names, 5, (), 0, length, vocabulary)


def copying(rng: Draw, items: int, length: int, vocabulary: int) -> Row:
    """A stretch of random ids somewhere in noise, to be written again after COPY."""
    require_items("copying", items, 1, None)
    answer = tuple(rng.integers(vocabulary // 2, vocabulary, size=items).tolist())
    ids, (start,) = _among_noise(rng, "copying", items, [(BEGIN, *answer, END)], (COPY,), length, vocabulary)
    others = _some(rng, [], lambda: _changed(rng, answer, vocabulary), but=answer)
    return Row((*ids, *answer[:-1]), (Ask(len(ids) - 1, answer, start + 1, others),))


def parity(rng: Draw, items: int, length: int, vocabulary: int) -> Row:
    """Whether the ones among so many bits are even (0) or odd (1)."""
    require_items("parity", items, 1, None)
    half, bits = vocabulary // 2, rng.integers(2, size=items)
    pieces = [(half + bit,) for bit in bits.tolist()]
    ids, starts = _among_noise(rng, "parity", items, pieces, (PARITY,), length, vocabulary)
    odd = int(bits.sum() % 2)
    return Row(ids, (Ask(len(ids) - 1, (half + odd,), starts[0], ((half + 1 - odd,),)),))


def permutation(rng: Draw, items: int, length: int, vocabulary: int) -> Row:
    """The product of so many permutations of five things, the first applied first."""
    require_items("permutation", items, 1, None)
    first_id = vocabulary // 2 + DIGITS
    chosen = rng.integers(PERMUTATIONS, size=items).tolist()
    state = tuple(range(5))
    for each in chosen:
        state = tuple(S5[each][thing] for thing in state)
    answer = (first_id + S5.index(state),)
    pieces = [(first_id + each,) for each in chosen]
    ids, starts = _among_noise(rng, "permutation", items, pieces, (PRODUCT,), length, vocabulary)
    others = _some(rng, [], lambda: (first_id + int(rng.integers(PERMUTATIONS)),), but=answer)
    return Row(ids, (Ask(len(ids) - 1, answer, starts[0], others),))


def _lookups(
    rng: Draw, task: str, names: Sequence[Ids], digits: int, mark: Ids, shots: int, length: int, vocabulary: int
) -> Row:
    """Names with numbers among noise, then the mark and lookups of which only the last lacks its number."""
    numbers = [_number(rng, digits, vocabulary) for _ in names]
    book = [name + number for name, number in zip(names, numbers, strict=True)]
    asked = rng.choice(len(names), min(shots + 1, len(names)), replace=False).tolist()
    *shown, last = asked
    tail = sum((book[i] for i in shown), mark) + names[last]
    ids, starts = _among_noise(rng, task, len(names), book, tail, length, vocabulary)
    first = len(ids) - len(tail) + len(mark) + len(names[last]) - 1
    width = len(book[last])
    asks = [
        Ask(
            first + nth * width,
            numbers[i],
            starts[i] + len(names[i]),
            _some(rng, numbers, lambda: _number(rng, digits, vocabulary), but=numbers[i]),
        )
        for nth, i in enumerate(asked)
    ]
    return Row((*ids, *numbers[last][:-1]), tuple(asks))


def _among_noise(
    rng: Draw, task: str, items: int, pieces: Sequence[Ids], tail: Ids, length: int, vocabulary: int
) -> tuple[Ids, list[int]]:
    """The pieces in order with noise between them up to ``length``, then the tail; and where each piece begins."""
    needed = sum(map(len, pieces)) + len(tail)
    require_room(task, items, length, needed)
    if vocabulary < SMALLEST:
        raise UserError(f"{task}: a vocabulary of {vocabulary} ids is too small; it takes {SMALLEST}")
    room = max(length - needed, 0)
    gaps = random_gaps(rng, room, len(pieces))
    noise = iter(rng.integers(vocabulary // 2 + DIGITS + PERMUTATIONS, vocabulary, size=room).tolist())
    ids: list[int] = []
    starts = []
    for gap, piece in zip(gaps, [*pieces, tail], strict=True):
        ids.extend(next(noise) for _ in range(gap))
        starts.append(len(ids))
        ids.extend(piece)
    return tuple(ids), starts[:-1]


def random_gaps(rng: Draw, room: int, pieces: int) -> NDArray[np.int64]:
    """(pieces + 1,): how much of the room lies before each piece and after the last; one piece is anywhere alike."""
    cuts = np.sort(rng.integers(room + 1, size=pieces))
    return np.diff(cuts, prepend=0, append=room)


def _number(rng: Draw, digits: int, vocabulary: int) -> Ids:
    return tuple((vocabulary // 2 + rng.integers(DIGITS, size=digits)).tolist())


def _value(rng: Draw, vocabulary: int) -> Ids:
    return (int(rng.integers(vocabulary // 2, vocabulary)),)


def _changed(rng: Draw, answer: Ids, vocabulary: int) -> Ids:
    """The answer with one of its ids replaced."""
    at = int(rng.integers(len(answer)))
    return (*answer[:at], *_value(rng, vocabulary), *answer[at + 1 :])


def _some(rng: Draw, present: Sequence[Ids], make: Callable[[], Ids], *, but: Ids) -> tuple[Ids, ...]:
    """CHOICES − 1 different wrong answers: of those present in the row, and made where these are too few."""
    found = list(dict.fromkeys(one for one in present if one != but))
    found = [found[i] for i in rng.permutation(len(found))[: CHOICES - 1]]
    while len(found) < CHOICES - 1:
        one = make()
        if one != but and one not in found:
            found.append(one)
    return tuple(found)
