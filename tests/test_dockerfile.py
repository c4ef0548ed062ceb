"""The image's recipe agrees with the repository: what it copies is there, and its pins are ours."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = (ROOT / "k8s" / "Dockerfile").read_text(encoding="utf-8")
STAGES = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", RECIPE, re.M | re.S))


def test_the_image_holds_our_packages_and_nothing_else() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = listed["tool"]["setuptools"]["packages"]["find"]["include"]
    rooms = {name for name in packages if not name.endswith(".*")}
    assert set(re.findall(r"^COPY (\w+) \1$", STAGES["image"], re.M)) == rooms


def test_its_torch_is_the_makefiles() -> None:
    (torch,) = re.findall(r"torch==\S+", RECIPE)
    assert torch in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_both_lists_can_be_chosen() -> None:
    assert "COPY requirements/${ACCELERATOR}.txt" in STAGES["packages"]
    assert {"cpu.txt", "cuda.txt"} <= {path.name for path in (ROOT / "requirements").iterdir()}


def test_it_runs_as_a_plain_user() -> None:
    assert re.findall(r"^USER (.*)$", STAGES["image"], re.M) == ["1000:1000"]


def test_no_image_without_the_layout_test() -> None:
    assert "pytest -q -p no:cacheprovider tests/test_layout.py" in STAGES["checked"]
    assert RECIPE.rstrip().splitlines()[-1].startswith("COPY --from=checked")
