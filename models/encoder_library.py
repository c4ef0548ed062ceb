"""The only door to transformers, the hub and peft. Imported where an encoder is built: it takes
seconds, which runs without one need not wait for."""

import contextlib
import inspect
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    TokenizersBackend,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING
from transformers.utils import logging

from data_shards.errors import UserError
from models.adapters import generator_for
from models.encoder_files import EncoderConfig, EncoderFiles
from models.shared_beginnings import Tree

logging.set_verbosity_error()
DEFAULT_TARGETS = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
CAUSAL = (LlamaConfig,)
"""Decoders that take positions, and hand what they do not know to their attention."""
SNAPSHOT = ("*.json", "*.safetensors", "*.model", "*.txt")


def snapshot(name: str, commit: str) -> Path:
    """Folder of one commit of a hub id, from this machine's cache where it is there."""
    return Path(snapshot_download(name, revision=commit, allow_patterns=list(SNAPSHOT)))


def load_model(files: EncoderFiles) -> PreTrainedModel:
    """Embeddings and layers alone, in fp32; built without memory, then filled from the file."""
    config = load_config(files)
    kind = _class(files, config)
    parts = inspect.signature(kind).parameters
    without: dict[str, Any] = {"add_pooling_layer": False} if "add_pooling_layer" in parts else {}
    if torch.get_default_device().type == "meta":
        return kind(config, **without)
    with _reading(files, "weights"):
        loaded: Any = kind.from_pretrained(  # Any: a pair, for which it has no annotation
            files.folder,
            config=config,
            gguf_file=files.gguf,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **without,
        )
    model, found = loaded
    if found["missing_keys"]:
        raise UserError(
            f"{files.folder}: its weights lack {min(found['missing_keys'])!r} and "
            f"{len(found['missing_keys']) - 1} more that config.json asks for; take both from the "
            "same model"
        )
    model.config.use_cache = False
    return model


def load_config(files: EncoderFiles) -> PreTrainedConfig:
    """What shapes the model."""
    with _reading(files, "config"):
        return AutoConfig.from_pretrained(
            files.folder, gguf_file=files.gguf, local_files_only=True, trust_remote_code=False
        )


def load_tokenizer(files: EncoderFiles) -> TokenizersBackend:
    """The encoder's own tokenizer, in its fast form; UserError where it is another model's."""
    with _reading(files, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            files.folder, gguf_file=files.gguf, local_files_only=True, trust_remote_code=False
        )
    if not isinstance(tokenizer, TokenizersBackend):
        raise UserError(
            f"{files.folder}: its tokenizer has no fast form; expected a tokenizer.json, as "
            "`save_pretrained` of a fast tokenizer writes it"
        )
    if not files.gguf:  # which holds both, and takes seconds to read
        _check_vocabulary(files, max(tokenizer.get_vocab().values()))
    return tokenizer


def read_ways(model: PreTrainedModel) -> bool:
    """Have a decoder attend along the ways of a `Tree` where it is given one; whether it is a
    model in which a token sees those before it alone. It then needs no mask: padding follows."""
    if type(model.config) not in CAUSAL or not model.config.to_dict().get("is_causal", True):
        return False
    model.set_attn_implementation(ALONG_WAYS)
    return True


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    tree: Tree | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention over q, k, v [n, heads, T, d]; those of a tree [1, heads, N, d] along each
    prompt's way, of which each token's first result is kept. Gives [n, T, heads, d]."""
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, None, **others)
    at, (m, longest) = tree.way.flatten(), tree.way.shape
    q, k, v = (
        x.squeeze(0).transpose(0, 1).index_select(0, at).unflatten(0, (m, longest)).transpose(1, 2)
        for x in (query, key, value)
    )
    found, _ = sdpa_attention_forward(module, q, k, v, None, **others)
    return found.flatten(0, 1).index_select(0, tree.first).unsqueeze(0), None


ALONG_WAYS = "along_ways"
AttentionInterface.register(ALONG_WAYS, _attend)


def add_lora(model: PreTrainedModel, config: EncoderConfig, seed: int) -> None:
    """Freeze the model and give its target layers low-rank branches, for which B is 0 and A a pure
    function of the seed and the layer's name."""
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.lora_dropout,
        target_modules=_targets(model, config.lora_targets),
    )
    inject_adapter_in_model(lora, model)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            first = generator_for(seed, "", name)
            for low in layer.lora_A.values():
                nn.init.kaiming_uniform_(
                    low.get_parameter("weight"), a=math.sqrt(5), generator=first
                )


def merge_lora(model: PreTrainedModel) -> None:
    """Put what the branches say into their layers' weights, and take them out."""
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, LoraLayer):
            layer.merge()  # type: ignore[attr-defined]
            model.set_submodule(name, layer.get_base_layer())


def _check_vocabulary(files: EncoderFiles, largest: int) -> None:
    rows = load_config(files).vocab_size
    if largest >= rows:
        raise UserError(
            f"{files.folder}: its tokenizer gives ids up to {largest}, its embedding has {rows} "
            "rows; take both from the same model"
        )


def _class(files: EncoderFiles, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The encoder half of an encoder-decoder, else the model below its head."""
    kinds: Any = MODEL_FOR_TEXT_ENCODING_MAPPING  # Any: its annotation is wrong
    if type(config) not in kinds and not config.is_encoder_decoder:
        kinds = MODEL_MAPPING
    if type(config) in kinds:
        return kinds[type(config)]
    raise UserError(
        f"{files.folder}: model_type {config.model_type!r} is no text encoder; expected one such "
        "as bert, deberta-v2, t5 or llama"
    )


def _targets(model: PreTrainedModel, wanted: tuple[str, ...]) -> list[str]:
    layers = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    offered = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers}))
    targets = list(wanted or DEFAULT_TARGETS.get(model.config.model_type, ()))
    if not targets:
        raise UserError(
            f"encoder.lora_targets: {model.config.model_type!r} has no default; name some of its "
            f"linear layers: {offered}"
        )
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise UserError(
                f"encoder.lora_targets: no linear layer {target!r} in this encoder; there are: "
                f"{offered}"
            )
    return targets


@contextlib.contextmanager
def _reading(files: EncoderFiles, what: str) -> Iterator[None]:
    """Silent (progress bars take no other no), and one error for what the libraries raise."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except Exception as error:  # the Rust libraries raise no narrower one
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{files.folder / (files.gguf or '')}: the {what} could not be read ({reason}); copy "
            "the encoder again, or save it with `save_pretrained` of transformers 5"
        ) from error
