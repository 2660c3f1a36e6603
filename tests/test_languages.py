"""Automata against recognisers that know nothing of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from recurra.diag import languages

every = pytest.mark.parametrize("language", languages.every(), ids=lambda language: language.name)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@every
def test_every_short_string_is_recognised(language):
    symbols = len(language.alphabet)
    length = {2: 10, 5: 5, 6: 4}[symbols]
    tokens = torch.tensor(list(itertools.product(range(symbols), repeat=length)))
    for row, labels in zip(language.text(tokens), language.labels(tokens).tolist(), strict=True):
        for t, label in enumerate(labels, 1):
            assert language.recognise(row[:t]) == label, row[:t]


@every
@pytest.mark.parametrize("member", [True, False])
def test_samples_are_what_they_should_be(language, member):
    length, drawn = 24, 64
    try:
        tokens = language.sample(drawn, length, member, generator())
    except ValueError as error:
        assert str(error) == f"no string of length 24 is outside {language.name}"
        assert language.name == "modular-1"
        return
    assert tokens.shape == (drawn, length)
    assert [language.recognise(row) for row in language.text(tokens)] == [member] * drawn


@every
def test_long_strings_are_drawn(language):
    tokens = language.sample(4, 3000, True, generator())
    assert all(language.recognise(row) for row in language.text(tokens))


@pytest.mark.parametrize("name, length", [("tomita-7", 5), ("flip-flop", 4), ("even-pair", 4)])
def test_samples_are_even(name, length):
    language = next(x for x in languages.every() if x.name == name)
    strings = ["".join(s) for s in itertools.product(language.alphabet, repeat=length)]
    members = [s for s in strings if language.recognise(s)]
    drawn = 400 * len(members)
    counts = dict.fromkeys(members, 0)
    for row in language.text(language.sample(drawn, length, True, generator())):
        counts[row] += 1
    assert min(counts.values()) > 300 and max(counts.values()) < 500, counts


def test_lengths_of_which_there_is_no_string():
    with pytest.raises(ValueError, match="no string of length 3 is in tomita-2"):
        languages.tomita(2).sample(1, 3, True)
    for make, bad in ((languages.tomita, 8), (languages.modular, 0), (languages.dyck, 0)):
        with pytest.raises(ValueError, match=f"{make.__name__}: .* must be .*, got {bad}"):
            make(bad)


def test_states_of_s3_are_products():
    language = languages.s3()
    group = list(itertools.permutations(range(3)))
    tokens = language.uniform(50, 20, generator())
    product = [(0, 1, 2)] * len(tokens)
    for t, states in enumerate(language.states(tokens).unbind(1)):
        product = [
            tuple(group[q][i] for i in p)
            for p, q in zip(product, tokens[:, t].tolist(), strict=True)
        ]
        assert [group[s] for s in states.tolist()] == product
