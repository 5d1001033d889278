"""The n-gram baseline: a probability model, the formula worked by hand, and better than chance on real text."""

import inspect
import json

import numpy as np
import pytest

from scripts.ngram import KneserNey


def document(text: str) -> np.ndarray:
    """0 for the beginning, then the bytes."""
    return np.array([0, *text.encode()], np.int64)


@pytest.fixture(scope="module")
def text() -> str:
    return inspect.getsource(json.decoder)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("context", ["", "def ", "    return ", "ÿþ"])
def test_probabilities_of_all_next_tokens_sum_to_one(text, n, context):
    model = KneserNey([document(text[:4000]), document(text[4000:])], n, 256)
    seen = document(context)
    logs = [model.log_probabilities(np.append(seen, token))[-1] for token in range(256)]
    assert np.exp(logs).sum() == pytest.approx(1.0, abs=1e-12)
    assert np.isfinite(logs).all()


def test_a_bigram_worked_by_hand():
    """Tokens a=1, b=2, c=3 after the beginning 0, V=4, the text "abac".

    Bigrams 0a ab ba ac once each; so n1=4, n2=n3=n4 count as 1, Y = 4/6 and D1 = 1 - 2·Y·1/4 = 2/3.
    Unigrams by continuation: a follows {0, b}, b follows {a}, c follows {a}: counts 2, 1, 1 of 4; n1=2, n2=1,
    Y = 2/4, D1 = 1 - 2·Y·1/2 = 1/2, D2 = 2 - 3·Y·1/1 = 1/2; gamma() = (2·D1 + D2)/4 = 3/8.
    p(a) = (2 - 1/2)/4 + 3/8 · 1/4 = 15/32, p(b) = p(c) = (1 - 1/2)/4 + 3/32 = 7/32, p(0) = 3/32.
    After a: b and c once each, gamma(a) = 2·D1/2 = 2/3: p(b | a) = (1 - 2/3)/2 + 2/3 · 7/32 = 5/16.
    After c, never seen as a context: p(a | c) = p(a).
    """
    model = KneserNey([np.array([0, 1, 2, 1, 3])], 2, 4)
    p = np.exp(model.log_probabilities(np.array([0, 1, 2])))
    assert p[1] == pytest.approx(5 / 16)
    assert np.exp(model.log_probabilities(np.array([3, 1])))[0] == pytest.approx(15 / 32)


def test_longer_contexts_help_on_text_that_was_not_counted(text):
    train, test = text[:-3000], text[-3000:]
    losses = [-KneserNey([document(train)], n, 256).log_probabilities(document(test)).mean() for n in (1, 2, 4)]
    assert losses[0] > losses[1] > losses[2]
    assert losses[0] < np.log(256)


def test_no_gram_crosses_a_document():
    """ "ab" ends one document and "cd" begins the next: "bc" was never seen."""
    apart = KneserNey([document("ab"), document("cd")], 3, 256)
    joined = KneserNey([document("abcd")], 3, 256)
    query = document("abc")
    assert joined.log_probabilities(query)[-1] > apart.log_probabilities(query)[-1]
