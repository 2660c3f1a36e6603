"""``recurra generate``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from recurra.cli import _common

_EPILOG = """\
    The text appears as it is made. Several prompts, of any lengths, are continued together and
    printed one after the other.

    examples
      recurra generate runs/first --prompt "def main("
      recurra generate runs/first --temperature 0 --prompt "import "
      recurra generate runs/first --top-p 0.9 --seed 7 --stop "\\n\\n" --prompt "class "
      recurra generate mamba-130m-hf --dtype bf16 --prompt "Once upon a time" --max-tokens 500
      recurra generate runs/first --prompt "for " --prompt "while " --tokens-per-second
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = _common.add_command(
        commands,
        "generate",
        run,
        _EPILOG,
        help="continue text with a trained model",
        description="Continues text with a trained model.",
    )
    _common.add_model_options(parser)
    add = parser.add_argument
    add("--prompt", action="append", metavar="TEXT", help="what to continue; may be repeated")
    add("--prompt-file", action="append", default=[], metavar="FILE", help="the same, from a file")
    add("--max-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    add(
        "--temperature",
        type=float,
        default=0.8,
        help="0 always takes the likeliest token; default: %(default)s",
    )
    add("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="only the likeliest tokens that have probability P together",
    )
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="1 for none")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends the text; \\n is a line")
    add("--seed", type=int, metavar="N", help="makes it repeatable")
    add("--tokens-per-second", action="store_true", help="say how fast it was")


def run(args: argparse.Namespace) -> int:
    from recurra.lm import Sampling, generate_text

    sampling = Sampling(
        repetition_penalty=args.repetition_penalty,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    _common.check_at_least_one(args, "max_tokens")
    _common.set_threads(args)
    prompts = list(args.prompt or [])
    prompts += [Path(name).read_text(errors="surrogateescape") for name in args.prompt_file]
    model, tokenizer = _common.load(args.model, args.dtype, args.tokenizer)
    prompts = prompts or ["\n"]
    stop = [s.replace("\\n", "\n") for s in args.stop]
    out = sys.stdout
    alone = len(prompts) == 1

    def show(row: int, text: str) -> None:
        if alone:
            out.write(text)
            out.flush()

    made: list[int] = []
    if alone:
        out.write(_printable(prompts[0]))
        out.flush()
    begin = time.perf_counter()
    texts = generate_text(
        model,
        tokenizer,
        prompts,
        max_tokens=args.max_tokens,
        sampling=sampling,
        stop=stop,
        on_text=show,
        on_token=lambda row, token: made.append(token),
    )
    seconds = time.perf_counter() - begin
    if alone:
        out.write("\n")
    else:
        for n, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
            out.write(f"== {n}\n{_printable(prompt)}{text}\n")
    out.flush()
    if args.tokens_per_second:
        rate = len(made) / seconds
        print(f"{len(made)} tokens, {rate:.1f} tokens/s with the prompt", file=sys.stderr)
    return 0


def _printable(text: str) -> str:
    return text.encode(errors="surrogateescape").decode(errors="replace")
