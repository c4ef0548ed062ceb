"""A step that is not finite moves nothing, whoever met it, and says which rows it came from."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_shards import UserError
from tests.gang import gang
from tests.toy_run import checkpoint_at, here, refused, toy_config
from trainer.bad_steps import BadStepError, Cut, listed
from trainer.engine import EngineConfig
from trainer.fit import Trainee
from trainer.model import Sent
from trainer.schedule import train

pytestmark = pytest.mark.dist

BAD = 5
STAGES = {1: (1,), 2: (0, 1, 2, 3)}
SHORT = ("phases=['pretrain']", "pretrain.max_epochs=1")
SKIP = ("engine.bad_steps=skip",)
Taken = Callable[[Trainee, Sent, Sent | None, int], Tensor]


@contextmanager
def _taken(how: Callable[[Taken, Trainee, Sent, Sent | None, int], Tensor]) -> Iterator[None]:
    """Step BAD is taken by `how`, on every rank."""
    taken = Trainee.step

    def step(self: Trainee, sent: Sent, following: Sent | None, at: int) -> Tensor:
        return (
            how(taken, self, sent, following, at) if at == BAD else taken(self, sent, following, at)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainee, "step", step)
        yield


def _input(taken: Taken, trainee: Trainee, sent: Sent, *rest: Any) -> Tensor:
    """The last rank reads a price that is no number."""
    if trainee.ranks.rank == trainee.ranks.world - 1:
        sent.batch.numbers[0] = torch.nan
    return taken(trainee, sent, *rest)


def _gradient(taken: Taken, trainee: Trainee, *rest: Any) -> Tensor:
    """The last rank's loss is fine, and its gradient of the first row is not: 0 * inf."""
    loss = trainee.method.loss

    def rooted(logit: Tensor, *others: Any) -> Tensor:
        last = trainee.ranks.rank == trainee.ranks.world - 1
        return loss(logit, *others) + ((logit[0] * 0).sqrt().sum() if last else 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainee.method, "loss", rooted)
        return taken(trainee, *rest)


def _large(taken: Taken, trainee: Trainee, *rest: Any) -> Tensor:
    """Every number of the last rank is finite, and the gradient's norm is not."""
    loss = trainee.method.loss

    def scaled(*given: Any) -> Tensor:
        last = trainee.ranks.rank == trainee.ranks.world - 1
        return loss(*given) * (1e25 if last else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainee.method, "loss", scaled)
        return taken(trainee, *rest)


def _omitted(*unused: Any) -> Tensor:
    """As if the step had not been."""
    raise BadStepError([])


BLAMED = {"input": _input, "gradient": _gradient, "large": _large}
WAYS = {**BLAMED, "omitted": _omitted}


def _always(toy: Path, output: Path) -> list[str]:
    """What a run says of which no step from BAD on is finite, when it is started again, and what
    one says of which every second step is."""

    def spoiled(self: Trainee, sent: Sent, following: Sent | None, at: int) -> Tensor:
        if at < BAD or (at % 2 and every_second):
            return taken(self, sent, following, at)
        return _input(taken, self, sent, following, at)

    taken, told = Trainee.step, []
    for every_second in (False, True):
        config = toy_config(
            toy,
            output,
            *SHORT,
            *SKIP,
            f"name=always-{every_second}",
            "pretrain.checkpoint_every=2",
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainee, "step", spoiled)
            patch.setattr("trainer.fit.SKIPPED", 4)
            told.append(refused(lambda config=config: train(config, here())))
            if not every_second:
                told.append(refused(lambda config=config: train(config, here())))
    return told


def test_skipping_gives_up_where_nothing_but_bad_steps_follow(toy: Path, tmp_path: Path) -> None:
    for always, again, every_second in gang(2, _always, toy, tmp_path):
        assert again == always, "a start in the midst of them counts on"
        assert f"pretrain: step {BAD + 4}: the loss or its gradient" in always
        assert "4 steps in a row were skipped, so it is not a few rows that spoil them" in always
        assert every_second == ""


def _stories(toy: Path, output: Path) -> dict[str, str]:
    said = {}
    for way, stage in product(WAYS, STAGES[here().world]):
        with _taken(WAYS[way]):
            # fbgemm's own optimizer takes every lookup for a step
            tables = "rowwise_adagrad" if stage == 2 else "adam"
            name = f"name={way}-{stage}", f"engine.zero_stage={stage}", f"tables.optimizer={tables}"
            train(toy_config(toy, output, *SHORT, *SKIP, *name), here())
    for way in BLAMED:
        with _taken(WAYS[way]):
            config = toy_config(toy, output, *SHORT, f"name=stopped-{way}")
            said[way] = refused(lambda config=config: train(config, here()))
    return said


@pytest.mark.parametrize("world", [1, 2])
def test_a_bad_step_is_as_if_it_had_not_been(toy: Path, tmp_path: Path, world: int) -> None:
    said = gang(world, _stories, toy, tmp_path)
    for stage in STAGES[world]:
        wanted = _files(tmp_path / f"omitted-{stage}")
        for way in BLAMED:
            found = _files(tmp_path / f"{way}-{stage}")
            assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]
            assert _state(tmp_path / f"{way}-{stage}") == _state(tmp_path / f"omitted-{stage}")
    for message in (message for rank in said for message in rank.values()):
        assert message.startswith("pretrain: step 6: the loss or its gradient is not finite, ")
        assert "or too large to be squared (rows " in message
        assert "; no weight has moved by it: look at the values of these rows, lower the" in message


def _newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def _state(run: Path) -> dict[str, Any]:
    """Counts of steps among it."""
    values = json.loads((_newest(run) / "state.json").read_text(encoding="utf-8"))
    return {**values, "seconds": 0}


def _files(run: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint, as each rank has written them."""
    files = _newest(run).glob("*.safetensors")
    return {f"{path.name}/{key}": part for path in files for key, part in load_file(path).items()}


def _both_phases(toy: Path, output: Path) -> tuple[dict[str, Any], list[tuple[int, str]]]:
    """A run with one bad step in each phase, and the rows that are to blame."""
    blamed = []

    def blaming(taken: Taken, trainee: Trainee, sent: Sent, *rest: Any) -> Tensor:
        blamed.append(int(sent.batch.row_id[0]))
        return _input(taken, trainee, sent, *rest)

    with _taken(blaming):
        summary = train(toy_config(toy, output, "adapt.max_epochs=2", *SKIP), here())
    return summary, blamed


def test_skipped_steps_are_counted_with_their_rows(toy: Path, tmp_path: Path) -> None:
    [(summary, _), (_, blamed)] = gang(2, _both_phases, toy, tmp_path)
    assert summary["bad_steps"] == {"adapt books": 1, "pretrain": 1}
    metrics = (tmp_path / "toy" / "metrics.jsonl").read_text()
    assert all(f'": [{row}]' in metrics for row in blamed)


def test_the_vectors_gradient_is_clamped_entry_by_entry() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5]], requires_grad=True)
    cut = Cut([], [])
    leaf = cut._leaf(weight * 1)
    (leaf * torch.tensor([3.0, -0.2, 0.1])).sum().backward()
    assert weight.grad is None, "nothing goes on by itself"
    cut.backward(0.2)
    assert torch.equal(weight.grad, torch.tensor([[0.2, -0.2, 0.1]]))  # type: ignore[arg-type]


PLANS = {
    1: ((0.0, "table_wise"), (0.002, "table_wise")),
    2: ((0.002, "row_wise"), (0.002, "column_wise")),
}


def _clipped(toy: Path, output: Path) -> None:
    for clip, plan in PLANS[here().world]:
        changes = f"engine.table_gradient_clipping={clip}", f"tables.sharding={plan}"
        name = f"name={plan}-{clip}-{here().world}"
        train(toy_config(toy, output, *SHORT, *changes, name), here())


def test_clipped_tables_depend_neither_on_ranks_nor_on_the_plan(toy: Path, tmp_path: Path) -> None:
    for world in (1, 2):
        gang(world, _clipped, toy, tmp_path)
    wanted, _ = checkpoint_at(_newest(tmp_path / "table_wise-0.002-1"))
    for run in tmp_path.glob("*-0.002-*"):
        for name, tensor in checkpoint_at(_newest(run))[0].items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-6)
    free, _ = checkpoint_at(_newest(tmp_path / "table_wise-0.0-1"))
    assert (free["item/exp_avg"] - wanted["item/exp_avg"]).abs().max() > 1e-4


def test_rows_are_listed_by_domain_and_not_without_end() -> None:
    rows = BadStepError([(0, n) for n in range(9)] + [(1, 4)]).named(("books", "music"))
    assert listed(rows) == "rows 0, 1, 2, 3, 4 and more of books, 4 of music"
    assert listed({}) == "no single row gave it"


@pytest.mark.parametrize("key", ["gradient_clipping", "table_gradient_clipping"])
def test_clipping_is_not_negative(key: str) -> None:
    with pytest.raises(UserError, match=f"engine.{key}: -1; it is above 0, or 0 for none"):
        replace(EngineConfig(), **{key: -1.0})
