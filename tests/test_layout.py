"""The design's rules about files: who imports whom, who owns a name, what may not be there."""

import ast
import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("data_shards", "embeddings", "models", "trainer", "launch")
# Heavy dependency -> the only file that may use it; None: no product file may.
DOORS = {
    "torchrec.distributed": "embeddings/placement.py",
    "deepspeed": "trainer/engine.py",
    "transformers": "models/encoder_library.py",
    "tokenizers": "models/encoder_library.py",
    "huggingface_hub": "models/encoder_library.py",
    "peft": "models/encoder_library.py",
    "wandb": "trainer/log.py",
    "matplotlib": "trainer/pictures.py",
    "sklearn": "trainer/pictures.py",
    "webdataset": None,
}
# Whatever runs code that lies in a file.
UNSAFE = (
    "pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "torch.load",
    "torch.save",
)
UNSAFE_ARGUMENTS = ("allow_pickle", "trust_remote_code")
HOSTS = r"pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|debian\.org|download\.pytorch\.org"
MACHINE_PATHS = r"(?<![\w.])/(?:root|home|Users|work/(?:main|shared)|opt/(?:pypi|wheels))\b"


def _sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names imported anywhere in the file; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _uses(tree: ast.Module) -> set[str]:
    """Imported names, and dotted chains such as `torchrec.distributed.DMP` in expressions."""
    chains = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return chains | set(_imports(tree))


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _offenders(folders: tuple[str, ...], package: str) -> list[str]:
    files = _sources(*folders)
    return [_name(f) for f in files if any(_within(use, package) for use in _uses(_tree(f)))]


def _project_files() -> list[Path]:
    """Every file of the project itself, by .gitignore's own words (an image has no git)."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()] + [".git"]
    top = [p for p in ROOT.iterdir() if not any(fnmatch(p.name, pattern) for pattern in ignored)]
    files = [file for entry in top for file in (entry.rglob("*") if entry.is_dir() else [entry])]
    return [file for file in files if file.is_file() and "__pycache__" not in file.parts]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_stands_to_its_left(room: str) -> None:
    above = ROOMS[ROOMS.index(room) + 1 :] + ("tests", "benchmarks")
    upward = {
        f"{_name(path)} imports {name}"
        for path in _sources(room)
        for name in _imports(_tree(path))
        if name.split(".")[0] in above
    }
    assert not upward


@pytest.mark.parametrize("package", DOORS)
def test_a_heavy_dependency_has_one_door(package: str) -> None:
    assert set(_offenders(ROOMS, package)) <= {DOORS[package]}


def test_models_know_no_ranks() -> None:
    assert not _offenders(("models",), "torch.distributed")


@pytest.mark.parametrize("name", UNSAFE)
def test_nothing_that_runs_code_from_a_file(name: str) -> None:
    assert not _offenders(ROOMS, name)


def test_no_argument_that_lets_a_file_run_code() -> None:
    given = {
        f"{_name(path)}:{node.value.lineno} {node.arg}"
        for path in _sources(*ROOMS)
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.keyword)
        and node.arg in UNSAFE_ARGUMENTS
        and not (isinstance(node.value, ast.Constant) and node.value.value is False)
    }
    assert not given


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_ours(room: str) -> None:
    spec = find_spec(room)
    assert spec is not None and spec.origin == str(ROOT / room / "__init__.py")
    assert set(packages_distributions().get(room, [])) <= {"banyan-ctr"}


def test_imports_are_absolute() -> None:
    relative = {
        f"{_name(path)}:{node.lineno}"
        for path in _sources(*ROOMS, "tests", "benchmarks")
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.ImportFrom) and node.level
    }
    assert not relative


def test_no_module_is_a_drawer() -> None:
    parts = {part for path in _sources(*ROOMS, "tests") for part in _name(path)[:-3].split("/")}
    assert not parts & {"utils", "util", "common", "helpers", "misc"}


def test_files_and_functions_are_short() -> None:
    long = []
    for path in _sources(*ROOMS, "tests", "benchmarks"):
        lines = path.read_text(encoding="utf-8").count("\n")
        long += [f"{_name(path)}: {lines} lines"] if lines > 300 else []
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                long += [f"{_name(path)}:{node.lineno} {node.name}: {size}"] if size > 60 else []
    assert not long


def test_run_files_parse() -> None:
    runs = sorted((ROOT / "launch" / "runs").glob("*.toml"))
    assert runs
    for run in runs:
        assert tomllib.loads(run.read_text(encoding="utf-8")), run.name


def test_nothing_is_tied_to_one_machine() -> None:
    tied = {
        f"{_name(path)}: {found}"
        for path in _project_files()
        for found in re.findall(f"{HOSTS}|{MACHINE_PATHS}", path.read_text(errors="ignore"))
    }
    assert not tied


def test_the_two_lists_differ_only_in_fbgemm() -> None:
    cpu, cuda = (
        {
            line
            for line in (ROOT / f"requirements/{kind}.txt").read_text().split("\n")
            if "==" in line
        }
        for kind in ("cpu", "cuda")
    )
    assert cpu ^ cuda == {"fbgemm-gpu-cpu==1.8.0", "fbgemm-gpu==1.8.0"}
