"""``recurra eval``."""

from __future__ import annotations

import argparse
import textwrap

_EPILOG = """\
    The text is read once, from the first token to the last, with the state carried all the way,
    in memory that does not depend on its length.

    examples
      recurra eval runs/first --data book.txt
      recurra eval mamba-130m-hf --data 'corpus/*.txt' --dtype bf16
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    from recurra.cli._model import add_model_options

    parser = commands.add_parser(
        "eval",
        help="bits per byte of a text under a trained model",
        description="Measures how well a trained model predicts a text.",
        epilog=textwrap.dedent(_EPILOG),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    add = parser.add_argument
    add(
        "--data",
        nargs="+",
        metavar="PATH",
        default=[],
        help="text files, folders or patterns; default: the Python standard library",
    )
    add("--chunk", type=int, default=1024, metavar="N", help="tokens at once; default: %(default)s")
    add("--max-tokens", type=int, metavar="N", help="read only so many")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from recurra.cli import _model
    from recurra.train.data import open_text
    from recurra.train.evaluate import evaluate

    for name in ("chunk", "max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    _model.set_threads(args.threads)
    text = open_text(args.data)
    model, tokenizer = _model.load(args.model, args.dtype, args.tokenizer)
    result = evaluate(model, tokenizer, text, chunk=args.chunk, max_tokens=args.max_tokens)
    print(
        f"{result.bits_per_byte:.4f} bits per byte, perplexity {result.perplexity:.4g} per token, "
        f"{result.tokens:,} tokens, {result.bytes:,} bytes, "
        f"{result.tokens_per_second:,.0f} tokens/s"
    )
    return 0
