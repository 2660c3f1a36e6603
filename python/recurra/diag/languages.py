"""Regular languages as tasks: strings drawn evenly from a language or from what is not in it, and
after every symbol whether what has been read so far is in the language.

A language is a deterministic automaton. Beside each stands a recogniser that knows nothing of it, a
regular expression or a count, for one to be checked against the other.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

from recurra._check import dtype_name


@dataclasses.dataclass(frozen=True)
class Language:
    """A deterministic automaton, begun in state 0.

    Attributes:
        name: what it is called.
        alphabet: a character for each symbol; symbol i is ``alphabet[i]``.
        transitions: of every state the next one, for each symbol.
        accepting: the states in which what has been read is in the language.
        recognise: whether a string is in the language, by other means.
    """

    name: str
    alphabet: str
    transitions: tuple[tuple[int, ...], ...]
    accepting: frozenset[int]
    recognise: Callable[[str], bool]

    def _check_tokens(self, tokens: Tensor) -> None:
        kind = dtype_name(tokens.dtype)
        if tokens.dim() != 2:
            raise ValueError(
                f"{self.name}: tokens must have shape (B, T), got {tuple(tokens.shape)}"
            )
        if kind == "bool" or tokens.is_floating_point() or tokens.is_complex():
            raise ValueError(f"{self.name}: tokens must be integers, got {kind}")
        symbols = len(self.alphabet)
        for bad in tokens[(tokens < 0) | (tokens >= symbols)][:1].tolist():
            raise ValueError(f"{self.name}: tokens must be from 0 to {symbols - 1}, got {bad}")

    def _check_sizes(self, **sizes: int) -> None:
        for name, size in sizes.items():
            _check_integer(self.name, name, size, 0)

    def states(self, tokens: Tensor) -> Tensor:
        """The states after every symbol of (B, T) strings.

        Raises:
            ValueError: they are not (B, T), or hold what is no symbol.
        """
        import torch

        self._check_tokens(tokens)
        table = torch.tensor(self.transitions, device=tokens.device)
        out = torch.empty_like(tokens, dtype=torch.long)
        state = out.new_zeros(len(out))
        for t, token in enumerate(tokens.long().unbind(1)):
            state = table[state, token]
            out[:, t] = state
        return out

    def labels(self, tokens: Tensor) -> Tensor:
        """(B, T) of bool: whether what was read up to and with each symbol is in the language.

        Raises:
            ValueError: they are not (B, T), or hold what is no symbol.
        """
        import torch

        accepts = [state in self.accepting for state in range(len(self.transitions))]
        return torch.tensor(accepts, device=tokens.device)[self.states(tokens)]

    def uniform(self, count: int, length: int, generator: torch.Generator | None = None) -> Tensor:
        """(count, length) of symbols, each as likely as the others.

        Raises:
            ValueError: a size is negative.
        """
        import torch

        self._check_sizes(count=count, length=length)
        return torch.randint(len(self.alphabet), (count, length), generator=generator)

    def sample(
        self, count: int, length: int, member: bool, generator: torch.Generator | None = None
    ) -> Tensor:
        """(count, length) strings, drawn evenly from those of that length that are in the language,
        or from those that are not.

        Raises:
            ValueError: there is none, or a size is negative.
        """
        import torch

        self._check_sizes(count=count, length=length)
        table = torch.tensor(self.transitions)
        # weights[t][q]: a multiple of how many of the strings with t symbols left lead from q to
        # where they should; each t has a multiple of its own, for there are 2^t of them and more.
        accepts = [state in self.accepting for state in range(len(table))]
        weights = [torch.tensor(accepts, dtype=torch.float64).eq(float(member)).double()]
        for _ in range(length):
            left = weights[-1][table].sum(1)
            weights.append(left / left.max().clamp_min(1e-300))
        if not weights[-1][0] > 0:
            where = "in" if member else "outside"
            raise ValueError(f"no string of length {length} is {where} {self.name}")
        state, out = torch.zeros(count, dtype=torch.long), []
        for t in range(length, 0, -1):
            next_ = table[state]
            token = torch.multinomial(weights[t - 1][next_], 1, generator=generator)
            out.append(token)
            state = next_.gather(1, token)[:, 0]
        return torch.cat(out, 1) if out else torch.zeros(count, 0, dtype=torch.long)

    def text(self, tokens: Tensor) -> list[str]:
        """(B, T) symbols as strings.

        Raises:
            ValueError: they are not (B, T), or hold what is no symbol.
        """
        self._check_tokens(tokens)
        return ["".join(self.alphabet[i] for i in row) for row in tokens.tolist()]


def _check_integer(who: str, name: str, value: int, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{who}: {name} must be an integer of at least {least}, got {value!r}")


def parity() -> Language:
    """An odd number of ones."""
    return Language(
        "parity", "01", ((0, 1), (1, 0)), frozenset({1}), lambda s: s.count("1") % 2 == 1
    )


def modular(n: int) -> Language:
    """A number of ones that ``n`` divides.

    Raises:
        ValueError: ``n`` is not an integer of at least 1.
    """
    _check_integer("modular", "n", n, 1)
    table = tuple((i, (i + 1) % n) for i in range(n))
    return Language(f"modular-{n}", "01", table, frozenset({0}), lambda s: s.count("1") % n == 0)


def even_pair() -> Language:
    """An even number of changes between neighbours: the last symbol is the first."""
    table = ((1, 3), (1, 2), (1, 2), (4, 3), (4, 3))
    return Language(
        "even-pair", "01", table, frozenset({0, 1, 3}), lambda s: not s or s[0] == s[-1]
    )


def dyck(depth: int) -> Language:
    """Brackets of one kind that close one another and are open ``depth`` at a time at most: Dyck-1.

    Raises:
        ValueError: ``depth`` is not an integer of at least 1.
    """
    _check_integer("dyck", "depth", depth, 1)
    dead = depth + 1
    table = [(i + 1, i - 1 if i else dead) for i in range(depth + 1)]
    table[depth] = (dead, depth - 1)

    def recognise(s: str) -> bool:
        for _ in range(depth):  # each time the innermost pairs of all
            s = re.sub(r"\(\.*\)", ".", s)
        return set(s) <= {"."}

    return Language(f"dyck-1-{depth}", "()", (*table, (dead, dead)), frozenset({0}), recognise)


def flip_flop() -> Language:
    """Write, read and ignore, each followed by a bit; every bit read is the one last written, and
    there is one. Liu et al., arXiv 2306.00946."""
    dead, states = 12, []
    for memory in (None, 0, 1):
        at = len(states)  # an instruction comes; one, two, three more: a bit to write, ignore, read
        read = [at if bit == memory else dead for bit in (0, 1)]
        states += [
            (at + 1, dead if memory is None else at + 3, at + 2, dead, dead),
            (dead, dead, dead, 4, 8),
            (dead, dead, dead, at, at),
            (dead, dead, dead, *read),
        ]
    states.append((dead,) * 5)

    def recognise(s: str) -> bool:
        if not re.fullmatch(r"(?:[wri][01])*", s):
            return False
        return bool(re.fullmatch(r"(?:w0(?:r0)*|w1(?:r1)*)*", re.sub(r"i[01]", "", s)))

    return Language(
        "flip-flop",
        "wri01",
        tuple(states),
        frozenset({0, 4, 8}),
        recognise,
    )


# Tomita 1982, "Dynamic construction of finite-state automata from examples using hill-climbing":
# transitions on 0 and 1, the accepting states, and the recogniser.
_TOMITA: tuple[tuple[tuple[tuple[int, ...], ...], set[int], Callable[[str], bool]], ...] = (
    (((1, 0), (1, 1)), {0}, lambda s: "0" not in s),
    (((2, 1), (0, 2), (2, 2)), {0}, lambda s: bool(re.fullmatch(r"(?:10)*", s))),
    (
        # 0: no odd run of ones has ended, 1: one may; 2, 3: after one, in an odd or even run of
        # zeros; 4: an odd one has ended.
        ((0, 1), (2, 0), (3, 4), (2, 3), (4, 4)),
        {0, 1, 3},
        lambda s: not re.fullmatch(r"(?:[01]*0)?1(?:11)*(?:0[01]*1)?0(?:00)*(?:1[01]*)?", s),
    ),
    (((1, 0), (2, 0), (3, 0), (3, 3)), {0, 1, 2}, lambda s: "000" not in s),
    (
        ((1, 2), (0, 3), (3, 0), (2, 1)),
        {0},
        lambda s: s.count("0") % 2 == 0 and s.count("1") % 2 == 0,
    ),
    (((1, 2), (2, 0), (0, 1)), {0}, lambda s: (s.count("0") - s.count("1")) % 3 == 0),
    (
        ((0, 1), (2, 1), (2, 3), (4, 3), (4, 4)),
        {0, 1, 2, 3},
        lambda s: bool(re.fullmatch(r"0*1*0*1*", s)),
    ),
)


def tomita(number: int) -> Language:
    """One of the seven languages of Tomita 1982: ones alone; (10)*; no odd run of zeros after an
    odd run of ones; no 000; both symbols even; as many of one as of the other modulo 3; 0*1*0*1*.

    Raises:
        ValueError: ``number`` is not from 1 to 7.
    """
    if type(number) is not int or not 1 <= number <= len(_TOMITA):
        raise ValueError(f"tomita: number must be from 1 to {len(_TOMITA)}, got {number!r}")
    table, accepting, recognise = _TOMITA[number - 1]
    return Language(f"tomita-{number}", "01", table, frozenset(accepting), recognise)


def s3() -> Language:
    """Products in the group of permutations of three, symbol after symbol; the language is that of
    the products that are the identity. ``states`` gives the products themselves."""
    group = tuple(itertools.permutations(range(3)))  # the identity first
    place = {p: i for i, p in enumerate(group)}
    table = tuple(tuple(place[tuple(q[p[i]] for i in range(3))] for q in group) for p in group)

    def recognise(s: str) -> bool:
        items = ["x", "y", "z"]
        for symbol in reversed(s):  # moves things about instead of composing maps
            items = [items[i] for i in group["abcdef".index(symbol)]]
        return items == ["x", "y", "z"]

    return Language("s3", "abcdef", table, frozenset({0}), recognise)


def every() -> list[Language]:
    """All that this module has, the families at a few sizes."""
    return [
        *(tomita(n) for n in range(1, 8)),
        *(modular(n) for n in (1, 2, 3, 5)),
        *(dyck(n) for n in (1, 2, 3)),
        parity(),
        even_pair(),
        flip_flop(),
        s3(),
    ]
