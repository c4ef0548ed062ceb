"""Uni-CTR through the real trainer: ranks (S6), domains (S4, S5), resumption (S7), serving."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from data_shards import Cursor, Index, Loader, Rows, UserError
from launch.__main__ import main
from models import UniCTR
from tests.gang import gang
from tests.toy_run import checkpoint_at, here, refused
from tests.toy_unictr_run import (
    ADDED,
    SIZES,
    STEPS,
    Story,
    adapters_at,
    configured,
    live,
    planted_rows,
    write_toy,
)
from trainer import pretrain
from trainer.adapt import adapt, rows_of
from trainer.checkpoint import checked
from trainer.log import RunLog
from trainer.run_folder import RunFolder
from trainer.trunk import new_method, new_trunk

pytestmark = pytest.mark.dist

GAMES = 46  # test rows


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unictr")
    write_toy(folder, SIZES, ADDED)
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def story(toy: Path, output: Path) -> Story:
    [told] = gang(1, live, toy, output)
    return told


def test_s4_adding_a_domain_moves_nothing_of_the_others(story: Story) -> None:
    assert story.added["moved"] == [] and story.added["others"] == 2
    assert story.files["without games"] == story.files["trained"]
    new = story.files["added"].keys() - story.files["trained"].keys()
    assert new and all(name.startswith("adapters/unictr/games/") for name in new)
    before, after = story.predictions["trained"], story.predictions["added"]
    same = before.logit.view(np.uint32) == after.logit.view(np.uint32)
    games = np.array(before.domains)[before.domain] == "games"
    assert np.array_equal(before.row_id, after.row_id)
    assert same[~games].all() and not same[games].any()


def test_s4_an_added_domain_is_a_head_and_nothing_else(
    story: Story, toy: Path, output: Path
) -> None:
    head = _method(toy, output).adapter("books")
    assert story.added["sizes"]["adapter"] == sum(t.numel() for t in head.values())
    for tensors in (story.games, *adapters_at(output / "whole").values()):
        assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in head.items()}


def _method(toy: Path, output: Path) -> UniCTR:
    """As it begins, with a head for each domain of phase 1."""
    config = configured(toy, output, "whole")
    method = new_method(config, config.data.schema)
    assert isinstance(method, UniCTR)
    for domain in SIZES:
        method.add_domain(domain, config.seed)
    return method


def test_s5_removing_a_domain_gives_back_what_was(story: Story) -> None:
    assert story.files["removed"] == story.files["trained"]
    before, after = story.predictions["trained"], story.predictions["removed"]
    assert np.array_equal(before.logit.view(np.uint32), after.logit.view(np.uint32))


def test_s7_cut_and_continued_is_bit_equal_to_uncut(story: Story, output: Path) -> None:
    """With dropout, from the checkpoint before the cut."""
    assert [step.at for step in story.resumed[:7]] == [5, 6, 7, 8, 9, 0, 1]
    whole, cut = output / "whole", output / "cut"
    for name in (f"checkpoints/step-{STEPS:010d}", "trunk"):
        _require_equal(_dense(cut / name), _dense(whole / name))
    found, expected = adapters_at(cut), adapters_at(whole)
    assert found.keys() == expected.keys() == {"books", "music"}
    for domain, tensors in found.items():
        _require_equal(tensors, expected[domain])


def _dense(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "dense.safetensors")


def _require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]


def test_no_file_of_a_run_holds_a_frozen_weight(story: Story, toy: Path, output: Path) -> None:
    method = _method(toy, output)
    heads = [*(method.adapter(domain) for domain in SIZES)]
    shared = {name for name in method.shared() if ".lora_" in name or name.startswith("general.")}
    assert shared == method.shared().keys() and any(".lora_" in name for name in shared)
    trunk = _dense(output / "whole" / "trunk")
    starts = {f"start/{domain}/{n}" for domain in SIZES for n in method.adapter(domain)}
    assert trunk.keys() == shared | starts
    learned = _bytes(method.shared()) + sum(map(_bytes, heads))
    assert _bytes(trunk) == learned
    steps = f"checkpoints/step-{STEPS:010d}"
    saved, values = checkpoint_at(output / "whole" / steps)
    assert values["base"] == checkpoint_at(output / "whole" / "trunk")[1]["base"]
    assert _bytes(saved) - _bytes({"": saved["optimizer/steps"]}) == 3 * learned
    frozen = {tuple(t.shape) for t in method.frozen().values()} - {
        tuple(t.shape) for part in (method.shared(), *heads) for t in part.values()
    }
    assert frozen and not frozen & {tuple(t.shape) for t in saved.values()}


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("other encoder", "whole: learned on another encoder than the one at .*other_encoder; put"),
        ("other prompts", "its prompts are of another run file .they differ in tokenizer.max_tok"),
        ("served", "whole: its prompts are of another run file .they differ in tokenizer.max_tok"),
        ("learned", "domain 'music': .*has learned from it, so this is not zero-shot; name one"),
        ("unknown", "unknown domain 'gamse'; .*there are: books, music, toys"),
    ],
)
def test_what_does_not_fit_is_refused(story: Story, what: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        raise UserError(story.told[what])


@pytest.mark.parametrize("name", ["books", "music", "spoilt"])
def test_phase_2_begins_with_the_head_of_phase_1(story: Story, name: str) -> None:
    """Kept as it is where it beats the general network, measured without dropout."""
    begun = story.begun[name]
    _require_equal(begun.adapter.tensors, begun.start)
    assert begun.adapter.metrics["steps"] == 0
    assert begun.own is not None and begun.shared is not None
    assert begun.adapter.metrics["shared_auc"] == begun.shared
    assert begun.adapter.metrics["auc"] == max(begun.own, begun.shared)
    assert begun.adapter.kept == (begun.own > begun.shared)


def _from_worse(toy: Path, output: Path) -> int:
    """Steps that phase 2 takes with the least patience, on a head that says the opposite."""
    config = configured(toy, output, "whole", "adapt.patience=1", "adapt.max_epochs=1")
    trunk = RunFolder(config.folder).load_trunk(config, here())
    for part in ("weight", "bias"):
        trunk.starts["books"][f"tower.out.{part}"] *= -1
    rows = rows_of(trunk, toy / "shards", "books")
    log = RunLog(False, config.folder, config.tracking, "worse")
    return int(str(adapt(trunk, trunk.fingerprint(), rows, log).metrics["steps"]))


def test_a_head_that_begins_worse_still_learns(story: Story, toy: Path, output: Path) -> None:
    [steps] = gang(1, _from_worse, toy, output)
    assert steps > 0


def _resumed_elsewhere(toy: Path, output: Path) -> str:
    config = configured(toy, output, "whole")
    other = replace(config.encoder, path=str(output / "other_encoder"))
    trunk = new_trunk(replace(config, encoder=other), here(), Index.load(toy / "shards"))
    path = output / "whole" / "checkpoints" / f"step-{STEPS:010d}"
    data = checkpoint_at(path)[1]["data"]
    none: Any = None  # it is not come to
    return refused(lambda: pretrain._resume(checked(path, here()), trunk, none, data))


def test_phase_1_goes_on_with_its_own_encoder_alone(story: Story, toy: Path, output: Path) -> None:
    [told] = gang(1, _resumed_elsewhere, toy, output)
    assert f"step-{STEPS:010d}: learned on another encoder than the one at" in told


def test_heads_of_phase_1_win_and_lose(story: Story) -> None:
    """What makes the law above worth its name."""
    assert {begun.adapter.kept for begun in story.begun.values()} == {True, False}


def test_zero_shot_scores_are_those_of_the_general_network(
    story: Story, toy: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [games] = story.zero_shot.domains
    assert games.domain == "games" and games.rows == GAMES
    assert games.auc == story.general.auc and story.added["shared"]["auc"] == games.auc
    assert games.log_loss == pytest.approx(story.general.log_loss, rel=1e-6)
    assert games.auc != story.added["adapted"]["auc"], "its own head says another thing"
    command = ["evaluate", str(output / "whole"), "--zero-shot", "games"]
    assert main([*command, "--shards", str(toy / "added")]) == 0
    assert f"{games.auc:.4f}    {games.log_loss:.4f}" in capsys.readouterr().out
    assert main([*command[:-1], "books"]) == 2
    assert "has learned from it, so this is not zero-shot" in capsys.readouterr().err


@pytest.fixture
def raw(story: Story, tmp_path: Path) -> Path:
    """The test rows as a user would have them, without tokens."""
    rows = planted_rows(SIZES | ADDED).take(pa.array(story.predictions["removed"].row_id))
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def test_predict_on_raw_rows_equals_evaluation_on_shards(
    story: Story, output: Path, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, out = story.predictions["removed"], raw.with_name("out.parquet")
    assert main(["predict", str(output / "whole"), str(raw), "--out", str(out)]) == 0
    found = pyarrow.parquet.read_table(out)
    assert found["row_id"].to_pylist() == expected.row_id.tolist()
    np.testing.assert_allclose(found["probability"].to_numpy(), expected.probability, rtol=1e-5)
    assert "without an adapter, scored by the shared part alone (" in (told := _err(capsys))
    assert f"games {GAMES}" in told


def test_strict_prediction_names_the_domains_that_have_no_head(
    story: Story, output: Path, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = raw.with_name("out.parquet")
    command = ["predict", str(output / "whole"), str(raw), "--out", str(out), "--strict"]
    assert main(command) == 2
    assert not out.exists() and f"games {GAMES}" in _err(capsys)


def test_an_exported_domain_scores_as_evaluation(story: Story, toy: Path, output: Path) -> None:
    file, config = output / "music.pt2", configured(toy, output, "whole")
    assert main(["export", str(output / "whole"), "music", "--out", str(file)]) == 0
    program, found = torch.export.load(file).module(), {}
    rows = Rows(config.test, ("music",))
    for batch in Loader(toy / "shards", rows, config.reading, 0, 1).batches(Cursor()):
        (tokens,) = batch.tokens.values()
        real = tokens.lengths() > 0
        prompts = tokens.values().long().split(tokens.lengths()[real].tolist())
        ids = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        mask = torch.arange(ids.shape[1]) < tokens.lengths()[real].unsqueeze(1)
        logit = program(ids, mask).tolist()
        found |= dict(zip(batch.row_id[real].tolist(), logit, strict=True))
    wanted = story.predictions["removed"]
    mine = wanted.domain == wanted.domains.index("music")
    assert sorted(found) == wanted.row_id[mine].tolist()
    logits = [found[row] for row in wanted.row_id[mine].tolist()]
    np.testing.assert_allclose(logits, wanted.logit[mine], rtol=1e-4, atol=1e-4)


def _err(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err
