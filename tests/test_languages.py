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


@every
def test_strings_without_symbols_and_no_strings(language):
    for count, length in ((2, 0), (0, 3), (0, 0)):
        tokens = language.uniform(count, length, generator())
        assert tokens.shape == language.states(tokens).shape == (count, length)
        labels = language.labels(tokens)
        assert labels.shape == (count, length) and labels.dtype == torch.bool
        assert language.text(tokens) == [""] * count
        empty = language.recognise("")
        assert language.sample(count, 0, empty, generator()).shape == (count, 0)
        where = "outside" if empty else "in"
        with pytest.raises(ValueError, match=f"no string of length 0 is {where} {language.name}"):
            language.sample(count, 0, not empty)
    assert language.sample(0, 4, True, generator()).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64], ids=str)
def test_symbols_of_any_integers(dtype):
    language = languages.flip_flop()
    tokens = language.uniform(3, 20, generator())
    states = language.states(tokens.to(dtype))
    assert states.dtype == torch.int64 and torch.equal(states, language.states(tokens))


@every
def test_what_is_no_string_is_refused(language):
    last = len(language.alphabet) - 1
    read = (language.states, language.labels, language.text)
    for tokens, message in (
        (torch.tensor([[0, -1]]), f"tokens must be from 0 to {last}, got -1"),
        (torch.tensor([[0], [last + 1]]), f"tokens must be from 0 to {last}, got {last + 1}"),
        (torch.zeros(2, 0), "tokens must be integers, got float32"),
        (torch.zeros(2, 3, dtype=torch.bool), "tokens must be integers, got bool"),
        (torch.tensor([0, 1]), r"tokens must have shape \(B, T\), got \(2,\)"),
    ):
        for function in read:
            with pytest.raises(ValueError, match=f"^{language.name}: {message}$"):
                function(tokens)
    for draw in (language.uniform, lambda *sizes: language.sample(*sizes, True)):
        for sizes, name in (((-1, 4), "count"), ((2, -1), "length"), ((2, 1.5), "length")):
            bad = min(sizes) if name == "length" else sizes[0]
            message = f"^{language.name}: {name} must be an integer of at least 0, got {bad}$"
            with pytest.raises(ValueError, match=message):
                draw(*sizes)


def test_languages_that_there_are_not():
    with pytest.raises(ValueError, match="no string of length 3 is in tomita-2"):
        languages.tomita(2).sample(1, 3, True)
    for make, name, bad in (
        (languages.tomita, "number", 8),
        (languages.tomita, "number", 1.0),
        (languages.tomita, "number", "1"),
        (languages.modular, "n", 0),
        (languages.modular, "n", 2.0),
        (languages.dyck, "depth", 0),
        (languages.dyck, "depth", True),
    ):
        with pytest.raises(ValueError, match=f"^{make.__name__}: {name} must be .*, got {bad!r}$"):
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
