"""Run files: read strictly, changed by --set, written back so that they read as the same run."""

import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards import SplitConfig, UserError
from trainer.config import RunConfig, dump, first_difference, from_dict, load

RUNS = sorted((Path(__file__).parents[1] / "launch" / "runs").glob("*.toml"))
SMALL = """
name = "small"
[data]
shards = "shards"
source = { kind = "movielens", path = "ml-1m.zip" }
fields = [{ name = "user", kind = "id" }, { name = "tags", kind = "id", multi = true }]
"""
NUMBERS = st.floats(0, 1e3, allow_nan=False)
# Keys that a user may set -> values, as they would be written after the equals sign.
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 2**63 - 1),
    "pretrain.lr": NUMBERS,
    "pretrain.one_phase": st.booleans(),
    "adapt.patience": st.integers(1, 99),
    "adapt.metric": st.sampled_from(["wauc", "auc", "log_loss", "auc/books and toys"]),
    "reading.sampler": st.sampled_from(["mixed", "domain_pure"]),
    "tables.pinned.user": st.sampled_from(["table_wise", "column_wise", "row_wise"]),
    "tables.weight_decay": NUMBERS,
    "backbone.hidden": st.lists(st.integers(1, 512), min_size=1, max_size=4),
    "engine.zero_stage": st.integers(0, 3),
    "data.hold_out": st.lists(st.text("ab é'\"\\=.", max_size=5), max_size=3),
}
CHANGES = st.fixed_dictionaries({}, optional=VALUES)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL, encoding="utf-8")
    return path


def _toml(value: Any) -> str:
    """A value as a user writes it after --set KEY=; text alone needs no quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_quoted, value))}]"
    return str(value)


def _quoted(value: Any) -> str:
    if not isinstance(value, str):
        return _toml(value)
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _at(config: RunConfig, key: str) -> Any:
    values: Any = tomllib.loads(dump(config))
    for part in key.split("."):
        values = values[part]
    return values


@given(changes=CHANGES)
def test_overrides_arrive_and_what_is_dumped_reads_as_the_same(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(SMALL, encoding="utf-8")
    plain = load(path)
    config = load(path, [f"{key}={_toml(value)}" for key, value in changes.items()])
    for key, value in changes.items():
        assert _at(config, key) == value
    assert from_dict(tomllib.loads(dump(config)), "run.toml") == config
    differs = first_difference(tomllib.loads(dump(config)), tomllib.loads(dump(plain)))
    assert (differs is None) == (config == plain)
    if differs is not None:
        assert differs in changes


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_file_loads(path: Path) -> None:
    config = load(path)
    assert config.name == path.stem, "its folder bears its name"
    assert from_dict(tomllib.loads(dump(config)), "run.toml") == config


def test_a_difference_is_named_by_its_key(small: Path) -> None:
    config = load(small)
    other = replace(config, adapt=replace(config.adapt, lr=0.5))
    a, b = (tomllib.loads(dump(one)) for one in (config, other))
    assert first_difference(a, b) == first_difference(b, a) == "adapt.lr"
    split = replace(config.data, split=SplitConfig(parts={"train": 0.7, "valid": 0.1, "test": 0.2}))
    assert first_difference(a, tomllib.loads(dump(replace(config, data=split)))) == (
        "data.split.parts.train"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=2", "small.toml: unknown key sed; did you mean seed"),
        ("pretrain.patients=2", r"unknown key pretrain.patients; did you mean pretrain.patience\?"),
        ("data.source.qqqq=2", "unknown key data.source.qqqq; known: path, kind, label, domains"),
        ('data.fields=[{name="a", kind="id", sid="x"}]', "unknown key data.fields.sid; did you"),
        ("pretrain=3", "pretrain: .*not 3"),
        ("backbone.hidden=12", "backbone.hidden: .*tuple.*not 12"),
        ("adapt.patience=soon", "adapt.patience: .*integer.*not 'soon'"),
        ("reading.sampler=blended", "reading.sampler: .*'mixed' or 'domain_pure'.*not 'blended'"),
        ("engine.zero_stage=4", "engine.zero_stage: .*not 4"),
        ('pretrain.rows=["trian"]', "pretrain.rows: unknown split 'trian'; .*train, valid, test"),
        ('test=["held"]', "test: unknown split 'held'"),
        ("data.split.parts={a=0.5}", "data.split: .*sum to 0.5; they must sum to 1"),
        ("method={alpha=4}", "method: name is missing; there are: mlora, unictr"),
        ("backbone.name=dnc", "backbone: unknown name 'dnc'; the nearest is 'dcn'"),
        ("backbone.cross_layers=2", "unknown key backbone.cross_layers; known: "),
        ("method.name=mlora2", "method: unknown name 'mlora2'; the nearest is 'mlora'"),
        ('tables.pinned={usr="row_wise"}', "unknown table in tables.pinned 'usr'; .*'user'"),
        ("adapt.metric=mauc", "adapt: unknown metric 'mauc'; the nearest is 'auc'"),
        ("adapt.patience=0", "adapt: patience is 1 or more, not 0"),
        ("seed=-1", "seed is from 0 to 9223372036854775807, not -1"),
        ("seed", "--set seed: write it as key=value, such as --set pretrain.lr=0.01"),
        ("name.first=x", "--set name.first=x: name is a value, not a section"),
    ],
)
def test_a_mistake_is_named_with_the_way_out(small: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(small, [override])


def test_a_row_has_one_prompt(small: Path) -> None:
    fields = """[{name="a", kind="id"}, {name="x", kind="tokens"}, {name="y", kind="tokens"}]"""
    with pytest.raises(UserError, match="x and y are of kind tokens; a row has one prompt"):
        load(small, [f"data.fields={fields}"])


def test_kept_states_and_zero_3_do_not_go_together(small: Path) -> None:
    with pytest.raises(UserError, match="cache_gb: with engine.zero_stage = 3 .* cache_gb to 0"):
        load(small, ["encoder.cache_gb=1", "engine.zero_stage=3"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "no such run file; there are some in launch/runs"),
        (lambda path: path.write_text("name ="), "not valid TOML: Invalid value"),
        (lambda path: path.write_bytes(b'name = "\xff"'), "not valid TOML"),
        (lambda path: path.write_text('name = "x"'), "data: .*required"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    small: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(small)
    with pytest.raises(UserError, match=f"small.toml: {message}"):
        load(small)
