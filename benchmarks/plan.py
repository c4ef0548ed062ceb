"""The plan of docs/plan.md: an industrial run on 1 to 512 ranks of 80 GiB.

python -m benchmarks.plan
"""

from launch.__main__ import main

SIZES = ("category=5000", "domain=11")
HEAD = (
    "ranks",
    "tables",
    "dense",
    "activations",
    "in all",
    "sent a step",
    "rows/s at most",
    "fits",
)


def table() -> None:
    print("| " + " | ".join(HEAD) + " |\n" + "| --- " * len(HEAD) + "|")
    for ranks in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        rows = [word for size in SIZES for word in ("--rows", size)]
        place = ["--ranks", f"{ranks}", "--memory", "80", "--domains", "10"]
        assert main(["plan", "docs/industrial/run.toml", *place, *rows, "--brief"]) == 0


if __name__ == "__main__":
    table()
