"""Laws of the adapter store: what is saved comes back, and no domain's bytes move for another's."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.errors import UserError
from trainer.adapter_store import Adapter, AdapterStore

TRUNK = "trunk-a"
NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)
VOCABULARIES = st.dictionaries(NAMES, st.lists(NAMES, max_size=3).map(tuple), max_size=3)


def _adapter(domain: str = "toys", seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        method="mlora",
        domain=domain,
        version=0,
        trunk=TRUNK,
        schema="schema-a",
        data="data-a",
        metrics={"wauc": 0.75, "auc/one class": None},
        kept=True,
        tensors={"0.A": torch.randn(4, 3, generator=generator), "0.B": torch.zeros(2, 4)},
        vocabulary={"movie": ("Łódź", "", "7"), "user": ()},
    )


def _files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _same(a: Adapter, b: Adapter) -> bool:
    facts = [{k: v for k, v in vars(x).items() if k != "tensors"} for x in (a, b)]
    tensors = a.tensors.keys() == b.tensors.keys() and all(
        torch.equal(a.tensors[k], b.tensors[k]) and a.tensors[k].dtype == b.tensors[k].dtype
        for k in a.tensors
    )
    return facts[0] == facts[1] and tensors


@settings(max_examples=40)
@given(
    st.lists(NAMES | st.sampled_from([".", "..", "a/b", "%2E", ".x"]), unique=True), VOCABULARIES
)
def test_any_name_and_vocabulary_comes_back(names: list[str], vocabulary: dict) -> None:
    with TemporaryDirectory() as folder:
        store = AdapterStore(Path(folder) / "adapters")
        saved = {name: replace(_adapter(name, i), vocabulary=vocabulary)
                 for i, name in enumerate(names)}  # fmt: skip
        for adapter in saved.values():
            path = store.save(adapter)
            assert path.parents[2] == Path(folder) / "adapters"
        assert store.domains("mlora") == tuple(sorted(names))
        for name, adapter in saved.items():
            assert _same(store.load("mlora", name, trunk=TRUNK), replace(adapter, version=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_slices_of_one_stack_keep_shape_and_type(tmp_path: Path, dtype: torch.dtype) -> None:
    stack = torch.arange(24).reshape(2, 3, 4).to(dtype)
    tensors = {"a": stack[0], "b": stack[1].T, "whole": stack, "none": stack[:0]}
    store = AdapterStore(tmp_path)
    store.save(replace(_adapter(), tensors=tensors))
    assert _same(
        store.load("mlora", "toys", trunk=TRUNK), replace(_adapter(), version=1, tensors=tensors)
    )


def test_a_save_adds_a_version_and_changes_no_other_byte(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    store.save(_adapter("books"))
    store.save(_adapter("toys"))
    before, digest = _files(tmp_path), store.digest("mlora", "books")
    assert store.save(_adapter("toys", seed=1)).name == "2"
    assert before.items() <= _files(tmp_path).items()
    assert store.digest("mlora", "books") == digest
    assert store.load("mlora", "toys", trunk=TRUNK).version == 2
    assert _same(store.load("mlora", "toys", 1, trunk=TRUNK), replace(_adapter("toys"), version=1))


def test_removing_a_domain_leaves_the_others_bytes(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    store.save(_adapter("books"))
    before = _files(tmp_path)
    store.save(_adapter("toys"))
    store.remove("mlora", "toys")
    assert _files(tmp_path) == before
    assert store.domains("mlora") == ("books",)


def test_the_digest_sees_every_byte(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    folder = store.save(_adapter())
    seen = {store.digest("mlora", "toys")}
    for path in sorted(folder.iterdir()):
        path.write_bytes(path.read_bytes() + b" ")
        seen.add(store.digest("mlora", "toys"))
    assert len(seen) == 4


def test_a_version_made_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rename, rivals = AdapterStore(tmp_path), os.rename, [_adapter(seed=1)]

    def late(source: Path, target: Path) -> None:
        if rivals:
            store.save(rivals.pop())
        rename(source, target)

    monkeypatch.setattr("os.rename", late)
    assert store.save(_adapter(seed=2)).name == "2"
    for version in (1, 2):
        expected = replace(_adapter(seed=version), version=version)
        assert _same(store.load("mlora", "toys", version, trunk=TRUNK), expected)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_full_disk_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    store, calls, fsync = AdapterStore(tmp_path), [], os.fsync
    store.save(_adapter())
    before = _files(tmp_path)

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device; nothing was written. Free space"):
        store.save(_adapter(seed=1))
    assert _files(tmp_path) == before
    assert [path.name for path in (tmp_path / "mlora" / "toys").iterdir()] == ["1"]


def test_another_trunk_is_an_error(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    store.save(_adapter())
    with pytest.raises(UserError, match="trained on trunk trunk-a, this trunk is trunk-b; load"):
        store.load("mlora", "toys", trunk="trunk-b")


def test_a_missing_domain_names_the_nearest(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    with pytest.raises(UserError, match="unknown domain .* 'toy'; there are: none"):
        store.load("mlora", "toy", trunk=TRUNK)
    store.save(_adapter("toys"))
    store.save(_adapter("books"))
    for call in (store.digest, store.remove, lambda m, d: store.load(m, d, trunk=TRUNK)):
        with pytest.raises(UserError, match="mlora adapter 'toy'; the nearest is 'toys'"):
            call("mlora", "toy")


def test_a_missing_version_lists_what_there_is(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    store.save(_adapter())
    store.save(_adapter())
    for version in (0, 3):
        with pytest.raises(UserError, match=f"no version {version} of .*; there are: 1, 2"):
            store.load("mlora", "toys", version, trunk=TRUNK)


def test_a_name_needs_a_character(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one character"):
        AdapterStore(tmp_path).save(_adapter(""))


@pytest.mark.parametrize("name", ["adapter.safetensors", "vocabulary.arrow"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damage_is_found(tmp_path: Path, name: str, how: str) -> None:
    store = AdapterStore(tmp_path)
    path = store.save(_adapter()) / name
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(
            content[:-1] + bytes([content[-1] ^ 1]) if how == "flipped" else content[:9]
        )
    with pytest.raises(UserError, match=f"{name} is missing or damaged: .* load an older version"):
        store.load("mlora", "toys", trunk=TRUNK)


@pytest.mark.parametrize("how", ["a link", "upwards", "a folder", "one more", "a hidden one"])
def test_a_folder_copied_from_elsewhere_holds_plain_files_alone(tmp_path: Path, how: str) -> None:
    store, outside = AdapterStore(tmp_path / "adapters"), tmp_path / "adapter.safetensors"
    folder = store.save(_adapter())
    if how == "a link":
        (folder / outside.name).rename(outside)
        (folder / outside.name).symlink_to(outside)
    elif how == "upwards":
        (folder / "vocabulary.arrow").unlink()
        (folder / "vocabulary.arrow").symlink_to("../1/adapter.json")
    elif how == "a folder":
        (folder / "vocabulary.arrow").unlink()
        (folder / "vocabulary.arrow").mkdir()
    else:
        (folder / ("code.py" if how == "one more" else ".env")).write_text("")
    with pytest.raises(UserError, match="not a plain file of an adapter; expected adapter.json"):
        store.load("mlora", "toys", trunk=TRUNK)


def test_a_version_that_is_a_link_is_none(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    folder = store.save(_adapter())
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert store.domains("mlora") == ()


def test_a_large_manifest_is_not_read(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    os.truncate(store.save(_adapter()) / "adapter.json", 1 << 30)
    with pytest.raises(UserError, match="1,073,741,824 bytes, at most 67,108,864 are read; take a"):
        store.load("mlora", "toys", trunk=TRUNK)


@pytest.mark.parametrize("content", [b"", b'{"format": 1', b"[]", b"{}", b'{"format": 1}', b"\xff"])
def test_a_cut_manifest_is_found(tmp_path: Path, content: bytes) -> None:
    store = AdapterStore(tmp_path)
    (store.save(_adapter()) / "adapter.json").write_bytes(content)
    with pytest.raises(UserError, match="adapter.json is missing or cut"):
        store.load("mlora", "toys", trunk=TRUNK)


@pytest.mark.parametrize(
    ("change", "at"),
    [({"format": 2}, "format 2"), ({"kept": 1}, "kept"), ({"sha256": {}}, "adapter")],
)
def test_another_format_is_an_error(tmp_path: Path, change: dict, at: str) -> None:
    store = AdapterStore(tmp_path)
    path = store.save(_adapter()) / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=rf"adapter.json is not of format 1 \(see '{at}"):
        store.load("mlora", "toys", trunk=TRUNK)
