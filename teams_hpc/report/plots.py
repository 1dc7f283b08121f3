"""Figures of the report as inline SVG, one look for all of them."""

import io
from collections.abc import Mapping, Sequence, Set

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PALETTE = ("#2563a8", "#d9822b", "#2f8f5b", "#b13a54", "#6d55a3", "#7a7f87", "#1f9bb3", "#a89132")
_GREY = "#8a9099"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "teams_hpc",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.axisbelow": True,
    "xtick.color": "#444a52",
    "ytick.color": "#444a52",
    "legend.frameon": False,
}

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Points by name: x values and y values."""


def _figure(width: float = 6.4, height: float = 3.1) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def lines(
    series: Series,
    *,
    x_label: str,
    y_label: str,
    levels: Mapping[str, float] | None = None,
    markers: Set[str] = frozenset(),
    are_shares: bool = False,
) -> str:
    """Curves, with dashed horizontal lines for `levels`; names in `markers` get points.

    Shares are drawn between 0 and 1, whatever part of that they take.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        for number, (name, (x, y)) in enumerate(series.items()):
            colour = PALETTE[number % len(PALETTE)]
            (line,) = axes.plot(x, y, label=name, color=colour, linewidth=1.5)
            if name in markers:
                line.set(marker="o", markersize=3.5)
        for number, (name, level) in enumerate((levels or {}).items()):
            dashes = ("--", ":", "-.")[number % 3]
            axes.axhline(level, color="#555b63", linestyle=dashes, linewidth=1.2, label=name)
        axes.set(xlabel=x_label, ylabel=y_label)
        if are_shares:
            axes.set_ylim(-0.02, 1.02)
        axes.legend(loc="best", fontsize=8.5)
        return _svg(figure)


def stacked_bars(
    columns: Sequence[str], parts: Mapping[str, Sequence[float]], *, x_label: str, y_label: str
) -> str:
    """One bar for each column, split into parts."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        floor = [0.0] * len(columns)
        for number, (name, values) in enumerate(parts.items()):
            axes.bar(columns, values, bottom=floor, label=name, color=PALETTE[number], width=0.7)
            floor = [low + value for low, value in zip(floor, values, strict=True)]
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(visible=False, axis="x")
        figure.legend(loc="outside right upper", fontsize=8.5)
        return _svg(figure)


def stacked_rows(rows: Sequence[str], parts: Mapping[str, Sequence[float]], *, x_label: str) -> str:
    """One horizontal bar for each row, split into parts; for names too long to stand below bars."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(height=0.9 + 0.3 * max(1, len(rows)))
        start = [0.0] * len(rows)
        for number, (name, values) in enumerate(parts.items()):
            axes.barh(rows, values, left=start, label=name, color=PALETTE[number], height=0.7)
            start = [low + value for low, value in zip(start, values, strict=True)]
        axes.set(xlabel=x_label)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside right upper", fontsize=8.5)
        return _svg(figure)


def bars(values: Mapping[str, float], *, x_label: str) -> str:
    """Horizontal bars with their numbers."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(height=0.55 + 0.33 * max(1, len(values)))
        names = list(values)[::-1]
        drawn = axes.barh(names, [values[name] for name in names], color=PALETTE[0], height=0.65)
        axes.bar_label(drawn, fmt="{:,.4g}", padding=4, fontsize=8.5)
        axes.set(xlabel=x_label)
        axes.margins(x=0.12)
        axes.grid(visible=False, axis="y")
        return _svg(figure)


def histograms(samples: Mapping[str, Sequence[float]], *, x_label: str) -> str:
    """Overlaid histograms as shares, cut at the 99th percentile."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        everything = sorted(value for values in samples.values() for value in values)
        top = everything[int(0.99 * (len(everything) - 1))] if everything else 1.0
        edges = [top * i / 30 for i in range(31)]
        for number, (name, values) in enumerate(samples.items()):
            if not values:
                continue
            axes.hist(
                values,
                bins=edges,
                weights=[1 / len(values)] * len(values),
                histtype="stepfilled",
                alpha=0.35,
                color=PALETTE[number],
                edgecolor=PALETTE[number],
                label=name,
            )
        axes.set(xlabel=x_label, ylabel="share")
        axes.legend(fontsize=8.5)
        return _svg(figure)


def roc(curves: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Receiver operating characteristics with the diagonal of a blind guess."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(width=4.2, height=3.6)
        axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=1.2, label="guessing")
        for number, (name, points) in enumerate(curves.items()):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=PALETTE[number], linewidth=1.6, label=name)
        axes.set(xlabel="false-positive rate", ylabel="true-positive rate", aspect="equal")
        axes.legend(fontsize=8.5, loc="lower right")
        return _svg(figure)
