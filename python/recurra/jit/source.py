"""What the text of a cell says of itself."""

from __future__ import annotations

import re

from recurra.jit.compile import compile_error
from recurra.ops.rnn import CellInfo

# Of csrc/rnn/cell_rows.h.
MOST = {"inputs": 4, "states": 4, "params": 8}

# NVRTC ends at a NUL, a surrogate has no bytes, and a byte order mark is for the start of a file.
_NOT_TEXT = re.compile(r"\A\ufeff|[\x00\ud800-\udfff]")
# Where braces and names mean nothing; and numbers, whose apostrophes open no literal.
_OPAQUE = re.compile(
    r"(?P<comment>//(?:[^\\\n]|\\.)*|/\*.*?\*/)"
    r'|R"(?P<mark>[^()\\\s"]*)\(.*?\)(?P=mark)"|"(?:[^"\\\n]|\\.)*"'
    r"|'(?:[^'\\\n]|\\.)*'|\b\d(?:'?[\w.])*",
    re.DOTALL,
)
_BRACE = re.compile(
    r"(?:\b(?:struct|class)\s+(?P<struct>[A-Za-z_]\w*)(?:\s+final)?\s*(?::[^{};]*)?)?\{|\}"
)
_PREPROCESSED = re.compile(r"^[ \t]*#[ \t]*(?:if|define)", re.MULTILINE)
_NAMESPACE = re.compile(r"\bnamespace\s+recurra\s*::\s*RECURRA_ISA\s*\{")
_NAME = re.compile(r'\bname\s*=\s*"(\w+)"')
_OUTPUT = re.compile(r"\boutput\s*=\s*(\d+)\s*;")


def _fail(message: str) -> None:
    raise ValueError(f"jit.cell: {message}")


def _blank(found: re.Match) -> str:
    return re.sub(r"[^\n]", " ", found[0])


def _unmatched(code: str) -> list[re.Match]:
    """The braces without another, each { with the head of its struct."""
    left = []
    for brace in _BRACE.finditer(code):
        if brace[0] == "}" and left and left[-1][0] != "}":
            left.pop()
        else:
            left.append(brace)
    return left


def _check_braces(code: str) -> None:
    left = _unmatched(code)
    if left and not _PREPROCESSED.search(code):  # which may choose among braces, or make them
        brace = left[-1]
        line = code.count("\n", 0, brace.end()) + 1
        wrong = "this } closes nothing" if brace[0] == "}" else "this { is never closed"
        raise compile_error(f"cell.h:{line}: error: {wrong}")


def _names(text: str, what: str) -> tuple[str, ...]:
    found = re.findall(rf"\b{what}\s*=\s*names\(([^()]*)\)", text)
    if len(found) != 1:
        _fail(
            f'source must hold one cell, with one line `static constexpr auto {what} = names("...")'
            f";`, got {len(found)}"
        )
    names = tuple(name.strip() for name in found[0].split(",")) if found[0].strip() else ()
    if not all(re.fullmatch(r'"\w+"', name) for name in names):
        _fail(f"{what} must be names in quotes, got {found[0]:.60}")
    names = tuple(name.strip('"') for name in names)
    least = 0 if what == "params" else 1
    if not least <= len(names) <= MOST[what]:
        _fail(f"{what} must be from {least} to {MOST[what]} names, got {len(names)}")
    return names


def read(source: str) -> tuple[str, CellInfo]:
    """The struct of a cell, as C++ finds it from the namespace of the engines, and its names.

    Raises:
        CompileError: a brace is missing or too many.
        ValueError: the text is not one cell; says what it must have.
    """
    if found := _NOT_TEXT.search(source):
        line = source.count("\n", 0, found.start()) + 1
        _fail(f"source must be plain text, got U+{ord(found[0]):04X} in line {line}")
    text = _OPAQUE.sub(lambda found: _blank(found) if found["comment"] else found[0], source)
    code = _OPAQUE.sub(_blank, source)
    _check_braces(code)
    inputs, states, params = (_names(text, what) for what in MOST)
    begin = re.search(r"\binputs\s*=\s*names\(", text).start()
    around = [brace["struct"] for brace in _unmatched(code[:begin]) if brace["struct"]]
    if not around:
        _fail("source must hold a struct with the names and the step of a cell")
    output = _OUTPUT.findall(text)
    if len(output) != 1 or int(output[0]) >= len(states):
        _fail(
            "source must say which state is the output, `static constexpr int output = N;` with "
            f"N < {len(states)}, got {', '.join(output) or 'nothing'}"
        )
    name = _NAME.search(text)
    struct = around[-1] if _NAMESPACE.search(code) else f"jit::{around[-1]}"
    called = name[1] if name else around[-1]
    return struct, CellInfo(called, inputs, states, params, states[int(output[0])], {})


def program(source: str, struct: str, info: CellInfo) -> str:
    """The text of a cell, whose lines keep their numbers, in the namespace of the engines.

    Behind it stand their includes.
    """
    begin, end = ("namespace recurra::RECURRA_ISA::jit {", "}") if "::" in struct else ("", "")
    sizes = (("inputs", info.inputs), ("states", info.states), ("params", info.params))
    same = "".join(
        f"static_assert(decltype(The::{what})::size == {len(names)});\n" for what, names in sizes
    )
    return (
        f'#include "recurra/cells/pack.h"\n{begin}\n#line 1 "cell.h"\n{source}\n'
        f'#line 1 "program"\n{end}\n#define RECURRA_CELL {struct}\n'
        f"namespace recurra::RECURRA_ISA {{\nusing The = {struct};\n{same}"
        f"static_assert(The::output == {info.states.index(info.output)});\n}}\n"
    )
