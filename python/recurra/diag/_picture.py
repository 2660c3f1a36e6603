"""The pictures of the diagnostics."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from recurra import _files


def add_option(parser, default: str) -> None:
    """--picture."""
    parser.add_argument(
        "--picture",
        metavar="FILE",
        default=default,
        help="a PNG, drawn where matplotlib is installed; default: %(default)s",
    )


def draw(path: str, panels: int, fill: Callable[[list], None]) -> str:
    """Draws ``panels`` axes side by side and says where.

    Args:
        path: the file.
        fill: is given the axes.
    """
    if not importlib.util.find_spec("matplotlib"):
        return "no picture: matplotlib is not installed"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    fill(list(axes))
    for each in axes:
        each.grid(alpha=0.3)
    _files.replace(Path(path), lambda to: figure.savefig(to, format="png", dpi=120))
    return f"picture: {path}"
