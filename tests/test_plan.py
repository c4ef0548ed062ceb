"""The plan against the run: the same places, the same bytes, and a way out that holds."""

import gc
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from data_shards import UserError
from embeddings import Place, ShardedTables, Table, TablesConfig, planned
from launch.__main__ import main
from models import Features, Tokens
from tests.gang import gang
from tests.toy_encoder import minilm
from trainer import config as run_files
from trainer.engine import Engine, EngineConfig
from trainer.footprint import Dense, _kept, dense_part, footprint, require_rows
from trainer.trunk import new_method

INDUSTRIAL = Path(__file__).parents[1] / "docs" / "industrial" / "run.toml"
SIZES = {"user": 1000, "item": 300, "tags": 7}
SHARDING = {"user": "row_wise", "item": "column_wise", "tags": "row_wise"}
WIDTH = 512


def _tables(kinds: dict[str, str]) -> list[Table]:
    return [Table(name, rows, 8, kinds[name], 0.01) for name, rows in SIZES.items()]  # type: ignore[arg-type]


def _placed() -> list[tuple[str, int, int, int, int, int]]:
    """Rectangles of this rank, and bytes of their optimizer."""
    config = TablesConfig()
    tables = ShardedTables(_tables(SHARDING), config, torch.device("cpu"), 1)
    found = []
    for shard in tables.shards():
        weight = shard.tensors["weight"]
        state = sum(t.nbytes for name, t in shard.tensors.items() if name != "weight")
        found.append((shard.table, shard.row, shard.col, *weight.shape, state))
    return found


@pytest.mark.dist
def test_tables_lie_where_the_plan_says() -> None:
    parts = planned(_tables(SHARDING), TablesConfig(), Place("cpu", 2, 2))
    for rank, found in enumerate(gang(2, _placed)):
        mine = {(p.table, p.row, p.col, p.rows, p.cols) for p in parts if p.rank == rank}
        assert {one[:5] for one in found} == mine
        for _, _, _, rows, cols, state in found:
            assert state == 2 * rows * cols * 4


class _Rows(nn.Module):
    """A dense part of a known size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))

    def forward(self, features: Features) -> torch.Tensor:
        return self.layers(features.numbers).sum(1)


def _live() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter)]
    storages = [one.untyped_storage() for one in tensors]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def _dense_bytes(stage: int, precision: str) -> int:
    """What an engine keeps from one step to the next."""
    before = _live()
    module = _Rows()
    config = EngineConfig(zero_stage=stage, precision=precision)  # type: ignore[arg-type]
    engine = Engine(module, list(module.parameters()), config, 1e-3, 0.0, 4)
    rows = Features(torch.zeros(4, 0, 0), torch.ones(4, WIDTH), torch.full((4,), -1))
    engine.backward(engine(rows).sum())
    engine.step()
    for parameter in module.parameters():
        parameter.grad = None
    return _live() - before


@pytest.mark.dist
@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_dense_bytes_are_the_engines(stage: int, precision: str) -> None:
    settings = [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
    config = run_files.load(INDUSTRIAL, settings)
    sizes = {field.name: 10 for field in config.data.schema.ids}
    plan = footprint(config, sizes, Dense(4 * (WIDTH * WIDTH + WIDTH), 0, 0.0, 0.0), CPU).memory
    kept = plan["dense"] + plan["dense optimizer"]
    if stage == 3:  # which alone keeps what is there in backward
        kept += plan["dense gradients"] + plan["reduction buffer"]
    for measured in gang(2, _dense_bytes, stage, precision):
        assert kept == pytest.approx(measured, rel=0.1)


CPU = Place("cpu", 2, 2)


def test_a_language_model_is_counted_without_its_weights() -> None:
    dense = dense_part(run_files.load(INDUSTRIAL), 10, "cuda")
    assert dense.frozen == 1_279_887_360  # Sheared-LLaMA-1.3B without its output layer


ENCODED = "launch/runs/amazon_unictr.toml", "launch/runs/amazon_p5.toml"


@pytest.mark.parametrize("run_file", ENCODED)
@pytest.mark.parametrize("tokens", [32, 96])
def test_activations_over_an_encoder_are_those_of_a_forward(run_file: str, tokens: int) -> None:
    settings = [f"encoder.path={minilm()}", f"encoder.max_tokens={tokens}", "encoder.chunks=1"]
    config = run_files.load(Path(run_file), settings)
    planned_bytes = dense_part(config, 1, "cpu").bytes_a_row
    method = new_method(config, config.data.schema, 0).train()
    if method.adapters_in_pretrain:
        method.add_domain("books", 0)
    lent = {id(p) for p in (*method.shared_parameters(), *method.adapter_parameters())}
    for parameter in method.parameters():
        parameter.requires_grad_(id(parameter) in lent)
    values = torch.randint(1000, 30000, (4 * tokens,))
    prompts = Tokens(values, torch.full((4,), tokens))
    slot = torch.full((4,), 0 if method.adapters_in_pretrain else -1)
    rows = Features(torch.zeros(4, 0, 0), torch.zeros(4, 0), slot, prompts)
    measured = _kept(method, lambda: [method(rows)]) / 4
    assert planned_bytes == pytest.approx(measured, rel=0.15)


TRAFFIC = {0: 2, 1: 3, 2: 3}  # times a weight's bytes


@pytest.mark.parametrize("stage", TRAFFIC)
def test_weights_come_back_from_the_first_stage_on(stage: int) -> None:
    """As measured over a loopback (docs/plan.md)."""
    config = run_files.load(INDUSTRIAL, [f"engine.zero_stage={stage}", "engine.precision=fp32"])
    sizes = {field.name: 10 for field in config.data.schema.ids}
    sent = footprint(config, sizes, Dense(1000, 9000, 0.0, 0.0), CPU).wire
    assert sent["dense gradients and weights"] == TRAFFIC[stage] * 4 * 1000 / 2


def test_the_way_out_holds(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rows", "category=5000", "--rows", "domain=11", "--domains", "10"]
    start = ["plan", str(INDUSTRIAL), "--memory", "80", *sizes]
    assert main([*start, "--ranks", "2"]) == 0
    told = capsys.readouterr().out
    assert "does not fit" in told and "table user: 1,000,000,001 rows on 2 ranks" in told
    found = re.search(r"would fit with --ranks (\d+)$", told, re.M)
    assert found is not None, told
    enough = int(found[1])
    for ranks, fits in ((enough // 2, False), (enough, True)):
        assert main([*start, "--ranks", str(ranks)]) == 0
        assert ("does not fit" not in capsys.readouterr().out) == fits


CHANGES = {
    # 30,000,000 rows of 4 floats, three times for Adam: 1.3 GiB on one rank
    "--memory 1": 'would fit with tables.sharding="row_wise"\n',
    "--memory 0.7": 'would fit with tables.optimizer="rowwise_adagrad", sharded row_wise\n',
    # no ZeRO stage is named: of so small a dense part it gathers and buffers more than it shares
    "--memory 0.1": 'would not fit with tables.sharding="row_wise", ',
}


@pytest.mark.parametrize("memory", CHANGES)
def test_the_smallest_change_is_named(
    memory: str, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["plan", str(toy / "run.toml"), "--ranks", "2", "--rows", "user=3e7"]
    assert main([*run, "--set", "engine.zero_stage=0", *memory.split()]) == 0
    told = capsys.readouterr().out
    assert "most of it is tables' optimizer" in told and CHANGES[memory] in told


MISTAKES = {
    "--ranks 0 --memory 1": "--ranks, --per-node and --memory are more than 0",
    "--ranks 3 --memory 1": "number of lanes 4 is not divisible by 3 ranks",
    "--ranks 2 --memory 1 --rows user": "--rows user: write it as FIELD=NUMBER",
    "--ranks 2 --memory 1 --rows usr=3": "--rows usr=3: there is no id field 'usr'",
}


@pytest.mark.parametrize("given", MISTAKES)
def test_a_mistake_is_told(given: str, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch = ["--set", "reading.global_batch=192"]
    assert main(["plan", str(toy / "run.toml"), *batch, *given.split()]) == 2
    assert MISTAKES[given] in capsys.readouterr().err


def test_an_unknown_size_is_asked_for() -> None:
    with pytest.raises(UserError, match="rows of the table of 'user' are not known before"):
        require_rows(run_files.load(INDUSTRIAL), {})
