"""The encoder: the model's own states, LoRA that begins as nothing, a base that never moves."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModel, T5EncoderModel

from data_shards import UserError
from models.encoder import Encoder, EncoderConfig
from models.prompt_tokenizer import PromptTokenizer
from tests.toy_encoder import (
    FAMILIES,
    HIDDEN,
    LAYERS,
    TARGETS,
    VOCABULARY,
    minilm,
    smollm2,
    write_encoder,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {family: write_encoder(root / family, family, dropout=0.1) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def _config(path: Path, **changed: object) -> EncoderConfig:
    return EncoderConfig(**{"path": str(path), "max_tokens": 48, "every": 2, **changed})  # type: ignore[arg-type]


def _batch(lengths: tuple[int, ...], width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random ids [n, T], in the padding too, and their mask."""
    ids = torch.randint(VOCABULARY, (len(lengths), width), generator=_generator(seed))
    return ids, torch.arange(width) < torch.tensor(lengths).unsqueeze(1)


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids [n, T] and their mask, of rows of unequal length."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows]).unsqueeze(1)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _loss(encoder: Encoder, ids: Tensor, mask: Tensor) -> Tensor:
    """Of all states on tokens, unlike for each of their numbers."""
    states = torch.stack(encoder(ids, mask))[:, mask]
    return (states * torch.randn(states.shape, generator=_generator(7)).to(states)).mean()


def _train(encoder: Encoder, steps: int = 5) -> None:
    optimizer = torch.optim.Adam(encoder.lora_parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        _loss(encoder, *_batch((5, 9), 9, step)).backward()
        optimizer.step()


@pytest.mark.parametrize("every", [1, 2, 3, 9])
@torch.no_grad()  # torch takes another kernel where T5's position bias wants a gradient
def test_the_taps_are_the_bare_models_states_bit_for_bit(folder: Path, every: int) -> None:
    encoder = Encoder(_config(folder, every=every), seed=0).eval()
    ids, mask = _batch((7, 3, 1), 7)
    own = (T5EncoderModel if folder.name == "t5" else AutoModel).from_pretrained(folder)
    bare = own(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    states = encoder(ids, mask)
    assert (encoder.hidden, encoder.layers) == (HIDDEN, LAYERS)
    assert len(encoder.taps) == LAYERS // every + 1 == len(states) - 1
    expected = [*bare.hidden_states[::every], bare.last_hidden_state]
    if encoder.shares:  # as a tree: other products of matrices, and other padding
        pairs = [(a[mask], b[mask]) for a, b in zip(states, expected, strict=True)]
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)
        return
    assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))


def test_minilm_has_its_real_weights() -> None:
    config = EncoderConfig(str(minilm()), every=3)
    encoder = Encoder(config, seed=0).eval()
    texts = ["a red dress for a party", "an evening gown, crimson", "strings for a bass guitar"]
    rows = PromptTokenizer(config)(pa.array(texts)).to_pylist()
    ids, mask = _padded(rows)
    bare = AutoModel.from_pretrained(minilm())
    own = bare(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    expected = [*own.hidden_states[::3], own.last_hidden_state]
    states = encoder(ids, mask)
    assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))
    pooled = (states[-1] * mask.unsqueeze(2)).sum(1)
    alike, unlike = torch.cosine_similarity(pooled[:1], pooled[1:])
    assert alike > unlike + 0.2


def test_smollm2_goes_on_as_it_was_taught(capfd: pytest.CaptureFixture[str]) -> None:
    config = EncoderConfig(str(smollm2()), every=10)
    encoder, tokenizer = Encoder(config, seed=0).eval(), PromptTokenizer(config)
    *prompt, paris = tokenizer(pa.array(["The capital of France is Paris"])).to_pylist()[0]
    with torch.no_grad():
        states = encoder(*_padded([prompt]))
    assert (encoder.hidden, encoder.layers, encoder.taps) == (576, 30, (0, 10, 20, 30))
    embedding = encoder.frozen()["model.embed_tokens.weight"]
    assert (states[-1][0, -1] @ embedding.T).argmax() == paris
    assert capfd.readouterr() == ("", "")


def test_what_lies_in_the_padding_changes_nothing(folder: Path) -> None:
    encoder = Encoder(_config(folder), seed=0).eval()
    _train(encoder)
    ids, mask = _batch((6, 2, 9), 9)
    whole = encoder(ids, mask)
    alone = encoder(ids[:1, :6], mask[:1, :6])
    wide, wide_mask = _batch((6, 40), 40, seed=1)
    wide[0, :6] = ids[0, :6]
    beside = encoder(wide, wide_mask)
    for a, b, c in zip(whole, alone, beside, strict=True):
        assert torch.allclose(a[:1, :6], b, atol=1e-5)
        assert torch.allclose(c[:1, :6], b, atol=1e-5)


@pytest.mark.parametrize("width", [1, 5])
def test_a_row_without_a_token_is_its_first_id_alone(folder: Path, width: int) -> None:
    encoder = Encoder(_config(folder), seed=0).eval()
    ids, mask = _batch((0, 0), width)
    states, alone = encoder(ids, mask), encoder(ids[:, :1], torch.ones(2, 1, dtype=torch.bool))
    for state, first in zip(states, alone, strict=True):
        assert torch.allclose(state[:, :1], first, atol=1e-5)
    sum(state.square().sum() for state in states).backward()  # type: ignore[union-attr]
    assert all(state.isfinite().all() for state in states)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.lora_parameters())


def test_the_first_lora_is_a_function_of_the_seed(folder: Path) -> None:
    first = Encoder(_config(folder), seed=3).lora()
    torch.manual_seed(99)
    again, other = (Encoder(_config(folder), seed=seed).lora() for seed in (3, 4))
    narrow = Encoder(_config(folder, lora_targets=TARGETS[folder.name][:1]), seed=3).lora()
    assert len(first) == 2 * 2 * LAYERS and len(narrow) == 2 * LAYERS
    for name, tensor in first.items():
        if "lora_B" in name:
            assert not tensor.any()
        else:
            assert torch.equal(tensor, again[name]) and not torch.equal(tensor, other[name])
    assert all(torch.equal(tensor, first[name]) for name, tensor in narrow.items())
    drawn = torch.cat([t.flatten() for name, t in first.items() if "lora_A" in name])
    assert drawn.unique().numel() > 0.99 * drawn.numel()


def test_merged_equals_unmerged(folder: Path) -> None:
    encoder = Encoder(_config(folder), seed=0).eval()
    batch = _batch((6, 9), 9)
    bare = encoder(*batch)[-1]
    _train(encoder)
    apart = encoder(*batch)
    assert (apart[-1] - bare).abs().max() > 0.01
    for layer in encoder.modules():
        if isinstance(layer, LoraLayer):
            layer.merge()  # type: ignore[attr-defined]
    for a, b in zip(encoder(*batch), apart, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_lora_is_all_that_trains_and_the_rest_is_frozen(folder: Path) -> None:
    encoder = Encoder(_config(folder), seed=0)
    before = {name: tensor.clone() for name, tensor in encoder.frozen().items()}
    _train(encoder)
    trained = {id(p) for p in encoder.lora_parameters()}
    for parameter in encoder.parameters():
        assert parameter.requires_grad == (id(parameter) in trained)
        assert (parameter.grad is not None) == (id(parameter) in trained)
    lora, frozen = encoder.lora(), encoder.frozen()
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.items())
    everything = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
    assert not lora.keys() & frozen.keys() and lora.keys() | frozen.keys() == everything.keys()
    for name, tensor in (lora | frozen).items():
        assert tensor.data_ptr() == everything[name].data_ptr()
    assert {id(everything[name]) for name in lora} == trained
    assert not [
        name for name in everything for part in ("pooler", "head", "decoder", "cls") if part in name
    ]


def test_freezing_lora_does_not_make_it_base(folder: Path) -> None:
    encoder = Encoder(_config(folder), seed=0)
    names = encoder.lora().keys()
    encoder.requires_grad_(False)
    assert encoder.lora().keys() == names


def test_checkpointing_gives_the_same_gradients(folder: Path) -> None:
    found = []
    for checkpointing in (False, True):
        encoder = Encoder(_config(folder, checkpointing=checkpointing), seed=0)
        torch.manual_seed(5)
        _train(encoder, steps=1)  # for with B = 0, A has no gradient
        encoder.zero_grad()
        _loss(encoder, *_batch((5, 9), 9)).backward()
        found.append([p.grad for p in encoder.lora_parameters()])
    for plain, again in zip(*found, strict=True):
        assert plain.any() and torch.equal(plain, again)


def test_checkpointing_keeps_less_for_backward(folder: Path) -> None:
    kept = []
    for checkpointing in (False, True):
        encoder = Encoder(_config(folder, checkpointing=checkpointing), seed=0)
        held: dict[int, int] = {}

        def hold(tensor: Tensor, held: dict[int, int] = held) -> Tensor:
            held[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            encoder(*_batch((20, 20), 20))
        kept.append(sum(held.values()))
    assert kept[1] < kept[0] / 2


def test_query_and_value_are_the_targets_by_default(folder: Path) -> None:
    names = {
        name.split(".lora_")[0].rsplit(".", 1)[1] for name in Encoder(_config(folder), 0).lora()
    }
    assert names == set(TARGETS[folder.name])


def test_bf16_is_finite_and_keeps_positions_exact(folder: Path) -> None:
    encoder = Encoder(_config(folder, lora_dropout=0.0), seed=0).eval()
    batch = _batch((40, 31), 40)
    exact = encoder(*batch)
    buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    encoder.to(torch.bfloat16)
    states = encoder(*batch)
    for rough, fine in zip(states, exact, strict=True):
        assert rough.dtype == torch.bfloat16
        assert (rough.float() - fine)[batch[1]].abs().max() < 0.1 * fine.abs().max()
    _loss(encoder.train(), *batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.lora_parameters())
    for name, buffer in encoder.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name])


def test_weights_in_bf16_come_as_fp32(folder: Path, tmp_path: Path) -> None:
    write_encoder(tmp_path / "half", folder.name)
    whole = AutoModel.from_pretrained(tmp_path / "half")
    whole.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    encoder = Encoder(_config(tmp_path / "half"), seed=0)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


def test_training_mode_reaches_the_base(folder: Path) -> None:
    encoder = Encoder(_config(folder, lora_dropout=0.0), seed=0)
    batch = _batch((9, 9), 9)
    assert not torch.equal(encoder(*batch)[-1], encoder(*batch)[-1])
    assert all(module.training for module in encoder.modules())
    encoder.eval()
    assert torch.equal(encoder(*batch)[-1], encoder(*batch)[-1])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[3, VOCABULARY]], "the encoder reads 0 to"),
        ([[3, -1]], "tokens -1 to 3"),
        ([[1] * 65], "up to 65 of them; .*, up to 64: write the shards with its own tokenizer"),
    ],
)
def test_tokens_of_another_tokenizer_are_named(
    folders: dict[str, Path], ids: list[list[int]], message: str
) -> None:
    encoder = Encoder(_config(folders["bert"]), seed=1)
    with pytest.raises(UserError, match=message):
        encoder(torch.tensor(ids), torch.ones(1, len(ids[0]), dtype=torch.bool))
