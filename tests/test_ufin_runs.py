"""UFIN through the real trainer: teachers, ranks (S6), domains (S4), resumption (S7), serving."""

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from data_shards import Index, UserError
from launch.__main__ import main
from launch.drilled import Death
from launch.measures import Cost, cost_of_shared
from tests.gang import gang
from tests.toy_ufin_run import (
    ADDED,
    SEEN,
    SIZES,
    Story,
    configured,
    live,
    live_cut,
    taught,
    taught_around,
    told,
    write_toy,
)
from tests.toy_unictr_run import planted_rows
from trainer import config as run_files
from trainer.phases import PretrainConfig

pytestmark = pytest.mark.dist
FIELDS, PARTS = ("user", "item", "domain"), ("rows", "values")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ufin")
    write_toy(folder)
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(toy: Path, output: Path) -> Story:
    [story] = gang(1, live, toy, output, "one")
    return story


@pytest.fixture(scope="module")
def two(toy: Path, output: Path, one: Story) -> list[Story]:
    return gang(2, live, toy, output, "two", "engine.zero_stage=3")


def test_the_cost_of_the_shared_part_is_that_of_all_that_led_to_it(one: Story) -> None:
    """Of the teachers too."""
    led = one.steps[: len(one.steps) - one.adapting]
    assert 0 < one.learned.steps == len(led) < len(one.steps)
    assert one.learned.rows == pytest.approx(sum(len(step.row_ids) for step in led))


def test_half_a_line_of_a_killed_run_is_no_cost(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"phase": "pretrain", "sec{"phase": "adapt a"}\n')
    trunk: Any = SimpleNamespace(config=SimpleNamespace(teacher=None, pretrain=PretrainConfig()))
    assert cost_of_shared(trunk, tmp_path / "metrics.jsonl", "nowhere") == Cost()


def test_s6_two_ranks_learn_what_one_does(one: Story, two: list[Story]) -> None:
    """Through teachers, phase 1 and phase 2, with domains spread unevenly, under ZeRO 3."""
    for alone, *shares in zip(one.steps, *(story.steps for story in two), strict=True):
        assert sorted(alone.row_ids) == sorted(row for step in shares for row in step.row_ids)
        assert sum(step.loss for step in shares) == pytest.approx(alone.loss, rel=1e-4)
    np.testing.assert_allclose(two[0].teacher, one.teacher, rtol=1e-3, atol=1e-4)
    for domain, tensors in one.adapters.items():
        for name, tensor in tensors.items():
            found = two[0].adapters[domain][name]
            np.testing.assert_allclose(found, tensor, 1e-2, 1e-3, err_msg=f"{domain} {name}")


def test_pictures_are_of_the_same_rows_at_any_number_of_ranks(
    one: Story, two: list[Story], output: Path
) -> None:
    alone, both, other = one.seen, two[0].seen, two[1].seen
    assert alone is not None and both is not None and other is None
    assert alone.domains == both.domains == ("books", "music")  # no toys are among the test rows
    assert np.array_equal(alone.domain, both.domain)
    assert np.array_equal(alone.row_id, both.row_id)
    assert np.bincount(alone.domain).max() == SEEN
    for kind, seen in alone.seen.items():
        np.testing.assert_allclose(both.seen[kind].values, seen.values, 5e-2, 5e-2, err_msg=kind)
    drawn = {path.stem for path in (output / "one/pictures").glob("*.png")}
    assert drawn >= {"points", "shares", "matrices"}


def test_s4_adding_a_domain_moves_nothing_of_the_others(one: Story, two: list[Story]) -> None:
    for story in (one, two[0]):
        assert story.added["moved"] == [] and story.added["others"] == 2
        assert story.files["without games"] == story.files["trained"]
        before, after = story.predictions["trained"], story.predictions["added"]
        assert before is not None and after is not None
        assert np.array_equal(before.logit.view(np.uint32), after.logit.view(np.uint32))


def test_an_adaptor_is_a_weight_of_each_id_that_its_domain_has_met(one: Story) -> None:
    """Own ids included: those of the added domain stand behind the trunk's."""
    for domain, tensors in one.adapters.items():
        keys = {"adaptor.bias", *(f"own_table/{f}/{part}" for f in FIELDS for part in PARTS)}
        keys |= (
            {"own_rows/user"} if domain == "games" and one.added["own_ids"].get("user") else set()
        )
        assert tensors.keys() == keys
        for field in FIELDS:
            place, values = (tensors[f"own_table/{field}/{part}"] for part in PARTS)
            assert np.array_equal(place, np.unique(place)) and values[:, 0].all()
            assert not values[:, 1:].any()
    items = one.adapters["games"]["own_table/item/rows"]
    assert (items >= one.added["own_ids"]["item"]).any()


def test_an_adaptor_answers_for_its_own_domain(one: Story, output: Path) -> None:
    shared, trained = one.predictions["shared"], one.predictions["trained"]
    assert shared is not None and trained is not None
    kept = [name for name in _kept(output / "one") if name != "games"]
    names = np.array(shared.domains)[shared.domain]
    assert kept and np.array_equal(shared.logit != trained.logit, np.isin(names, kept))


def test_zero_shot_is_the_shared_part_on_a_domain_that_it_never_saw(one: Story) -> None:
    assert one.zero_shot == pytest.approx(one.shared, abs=1e-12)


def test_teachers_are_heard_on_the_rows_of_phase_1_alone(one: Story, toy: Path) -> None:
    index = Index.load(toy / "shards")
    for block, start in zip(index.blocks, index.row_starts, strict=True):
        logits = one.teacher[start : start + block.rows]
        taught = block.split == "train" and block.domain != "toys"
        assert np.isfinite(logits).all() if taught else np.isnan(logits).all()


def test_a_corrupt_block_is_taught_nothing_where_it_is_skipped(toy: Path, tmp_path: Path) -> None:
    [(said, logits, wanted, lost)] = gang(1, taught_around, toy, tmp_path)
    assert "its XXH3 differs from the index" in said
    np.testing.assert_array_equal(logits, wanted)
    assert np.isnan(logits[:lost]).all() and np.isfinite(logits).any()


def test_s7_cut_and_continued_is_bit_equal_to_uncut(one: Story, toy: Path, output: Path) -> None:
    """In the second teacher's training, and in phase 1."""
    of_books, of_music = (_steps(one, name) for name in ("books", "music"))
    for at in (of_books + of_music - 1, of_books + of_music + 6):
        gang(1, live_cut, toy, output, at)
        cut = output / f"cut{at}"
        found, expected = _trunk(cut), _trunk(output / "one")
        assert not [name for name in expected if not torch.equal(found[name], expected[name])]


# Where the first teacher's logits are asked for, after two evaluations, and in the second one.
DEATHS = [Death("evaluation", 3, 0), Death("step", 3, 1)]


def test_a_rank_killed_among_the_teachers_changes_no_bit(toy: Path, tmp_path: Path) -> None:
    whole = gang(2, taught, toy, tmp_path / "whole")
    for death in DEATHS:
        with pytest.raises(AssertionError, match=f"rank {death.rank} died without a word"):
            gang(2, taught, toy, tmp_path / "killed", death)
    for found in gang(2, taught, toy, tmp_path / "killed"):
        assert np.array_equal(found.view(np.uint32), whole[0].view(np.uint32))


def _trunk(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "trunk/dense.safetensors")


def _steps(story: Story, domain: str) -> int:
    """Of a teacher: two epochs of its training rows."""
    rows = sum(np.isfinite(story.teacher)) * SIZES[domain] // (SIZES["books"] + SIZES["music"])
    return 2 * -(-rows // 32)


def test_predictions_for_raw_rows_are_those_on_shards(
    one: Story, toy: Path, output: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Known titles are read, a new one is encoded on the spot and counted."""
    rows = planted_rows(SIZES | ADDED)
    expected = one.predictions["trained"], one.predictions["games"]
    probability = {}
    for found in expected:
        assert found is not None
        probability |= dict(zip(found.row_id.tolist(), found.probability.tolist(), strict=True))
    kept = set(_kept(output / "one"))
    wanted = [n for n in probability if rows["domain"][n].as_py() in kept]
    assert wanted, "no adapter was kept"
    asked = rows.take(pa.array(wanted)).drop_columns(["label", "time"])
    pq.write_table(asked, tmp_path / "rows.parquet")
    out = tmp_path / "out.parquet"
    arguments = ["predict", str(output / "one"), str(tmp_path / "rows.parquet"), "--out", str(out)]
    assert main(arguments) == 0
    told = pq.read_table(out)["probability"].to_pylist()
    np.testing.assert_allclose(told, [probability[n] for n in wanted], rtol=1e-5, atol=1e-6)
    place = asked.column_names.index("title")
    titles = pa.array(["green green"] * len(asked))
    pq.write_table(asked.set_column(place, "title", titles), tmp_path / "rows.parquet")
    capfd.readouterr()
    assert main(arguments) == 0
    assert "1 texts encoded on the spot" in capfd.readouterr().err


def _kept(run: Path) -> list[str]:
    manifests = sorted((run / "adapters/ufin").glob("*/*/adapter.json"))
    return [path.parent.parent.name for path in manifests if '"kept": true' in path.read_text()]


def test_a_run_begins_from_another_one_and_mistakes_are_named(
    one: Story, toy: Path, output: Path
) -> None:
    [said] = gang(1, told, toy, output)
    assert "the text vectors of this shard set are not there" in said["no text"]
    assert "shared part of" in said["other shape"] and "has shape" in said["other shape"]
    assert "learned on another encoder" in said["other encoder"]
    assert said["begun"] == ""
    begun, whole = _trunk(output / "g"), _trunk(output / "one")
    assert all(torch.equal(begun[name], tensor) for name, tensor in whole.items())
    assert "domain 'toys' can have no teacher: all 2 rows of valid have" in said["no teacher"]
    assert "teacher.without: no domain 'toy'" in said["unknown"]


def test_a_run_file_says_what_its_method_reads(toy: Path, output: Path) -> None:
    cases = [
        ("text: method mlora reads no text vectors", ("method={name='mlora'}",)),
        ("encoder.path: none given, and \\[text\\] needs", ("encoder.path=''",)),
        ("pretrain.one_phase: method ufin has two phases", ("pretrain.one_phase=true",)),
        ("phases: without pretrain there is no shared part", ("phases=['adapt']",)),
        ("teacher.rows: unknown split 'tarin'", ("teacher.rows=['tarin']",)),
    ]
    for message, overrides in cases:
        with pytest.raises(UserError, match=message):
            configured(toy, output, "x", *overrides)
    plain = tomllib.loads((toy / "run.toml").read_text()) | {"method": {"name": "mlora"}}
    del plain["text"]
    with pytest.raises(UserError, match="teacher: method mlora learns from no teacher"):
        run_files.from_dict(plain, "run.toml")
