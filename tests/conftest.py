"""Fixtures for real data, and what a test run needs beyond pytest's own settings."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.toy_run import write_toy

CI = os.environ.get("CI") == "true"

# No deadline: a shared machine's pauses are no defect. In CI the cases are the same in every run.
settings.register_profile("banyan", deadline=None, derandomize=CI, print_blob=True)
settings.load_profile("banyan")


def _missing(path: Path) -> None:
    message = f"needs {path.parent.name}/{path.name} beside the repository"
    if CI:
        pytest.fail(f"{message}; in CI it must be there")
    pytest.skip(message)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real public data sets that lies beside a checkout."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        _missing(folder)
    return folder


@pytest.fixture(scope="session")
def movielens_zip(shared_data: Path) -> Path:
    """MovieLens-1M in its original zip."""
    path = shared_data / "ml-1m.zip"
    if not path.is_file():
        _missing(path)
    return path


@pytest.fixture(scope="session")
def k8s_crds() -> Path:
    """The definitions of Kubeflow Trainer's and JobSet's kinds, which no package carries."""
    folder = Path(__file__).parents[2] / "shared" / "k8s-crds"
    if not folder.is_dir():
        pytest.skip("needs shared/k8s-crds beside the repository")
    return folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `shards`, `added` and `run.toml`; see `tests.toy_run`. Read only."""
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    return folder


@pytest.fixture(scope="session")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file, its shards and their text vectors; see `tests.toy_text`. Read only."""
    from tests.toy_text import cache_text, write_text_run  # seconds, for transformers

    folder = tmp_path_factory.mktemp("worded")
    write_text_run(folder)
    assert cache_text(folder) == 0
    return folder
