"""The report of one run, from what its folder holds so far."""

import json
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_shards import UserError
from launch.report_curves import Curve, adapter_sparks, curves, learning, pace
from launch.report_figures import adapter_sizes, domain_rates, gains, reliability
from launch.report_page import Cell, Image, Page, Section, Sparks, Table, image, ranked
from trainer.adapter_store import quoted
from trainer.log import lines_of
from trainer.report import change, figure
from trainer.run_folder import RUN_FILE, SUMMARY

# What stands on a run's own pictures, for those who cannot see them; `gains` is drawn anew.
ALT = {
    "points": "Learned vectors of test rows in two dimensions, coloured by domain",
    "shares": "Load of each expert by domain, by weight and by rows, as a heat map",
    "matrices": "What the top expert of each domain has learned, as heat maps",
}


@dataclass(frozen=True)
class Record:
    """A run's folder as it was read."""

    folder: Path
    text: str
    run: dict[str, Any]
    lines: list[dict[str, Any]]
    summary: dict[str, Any] | None
    adapters: dict[str, dict[str, Any]]
    """By domain, the manifest of the newest, and `bytes`"""
    added: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Of a run that is done, is still going on, or was cut off."""
        text = (folder / RUN_FILE).read_text(encoding="utf-8")
        try:
            run = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{folder / RUN_FILE}: not TOML ({error}); restore it") from None
        if not {"name", "method", "backbone"} <= run.keys():
            raise UserError(
                f"{folder / RUN_FILE}: not a run file as `train` writes it (it has no name, method "
                "or backbone); give the folder that `train` made"
            )
        summary = folder / SUMMARY
        return cls(
            folder,
            text,
            run,
            lines_of(folder / "metrics.jsonl"),
            json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else None,
            _adapters(folder / "adapters" / quoted(run["method"]["name"])),
            [_json(path) for path in sorted(folder.glob("added/*.json"))],
        )

    @property
    def two_phases(self) -> bool:
        """Whether adapters learned after the shared part, and only those that beat it are kept."""
        one_phase = self.run.get("pretrain", {}).get("one_phase", False)
        return "adapt" in self.run.get("phases", ("adapt",)) and not one_phase

    @property
    def phase_2_seconds(self) -> float:
        """Of the run's own domains, without those that were added later."""
        later = {one["domain"] for one in self.added}
        own = [one["metrics"] for domain, one in self.adapters.items() if domain not in later]
        return sum(float(metrics.get("seconds", 0)) for metrics in own)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _adapters(root: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for home in sorted(root.glob("*/")):
        versions = [path for path in home.glob("*/adapter.json") if path.parent.name.isdigit()]
        if versions:
            newest = max(versions, key=lambda path: int(path.parent.name))
            manifest = _json(newest)
            size = sum(file.stat().st_size for file in newest.parent.iterdir())
            found[manifest["domain"]] = manifest | {"bytes": size}
    return found


def run_page(folder: Path) -> Page:
    """What there is to say of a run."""
    record = Record.read(folder)
    learned = curves(record.lines, record.run)
    sections = [*_results(record), *_learning(record, learned)]
    if record.added:
        sections.append(Section("Domains added later", [_added(record.added)]))
    sections += [*_state(record), *_pictures(folder)]
    return Page(
        title=record.run["name"],
        what=_what(record),
        headlines=_headlines(record),
        sections=sections,
        facts=_facts(record),
        links=_links(folder),
        status=_status(record, learned),
        source=record.text,
    )


def _what(record: Record) -> str:
    run = record.run
    what = f"{run['method']['name']} on {run['backbone']['name']}, seed {run.get('seed', 1)}"
    if record.summary is None:
        return what
    shared = record.summary["shared"]["domains"]
    rows = sum(one["rows"] for one in shared)
    plural = "s" if len(shared) != 1 else ""
    return f"{what}, {len(shared)} domain{plural}, {rows:,} test rows"


def _status(record: Record, learned: list[Curve]) -> str:
    if record.summary is not None:
        return ""
    if not learned:
        return "Not finished: nothing has been measured yet."
    last = learned[-1]
    best = "" if last.values[-1] is None else f", validation {last.metric} {last.values[-1]:.5f}"
    return (
        f"Not finished: last heard of in “{last.phase}”, step {last.steps[-1]:,}{best}. "
        "Started again, `train` goes on from its newest checkpoint."
    )


def _headlines(record: Record) -> list[tuple[str, str, str]]:
    summary = record.summary
    if summary is None:
        return []
    shared, adapted, sizes = summary["shared"], summary["adapted"], summary["sizes"]
    told = []
    for key, label in (("wauc", "WAUC"), ("log_loss", "Log loss")):
        value, more = figure(shared[key]), "shared part, test rows"
        if adapted is not None:
            value, more = figure(adapted[key]), f"with adapters; {value} shared"
            more += f" ({change(shared[key], adapted[key])})" if shared[key] is not None else ""
        told.append((label, value, more))
    if adapted is not None:
        of = len(shared["domains"])
        why = "beat the shared part" if record.two_phases else "learned with the shared part"
        told.append(("Adapters kept", f"{len(summary['kept'])} of {of}", why))
    trunk = sizes["tables"] + sizes["dense"] + sizes.get("frozen", 0)
    share = f"largest adapter {sizes['adapter']:,}" if sizes["adapter"] else "no adapter kept"
    told.append(("Parameters", f"{trunk:,}", share))
    some = record.adapters and record.two_phases
    more = f"and {_time(record.phase_2_seconds)} for adapters" if some else ""
    return [*told, ("Pretraining", _time(summary["pretrain_seconds"]), more)]


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _results(record: Record) -> list[Section]:
    summary = record.summary
    if summary is None:
        return []
    parts = [*gains(summary), domain_table(summary, record.adapters)]
    note = "\n".join(f"No adapter: {reason}" for reason in summary["skipped"].values())
    calibration = [*reliability(summary), *domain_rates(summary)]
    return [
        Section("Domains", parts, note),
        Section("Calibration", calibration, "Whether as many click as were predicted to."),
    ]


def domain_table(summary: dict[str, Any], adapters: dict[str, dict[str, Any]]) -> Table:
    """Per domain, the largest first; all rows together at the end."""
    shared, adapted = summary["shared"], summary["adapted"]
    after = {one["domain"]: one for one in adapted["domains"]} if adapted else {}
    head = ["domain", "test rows", "click rate", "AUC", "log loss", "calibration"]
    if adapted:
        head[3:] = ["AUC shared", "+ adapter", "change", "log loss shared", "+ adapter"]
        head += ["calibration", "adapter", "KB"]
    rows = []
    for one in sorted(shared["domains"], key=lambda one: -one["rows"]):
        scores = _scores(one, after.get(one["domain"]))
        if adapted:
            kept = "kept" if one["domain"] in summary["kept"] else "–"
            size = adapters[one["domain"]]["bytes"] / 1000 if one["domain"] in adapters else None
            scores += [Cell(kept), Cell("–" if size is None else f"{size:,.1f}", size)]
        rows.append([Cell(one["domain"]), *_rows(one["rows"], one["positives"]), *scores])
    brief = (0, 1, 3, 4, 5, 6, 7, 9) if adapted else (0, 1, 3, 4)
    total = [sum(one[key] for one in shared["domains"]) for key in ("rows", "positives")]
    last = [*_rows(total[0], total[1]), *_scores(shared, adapted)]
    end = [Cell("all rows mixed"), *last, *([Cell(""), Cell("")] if adapted else [])]
    note = "Calibration is mean prediction by click rate: 1 is right."
    if shared["undefined"]:
        note += f" {shared['undefined']} domains have rows of one class: no AUC, not in WAUC."
    return Table("Test rows, domain by domain", head, rows, note, brief=brief, total=end)


def _rows(rows: int, positives: int) -> list[Cell]:
    return [Cell(f"{rows:,}", rows), Cell(f"{positives / rows:.2%}", positives / rows)]


def _scores(before: dict[str, Any], after: dict[str, Any] | None) -> list[Cell]:
    """AUC and log loss, the better one marked, and calibration of what serves."""
    cells = []
    for key in ("auc", "log_loss"):
        values = [one[key] for one in (before, after) if one is not None]
        marks = ranked(values, lower_is_better=key == "log_loss")
        marks = [mark if mark == "best" else "" for mark in marks]
        cells += [Cell(figure(v), v, mark) for v, mark in zip(values, marks, strict=True)]
        if key == "auc" and after is not None:
            gain = None if None in values else after["auc"] - before["auc"]
            cells.append(Cell(change(before["auc"], after["auc"]), gain))
    value = (after or before)["calibration"]
    return [*cells, Cell("undefined" if value is None else f"{value:.3f}", value)]


def _learning(record: Record, learned: list[Curve]) -> list[Section]:
    base = {
        domain: (one["metrics"].get(f"shared_{record.run['adapt']['metric']}"), one["kept"])
        for domain, one in record.adapters.items()
    }
    parts = [*learning(learned, base), *adapter_sparks(learned, base)]
    return [Section("Learning", parts)] if parts else []


def _added(added: list[dict[str, Any]]) -> Table:
    head = ["domain", "test rows", "AUC shared", "+ adapter", "change", "kept", "seconds", "moved"]
    rows = []
    for one in added:
        before, after = one["shared"]["domains"][0], one["adapted"]["domains"][0]
        told = [Cell(f"{before['rows']:,}", before["rows"]), *_scores(before, after)[:3]]
        moved = ", ".join(one["moved"]) or f"nothing of {one['others']} others"
        kept, seconds = "yes" if one["kept"] else "no", one["seconds"]
        rows.append([Cell(one["domain"]), *told, Cell(kept), Cell(f"{seconds:.1f}", seconds)])
        rows[-1].append(Cell(moved))
    return Table("", head, rows, brief=(0, 1, 2, 3, 4, 5))


def _state(record: Record) -> list[Section]:
    parts = pace(record.lines)
    if record.summary:
        parts += adapter_sizes(record.adapters, record.summary)
    return [Section("Speed and size", parts)] if parts else []


def _pictures(folder: Path) -> list[Section]:
    files = [path for path in sorted(folder.glob("pictures/*.png")) if path.stem in ALT]
    parts: list[Image | Sparks] = [
        image(path, ALT[path.stem], f"pictures/{path.stem}.csv") for path in files
    ]
    return [Section("Pictures of the method", parts)] if parts else []


def _facts(record: Record) -> dict[str, str]:
    """What it ran on, where that is known."""
    starts = [line for line in record.lines if line["phase"] == "start"]
    facts = {"shards": str(record.run.get("data", {}).get("shards", ""))}
    if record.lines:
        first, last = record.lines[0]["time"], record.lines[-1]["time"]
        facts["from"] = f"{datetime.fromtimestamp(first, UTC):%Y-%m-%d %H:%M} UTC"
        facts["to"] = f"{datetime.fromtimestamp(last, UTC):%Y-%m-%d %H:%M} UTC"
    if starts:
        now = starts[-1]
        facts["ranks"] = f"{now['ranks']} ({now['device']})"
        facts["started"] = "once" if len(starts) == 1 else f"{len(starts)} times"
        facts["machine"] = f"{now['cpu']}, {now['cores']} cores, {now['memory_gib']} GiB"
        facts["packages"] = ", ".join(f"{name} {v}" for name, v in now["packages"].items())
    skipped = (record.summary or {}).get("bad_steps", {})
    if skipped:
        facts["steps skipped"] = ", ".join(f"{phase}: {n}" for phase, n in skipped.items())
    corrupt = (record.summary or {}).get("corrupt_rows", {})
    if corrupt:
        facts["corrupt rows left out"] = ", ".join(f"{p}: {n:,}" for p, n in corrupt.items())
    return facts


def _links(folder: Path) -> list[tuple[str, str]]:
    names = [SUMMARY, "metrics.jsonl", RUN_FILE]
    files = [folder / name for name in names if (folder / name).exists()]
    files += [*sorted(folder.glob("pictures/*.csv")), *sorted(folder.glob("added/*.json"))]
    paths = [file.relative_to(folder).as_posix() for file in files]
    return [(path, path) for path in paths]
