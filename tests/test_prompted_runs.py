"""Prompts in a run: written by `write-shards`, made again by `predict`, and never mixed up."""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import json
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
import pytest
import tomli_w

from data_shards import Batch, Index, Schema, UserError, encode_batch, open_source
from launch.__main__ import main
from launch.predict import _log_names, _read
from tests.gang import gang
from tests.test_prompted import TOKENS
from tests.toy_encoder import write_encoder, write_tokenizer
from tests.toy_prompts import LOG_FIELDS, PROMPT, rows_of, toy_history
from tests.toy_run import here
from trainer import config as run_files
from trainer import serving
from trainer.prompting import prompter_of, require_same_prompts
from trainer.run_folder import RunFolder
from trainer.trunk import new_trunk

LOG = "".join(f"u{n % 7},i{n % 11},{int(n % 3 > 0)},{n}\n" for n in range(60))
ITEMS = "".join(f"i{n},{n} red guitar\n" for n in range(11))
WORDS = ("shop", "The", "ID", "is", "clicked", "title", "red", "guitar", *"0123456789")
WORDS += tuple(f"user_u{n}" for n in range(7)) + tuple(f"product_i{n}" for n in range(11))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file, the encoder and the log that it reads, and its shards."""
    folder = tmp_path_factory.mktemp("run")
    write_tokenizer(write_encoder(folder / "encoder", "bert"), WORDS)
    source = asdict(toy_history(folder, LOG, ITEMS, columns={"user": "user"}))
    values = {
        "name": "toy",
        "output": str(folder),
        "data": {
            "shards": str(folder / "shards"),
            "source": run_files._without_none(source),
            "fields": [asdict(field) for field in (*LOG_FIELDS, TOKENS)],
            "prompt": asdict(PROMPT),
        },
        "encoder": {"path": str(folder / "encoder"), "max_tokens": 44},
        "backbone": {"hidden": [4]},
        "method": {"name": "mlora", "alpha": 2},
    }
    (folder / "run.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
    assert main(["write-shards", str(folder / "run.toml")]) == 0
    return folder


def test_the_shards_say_how_many_prompts_were_cut(made: Path) -> None:
    index = Index.load(made / "shards")
    prompts = rows_of(made / "shards")["prompt"].to_pylist()
    longest = sum(len(prompt) == 44 for prompt in prompts)
    assert 0 < index.dropped["kept_cut_prompt"] <= longest < len(prompts)
    assert len({tuple(prompt) for prompt in prompts}) > 60


def test_inspect_tells_how_long_the_prompts_are(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(made / "shards"), "--verify"]) == 0
    lengths = [len(prompt) for prompt in rows_of(made / "shards")["prompt"].to_pylist()]
    told = f"prompt: {sum(lengths) / len(lengths):.1f} tokens a row, at most {max(lengths)}"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_predict_makes_the_tokens_that_the_shards_hold(
    suffix: str, made: Path, tmp_path: Path
) -> None:
    config = run_files.load(made / "run.toml")
    source = open_source(config.data.source, config.data.raw.fields)
    raw = pa.concat_tables(source.read(0, Counter()))
    if suffix == ".csv":
        flat = pc.binary_join(raw["history"], "|")
        raw = raw.set_column(raw.column_names.index("history"), "history", flat)
        pyarrow.csv.write_csv(raw, tmp_path / "rows.csv")
    else:
        pyarrow.parquet.write_table(raw, tmp_path / "rows.parquet")
    (told,) = gang(1, _told, made, tmp_path / f"rows{suffix}")
    written = rows_of(made / "shards")
    pairs = zip(written["row_id"].to_pylist(), written["prompt"].to_pylist(), strict=True)
    assert told == dict(pairs)


def _told(made: Path, rows: Path) -> dict[int, list[int]]:
    """The tokens that an untrained model is given, by row."""
    config = run_files.load(made / "run.toml")
    index, folder = Index.load(made / "shards"), RunFolder(made / "toy")
    trunk = new_trunk(config, here(), index)
    with folder.open(config, here()):
        folder.save_trunk(trunk, index, made / "shards", 0.0)
    server = serving.Server(config, folder, here())
    told: dict[int, list[int]] = {}

    def seen(*given: Any) -> Batch:
        batch = encode_batch(*given)
        prompts = batch.tokens["prompt"].to_dense()
        told.update(zip(batch.row_id.tolist(), (p.tolist() for p in prompts), strict=True))
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "encode_batch", seen)
        server.probabilities(_read(rows, server.raw, _log_names(config.data.source)))
    return told


def test_tokens_of_a_log_are_predicted_from_as_they_are(tmp_path: Path) -> None:
    rows = pa.table({"domain": ["a", "b"], "user": ["1", "2"], "prompt": [[5, 6], []]})
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet")
    schema = Schema((LOG_FIELDS[0], TOKENS))
    read = _read(tmp_path / "rows.parquet", schema, {})
    assert read["prompt"].to_pylist() == [[5, 6], []]
    assert read["prompt"].type == pa.list_(pa.int32())


OTHERS = {
    "data.prompt.template=ufin": "template",
    "encoder.max_tokens=23": "tokenizer.max_tokens",
    'data.prompt.without=["title"]': "without",
    'data.source.local=["item"]': "local",
}


@pytest.mark.parametrize("change", OTHERS)
def test_prompts_of_another_run_file_are_refused(change: str, made: Path) -> None:
    config = run_files.load(made / "run.toml")
    index = Index.load(made / "shards")
    require_same_prompts(prompter_of(config), index.source.get("prompt"), "here")
    other = run_files.load(made / "run.toml", [change])
    message = rf"here: its prompts are of another run file .they differ in {OTHERS[change]}\)"
    with pytest.raises(UserError, match=message):
        require_same_prompts(prompter_of(other), index.source.get("prompt"), "here")


def test_an_added_domain_has_the_prompts_of_its_trunk(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_files.load(made / "run.toml", [f"output={tmp_path}", "name=base"])
    folder = RunFolder(tmp_path / "base")
    folder.path.mkdir()
    (folder.path / "run.toml").write_text(run_files.dump(config), encoding="utf-8")
    prompter = prompter_of(config)
    assert prompter is not None
    folder.trunk.mkdir()
    (folder.trunk / "manifest.json").touch()
    (folder.trunk / "state.json").write_text(json.dumps({"prompts": prompter.describe()}))
    command = ["write-shards", str(made / "run.toml"), "--base", str(folder.path)]
    command += ["--out", str(tmp_path / "added"), "--set", "encoder.max_tokens=30"]
    assert main(command) == 2
    assert "base: its prompts are of another run file (they differ in" in capsys.readouterr().err


def test_other_words_are_other_tokens_and_another_fingerprint(made: Path, tmp_path: Path) -> None:
    before = prompter_of(run_files.load(made / "run.toml"))
    write_tokenizer(write_encoder(tmp_path / "encoder", "bert"), WORDS[::-1])
    change = f"encoder.path={tmp_path / 'encoder'}"
    after = prompter_of(run_files.load(made / "run.toml", [change]))
    assert before and after and before.describe()["tokenizer"] != after.describe()["tokenizer"]


def _without_prompt(values: dict[str, Any]) -> None:
    del values["data"]["prompt"]
    values["data"]["source"] = {"kind": "planted"}


def _elsewhere(values: dict[str, Any]) -> None:
    values["data"]["prompt"]["field"] = "words"


def _of_text(values: dict[str, Any]) -> None:
    values["data"]["fields"][-1]["kind"] = "text"


def _twice(values: dict[str, Any]) -> None:
    values["data"]["prompt"]["fields"] += values["data"]["fields"][:1]


MISTAKES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (_without_prompt, "data.fields: planted has no tokens, so no 'prompt'; make them of "),
    (_elsewhere, "data.prompt.field: data.fields has no 'words' of kind tokens; add { name ="),
    (_of_text, "data.prompt.field: data.fields has no 'prompt' of kind tokens; add"),
    (_twice, "the field 'user' stands twice"),
    (lambda values: values.pop("encoder"), r"encoder.path: none given, and \[data.prompt\] needs"),
    (
        lambda values: values["data"]["prompt"].update(templat=3),
        "unknown key data.prompt.templat; did you mean data.prompt.template",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), MISTAKES)
def test_a_mistake_in_the_run_file_is_named(
    spoil: Callable[[dict[str, Any]], object], message: str, made: Path
) -> None:
    values = tomllib.loads((made / "run.toml").read_text(encoding="utf-8"))
    spoil(values)
    with pytest.raises(UserError, match=message):
        run_files.from_dict(values, "run.toml").data.raw  # noqa: B018
