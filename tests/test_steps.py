"""One step: dropout is a function of the step, and a domain is an input only as a field (M12)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards import Cursor, Index, Loader, Rows, Schema, Vocabulary, encode_batch
from data_shards.vocabulary import count_values
from tests.gang import gang
from tests.toy_run import SCHEMA, SIZES, here, planted_rows, refused, toy_config
from trainer import meter, schedule
from trainer.engine import Engine
from trainer.fit import Trainee
from trainer.model import trunk_alone
from trainer.trunk import empty_trunk, new_trunk

pytestmark = pytest.mark.dist


def _losses(toy: Path, output: Path) -> dict[tuple[str, int], float]:
    """Of one batch under weights that never move, as step 0 and as step 1, twice each."""
    still = ("tables.lr=0.0", "backbone.dropout=0.5")
    config, ranks = toy_config(toy, output, *still), here()
    loader = Loader(toy / "shards", Rows(("train",)), config.reading, ranks.rank, ranks.world)
    trunk = new_trunk(config, ranks, Index.load(toy / "shards"))
    method = trunk.method()
    engine = Engine(method, method.shared_parameters(), config.engine, 0.0, 0.0, 64 // ranks.world)
    engine.train(True)
    model = trunk_alone(trunk)
    model.dense = engine
    trainee = Trainee(model, engine, method, ranks, config.seed)
    batch, slots = next(iter(loader.batches(Cursor()))), model.slots(loader)
    return {
        (turn, at): float(trainee.step(model.send(batch, slots, False), None, at))
        for turn in ("first", "again")
        for at in (0, 1)
    }


def test_dropout_follows_the_step_and_nothing_else(toy: Path, tmp_path: Path) -> None:
    (losses,) = gang(1, _losses, toy, tmp_path)
    assert losses["first", 0] == losses["again", 0]
    assert losses["first", 1] == losses["again", 1]
    assert losses["first", 0] != losses["first", 1]


def _astray(toy: Path, output: Path) -> str:
    """What a run says whose first step throws the orders of EulerNet far off."""
    euler = "backbone={name='eulernet', orders=[3]}", "pretrain.lr=1e6"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meter, "LOSS_EVERY", 1)
        return refused(lambda: schedule.train(toy_config(toy, output, *euler), here()))


def test_weights_that_have_gone_astray_end_a_phase_and_are_named(toy: Path, tmp_path: Path) -> None:
    (said,) = gang(1, _astray, toy, tmp_path)
    assert said.startswith("pretrain: step 1: ") and "overflows" in said


def _logits(toy: Path, output: Path, fields: tuple[str, ...]) -> dict[str, list[float]]:
    """Of the same rows, said to be of one domain and then of another."""
    schema = Schema(tuple(field for field in SCHEMA.fields if field.name in fields))
    rows = planted_rows(SIZES).slice(0, 50)
    vocabulary = Vocabulary.build(schema, count_values(schema, rows))
    trunk = empty_trunk(toy_config(toy, output), here(), schema, vocabulary.sizes, "")
    model = trunk_alone(trunk)
    found = {}
    for name in ("books", "music"):
        place = rows.column_names.index("domain")
        said = rows.set_column(place, "domain", [[name] * len(rows)])
        batch = encode_batch(schema, vocabulary.encode(said), np.zeros(len(rows), np.int64))
        with torch.no_grad():
            found[name] = model.logits(batch, torch.tensor([-1]), False).tolist()
    return found


def test_m12_without_the_domain_field_the_shared_part_knows_no_domain(
    toy: Path, tmp_path: Path
) -> None:
    names = tuple(field.name for field in SCHEMA.fields)
    (known,) = gang(1, _logits, toy, tmp_path, names)
    (unknown,) = gang(1, _logits, toy, tmp_path, tuple(n for n in names if n != "domain"))
    assert unknown["books"] == unknown["music"]
    assert not any(map(math.isclose, known["books"], known["music"]))
