"""The frozen encoder of texts: masked sums that know no neighbours, and nothing that can learn."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, T5EncoderModel

from data_shards import UserError
from models.encoder_files import EncoderConfig
from models.text_encoder import TextEncoder
from tests.toy_encoder import FAMILIES, HIDDEN, WORDS, minilm, write_encoder, write_tokenizer

TEXTS = ["red", "blue guitar song", "", "gift card dress red blue " * 6, "users buys items", "red"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {family: write_encoder(root / family, family, dropout=0.1) for family in FAMILIES}


def _encoder(folder: Path, max_tokens: int = 48) -> TextEncoder:
    return TextEncoder(EncoderConfig(str(folder), max_tokens=max_tokens))


@torch.no_grad()
def _states(folder: Path, text: str) -> Tensor:
    """[tokens, width] of one text alone, by the library itself."""
    kind = T5EncoderModel if folder.name == "t5" else AutoModel
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    model = kind.from_pretrained(folder).eval()
    return model(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vector_is_the_sum_of_the_models_own_last_states(
    family: str, folders: dict[str, Path]
) -> None:
    encoder = _encoder(folders[family])
    vectors = encoder.vectors(TEXTS)
    states = [_states(folders[family], text) for text in TEXTS]
    assert vectors.dtype == torch.float32 and vectors.shape == (len(TEXTS), encoder.width)
    assert encoder.width == HIDDEN
    sums = torch.stack([one.sum(0) for one in states])
    assert torch.allclose(vectors, sums, rtol=1e-5, atol=1e-5)
    # LayerNorm does not tell the sum from the masked mean, up to its eps
    means = torch.stack([one.mean(0) for one in states])
    normed, of_means = (F.layer_norm(one, (HIDDEN,), eps=1e-9) for one in (vectors, means))
    assert torch.allclose(normed, of_means, atol=1e-4)


@settings(max_examples=15)
@given(texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join), max_size=9))
def test_neither_neighbours_nor_padding_matter(folders: dict[str, Path], texts: list[str]) -> None:
    encoder = _encoder(folders["bert"])
    together = encoder.vectors(texts)
    for text, vector in zip(texts, together, strict=True):
        assert torch.allclose(vector, encoder.vectors([text])[0], rtol=1e-5, atol=1e-5)


def test_calls_are_within_their_tokens(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = _encoder(folders["bert"])
    expected, counts = encoder.vectors(TEXTS), []
    monkeypatch.setattr("models.text_encoder.CALL_TOKENS", {"cpu": 10})
    found = encoder.vectors(TEXTS, counts.append)
    # of 32, 5, 5, 3, 3 and 2 tokens
    assert counts == [1, 2, 3] and torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_nothing_learns(folders: dict[str, Path]) -> None:
    encoder = _encoder(folders["t5"])
    width = encoder.width
    assert "_model" not in vars(encoder), "the width needs no weights"
    vectors = encoder.vectors(["red guitar", "red guitar"])
    assert vectors.shape == (2, width) and not vectors.requires_grad
    assert torch.equal(vectors[0], vectors[1]), "no dropout"
    assert not encoder._model.training
    assert not any(parameter.requires_grad for parameter in encoder._model.parameters())


def test_cut_texts_are_counted_and_texts_without_tokens_are_zeros(tmp_path: Path) -> None:
    write_tokenizer(write_encoder(tmp_path, "llama"), special=False)
    encoder = _encoder(tmp_path, max_tokens=3)
    vectors = encoder.vectors(["red blue song gift", "", "red blue song"])
    assert encoder.cut == 1
    torch.testing.assert_close(vectors[0], vectors[2], rtol=1e-5, atol=1e-5)
    assert not vectors[1].any() and vectors[0].any()
    assert not encoder.vectors([""]).any() and encoder.vectors([]).shape == (0, HIDDEN)


def test_what_decides_a_vector_is_told(folders: dict[str, Path], tmp_path: Path) -> None:
    told = _encoder(folders["bert"]).describe()
    assert told == _encoder(write_encoder(tmp_path / "same", "bert", dropout=0.1)).describe()
    assert told["encoder"] != _encoder(folders["t5"]).describe()["encoder"]
    assert told["max_tokens"] != _encoder(folders["bert"], 20).describe()["max_tokens"]
    write_tokenizer(write_encoder(tmp_path / "other", "bert", dropout=0.1), WORDS[::-1])
    assert told["tokenizer"] != _encoder(tmp_path / "other").describe()["tokenizer"]


def test_more_tokens_than_positions_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="encoder.max_tokens: 65, but .*bert has 64 positions"):
        _encoder(folders["bert"], 65).width  # noqa: B018


def test_minilm_knows_what_words_mean() -> None:
    encoder = _encoder(minilm())
    texts = ["an electric guitar", "strings for a guitar", "a summer dress with red flowers"]
    vectors = encoder.vectors(texts)
    assert torch.allclose(vectors[2], _states(minilm(), texts[2]).sum(0), rtol=1e-4, atol=1e-4)
    near, far = (F.cosine_similarity(vectors[0], other, dim=0) for other in vectors[1:])
    assert near > far + 0.2
