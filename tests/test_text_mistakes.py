"""Text vectors that are missing, half there or made by something else: each mistake is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from data_shards import Index, UserError
from tests.toy_text import cache_of, cache_text, columns_of, text_config
from trainer.fence import fence

OTHERS = {
    "encoder.max_tokens=19": "max_tokens",
    "text.parts=joint": "parts",
    "text.dtype=float16": "dtype",
    'text.prompt.without=["page", "user"]': "prompt.without",
    "text.prompt.template=ufin_pairs": "prompt.template",
}


@pytest.fixture
def copied(worded: Path, tmp_path: Path) -> Path:
    """The folder of the text vectors of `worded`, to be spoiled."""
    return shutil.copytree(worded / "text", tmp_path / "text")


def _open(worded: Path, *changes: str) -> int:
    """How many sidecars its shards have."""
    return len(cache_of(text_config(worded, *changes)).open(Index.load(worded / "shards")))


@pytest.mark.parametrize("change", OTHERS)
def test_vectors_of_another_run_file_are_refused(
    change: str, worded: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = rf"its text vectors are of another run file .they differ in {OTHERS[change]}.; take"
    changes = (f"text.folder={copied}", change)
    with pytest.raises(UserError, match=message):
        _open(worded, *changes)
    assert cache_text(worded, *changes) == 2
    assert f"differ in {OTHERS[change]})" in capsys.readouterr().err


def test_vectors_of_another_encoder_or_shard_set_are_refused(worded: Path, copied: Path) -> None:
    (folder,) = copied.iterdir()
    said = json.loads((folder / "text.json").read_text())
    for key in ("encoder", "tokenizer", "shards"):
        (folder / "text.json").write_text(json.dumps({**said, key: "another"}))
        with pytest.raises(UserError, match=rf"differ in {key}.; .* run `cache-text RUN_FILE`"):
            _open(worded, f"text.folder={copied}")
    (folder / "text.json").write_text(json.dumps(said))
    for path in ("text_user/ids/sidecar.json", "text_user/vectors/vectors.json"):
        (folder / path).write_text((folder / path).read_text().replace("ufin", "uni_ctr"))
        with pytest.raises(UserError, match="its made_by.prompt is .*uni_ctr.*, expected"):
            _open(worded, f"text.folder={copied}")
        shutil.copy(worded / "text" / folder.name / path, folder / path)
    assert _open(worded, f"text.folder={copied}") == 3


def test_what_is_not_there_is_refused(
    worded: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = "the text vectors of this shard set are not there, or not all; `cache-text RUN_FILE`"
    (folder,) = copied.iterdir()
    for part in ("text_item", ""):
        shutil.rmtree(folder / part)
        with pytest.raises(UserError, match=missing):
            _open(worded, f"text.folder={copied}")
    folder.mkdir()
    (folder / "notes.txt").touch()
    assert cache_text(worded, f"text.folder={copied}") == 2
    assert "holds something else than text vectors (no text.json)" in capsys.readouterr().err
    shutil.rmtree(folder)
    whole = cache_of(text_config(worded))
    columns = columns_of(whole, Index.load(worded / "shards"))
    columns["text_item"][1] = 7
    with pytest.raises(UserError, match="no vector of the text 7 in a row's text_item; delete"):
        whole.vectors(columns)


def test_a_run_without_words_is_refused(
    worded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = 'text.prompt.without=["pages"]'
    assert cache_text(worded, unknown, f"text.folder={tmp_path}") == 2
    assert "unknown field of a prompt 'pages'; the nearest is 'page'" in capsys.readouterr().err
    every = 'text.prompt.without=["page", "user", "tags", "price", "title", "domain"]'
    for parts in ("joint", "sides"):
        assert cache_text(worded, every, f"text.parts={parts}", f"text.folder={tmp_path}") == 2
        told = capsys.readouterr().err
        assert "text.prompt: the template 'ufin' words none of the fields user, item, tags" in told
    assert not list(tmp_path.iterdir())
    lines = (worded / "run.toml").read_text().split("[text]")[0]
    (tmp_path / "run.toml").write_text(lines)
    assert cache_text(tmp_path, "method={name='mlora'}") == 2
    assert "text: the run file has no such section; add [text], and" in capsys.readouterr().err


def test_vectors_that_do_not_fit_into_their_type_are_refused(worded: Path) -> None:
    cache = cache_of(text_config(worded, "text.dtype=float16"))
    with torch.no_grad():
        for parameter in cache.encoder._model.parameters():
            parameter.mul_(1e6)
    with pytest.raises(UserError, match="text.dtype: float16 cannot hold .* 'title a b'; take"):
        cache.stored(["title a b"])


def test_two_at_once_do_not_write_the_same_vectors(
    worded: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = copied.iterdir()
    changes = (f"text.folder={copied}", "faults.timeout_seconds=0.4")
    with fence(folder):
        assert cache_text(worded, *changes) == 1
    assert f"{folder.name}: another process writes to it (pid " in capsys.readouterr().err
    assert cache_text(worded, *changes) == 0
