"""Writing: jobs, parts and kills decide nothing, and what waits is bounded."""

import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_shards
from data_shards import pieces, row_ids
from data_shards.errors import UserError
from data_shards.index import Index
from data_shards.loader import Loader
from data_shards.schema import Field, Schema
from data_shards.splits import SplitConfig
from data_shards.writer import Part, write_shards
from tests.toy_source import SCHEMA, ToySource, toy_rows, toy_source

ROOT = Path(__file__).parents[1]


def test_jobs_and_tables_decide_nothing(tmp_path: Path) -> None:
    source = toy_source(pieces=5)
    one, four = (
        write_shards(source, SCHEMA, SplitConfig(), tmp_path / str(jobs), block_rows=50, jobs=jobs)
        for jobs in (1, 4)
    )
    assert one.fingerprint == four.fingerprint
    for name in one.shards:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "4" / name).read_bytes()


PART = """
import sys
from pathlib import Path
from data_shards import Part, SplitConfig, write_shards
from tests.toy_source import SCHEMA, toy_source
part = Part(int(sys.argv[2]), 4)
write_shards(
    toy_source(pieces=5), SCHEMA, SplitConfig(), Path(sys.argv[1]), block_rows=50, part=part
)
"""


def _parts(out: Path, numbers: range) -> list[subprocess.Popen]:
    return [
        subprocess.Popen([sys.executable, "-c", PART, str(out), str(number)], cwd=ROOT)
        for number in numbers
    ]


def test_parts_decide_nothing(tmp_path: Path) -> None:
    alone = write_shards(
        toy_source(pieces=5), SCHEMA, SplitConfig(), tmp_path / "alone", block_rows=50
    )
    running = _parts(tmp_path / "parts", range(4))
    assert [process.wait(timeout=120) for process in running] == [0] * 4
    together = Index.load(tmp_path / "parts")
    assert together.fingerprint == alone.fingerprint
    for name in alone.shards:
        ours, theirs = tmp_path / "alone" / name, tmp_path / "parts" / name
        assert ours.read_bytes() == theirs.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "parts"]


def test_a_part_that_comes_late_finds_the_set(tmp_path: Path) -> None:
    source, out = toy_source(pieces=5), tmp_path / "parts"
    running = _parts(out, range(4))
    assert [process.wait(timeout=120) for process in running] == [0] * 4
    index = Index.load(out)
    again = write_shards(
        toy_source(pieces=5), SCHEMA, SplitConfig(), out, block_rows=50, part=Part(3, 4)
    )
    assert again == index
    with pytest.raises(UserError, match="exists already; give another path or delete it"):
        write_shards(source, SCHEMA, SplitConfig(), out)
    with pytest.raises(UserError, match="exists already; give another path or delete it"):
        other = SplitConfig(parts={"train": 0.5, "test": 0.5})
        write_shards(source, SCHEMA, other, out, part=Part(3, 4))


class _Killed(ToySource):
    """Reads piece 3 in the third stage only once somebody has put `go` there."""

    def __init__(self, go: Path) -> None:
        super().__init__(toy_rows(), 5)
        self.go = go

    def read(self, piece: int, dropped: Counter[str]) -> Iterator[pa.Table]:
        if piece == 3 and list(self.go.parent.glob(".*/blocks-00000.json")):
            if not self.go.exists():
                raise KeyboardInterrupt
        return super().read(piece, dropped)


def test_a_writer_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    out, go, said = tmp_path / "shards", tmp_path / "go", []
    source = _Killed(go)
    with pytest.raises(KeyboardInterrupt):
        write_shards(source, SCHEMA, SplitConfig(), out, block_rows=50)
    assert not out.exists()
    with pytest.raises(UserError, match="begun with other choices .they differ in block_rows"):
        write_shards(source, SCHEMA, SplitConfig(), out, block_rows=60)
    go.touch()
    index = write_shards(source, SCHEMA, SplitConfig(), out, block_rows=50, progress=said.append)
    there = [line for line in said if "there already" in line]
    assert there[:2] == [f"{stage}: 5 pieces are there already" for stage in ("rows", "values")]
    assert there[2] in [f"blocks: {count} pieces are there already" for count in (3, 4)]
    whole = write_shards(
        toy_source(pieces=5), SCHEMA, SplitConfig(), tmp_path / "whole", block_rows=50
    )
    assert index.fingerprint == whole.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["go", "shards", "whole"]


class _Broken(ToySource):
    def read(self, piece: int, dropped: Counter[str]) -> Iterator[pa.Table]:
        if piece == 0:
            raise UserError("line 7 is wrong")
        return super().read(piece, dropped)


def test_a_part_that_stops_stops_the_others(tmp_path: Path) -> None:
    source, out = _Broken(toy_rows(), 2), tmp_path / "shards"
    for number, message in ((0, "line 7 is wrong"), (1, "another part stopped: part 0: line 7 is")):
        with pytest.raises(UserError, match=message):
            write_shards(source, SCHEMA, SplitConfig(), out, part=Part(number, 2))
    assert not out.exists()


@pytest.mark.parametrize(("number", "of"), [(4, 4), (-1, 2), (0, 0)])
def test_a_part_is_one_of_them(number: int, of: int) -> None:
    with pytest.raises(
        UserError, match=f"part {number}/{of}: of {max(of, 1)} parts the first is 0"
    ):
        Part(number, of)


@given(st.lists(st.integers(0, 4), max_size=300), st.integers(1, 40), st.integers(0, 60))
def test_cutting_keeps_each_group_in_order_and_bounds_what_waits(
    groups: list[int], block_rows: int, most: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "WINDOW", 50)
        patch.setattr(pieces, "MOST_WAITING", most)
        group = np.array(groups, np.int64)
        tables = [
            (pa.table({"at": np.arange(i, min(i + 23, len(group)))}), group[i : i + 23])
            for i in range(0, len(group), 23)
        ]
        blocks = list(pieces.cut(iter(tables), block_rows))
    assert all(0 < len(table) <= block_rows for _, table in blocks)
    for number in set(groups):
        rows = [row for g, table in blocks if g == number for row in table["at"].to_pylist()]
        assert rows == np.flatnonzero(group == number).tolist()
    assert sum(len(table) for _, table in blocks) == len(groups)


WAITING = """
import sys
from pathlib import Path
from data_shards import SplitConfig, write_shards
from tests.toy_source import SCHEMA, ToySource, toy_rows
class Waiting(ToySource):
    def read(self, piece, dropped):
        print("reading", flush=True)
        sys.stdin.read()
        return super().read(piece, dropped)
write_shards(Waiting(toy_rows(), 5), SCHEMA, SplitConfig(), Path(sys.argv[1]), block_rows=50)
"""


def test_a_second_writer_is_told_of_the_first_until_that_one_is_gone(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    command = [sys.executable, "-c", WAITING, str(out)]
    first = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout is not None and first.stdout.readline() == b"reading\n"
    who = f"pid {first.pid} on {socket.gethostname()} since 20..-..-.. "
    for block_rows in (50, 60):  # whatever it was asked
        with pytest.raises(UserError, match=f"part 0 is being written by another .*{who}.*wait"):
            write_shards(toy_source(pieces=5), SCHEMA, SplitConfig(), out, block_rows=block_rows)
    first.kill()
    first.communicate()
    index = write_shards(toy_source(pieces=5), SCHEMA, SplitConfig(), out, block_rows=50)
    assert index.rows == 1041
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def _with_ids(ids: np.ndarray) -> pa.Table:
    return toy_rows().set_column(0, "row_id", pa.array(ids))


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 300), st.integers(0, 99), st.booleans())
def test_a_row_id_that_stands_twice_is_found_wherever_it_stands(
    tmp_path_factory: pytest.TempPathFactory, parts: int, run: int, seed: int, mixed: bool
) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.permutation(1041) * 3 if mixed else np.arange(1041) * 3
    first, second = rng.choice(1041, 2, replace=False)
    split, out = SplitConfig("random"), tmp_path_factory.mktemp("ids") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_ids, "RUN", run)
        write_shards(toy_source(_with_ids(ids), parts), SCHEMA, split, out)
        ids[second] = ids[first]
        with pytest.raises(UserError, match=f"the row id {ids[first]} stands twice .in .*row_id"):
            write_shards(toy_source(_with_ids(ids), parts), SCHEMA, split, out.with_name("b"))
    assert [path.name for path in out.parent.iterdir()] == ["shards"]
    assert {path.suffix for path in out.iterdir()} == {".tar", ".json", ""}


@pytest.mark.parametrize(
    ("only", "held", "message"),
    [
        (("toyz",), (), "unknown domain 'toyz'; the nearest is 'toys'; there are: books, music,"),
        (("toys", "musik"), (), "unknown domain 'musik'; the nearest is 'music'"),
        ((), ("boks", "toys"), "unknown domain 'boks'; the nearest is 'books'"),
    ],
)
def test_a_domain_that_is_not_there_is_told_also_where_rows_are_read_once(
    only: tuple[str, ...], held: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    schema = Schema((Field("page", "id", vocabulary="hash", buckets=50),))
    source, out = toy_source(pieces=3), tmp_path / "shards"
    with pytest.raises(UserError, match=message):
        write_shards(source, schema, SplitConfig("random"), out, only_domains=only, hold_out=held)
    assert list(tmp_path.iterdir()) == []


def test_a_writing_process_does_not_wait_for_torch() -> None:
    check = "import sys, data_shards.processes; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)
    assert data_shards.Loader is Loader
    with pytest.raises(AttributeError, match="module 'data_shards' has no attribute 'Loder'"):
        data_shards.Loder  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


class _Grown(ToySource):
    """A file that has changed since an earlier start."""

    def state(self) -> list[object]:
        return [["log.csv", 2_000, 0]]


def test_input_that_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    with pytest.raises(KeyboardInterrupt):
        write_shards(_Killed(tmp_path / "go"), SCHEMA, SplitConfig(), out, block_rows=50)
    with pytest.raises(UserError, match="begun with other choices .they differ in input files"):
        write_shards(_Grown(toy_rows(), 5), SCHEMA, SplitConfig(), out, block_rows=50)


def test_a_plan_under_which_nothing_was_done_gives_way(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    with pytest.raises(UserError, match="line 7 is wrong"):
        write_shards(_Broken(toy_rows(), 1), SCHEMA, SplitConfig(), out, part=Part(0, 2))
    index = write_shards(toy_source(), SCHEMA, SplitConfig(), out, block_rows=60)
    assert index.rows == 1041


def test_rows_that_fill_a_window_to_the_last_are_no_special_case() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "WINDOW", 50)
        rows = (pa.table({"at": np.arange(50)}), np.zeros(50, np.int64))
        assert [len(table) for _, table in pieces.cut(iter([rows]), 10)] == [10] * 5
        assert list(pieces.cut(iter([(rows[0].slice(0, 0), rows[1][:0])]), 10)) == []


def test_a_set_without_a_training_row_is_refused(tmp_path: Path) -> None:
    split = SplitConfig("time", until={"train": -5, "test": 10})
    with pytest.raises(UserError, match="no row is left in train .left out: .*look at the split"):
        write_shards(toy_source(), SCHEMA, split, tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []
