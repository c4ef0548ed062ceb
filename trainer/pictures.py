"""Pictures of what a run has learned, and beside each its numbers as a CSV file.

Each kind of `Method.pictured` is drawn in one way, whatever the method. Drawing takes a second to
import, so that happens where it is done.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards import Loader
from trainer.adapter_store import Adapter
from trainer.log import RunLog
from trainer.sample import Sample, sample
from trainer.trunk import Trunk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's, which the colour-blind tell apart, but for yellow; shapes help.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
SHAPES = "os^DvPX"
GREY = "#666666"
DPI = 150
TELL = 10
"""Cells along an axis, at most, into which their numbers are written."""


@dataclass(frozen=True)
class Picture:
    """One figure and its numbers."""

    name: str
    """Of its files"""
    head: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    draw: "Callable[[Figure], None]"
    size: tuple[float, float] = (7.0, 4.8)
    """Inches"""


def take_pictures(
    trunk: Trunk,
    adapters: Sequence[Adapter],
    test: Loader,
    summary: dict[str, Any],
    folder: Path,
    log: RunLog,
) -> None:
    """Every picture that there is something for, as files and in wandb. Collective."""
    found = sample(trunk, adapters, test)
    if trunk.ranks.first:
        log.pictures(draw_all(summary, found, folder, log.say))


def draw_all(
    summary: dict[str, Any], found: Sample | None, folder: Path, say: Callable[[str], None]
) -> list[Path]:
    """The PNG files that were drawn. What fails is told, and raises nothing: the run is done."""
    files = []
    for make in (gains, points, shares, matrices):
        try:
            picture = make(summary, found)
            files += [_save(picture, folder)] if picture else []
        except Exception as error:  # a finished run must not be lost for a picture
            say(f"pictures: {make.__name__} not drawn: {error}")
    if files:
        say(f"pictures: {', '.join(file.name for file in files)} in {folder}")
    return files


def _save(picture: Picture, folder: Path) -> Path:
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{picture.name}.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([picture.head, *picture.rows])
    figure = Figure(picture.size, dpi=DPI, layout="constrained")
    picture.draw(figure)
    path = folder / f"{picture.name}.png"
    figure.savefig(path)
    return path


def gains(summary: dict[str, Any], found: Sample | None) -> Picture | None:
    """What its adapter does for each domain, against how many rows that is measured on."""
    if not summary["kept"]:
        return None
    both = zip(summary["shared"]["domains"], summary["adapted"]["domains"], strict=True)
    rows = [
        (one["domain"], one["rows"], one["auc"], own["auc"], one["domain"] in summary["kept"])
        for one, own in both
    ]
    told = [row for row in rows if row[2] is not None and row[3] is not None]
    if not told:
        return None

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        note = "AUC on test rows with the domain's adapter, less that of the shared part alone"
        _frame(axes, "What adapters change", note)
        axes.axhline(0, color=GREY, linewidth=0.8)
        for kept, face, label in ((True, COLOURS[0], "kept"), (False, "white", "not kept")):
            some = [(row[1], row[3] - row[2]) for row in told if row[4] is kept]
            if some:
                axes.scatter(*np.transpose(some), s=36, c=face, edgecolors=COLOURS[0], label=label)
        decades = np.log10([row[1] for row in told])
        limits = 10 ** np.floor(decades.min()), 10 ** (np.floor(decades.max()) + 1)
        axes.set(xscale="log", xlabel="test rows of the domain", ylabel="change of AUC")
        axes.set_xlim(*limits)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter("")
        axes.margins(y=0.12)
        _legend(axes, "adapter")
        figure.draw_without_rendering()  # or no text would know its place
        _names(axes, [(row[0], row[1], row[3] - row[2]) for row in told])

    return Picture("gains", ("domain", "rows", "auc_shared", "auc_adapted", "kept"), rows, draw)


def points(summary: dict[str, Any], found: Sample | None) -> Picture | None:
    """Where rows lie: t-SNE, a colour for each domain."""
    seen = found.seen.get("points") if found else None
    shown = len(COLOURS)
    if found is None or seen is None or (found.domain < shown).sum() < 5:
        return None
    few = found.domain < shown
    place = _tsne(seen.values.numpy()[few])
    names = [found.domains[domain] for domain in found.domain[few]]
    rows = list(zip(names, found.row_id[few].tolist(), *place.T.tolist(), strict=True))
    which = f"of the {shown} largest domains" if len(found.domains) > shown else "by domain"

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        note = "t-SNE: neighbours are alike to the model; sizes of groups and gaps say little"
        _frame(axes, f"{seen.name.capitalize()} of test rows, {which}", note)
        for domain, name in enumerate(found.domains[:shown]):
            mine = place[found.domain[few] == domain]
            style = {"color": COLOURS[domain], "marker": SHAPES[domain]}
            label = f"{name} ({len(mine)})"
            axes.scatter(*mine.T, s=13, alpha=0.65, linewidths=0, label=label, **style)
        axes.set(xticks=[], yticks=[], xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)")
        _legend(axes, "domain (rows)")

    return Picture("points", ("domain", "row_id", "x", "y"), rows, draw)


def _tsne(values: np.ndarray) -> np.ndarray:
    """[n, 2] for [n, d], n of 5 or more."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(values) - 1) / 3)
    return TSNE(perplexity=perplexity, random_state=0).fit_transform(values)


def shares(summary: dict[str, Any], found: Sample | None) -> Picture | None:
    """How much each domain asks of each expert: share of the weight, and of rows."""
    if found is None or "shares" not in found.seen:
        return None
    seen = found.seen["shares"]
    weight, asked = _load(found)
    rows = [
        (name, expert, weight[domain, expert], asked[domain, expert])
        for domain, name in enumerate(found.domains)
        for expert in range(weight.shape[1])
    ]
    titles = ("share of the gate's weight", "share of rows that ask it")

    def draw(figure: "Figure") -> None:
        figure.suptitle(f"Load of {seen.name}, by domain, on test rows", fontsize=11)
        for axes, values, title in zip(
            figure.subplots(1, 2, sharey=True), (weight, asked), titles, strict=True
        ):
            image = _cells(axes, 100 * values, "Blues", (0, 100 * np.nanmax(values)), 0)
            axes.set_title(f"{title} (%)", fontsize=9, color=GREY)
            axes.set_xlabel(seen.axes[0])
            axes.set_yticks(range(len(found.domains)), found.domains)
            figure.colorbar(image, ax=axes, shrink=0.8)

    experts, domains = weight.shape[1], len(found.domains)
    size = (min(4 + 0.9 * experts, 16), 2.2 + 0.35 * domains)
    head = ("domain", "expert", "share_of_weight", "share_of_rows")
    return Picture("shares", head, rows, draw, size)


def _load(found: Sample) -> tuple[np.ndarray, np.ndarray]:
    """[domains, L] each domain's share of weight in each expert, and of rows that ask it; NaN for
    a domain without rows."""
    values = found.seen["shares"].values.numpy().astype(np.float64)
    each = [values[found.domain == domain] for domain in range(len(found.domains))]
    with np.errstate(invalid="ignore"):
        weight = np.array([rows.sum(0) / rows.sum() for rows in each])
        return weight, np.array([(rows > 0).sum(0) / len(rows) for rows in each])


def matrices(summary: dict[str, Any], found: Sample | None) -> Picture | None:
    """What the top expert of each domain has learned, and one that all domains share."""
    if found is None or not {"shares", "matrices"} <= found.seen.keys():
        return None
    seen, values = found.seen["matrices"], found.seen["matrices"].values.cpu().numpy()
    told = dict(chosen(found))
    rows = [(*place, float(value)) for place, value in np.ndenumerate(values)]
    bound = max(float(np.abs(values[list(told)]).max()), 1e-6)
    wide = min(len(told), 3)
    tall = -(-len(told) // wide)

    def draw(figure: "Figure") -> None:
        figure.suptitle(f"{seen.name.capitalize()} that experts have learned", fontsize=11)
        grid = figure.subplots(tall, wide, squeeze=False).flatten()
        image = None
        for axes, (expert, words) in zip(grid, told.items(), strict=False):
            image = _cells(axes, values[expert].T, "PuOr", (-bound, bound), 2)
            axes.set_title(f"{seen.axes[0]} {expert}\n{words}", fontsize=8)
            axes.set(xlabel=seen.axes[1], ylabel=seen.axes[2])
        for axes in grid[len(told) :]:
            axes.set_axis_off()
        assert image is not None
        figure.colorbar(image, ax=list(grid), label=seen.name, shrink=0.8)

    head = (*(axis.replace(" ", "_") for axis in seen.axes), "value")
    return Picture("matrices", head, rows, draw, (3.6 * wide + 1, 3.6 * tall))


def chosen(found: Sample) -> Iterator[tuple[int, str]]:
    """Experts, and why they are shown."""
    present = np.unique(found.domain)[: len(COLOURS)]
    weight = _load(found)[0][present]
    top = weight.argmax(1)
    for expert in dict.fromkeys(top.tolist()):
        names = [found.domains[domain] for domain in present[top == expert]]
        yield expert, f"top of {', '.join(names)}"
    least = weight.min(0)
    least[top] = 0
    shared = int(least.argmax())
    if len(weight) > 1 and least[shared] >= 0.01:
        yield shared, f"shared: {least[shared]:.0%} or more of each domain's weight"


def _cells(
    axes: "Axes", values: np.ndarray, colours: str, limits: tuple[float, float], digits: int
) -> Any:
    """A heat map, with its numbers where there is room for them."""
    image = axes.imshow(values, colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(values.shape[0]))
    if values.shape[1] <= TELL:
        for (row, column), value in np.ndenumerate(values):
            told = f"{np.round(value, digits) + 0.0:.{digits}f}" if np.isfinite(value) else ""
            dark = sum(image.cmap(image.norm(value))[:3]) < 1.5
            style = {"ha": "center", "va": "center", "fontsize": 7}
            axes.text(column, row, told, color="white" if dark else "black", **style)
    return image


def _frame(axes: "Axes", title: str, note: str) -> None:
    axes.set_title(f"{title}\n", loc="left", fontsize=11)
    axes.text(0, 1.02, note, transform=axes.transAxes, fontsize=8, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: "Axes", title: str) -> None:
    """Beside the axes, where it covers nothing."""
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)}
    axes.legend(title=title, frameon=False, fontsize=8, title_fontsize=8, **place)


def _names(axes: "Axes", told: Sequence[tuple[str, float, float]]) -> None:
    """Names beside points, the farthest from 0 first; one that would cover another is left out."""
    taken = []
    for name, x, y in sorted(told, key=lambda one: -abs(one[2])):
        at = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 7, "color": GREY}
        text = axes.annotate(name, (x, y), **at)
        box = text.get_window_extent()
        if any(box.overlaps(other) for other in taken):
            text.remove()
        else:
            taken.append(box)
