"""Uni-CTR over a small BERT with random weights, its rows, and its equations a row at a time.

In float64, so that what is equal in law is equal in ten digits, whatever the batch.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from models import EncoderConfig, Features, Tokens, UniCTR, UniCTRConfig
from models.backbones import Inputs
from tests.toy_method import ABC, stir

INPUTS = Inputs(fields=2, dim=3, numbers=1)
PLAIN = UniCTRConfig(ladder_heads=1, ladder_dropout=0.0, tower=(24, 16), dropout=0.0)
CONFIGS = (
    PLAIN,
    replace(PLAIN, ids=True),
    replace(PLAIN, combine="sum", general="ladder"),
    replace(PLAIN, ladder="none", ladder_width=4, ladder_heads=2, ids=True),
    replace(PLAIN, ladder_width=6, ladder_heads=3, general="ladder", ids=True),
)
EACH = pytest.mark.parametrize("config", CONFIGS)
CHUNKS = 3
Methods = dict[UniCTRConfig, UniCTR]
Row = tuple[int, tuple[int, ...]]  # slot and prompt; a padding row's prompt is empty
ROWS: list[Row] = [
    (0, (5, 6)),
    (1, (5, 6, 7)),
    (-1, (8,)),
    (0, (5, 6)),
    (1, (1, 2, 3, 4)),
    (-1, ()),
]
prompts_ = st.lists(st.integers(0, 8), min_size=1, max_size=9).map(tuple)
some_rows = st.lists(
    st.tuples(st.integers(-1, 2), st.one_of(prompts_, st.sampled_from([(), (0,), (5, 6), (5,)]))),
    min_size=1,
    max_size=12,
)


def small_bert(folder: Path) -> EncoderConfig:
    """Fills the folder with a BERT of 3 layers and random weights."""
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    BertModel(shape).save_pretrained(folder)
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d")
    (folder / "vocab.txt").write_text("\n".join(words))
    return EncoderConfig(str(folder), max_tokens=16, every=2, lora_dropout=0.0, chunks=CHUNKS)


def every_method(encoder: EncoderConfig) -> Methods:
    """As if trained; a test leaves its weights as they are."""
    return {config: trained(encoder, config, ABC) for config in CONFIGS}


def trained(
    encoder: EncoderConfig, config: UniCTRConfig, domains: Sequence[str], inputs: Inputs = INPUTS
) -> UniCTR:
    """The shared part is the same in each, a domain's head follows its name."""
    method = UniCTR(inputs, encoder, config, seed=1)
    stir(method.shared().values(), "shared")
    for domain in domains:
        method.add_domain(domain, seed=1)
        stir(method.adapter(domain).values(), domain)
    return method.double().eval()


def features_of(
    rows: Sequence[Row], slots: tuple[int, ...] | None = None, width: int = 4, seed: int = 0
) -> Features:
    """Vectors follow the row's place; one spare column more than `Inputs.dim`."""
    generator = torch.Generator().manual_seed(seed)
    embedded = torch.randn(len(rows), 2, width, generator=generator, dtype=torch.float64)
    return Features(
        embedded=embedded,
        numbers=torch.zeros(len(rows), 1, dtype=torch.float64),
        slot=torch.tensor([slot for slot, _ in rows]),
        tokens=tokens_of([prompt for _, prompt in rows]),
        slots=slots,
    )


def tokens_of(prompts: Sequence[Sequence[int]]) -> Tokens:
    values = [token for prompt in prompts for token in prompt]
    return Tokens(
        torch.tensor(values, dtype=torch.int64), torch.tensor([len(prompt) for prompt in prompts])
    )


def part_of(features: Features, place: Tensor, slots: tuple[int, ...] | None = None) -> Features:
    assert features.tokens is not None
    texts = features.tokens.values.split(features.tokens.lengths.tolist())
    return Features(
        embedded=features.embedded[place],
        numbers=features.numbers[place],
        slot=features.slot[place],
        tokens=tokens_of([texts[int(i)].tolist() for i in place]),
        slots=slots,
    )


def labels_of(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    label = torch.randint(2, (rows,), generator=generator).double()
    return label, torch.rand(rows, generator=generator, dtype=torch.float64)


def row_by_hand(method: UniCTR, features: Features, row: int) -> tuple[Tensor, Tensor]:
    """One row's own and general logit, from the encoder's states of its prompt alone."""
    assert features.tokens is not None
    text = features.tokens.values.split(features.tokens.lengths.tolist())[row]
    ids = text.unsqueeze(0) if len(text) else torch.zeros(1, 1, dtype=torch.int64)
    mask = torch.ones_like(ids, dtype=torch.bool)
    states = method.encoder(ids, mask)
    beside = features.embedded[row : row + 1, :, : method.dim].flatten(1)
    slot = int(features.slot[row])
    first = torch.zeros(1, dtype=torch.int64)
    general = method.general(states, mask, first, beside)
    own = method.heads[slot](states, mask, first, beside) if slot >= 0 else general
    return own[0], general[0]


def by_hand(method: UniCTR, features: Features) -> Tensor:
    rows = [row_by_hand(method, features, row) for row in range(len(features.slot))]
    own, general = (torch.stack(column) for column in zip(*rows, strict=True))
    return torch.stack([own, general, (features.slot >= 0).double()], 1)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def gradients(method: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """By name; zeros where there is none."""
    named = {name: p for name, p in method.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    return dict(zip(named, grads, strict=True))


def of_head(grads: dict[str, Tensor], slot: int) -> dict[str, Tensor]:
    return {name: g for name, g in grads.items() if name.startswith(f"heads.{slot}.")}
