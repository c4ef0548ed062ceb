"""P5: a word answers each prompt, whatever the batch (S1, S2), the same way for all domains."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_shards import Field, UserError
from models import METHODS, P5, EncoderConfig, Features, P5Config, Parts
from models.backbones import MLPConfig
from tests.toy_method import INPUTS, stir
from tests.toy_unictr import (
    CHUNKS,
    ROWS,
    Row,
    close,
    features_of,
    gradients,
    labels_of,
    part_of,
    small_bert,
    some_rows,
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> EncoderConfig:
    return small_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def method(encoder: EncoderConfig) -> P5:
    """As if trained; a test leaves its weights as they are."""
    found = METHODS["p5"](P5Config(), Parts(INPUTS, MLPConfig(), encoder, seed=1))
    assert isinstance(found, P5)
    stir(found.shared().values(), "shared")
    return found.double().eval()


def _answers(method: P5, features: Features, row: int) -> Tensor:
    """(log P(yes), log P(no)) of one row, from its prompt's states, a token at a time."""
    assert features.tokens is not None
    text = features.tokens.values.split(features.tokens.lengths.tolist())[row]
    ids = text.unsqueeze(0) if len(text) else torch.zeros(1, 1, dtype=torch.int64)
    [states] = method.encoder(ids, torch.ones_like(ids, dtype=torch.bool))[-1]
    key, query = method.gate.key, method.gate.query
    seen = [torch.exp(query.weight[0] @ torch.tanh(key.weight @ h + key.bias)) for h in states]
    read = torch.stack([a / sum(seen) * h for a, h in zip(seen, states, strict=True)]).sum(0)
    yes, no = torch.exp(method.words.weight @ read)
    return torch.stack([yes, no]).log() - (yes + no).log()


@pytest.mark.parametrize("training", [False, True])
@settings(max_examples=12)
@given(rows=some_rows)
def test_s2_a_row_is_answered_by_the_equation_whatever_its_batch(
    method: P5, training: bool, rows: list[Row]
) -> None:
    features = features_of(rows)
    by_hand = torch.stack([_answers(method, features, row) for row in range(len(rows))])
    got = method.train(training)(features)
    assert got.shape == (len(rows), 1)
    close(torch.nn.functional.logsigmoid(got[:, 0]), by_hand[:, 0])
    close(torch.nn.functional.logsigmoid(-got[:, 0]), by_hand[:, 1])


@settings(max_examples=12)
@given(rows=some_rows, data=st.data())
def test_s1_permuting_a_batch_permutes_its_logits(
    method: P5, rows: list[Row], data: st.DataObject
) -> None:
    features = features_of(rows)
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    close(method.eval()(part_of(features, order)), method(features)[order])


def test_the_loss_and_its_gradients_are_those_of_the_right_words_likelihood(method: P5) -> None:
    features, (label, weight) = features_of(ROWS), labels_of(len(ROWS))
    words = torch.stack([_answers(method, features, row) for row in range(len(ROWS))])
    told = torch.where(label > 0, words[:, 0], words[:, 1])
    wanted = gradients(method, -(weight * told).sum() / len(ROWS))
    loss = method.train().loss(method(features), label, weight, len(ROWS))
    close(loss, -(weight * told).sum() / len(ROWS))
    got = gradients(method, loss)
    for name, gradient in wanted.items():
        close(got[name], gradient)
        assert gradient.any(), name


def test_gradients_are_those_of_finite_differences(method: P5) -> None:
    features, (label, weight) = features_of(ROWS), labels_of(len(ROWS))

    def loss(words: Tensor) -> Tensor:
        logit = torch.func.functional_call(method, {"words.weight": words}, (features,))
        return method.loss(logit, label, weight, len(ROWS))

    assert torch.autograd.gradcheck(loss, method.words.weight.detach().clone().requires_grad_())


def test_all_domains_share_all_of_it(method: P5) -> None:
    everywhere = [(slot, prompt) for prompt in [(5, 6), (8,)] for slot in (-1, 0, 2)]
    logit = method.eval()(features_of(everywhere)).view(2, 3)
    assert torch.equal(logit, logit[:, :1].expand(2, 3)) and logit[0, 0] != logit[1, 0]


def test_it_learns_which_word_is_answered_with_yes(encoder: EncoderConfig) -> None:
    """One that the prompt holds or not."""
    torch.manual_seed(0)
    method = P5(encoder, seed=1).train()
    adam = torch.optim.Adam(method.shared_parameters(), 0.02)
    prompts = [tuple(prompt) for prompt in torch.randint(5, 9, (256, 3)).tolist()]
    label = torch.tensor([float(7 in prompt) for prompt in prompts])
    features, rows = features_of([(-1, prompt) for prompt in prompts]), torch.arange(192)
    for _ in range(60):
        adam.zero_grad()
        logit = method(part_of(features, rows))
        method.loss(logit, label[rows], torch.ones(192), 192).backward()
        adam.step()
    rest = torch.arange(192, 256)
    right = (method.eval()(part_of(features, rest))[:, 0] > 0) == (label[rest] > 0)
    assert right.double().mean() > 0.9


def test_shared_and_frozen_partition_the_model(method: P5) -> None:
    own = [*method.shared().values(), *method.frozen().values()]
    everything = [*method.parameters(), *method.buffers()]
    assert sorted(t.data_ptr() for t in own) == sorted(t.data_ptr() for t in everything)
    trained = {p.data_ptr() for p in method.shared_parameters()}
    assert trained == {t.data_ptr() for t in method.shared().values()}
    assert not method.adapter_parameters() and method.calls == CHUNKS


def test_it_reads_no_table_and_has_no_adapters(method: P5) -> None:
    assert not P5Config().reads(Field("user", "id", "user")) and not P5Config.adapts
    for act in (lambda: method.add_domain("a", 1), lambda: method.remove_domain("a")):
        with pytest.raises(UserError, match="method p5 is the same for all domains and has no"):
            act()
    with pytest.raises(UserError, match="has no adapters; score a domain that it has not seen by"):
        method.adapter("a")


def test_rows_without_prompts_are_refused(method: P5) -> None:
    features = Features(torch.zeros(1, 0, 0), torch.zeros(1, 0), torch.tensor([-1]))
    with pytest.raises(UserError, match="method p5 reads prompts, and these shards hold none"):
        method(features)
