"""Where an encoder lies: a folder, a GGUF file or a commit on the hub; refused before it is read.

Weights come as safetensors or GGUF alone, and no code that lies beside them is run.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.errors import UserError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "spiece.model", "spm.model")
"""Any one of them makes a tokenizer."""
WANTED = f"config.json, *.safetensors and one of {', '.join(TOKENIZERS)}"
# Keys of a model's JSON files that would change where its weights and its code come from.
REFUSED = {
    "auto_map": "asks for code of its own, which is never run here; if transformers knows this "
    "architecture, delete the key",
    "transformers_weights": "points at weights of another name; name them model.safetensors and "
    "delete the key",
    "quantization_config": "quantised; expected fp32 or bf16 weights, or a GGUF file",
}
_HUB_ID = re.compile(r"[A-Za-z0-9]\w*[\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class EncoderConfig:
    """The `[encoder]` section of a run file."""

    path: str = ""
    """A folder with config.json, *.safetensors and tokenizer files; a *.gguf file; or a hub id."""
    revision: str = ""
    """The commit of a hub id, which must have one; nothing else has one."""
    max_tokens: int = 256
    """Longer prompts are cut, and counted."""
    every: int = 8
    """f: the hidden states are tapped each f layers (Uni-CTR, Eq. 7)."""
    lora_rank: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    lora_targets: tuple[str, ...] = ()
    """Names of linear layers; none named: the attention's query and value."""
    checkpointing: bool = False
    """Compute the layers once more in backward instead of keeping what they need."""
    chunks: int = 4
    """Calls of the encoder per batch, over prompts in order; the same number on all ranks."""
    cache_gb: float = 0.0
    """Memory of a rank for states that phase 2 keeps from one epoch to the next, in 10**9 bytes;
    prompts that find no room are encoded again each time."""

    def __post_init__(self) -> None:
        if min(self.max_tokens, self.every, self.lora_rank, self.chunks) < 1:
            raise UserError("encoder: max_tokens, every, lora_rank and chunks are 1 or more")
        if not 0 <= self.cache_gb < math.inf:
            raise UserError(f"encoder: cache_gb is 0 or more, not {self.cache_gb}")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"encoder: lora_dropout is 0 to below 1, not {self.lora_dropout}")


@dataclass(frozen=True)
class EncoderFiles:
    """An encoder on this machine whose files are of the kinds that may be read."""

    folder: Path
    gguf: str | None = None
    """Name of the GGUF file, which then is all that is read of the folder."""

    def fingerprint(self) -> str:
        """SHA-256 of the weights and of the config that shapes them; reads the whole files."""
        digest = hashlib.sha256()
        for path in self._shaping():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _shaping(self) -> list[Path]:
        if self.gguf:
            return [self.folder / self.gguf]
        return [self.folder / "config.json", *_weights(self.folder)]


def find(config: EncoderConfig, weights: bool = True) -> EncoderFiles:
    """The files of `config.path`, checked; only a hub id is fetched. UserError for any other.

    Without weights a folder with config.json is enough.
    """
    path = Path(config.path)
    if not config.path:
        raise UserError(f"encoder.path: none given; expected a folder with {WANTED}, or a hub id")
    if path.is_dir() or path.is_file():
        return _local(path, config.revision, weights)
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(config.path):
        raise UserError(f"encoder.path: no such file or folder: {path}; expected one with {WANTED}")
    if not _COMMIT.fullmatch(config.revision):
        raise UserError(
            f"encoder.path: no such folder: {path}; taken as a hub id it needs encoder.revision, a "
            f"commit of 40 hexadecimal digits, not {config.revision!r}: a branch moves"
        )
    return _checked(_snapshot(config.path, config.revision))


def _local(path: Path, revision: str, weights: bool) -> EncoderFiles:
    if revision:
        raise UserError(
            f"encoder.revision: {revision!r} is for a hub id, but {path} is on this machine; "
            "delete it"
        )
    if path.is_dir():
        return _checked(path, weights)
    if path.suffix != ".gguf":
        raise UserError(f"{path}: no encoder; expected a folder with {WANTED}, or a .gguf file")
    return EncoderFiles(path.parent, path.name)


def _snapshot(name: str, commit: str) -> Path:
    from models.encoder_library import snapshot

    try:
        return snapshot(name, commit)
    except (OSError, ValueError) as error:
        raise UserError(
            f"encoder.path: {name} at {commit} cannot be had from the hub ({_first_line(error)}); "
            "copy its folder to this machine and give that path"
        ) from error


def _checked(folder: Path, weights: bool = True) -> EncoderFiles:
    for name in ("config.json", "tokenizer_config.json"):
        _refuse(folder / name)
    if not (folder / "config.json").is_file():
        raise _lacks(folder, "no config.json")
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder}: holds a LoRA over another model (adapter_config.json); merge it, and save "
            "the whole model"
        )
    if not weights:
        return EncoderFiles(folder)
    if not all(path.is_file() for path in _weights(folder)):
        raise _lacks(folder, "a file that model.safetensors.index.json names is not there")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise _lacks(folder, "no tokenizer")
    return EncoderFiles(folder)


def _refuse(path: Path) -> None:
    content = _json(path) if path.is_file() else {}
    for key, why in REFUSED.items():
        if key in content:
            raise UserError(f"{path}: {key}: {why}")


def _weights(folder: Path) -> list[Path]:
    """model.safetensors, or the files that its index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        return [folder / name for name in sorted(set(_json(index)["weight_map"].values()))]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise UserError(
            f"{folder}: its weights are pickled (*.bin, *.pt), which would run code; expected "
            "model.safetensors: save it once more with `save_pretrained`, where you trust it"
        )
    raise _lacks(folder, "no model.safetensors")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not JSON ({error}); copy the encoder's folder again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; copy the encoder's folder again")
    return content


def _lacks(folder: Path, what: str) -> UserError:
    return UserError(
        f"{folder}: {what}; expected a folder with {WANTED}, as `save_pretrained` writes it"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
