"""The course's colours and plot style, so that the same thing has the same colour in every lesson."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

__all__ = ["COLOURS", "SEQUENCE", "heatmap", "use_style"]

COLOURS = {
    "train": "#4361ee",  # what is trained on, and queries
    "val": "#f3722c",  # what is held out, and keys
    "good": "#2a9d5c",  # right, and values
    "bad": "#d1495b",  # wrong, and what goes wrong
    "baseline": "#8d99ae",  # what to compare with
    "accent": "#7b2cbf",  # the one thing to look at
    "query": "#4361ee",
    "key": "#f3722c",
    "value": "#2a9d5c",
}
SEQUENCE = ["#4361ee", "#f3722c", "#2a9d5c", "#7b2cbf", "#d1495b", "#00b4d8", "#8d99ae", "#b08900"]
"""For lines without a meaning of their own."""


def use_style() -> None:
    """Set matplotlib up for the course: legible at 90 dpi, light grid, no frame on top and right."""
    import matplotlib as mpl

    mpl.rcParams.update(
        {
            "figure.dpi": 90,
            "figure.figsize": (7.0, 3.4),
            "figure.constrained_layout.use": True,
            "font.size": 10.5,
            "axes.titlesize": 11.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.alpha": 0.25,
            "lines.linewidth": 2.0,
            "legend.frameon": False,
            "image.cmap": "viridis",
            "axes.prop_cycle": mpl.cycler(color=SEQUENCE),
            "savefig.facecolor": "white",
        }
    )


def heatmap(
    ax: Axes,
    values: Tensor,
    rows: list[str] | None = None,
    columns: list[str] | None = None,
    title: str = "",
    numbers: bool = False,
    vmin: float | None = None,
    vmax: float | None = None,
    cmap: str = "viridis",
) -> None:
    """A matrix as colours, with labels and, for small ones, its numbers written in."""
    values = values.detach().float()
    image = ax.imshow(values.numpy(), aspect="auto", vmin=vmin, vmax=vmax, cmap=cmap)
    ax.grid(False)
    ax.set_title(title)
    if columns is not None:
        ax.set_xticks(range(len(columns)), columns)
    if rows is not None:
        ax.set_yticks(range(len(rows)), rows)
    if numbers:
        for i in range(values.shape[0]):
            for j in range(values.shape[1]):
                light = image.norm(float(values[i, j])) < 0.6
                text = f"{values[i, j]:.2f}"
                ax.text(j, i, text, ha="center", va="center", color="white" if light else "black", fontsize=9)
