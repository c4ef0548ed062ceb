"""Blocks of several sets: which sets can be read as one."""

import shutil
from pathlib import Path

import pytest

from data_shards.blocks import require_one_schema
from data_shards.errors import UserError
from data_shards.index import Index
from data_shards.splits import SplitConfig
from data_shards.writer import write_shards
from tests.toy_source import SCHEMA, toy_source


def test_a_set_is_named_once_wherever_its_copies_lie(tmp_path: Path) -> None:
    trunk, toys, copy = (tmp_path / name for name in ("trunk", "toys", "copy"))
    index = write_shards(toy_source(), SCHEMA, SplitConfig(), trunk, hold_out=("toys",))
    base = index.load_vocabulary(trunk)
    write_shards(toy_source(), SCHEMA, SplitConfig(), toys, only_domains=("toys",), base=base)
    shutil.copytree(toys, copy)
    (tmp_path / "link").symlink_to(toys)

    def check(*folders: Path | str) -> None:
        require_one_schema(folders, [Index.load(folder) for folder in folders])

    check(trunk, toys)
    for again in (toys, str(toys), f"{toys}/", tmp_path / "link", copy, f"file://{toys}"):
        with pytest.raises(UserError, match=f"{again}: is {toys} or a copy of it, whose rows"):
            check(trunk, toys, again)
