"""Whole runs: the trunk stands still (M3), domains come and go (S4, S5), exact scores (S9)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from data_shards import UserError
from launch.__main__ import main
from tests.gang import gang
from tests.toy_run import ADDED, SIZES, adapters_at, planted_rows
from tests.toy_story import LATER, Story, live, scores_of, write_sets
from trainer import adding
from trainer.metrics import Scores

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def sets(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_sets`."""
    folder = tmp_path_factory.mktemp("sets")
    write_sets(toy, folder)
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("schedule")


@pytest.fixture(scope="module")
def story(toy: Path, sets: Path, output: Path) -> Story:
    first, second = gang(2, live, toy, sets, output)
    assert first.told == second.told and first.files == second.files
    assert first.scores == second.scores and first.added["moved"] == second.added["moved"]
    return first


def test_m3_adapting_moves_no_byte_of_the_trunk_nor_of_its_optimizer(story: Story) -> None:
    dense = 6  # weights and biases: two hidden layers, the last one
    tables = 4 * 3  # of all ranks: weight and two moments of each
    domains = (*story.summary["kept"], *[d for d in SIZES if d not in story.summary["kept"]])
    learned = [line for line in story.watched if line.endswith("learned")]
    assert story.watched == learned, "no tensor moved"
    assert {line.split()[-2] for line in learned} == {*domains, "games"} - {"tiny"}
    assert all(dense < int(line.split()[0]) <= dense + tables for line in learned)


def test_a_run_says_what_it_did(story: Story, output: Path) -> None:
    saved = json.loads((output / "toy" / "summary.json").read_text(encoding="utf-8"))
    assert saved == json.loads(json.dumps(story.summary))
    assert story.summary["kept"] and set(story.summary["kept"]) < set(SIZES)
    assert set(story.summary["skipped"]) == {"tiny"}
    assert "9 training rows, adapt.min_rows asks for 20" in story.summary["skipped"]["tiny"]
    assert saved["adapted"]["wauc"] > saved["shared"]["wauc"]


def test_s4_adding_a_domain_changes_no_file_of_the_others(story: Story) -> None:
    assert story.files["added, without games"] == story.files["trained"]
    assert story.files["added"].keys() > story.files["trained"].keys()
    assert story.added["moved"] == [] == story.again["moved"]
    assert story.added["others"] == 3


def test_an_added_domain_owns_rows_for_its_own_ids(story: Story, output: Path) -> None:
    games = adapters_at(output / "toy")["games"]
    for field in ("user", "item"):
        count = story.added["own_ids"][field]
        assert 0 < count == len(games[f"own_rows/{field}"])
        assert games[f"own_rows/{field}"].abs().sum() > 0
    assert "own_rows/tags" not in games
    assert story.added["kept"]
    assert story.added["adapted"]["auc"] > story.added["shared"]["auc"]


def test_s5_removing_a_domain_changes_no_file_and_no_logit_of_the_others(story: Story) -> None:
    assert story.files["removed"] == story.files["without books"]
    before, after = story.predictions["added"], story.predictions["removed"]
    assert before is not None and after is not None
    assert np.array_equal(before.row_id, after.row_id)
    others = np.array(before.domains)[before.domain] != "books"
    same = before.logit.view(np.uint32) == after.logit.view(np.uint32)
    assert same[others].all() and not same[~others].any()


def test_an_adapter_comes_out_the_same_whenever_it_is_trained(story: Story) -> None:
    in_train, added_again = story.books
    assert in_train.keys() == added_again.keys()
    assert all(torch.equal(tensor, added_again[name]) for name, tensor in in_train.items())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("unfinished", "shared part is not trained yet; run `train` to the end"),
        ("other ids", "another vocabulary than the trunk's .*write-shards --base"),
        ("other schema", "another schema: the field 'domain' differs"),
        ("one class", "'games': all 200 rows of adapt have label 1; an adapter needs both classes"),
        ("unknown", "unknown domain 'gamse'; the nearest is 'games'"),
        ("few rows", "'games': 200 training rows, adapt.min_rows asks for 1000"),
        ("twice", "'games' has an adapter .*already; remove it first: remove-domain"),
    ],
)
def test_what_cannot_be_added_says_why(story: Story, what: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        raise UserError(story.told[what])


def test_a_diverged_model_is_refused_by_every_rank(story: Story) -> None:
    assert "241 of 241 logits are not finite, the first in domain 'books'" in story.told["diverged"]


def test_a_witness_names_whatever_moved() -> None:
    before = adding.Witness("t", {"a": "1", "b": "2"}, "p")
    assert before.differences(replace(before, adapters={"a": "1", "b": "2", "new": "3"})) == []
    assert before.differences(replace(before, adapters={"a": "1"})) == ["adapter of b"]
    moved = adding.Witness("u", {"a": "1", "b": "3"}, "q")
    assert before.differences(moved) == ["trunk", "adapter of b", "predictions"]


def test_s9_scores_of_all_ranks_are_those_of_scikit_learn(story: Story) -> None:
    found = story.predictions["added"]
    assert found is not None
    for _, scores in (story.scores["shards"], story.scores["added"]):
        for one in scores.domains:
            mine = found.domain == found.domains.index(one.domain)
            label, probability = found.label[mine], found.probability[mine]
            assert one.rows == mine.sum()
            assert one.auc == pytest.approx(roc_auc_score(label, probability), rel=1e-12)
            assert one.log_loss == pytest.approx(log_loss(label, probability), rel=1e-7)
        weights = [one.rows for one in scores.domains]
        wauc = np.average([one.auc or 0.0 for one in scores.domains], weights=weights)
        assert scores.wauc == pytest.approx(wauc, rel=1e-12)


@pytest.mark.parametrize("world", [1, 4])
def test_s9_any_number_of_ranks_gives_the_same_scores(
    story: Story, toy: Path, sets: Path, output: Path, world: int
) -> None:
    for scores in gang(world, scores_of, toy, sets, output):
        for name, pair in scores.items():
            for found, expected in zip(pair, story.scores[name], strict=True):
                assert _aucs(found) == _aucs(expected)
                assert found.log_loss == pytest.approx(expected.log_loss, rel=1e-7)


def _aucs(scores: Scores) -> list[tuple[Any, ...]]:
    """Exact values: ranks may round a logit's last bit otherwise, but the order of rows stands."""
    domains = [(one.domain, one.rows, one.positives, one.auc) for one in scores.domains]
    return [*domains, (scores.wauc, scores.mean_auc, scores.auc)]


def _rows_file(path: Path, rows: pa.Table) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(rows, path)
        return path
    tags = pa.array(["|".join(row) for row in rows["tags"].to_pylist()])
    place = rows.column_names.index("tags")
    pyarrow.csv.write_csv(rows.set_column(place, "tags", tags), path)
    return path


@pytest.mark.parametrize("kind", [".csv", ".parquet"])
@pytest.mark.parametrize("what", ["added", "later"])
def test_predict_on_raw_rows_equals_evaluation_on_shards(
    story: Story,
    output: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    what: str,
) -> None:
    """For the trunk's domains and for one added with ids of its own, however numbered."""
    expected = story.predictions[what]
    assert expected is not None and len(expected.row_id) == len(set(expected.row_id))
    raw = planted_rows(SIZES | ADDED) if what == "added" else LATER
    rows = _rows_file(tmp_path / f"rows{kind}", raw.take(pa.array(expected.row_id)))
    out = tmp_path / f"out{kind}"
    assert main(["predict", str(output / "toy"), str(rows), "--out", str(out)]) == 0
    read = pyarrow.parquet.read_table if kind == ".parquet" else pyarrow.csv.read_csv
    found = read(out)
    assert found["row_id"].to_pylist() == expected.row_id.tolist()
    assert found["domain"].to_pylist() == [expected.domains[d] for d in expected.domain]
    np.testing.assert_allclose(
        found["probability"].to_numpy(), expected.probability, rtol=1e-5, atol=1e-7
    )
    assert f"{len(found):,} rows; " in capsys.readouterr().err
