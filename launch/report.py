"""A page about a run or a suite: one HTML file in its folder, and the same, shorter, as text.

Example: python -m launch report runs/movielens_mlora
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from data_shards import UserError

if TYPE_CHECKING:
    from launch.report_page import Page

PAGE = "report.html"
RUN, SUITE = "run.toml", "results.json"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="of a `train` or of a `compare`")


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    page = page_of(args.folder)
    path = write(page, args.folder)
    console = Console()
    page.print(console)
    console.print(f"page: {path}", soft_wrap=True, markup=False, highlight=False)


def write(page: "Page", folder: Path) -> Path:
    """The file of the page, in its folder."""
    path = folder / PAGE
    path.write_text(page.html(), encoding="utf-8")
    return path


def page_of(folder: Path) -> "Page":
    """Of whatever the folder holds."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one of a `train` or of a `compare`")
    if (folder / RUN).exists():
        from launch.report_run import run_page

        return run_page(folder)
    if (folder / SUITE).exists():
        from launch.report_suite import suite_page

        return suite_page(folder)
    raise UserError(
        f"{folder}: neither a run's folder (no {RUN}) nor a suite's (no {SUITE}); give the one of "
        "a `train` or of a `compare`"
    )
