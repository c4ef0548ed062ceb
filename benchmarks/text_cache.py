"""Frozen text: encoding it once beside a plain loop, and reading vectors beside copying memory.

    python -m benchmarks.text_cache

Texts are Amazon items in UFIN's words (title, brand, category), through MiniLM. Sides are timed in
turns; figures are of processor time, which other work on the machine changes least.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from benchmarks.measure import Claim, Figure, Side, table
from benchmarks.unictr import in_turns
from data_shards import Field
from data_shards.prompts import PromptConfig, render
from data_shards.text_parts import TextConfig
from data_shards.text_vectors import BLOCK, TextVectors, VectorWriter
from data_shards.texts import TextTable
from models.encoder_files import EncoderConfig
from models.text_encoder import TextEncoder
from trainer.machine import machine
from trainer.text_cache import TextCache

ROOT = Path(__file__).parents[1]
ITEMS = ROOT / "data" / "amazon-text" / "beauty.items.csv.gz"
ENCODER = EncoderConfig(str(ROOT / "data" / "encoders" / "minilm"), max_tokens=96)
FIELDS = tuple(Field(name, "text", "item") for name in ("title", "brand", "category"))
PLAIN_BATCH = 32
ROWS = 4096  # of one look-up


def texts_of_items(count: int) -> list[str]:
    """In the order of the file."""
    kinds = {field.name: pa.string() for field in FIELDS}
    items = pyarrow.csv.read_csv(
        ITEMS, convert_options=pyarrow.csv.ConvertOptions(column_types=kinds)
    )
    return render(FIELDS, items.slice(0, count), PromptConfig()).to_pylist()


def plain_loop() -> Callable[[list[str]], Tensor]:
    """As one writes it with transformers: batches as the texts come, padded to their longest."""
    tokenizer = AutoTokenizer.from_pretrained(ENCODER.path)
    model = AutoModel.from_pretrained(ENCODER.path).eval()

    @torch.inference_mode()
    def encode(texts: list[str]) -> Tensor:
        sums = []
        for start in range(0, len(texts), PLAIN_BATCH):
            part = texts[start : start + PLAIN_BATCH]
            given = tokenizer(
                part,
                padding=True,
                truncation=True,
                max_length=ENCODER.max_tokens,
                return_tensors="pt",
            )
            states = model(**given).last_hidden_state
            sums.append((states * given["attention_mask"].unsqueeze(2)).sum(1))
        return torch.cat(sums)

    return encode


def building(args: argparse.Namespace) -> dict[str, Any]:
    """Texts a second, in the blocks in which a cache is built."""
    texts = texts_of_items(args.texts)
    encoder, plain = TextEncoder(ENCODER), plain_loop()

    def blocks() -> Tensor:
        starts = range(0, len(texts), BLOCK)
        return torch.cat([encoder.vectors(texts[start : start + BLOCK]) for start in starts])

    few = texts[:PLAIN_BATCH]
    assert torch.allclose(encoder.vectors(few), plain(few), rtol=1e-3, atol=1e-3)
    ours, theirs = "Banyan, sorted by length", "transformers, batches of 32 as they come"
    sides = {ours: Side(blocks, 1, len(texts)), theirs: Side(lambda: plain(texts), 1, len(texts))}
    claim = Claim("times the texts/s of the plain loop", theirs, ours, 1.5)
    return compared(f"Encoding {len(texts):,} item texts", sides, [claim], args.rounds)


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """Vectors of a batch's rows by text id, out of large and small tables, and a copy of them."""
    source = torch.rand(ROWS, 384)
    copy = "a memory copy of the same bytes"
    sides = {copy: Side(lambda: [source.clone() for _ in range(50)], 50, 50 * ROWS)}
    claims = []
    with TemporaryDirectory() as folder:
        for count, dtype in (
            (args.vectors, "float32"),
            (args.vectors, "float16"),
            (4000, "float32"),
        ):
            name = f"look-ups in {count:,} vectors, {dtype}"
            path = Path(folder) / f"{count}-{dtype}"
            sides[name] = Side(partial(look_up, *cache_of(path, count, dtype)), 50, 50 * ROWS)
            claims.append(Claim(f"of the copy's speed: {name}", copy, name))
        return compared(f"{ROWS:,} vectors of 384 floats", sides, claims, args.rounds)


def cache_of(folder: Path, count: int, dtype: str) -> tuple[TextCache, list[dict[str, Tensor]]]:
    """A cache of random vectors, and batches of text ids in random order."""
    texts = (pa.array([f"text {i}" for i in range(s, s + 10_000)]) for s in range(0, count, 10_000))
    known = TextTable.build(folder / "texts", texts)
    writer = VectorWriter(folder / "vectors", known, 384, dtype, {})
    for block in writer.todo:
        writer.put(block, torch.rand(len(writer.texts(block)), 384))
    writer.finish()
    cache = TextCache(TextConfig(), ENCODER)
    cache._sets = {"text_joint": [TextVectors.open(folder / "vectors", known)]}
    places = np.random.default_rng(0).integers(0, count, (50, ROWS))
    return cache, [{"text_joint": torch.from_numpy(known.ids[row])} for row in places]


def look_up(cache: TextCache, batches: list[dict[str, Tensor]]) -> None:
    for columns in batches:
        cache.vectors(columns)


def compared(
    title: str, sides: Mapping[str, Side], claims: list[Claim], rounds: int
) -> dict[str, Any]:
    """Time the sides in turns and judge the claims by processor time."""
    load, times = os.getloadavg()[0], in_turns(sides, rounds)
    figures = {
        name: {
            "step_ms": asdict(Figure.of([1000 * s for s in cpu])),
            "rows_per_second": asdict(
                Figure.of([sides[name].rows / sides[name].steps / s for s in cpu])
            ),
            "wall_step_ms": asdict(Figure.of([1000 * s for s in times.wall[name]])),
        }
        for name, cpu in times.cpu.items()
    }
    judged = [claim.judged(times.cpu, sides) for claim in claims]
    part = {"title": f"{title}, processor time", "load": load, "rounds": rounds}
    part |= {"sides": figures, "claims": judged}
    print(table(part), flush=True)
    return part


def main() -> None:
    """Measure, print, write."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--texts", type=int, default=4096)
    parser.add_argument("--vectors", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/text_cache.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parts = [reading(args), building(args)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).isoformat(timespec="minutes")
    content = {"date": date, "machine": machine(), "threads": args.threads, "parts": parts}
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
