"""Coverage-guided fuzzing of what parses foreign bytes: blocks, tars and the index.

    pip install atheris
    python -m tests.fuzz_blocks -max_total_time=120

The first byte chooses the parser. Anything but a UserError or a sound result stops it.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris  # pyright: ignore

# numba compiles these from bytecode, and does not know the fuzzer's marks in it
with atheris.instrument_imports(  # pyright: ignore
    include=["data_shards"],
    exclude=[
        f"data_shards.{compiled}"
        for compiled in ("gather", "hashing", "order", "permute", "stored", "stratified")
    ],
):
    from data_shards.errors import UserError
    from data_shards.index import Index
    from data_shards.reader import ShardReader
    from data_shards.splits import SplitConfig
    from data_shards.storage import open_storage
    from data_shards.tars import members
    from data_shards.writer import write_shards

from tests.toy_source import SCHEMA, toy_rows, toy_source


def main() -> None:
    """Seed the corpus with sound bytes and run until told to stop."""
    with TemporaryDirectory() as temporary:
        folder, seeds = Path(temporary) / "shards", Path(temporary) / "seeds"
        rows = toy_rows({"books": 20})
        write_shards(toy_source(rows), SCHEMA, SplitConfig(), folder, block_rows=4)
        index = Index.load(folder)
        reader, block = ShardReader(folder, index, verify=False), index.blocks[0]
        seeds.mkdir()
        sound = (reader.fetch(block), (folder / block.shard).read_bytes())
        for number, data in enumerate((*sound, (folder / "index.json").read_bytes())):
            (seeds / str(number)).write_bytes(bytes([number]) + data)

        def one(data: bytes) -> None:
            content = data[1:]
            try:
                if data[:1] == b"\1":
                    (folder / "x.tar").write_bytes(content)
                    list(members(open_storage(folder), "x.tar"))
                elif data[:1] == b"\2":
                    (folder / "index.json").write_bytes(content)
                    Index.load(folder)
                else:
                    reader.parse(block, content).to_pylist()
            except UserError:
                pass

        atheris.Setup([*sys.argv, "-max_len=20000", str(seeds)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
