"""A disk that does not answer, and what was finished and is damaged, end a run with the way out: no
domain goes without its adapter, and nothing is taken for lost."""

import re
from pathlib import Path
from typing import Any

import pytest

from data_shards.errors import LostError
from tests.gang import gang
from tests.toy_run import here, refused, toy_config
from trainer import schedule

pytestmark = pytest.mark.dist


def _unread(toy: Path, output: Path) -> list[str]:
    """What a run says whose disk does not answer for one rank, while a domain's rows are opened,
    while the best checkpoint is looked at, and at the end of a phase."""
    config, said = toy_config(toy, output, "name=unread", "pretrain.max_epochs=1"), []

    def silent(*unused: Any) -> Any:
        raise LostError("the disk does not answer")

    with pytest.MonkeyPatch.context() as patch:
        if here().rank == here().world - 1:
            patch.setattr(schedule, "rows_of", silent)
        with pytest.raises(LostError) as lost:
            schedule.train(config, here())
        said.append(str(lost.value))
    trunk = output / "unread" / "trunk"
    dense = (trunk / "dense.safetensors").read_bytes()
    here().gather(None)
    (trunk / "dense.safetensors").write_bytes(b"")
    said.append(refused(lambda: schedule.train(config, here())))
    here().gather(None)
    (trunk / "dense.safetensors").write_bytes(dense)
    more = toy_config(toy, output, "name=unread", "pretrain.max_epochs=2")
    said.append(refused(lambda: schedule.train(more, here())))
    return said


def test_a_disk_that_does_not_answer_makes_no_domain_go_without(toy: Path, tmp_path: Path) -> None:
    for silent, trunk, more in gang(2, _unread, toy, tmp_path):
        assert silent == "the disk does not answer"
        assert re.search(
            "restore the folder .*, or delete .*trunk and start its `train` aga", trunk
        )
        assert "they differ in pretrain.max_epochs" in more
