"""MLoRA on MovieLens by gender (the paper's Table 2): WAUC of base and +MLoRA, over seeds.

Each cell is a whole run of launch/runs/movielens_gender.toml. "Same rows": base and adapters train
on the same 60 %. "Held aside": base on three quarters of these, adapters on the fresh quarter.

    python -m benchmarks.mlora_gender --data data/ml-1m.zip --out runs/mlora_gender
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from data_shards import open_source, write_shards
from trainer import config as run_files
from trainer import ranks
from trainer.report import grid
from trainer.schedule import train

RUN_FILE = Path("launch/runs/movielens_gender.toml")
PAPER = {"mlp": (80.15, 80.39), "deepfm": (80.24, 80.46), "dcn": (80.28, 80.42)}
ASIDE = [
    "data.split.parts={pretrain=0.45, adapt=0.15, valid=0.2, test=0.2}",
    'data.split.train=["pretrain", "adapt"]',
    'pretrain.rows=["pretrain"]',
    'adapt.rows=["adapt"]',
]
ROWS = {"same rows": [], "held aside": ASIDE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/ml-1m.zip"))
    parser.add_argument("--out", type=Path, default=Path("runs/mlora_gender"))
    parser.add_argument("--backbones", nargs="+", default=list(PAPER))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    args = parser.parse_args()
    group = ranks.start()
    cells = []
    for seed in args.seeds:
        for backbone in args.backbones:
            for rows, overrides in ROWS.items():
                cells.append(_cell(args, group, seed, backbone, rows, overrides))
                _save(args.out, cells)
    ranks.stop()
    print(_table(cells))


def _cell(
    args: argparse.Namespace,
    group: ranks.Ranks,
    seed: int,
    backbone: str,
    rows: str,
    overrides: list[str],
) -> dict[str, object]:
    slug = rows.replace(" ", "_")
    shards = args.out / f"shards-{slug}"
    config = run_files.load(
        RUN_FILE,
        [
            *overrides,
            f"name={backbone}-{slug}-{seed}",
            f'output="{args.out}"',
            f'data.shards="{shards}"',
            f'data.source.path="{args.data}"',
            f"seed={seed}",
            f"reading.seed={seed}",
            f"backbone.name={backbone}",
            "tracking.wandb=disabled",
        ],
    )
    if not shards.exists():
        data = config.data
        source = open_source(data.source, data.fields)
        write_shards(source, data.schema, data.split, shards)
    start = time.monotonic()
    summary = train(config, group)
    return {
        "backbone": backbone,
        "rows": rows,
        "seed": seed,
        "shared": summary["shared"]["wauc"],
        "adapted": summary["adapted"]["wauc"],
        "kept": len(summary["kept"]),
        "seconds": round(time.monotonic() - start, 1),
    }


def _save(out: Path, cells: list[dict[str, object]]) -> None:
    (out / "cells.json").write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")


def _table(cells: list[dict]) -> str:
    head = ["backbone, rows of phase 2", "base", "sd", "+MLoRA", "sd", "change", "paper"]
    body = []
    for backbone, (base, adapted) in PAPER.items():
        for rows in ROWS:
            mine = [c for c in cells if c["backbone"] == backbone and c["rows"] == rows]
            if mine:
                figures = [_mean_sd([100 * c[key] for c in mine]) for key in ("shared", "adapted")]
                change = statistics.mean(100 * (c["adapted"] - c["shared"]) for c in mine)
                flat = [figure for pair in figures for figure in pair]
                body.append([f"{backbone}, {rows}", *flat, f"{change:+.2f}", f"{base} {adapted}"])
    return grid(head, body)


def _mean_sd(values: list[float]) -> tuple[str, str]:
    sd = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"
    return f"{statistics.mean(values):.2f}", sd


if __name__ == "__main__":
    main()
