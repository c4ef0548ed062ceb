"""What is no encoder is refused with its place, what was expected and the way out; nothing that
lies in a folder is run, and nothing is asked of a network for what is on this machine."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants as hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BertModel, RoFormerConfig, RoFormerModel

from data_shards.errors import UserError
from models.encoder import Encoder, EncoderConfig
from models.encoder_files import find
from models.prompt_tokenizer import PromptTokenizer
from tests.toy_encoder import HIDDEN, VOCABULARY, minilm, write_encoder, write_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_encoder(tmp_path / "encoder", "bert")


def _encoder(path: Path | str, **changed: object) -> Encoder:
    return Encoder(EncoderConfig(**{"path": str(path), "max_tokens": 48, **changed}), seed=0)  # type: ignore[arg-type]


def _change(path: Path, **keys: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def _pickled_alone(folder: Path) -> None:
    weights = folder / WEIGHTS
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()


def _without_a_shard(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _without_a_weight(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    kept = {name: tensor for name, tensor in weights.items() if "layer.2" not in name}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


def _cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def _without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (
        lambda f: (f / WEIGHTS).unlink(),
        r"encoder: no model.safetensors; expected a folder with config.json, \*.safetensors and",
    ),
    "pickled": (
        _pickled_alone,
        r"encoder: its weights are pickled .* expected model.safetensors: save it once more with",
    ),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "encoder: no config.json; expected a folder with .*, as `save_pretrained` writes it",
    ),
    "no tokenizer": (
        _without_tokenizer,
        "encoder: no tokenizer; expected a folder with .* one of tokenizer.json",
    ),
    "a shard missing": (_without_a_shard, "a file that model.safetensors.index.json names is not"),
    "a LoRA": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "encoder: holds a LoRA over another model .*; merge it, and save the whole model",
    ),
    "no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        "config.json: not JSON .*; copy the encoder's folder again",
    ),
    "no object": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json: not a JSON object; copy the encoder's folder again",
    ),
    "another's config": (
        lambda f: _change(f / "config.json", intermediate_size=65),
        "encoder: the weights could not be read .*; copy the encoder again",
    ),
    "a weight missing": (
        _without_a_weight,
        "encoder: its weights lack 'encoder.layer.2.*' and 15 more that config.json asks for; take",
    ),
    "cut weights": (_cut, "encoder: the weights could not be read .*; copy the encoder again"),
    "nothing known": (
        lambda f: _change(f / "config.json", model_type="nothing"),
        "encoder: the config could not be read .*nothing.*; copy the encoder again",
    ),
    "no encoder": (
        lambda f: BartConfig().save_pretrained(f),
        "encoder: model_type 'bart' is no text encoder; expected one such as bert",
    ),
    "other weights": (
        lambda f: _change(f / "config.json", transformers_weights="adapter_model.bin"),
        "config.json: transformers_weights: points at weights of another name; name them",
    ),
    "quantised": (
        lambda f: _change(f / "config.json", quantization_config={}),
        "config.json: quantization_config: quantised; expected fp32 or bf16 weights, or a GGUF",
    ),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_folder_that_is_no_encoder_is_named(folder: Path, how: str) -> None:
    spoil, message = SPOILED[how]
    spoil(folder)
    with pytest.raises(UserError, match=message):
        _encoder(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_no_code_of_a_folder_is_run(folder: Path, name: str) -> None:
    ran = folder / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    classes = {"AutoConfig": "own.A", "AutoModel": "own.B", "AutoTokenizer": ["own.C", "own.D"]}
    _change(folder / name, auto_map=classes, model_type="own", tokenizer_class="C")
    with pytest.raises(UserError, match=f"{name}: auto_map: asks for code of its own, which is"):
        _encoder(folder)
    with pytest.raises(UserError, match="auto_map: .*delete the key"):
        PromptTokenizer(EncoderConfig(str(folder))).describe()
    assert not ran.exists()


@pytest.mark.parametrize(
    ("path", "revision", "message"),
    [
        ("", "", "encoder.path: none given; expected a folder with config.json"),
        ("./gone", "", "encoder.path: no such file or folder: gone; expected one with config.json"),
        ("gone/a.gguf", "", "encoder.path: no such file or folder: gone/a.gguf"),
        ("some/model", "", "no such folder: some/model; taken as a hub id it needs .*, not ''"),
        ("some/model", "main", "a commit of 40 hexadecimal digits, not 'main': a branch moves"),
        (str(Path(__file__)), "", "test_encoder_files.py: no encoder; expected a folder with"),
        (
            str(Path(__file__).parent),
            "main",
            "encoder.revision: 'main' is for a hub id, .*; delete",
        ),
    ],
)
def test_a_path_that_leads_nowhere(path: str, revision: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _encoder(path, revision=revision)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"a.gguf: the config could not be read .*; copy the enc"):
        _encoder(tmp_path / "a.gguf")


def test_a_commit_of_the_hub_is_its_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    config = EncoderConfig("some/model", COMMIT, max_tokens=48)
    with pytest.raises(
        UserError, match=f"some/model at {COMMIT} cannot be had from the hub .*; co"
    ):
        Encoder(config, seed=0)
    shutil.copytree(folder, tmp_path / "cache" / "models--some--model" / "snapshots" / COMMIT)
    encoder, local = Encoder(config, seed=0), _encoder(folder)
    assert encoder.fingerprint == local.fingerprint
    for name, tensor in local.frozen().items():
        assert torch.equal(tensor, encoder.frozen()[name])


def test_a_folder_needs_no_network_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda self, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
    config = EncoderConfig(str(minilm()))
    Encoder(config, seed=0)
    PromptTokenizer(config).describe()
    assert not asked
    assert capfd.readouterr() == ("", "")


def test_targets_that_are_not_there_are_told_with_those_that_are(folder: Path) -> None:
    there = "no linear layer 'qeury' in this encoder; there are: dense, key, query, value"
    with pytest.raises(UserError, match=f"encoder.lora_targets: {there}"):
        _encoder(folder, lora_targets=("value", "qeury"))
    with pytest.raises(UserError, match="no linear layer 'word_embeddings' in this encoder"):
        _encoder(folder, lora_targets=("word_embeddings",))
    lora = _encoder(folder, lora_targets=("layer.1.attention.self.key",)).lora()
    assert len(lora) == 2 and all("layer.1.attention.self.key.lora_" in name for name in lora)


def test_an_architecture_without_default_targets_asks_for_them(tmp_path: Path) -> None:
    config = RoFormerConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    RoFormerModel(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(UserError, match="'roformer' has no default; name some .*: dense, key, que"):
        _encoder(tmp_path)
    assert len(_encoder(tmp_path, lora_targets=("query",)).lora()) == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"every": 0}, "max_tokens, every, lora_rank and chunks are 1 or more"),
        ({"lora_dropout": 1.0}, "encoder: lora_dropout is 0 to below 1, not 1.0"),
        ({"max_tokens": 65}, "encoder.max_tokens: 65, but .*encoder has 64 positions; give that"),
    ],
)
def test_settings_out_of_range(folder: Path, changed: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _encoder(folder, **changed)


def test_the_fingerprint_is_that_of_weights_and_config(folder: Path, tmp_path: Path) -> None:
    first = _encoder(folder).fingerprint
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("words")
    assert find(EncoderConfig(str(copy))).fingerprint() == first
    _change(copy / "config.json", layer_norm_eps=0.1)
    assert _encoder(copy).fingerprint != first
    other = shutil.copytree(folder, tmp_path / "other")
    weights = load_file(other / WEIGHTS)
    weights["bert.embeddings.LayerNorm.weight"][-1] += 1e-6
    save_file(weights, other / WEIGHTS, metadata={"format": "pt"})
    assert _encoder(other).fingerprint != first


def test_weights_in_several_files_are_those_of_one(folder: Path, tmp_path: Path) -> None:
    model = BertModel.from_pretrained(folder, add_pooling_layer=False)
    model.save_pretrained(tmp_path / "several", max_shard_size="20KB")
    write_tokenizer(tmp_path / "several")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    several, one = _encoder(tmp_path / "several"), _encoder(folder)
    for name, tensor in one.frozen().items():
        assert torch.equal(tensor, several.frozen()[name])
    assert several.fingerprint
