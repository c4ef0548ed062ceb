"""Folders of runs and suites as `train` and `compare` leave them, and what is in their pages."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from trainer.metrics import score

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    '" onmouseover="alert(3)',
    "<a href='javascript:alert(4)'>%{x} {{ 7 * 7 }} [red]x[/red]</a>",
)
RUN = """name = "planted <b>run</b>"
seed = 3
[data]
shards = "data/shards"
[backbone]
name = "mlp"
[method]
name = "mlora"
[pretrain]
metric = "mean_auc"
[adapt]
metric = "auc"
"""


def toy_scores(domains: tuple[str, ...], shift: float) -> dict[str, Any]:
    """Of 40 rows a domain; the last domain has one class when there are several."""
    rng = np.random.default_rng(7)
    domain = np.repeat(np.arange(len(domains)), 40)
    label = (rng.random(len(domain)) < 0.4).astype(np.float32)
    if len(domains) > 1:
        label[-40:] = 0
    logit = rng.normal(size=len(domain)) + shift * label
    return json.loads(json.dumps(score(label, logit, domain, domains).to_dict()))


def write_run(folder: Path, domains: tuple[str, ...], steps: int = 3) -> Path:
    """A finished run's folder, as `train` leaves it, without its tensors."""
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(RUN, encoding="utf-8")
    sizes = {"tables": 100, "dense": 50, "frozen": 0, "adapter": 10}
    summary = {
        "trunk": "0",
        "pretrain_seconds": 12.0,
        "shared": toy_scores(domains, 1.0),
        "adapted": toy_scores(domains, 1.2),
        "kept": list(domains[1:]),
        "skipped": {},
        "bad_steps": {},
        "corrupt_rows": {},
        "sizes": sizes,
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    for place, name in enumerate(domains):
        home = folder / "adapters" / "mlora" / f"domain-{place}" / "1"
        home.mkdir(parents=True)
        metrics = {"auc": 0.7, "shared_auc": 0.6, "seconds": 1.0, "steps": steps}
        manifest = {"domain": name, "kept": place > 0, "metrics": metrics}
        (home / "adapter.json").write_text(json.dumps(manifest), encoding="utf-8")
    pace = {"loss": 0.5, "rows_per_second": 1000.0, "waiting": 0.1, "seconds": 1.0}
    lines: list[dict[str, Any]] = []
    for phase, metric in (("pretrain", "mean_auc"), *((f"adapt {d}", "auc") for d in domains)):
        aucs = dict.fromkeys(domains if phase == "pretrain" else [phase[6:]], 0.65)
        for step in range(1, steps + 1):
            told = {"step": step, metric: 0.6 + step / 100, "log_loss": 0.5, "domains": aucs}
            lines.append({"time": 100.0 + len(lines), "phase": phase, **told, **pace})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def write_suite(folder: Path) -> Path:
    """Two models in three settings, one place still empty."""
    folder.mkdir(parents=True)
    models, settings = ["mlp", HOSTILE[0]], ["shared", "+adapters", "longer"]
    cells, table = [], []
    for model in models:
        for place, setting in enumerate(settings):
            if (model, setting) == (HOSTILE[0], "longer"):
                continue
            for seed in (1, 2, 3):
                scores = {**toy_scores(("a",), 1.0), "wauc": 0.7 + 0.01 * place + 0.001 * seed}
                run = f"runs/{len(cells)}"
                cell: dict[str, Any] = {"model": model, "setting": setting, "seed": seed}
                cell |= {"run": run, "scores": scores, "sizes": {}, "seconds": 2.0, "steps": 5}
                cells.append(cell | {"rows_per_second": 10.0, "latency_ms": {"1": 0.5, "32": 1.0}})
            mine = [c["scores"]["wauc"] for c in cells[-3:]]
            base = setting == "shared"
            one: dict[str, Any] = {"model": model, "setting": setting, "seeds": 3}
            one |= {"mean": sum(mine) / 3, "sd": 0.001, "change": None if base else 0.01 * place}
            one |= {"p": None if base else 0.2 if place == 2 else 0.0123, "rela_impr": None}
            one |= {"wauc": 0.7, "mean_auc": 0.7, "auc": None, "log_loss": 0.5, "steps": 5}
            one |= {"seconds": 2.0, "parameters": 150, "rows_per_second": 10.0}
            table.append(one | {"latency_ms": {"1": 0.5, "32": 1.0}})
    suite: dict[str, Any] = {"suite": "toy", "title": "A toy", "note": "Says nothing."}
    suite |= {
        "metric": "wauc",
        "base": "shared",
        "machine": {"cpu": "one"},
        "date": "2026-01-01",
        "grid": {},
    }
    suite |= {"models": models, "settings": settings, "seeds": [1, 2, 3]}
    suite |= {"cells": cells, "table": table}
    suite["axis"] = {"name": "width", "values": dict(zip(models, (1, 2), strict=True))}
    suite["published"] = {"source": "a paper", "figures": {"mlp": {"shared": 0.8015}}}
    (folder / "results.json").write_text(json.dumps(suite), encoding="utf-8")
    (folder / "results.csv").write_text("model\n", encoding="utf-8")
    return folder


class Parts(HTMLParser):
    """Tags, addresses, texts of cells, and the JSON of the figures."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.cells: list[str] = []
        self.values: list[float] = []
        self.json = ""
        self._inside, self._cell = "", False
        self.feed(page.read_text(encoding="utf-8"))
        self.figures = json.loads(self.json)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.handlers += [name for name in given if name.startswith("on")]
        self.addresses += [str(given[name]) for name in ("src", "href") if name in given]
        self.values += [float(str(given["data-value"]))] if "data-value" in given else []
        self._inside = "json" if given.get("id") == "figures" else tag
        if tag == "td":
            self.cells.append("")
            self._cell = True

    def handle_data(self, data: str) -> None:
        if self._inside == "json":
            self.json += data
        elif self._cell and self._inside != "small":
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""
        self._cell = self._cell and tag != "td"
