"""Pictures: arrays in, files out; and nothing where there is nothing to show."""

import ast
import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import Seen
from tests.toy_ufin import CONFIGS, PLAIN, fresh, rows
from trainer import pictures
from trainer.pictures import draw_all
from trainer.sample import Sample


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that take less time."""
    monkeypatch.setattr(pictures, "DPI", 30)


EXPERTS, FIELDS, VECTORS = 3, 4, 2
NAMES = {"gains", "points", "shares", "matrices"}


def _sample(*counts: int, sizes: tuple[int, int] = (FIELDS, VECTORS)) -> Sample:
    """As of domains with this many rows each; domain i asks expert i most."""
    generator = np.random.default_rng(0)
    domain = np.repeat(np.arange(len(counts)), counts)
    gates = generator.random((len(domain), EXPERTS)) + 2 * np.eye(EXPERTS)[domain % EXPERTS]
    gates[gates == gates.min(1, keepdims=True)] = 0
    seen = {
        "points": Seen("features", torch.tensor(generator.normal(size=(len(domain), 6)))),
        "shares": Seen("experts", torch.tensor(gates), ("expert",)),
        "matrices": Seen(
            "orders",
            torch.tensor(generator.normal(size=(EXPERTS, *sizes))),
            ("expert", "feature", "vector"),
        ),
    }
    names = tuple(f"domain {number}" for number in range(len(counts)))
    return Sample(names, domain, np.arange(len(domain)), seen)


def _summary(*gains: float | None, kept: tuple[str, ...] = ("domain 0",)) -> dict[str, Any]:
    names = [f"domain {number}" for number in range(len(gains))]
    before = [{"domain": name, "rows": 10, "auc": 0.5} for name in names]
    after = [
        {"domain": name, "auc": None if gain is None else 0.5 + gain}
        for name, gain in zip(names, gains, strict=True)
    ]
    return {"kept": list(kept), "shared": {"domains": before}, "adapted": {"domains": after}}


NOBODY = _summary(kept=())


def _drawn(folder: Path, summary: dict[str, Any], found: Sample | None) -> dict[str, list]:
    """What was drawn: the numbers beside each picture. Nothing may fail in silence."""
    told: list[str] = []
    files = draw_all(summary, found, folder, told.append)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert not [line for line in told if "not drawn" in line]
    beside = {file.stem: file.with_suffix(".csv") for file in files}
    assert {path.stem for path in folder.glob("*")} == set(beside)
    return {name: list(csv.DictReader(path.open())) for name, path in beside.items()}


def test_each_kind_is_a_picture_and_its_numbers(tmp_path: Path) -> None:
    found = _sample(8, 7)
    gates = found.seen["shares"].values.numpy()
    drawn = _drawn(tmp_path, _summary(0.1, None), found)
    assert drawn.keys() == NAMES
    assert [float(row["auc_adapted"]) for row in drawn["gains"] if row["auc_adapted"]] == [0.6]
    assert [int(row["row_id"]) for row in drawn["points"]] == list(range(15))
    for row in drawn["shares"]:
        mine = gates[found.domain == found.domains.index(row["domain"])][:, int(row["expert"])]
        total = gates[found.domain == found.domains.index(row["domain"])].sum()
        assert float(row["share_of_weight"]) == pytest.approx(mine.sum() / total)
        assert float(row["share_of_rows"]) == pytest.approx((mine > 0).mean())
    orders = found.seen["matrices"].values
    for row in drawn["matrices"]:
        place = tuple(int(row[axis]) for axis in ("expert", "feature", "vector"))
        assert float(row["value"]) == float(orders[place])
    assert len(drawn["matrices"]) == orders.numel()


@pytest.mark.parametrize("counts", [(6, 0, 3), (1,) * 12])
def test_domains_with_few_rows_or_none(counts: tuple[int, ...], tmp_path: Path) -> None:
    drawn = _drawn(tmp_path, NOBODY, _sample(*counts, sizes=(1, 30)))
    assert drawn.keys() == NAMES - {"gains"}
    assert pictures.points(NOBODY, _sample(1, 1)) is None  # t-SNE wants five


def test_the_experts_shown_are_each_domains_top_one_and_a_shared_one() -> None:
    chosen = dict(pictures.chosen(_sample(40, 0, 40)))
    assert list(chosen) == [0, 2, 1]
    assert chosen[0] == "top of domain 0" and chosen[2] == "top of domain 2"
    assert chosen[1].startswith("shared: ")
    assert list(dict(pictures.chosen(_sample(40)))) == [0]


def test_a_picture_that_fails_is_told_and_loses_no_other(tmp_path: Path) -> None:
    found = _sample(8, 7)
    broken = found.seen["points"]._replace(values=torch.full((15, 6), torch.nan))
    told: list[str] = []
    found = replace(found, seen={"points": broken, "shares": found.seen["shares"]})
    files = draw_all(NOBODY, found, tmp_path, told.append)
    assert [file.stem for file in files] == ["shares"]
    assert told[0].startswith("pictures: points not drawn: ") and "NaN" in told[0]


def test_nothing_is_drawn_where_there_is_nothing_to_show(tmp_path: Path) -> None:
    assert _drawn(tmp_path / "none", NOBODY, None) == {}
    assert not (tmp_path / "none").exists()
    undefined = _summary(None, None)
    assert _drawn(tmp_path / "undefined", undefined, None) == {}
    plain = _sample(1)
    without = replace(plain, seen={"matrices": plain.seen["matrices"]})  # of experts nobody asked
    assert _drawn(tmp_path / "some", NOBODY, without) == {}


def test_ufin_shows_its_own_features_gates_and_orders() -> None:
    method, features = fresh(PLAIN), rows([0, 1, -1])
    seen, weights = method.pictured(features), method.pictured_weights()
    assert torch.equal(seen["points"].values, method.universal(features).flatten(1))
    assert torch.equal(seen["shares"].values, method.gates(features))
    assert torch.equal(weights["matrices"].values, method.orders())
    assert len(weights["matrices"].axes) == weights["matrices"].values.dim()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_ufin_shows_what_it_has(name: str) -> None:
    method = fresh(CONFIGS[name])
    assert method.shows == bool(method.pictured(rows([0])))
    assert method.shows == (CONFIGS[name].universal > 0)
    euler = method.shows and CONFIGS[name].interaction == "euler"
    assert bool(method.pictured_weights()) == euler


def test_drawing_is_imported_where_it_is_done() -> None:
    tree = ast.parse(Path(pictures.__file__).read_text(encoding="utf-8"))
    at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not {"matplotlib", "sklearn"} & {
        name.split(".")[0]
        for node in at_import
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [])
        + [alias.name for alias in node.names]
        if name
    }
