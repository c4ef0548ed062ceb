"""P5 (Geng et al., 2022): recommendation as language. A prompt that names user and item by their
ids asks whether the one likes the other, and the answer is a word, "yes" or "no".

One model and one way from text to answer for all domains: it has no adapters. A row is scored by
P(yes) / (P(yes) + P(no)), so its logit is that of "yes" less that of "no", and the likelihood of
the right word among these two is the cross entropy of the label.

A P5-style model, for these parts of the paper are not here:
- T5's decoder, of which such an answer needs a single step: its only input is the start token, the
  same in each row, which attends to the prompt's states. Here one learned query attends to them
  (`Gate`), once and not in each layer: the encoder's half is all that `load_model` loads;
- the two words' rows of the output matrix are learned anew, not taken from the vocabulary, and the
  other words, which no answer has, take no part in softmax;
- the encoder learns by LoRA, where P5 trains all of it, as in Uni-CTR here;
- embeddings of whole words, that tell which tokens make one id, since shards hold tokens alone;
- its other tasks (ratings, explanations, reviews, next items).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from data_shards.schema import Field
from models.distinct import distinct
from models.domain_head import Gate
from models.encoder import Encoder, EncoderConfig
from models.layers import linear
from models.method import Features, Method, Needs, cross_entropy
from models.shared_beginnings import arranged, encode


@dataclass(frozen=True)
class P5Config(Needs):
    """The `[method]` section of a run file."""

    name: Literal["p5"] = "p5"

    adapts: ClassVar[bool] = False

    def reads(self, field: Field) -> bool:
        return False


class P5(Method):
    """Logits [B, 1]. Prompts are encoded once however many rows have them."""

    def __init__(self, encoder: EncoderConfig, seed: int) -> None:
        super().__init__()
        self.domains: list[str] = []
        self.calls = encoder.chunks
        self.encoder = Encoder(encoder, seed)
        self.gate = Gate(self.encoder.hidden)
        self.words = linear(self.encoder.hidden, 2, bias=False)  # yes, no

    def forward(self, features: Features) -> Tensor:
        if features.tokens is None:
            raise UserError(
                "method p5 reads prompts, and these shards hold none; write shards with a prompt"
            )
        prompts = arranged(distinct(features.tokens), self.encoder.shares)
        encoded = encode(self.encoder, prompts, self.calls)
        pooled = torch.cat([self.gate(chunk.states[-1], chunk.mask) for chunk in encoded])
        yes, no = self.words(pooled[-len(prompts.ids) :]).unbind(1)
        return (yes - no)[prompts.of_row].unsqueeze(1)

    def over_states(self, tokens: int) -> list[Tensor]:
        zeros = self.words.weight.new_zeros
        state = zeros(1, tokens, self.encoder.hidden, requires_grad=True)
        self.gate(state, zeros(1, tokens) == 0)
        return [state]

    def loss(self, logit: Tensor, label: Tensor, weight: Tensor, rows: int) -> Tensor:
        """The answers' negative log likelihood, as a mean over rows."""
        return cross_entropy(logit[:, 0], label, weight) / max(rows, 1)

    def shared(self) -> dict[str, Tensor]:
        lora = {f"encoder.{name}": tensor for name, tensor in self.encoder.lora().items()}
        answer = {f"gate.{name}": p.data for name, p in self.gate.named_parameters()}
        return {**lora, **answer, "words.weight": self.words.weight.data}

    def frozen(self) -> dict[str, Tensor]:
        return {f"encoder.{name}": tensor for name, tensor in self.encoder.frozen().items()}

    def shared_parameters(self) -> list[nn.Parameter]:
        answer = [*self.gate.parameters(), *self.words.parameters()]
        return [*self.encoder.lora_parameters(), *answer]

    def adapter_parameters(self) -> list[nn.Parameter]:
        return []

    def adapter(self, domain: str) -> dict[str, Tensor]:
        raise _no_adapters()

    def add_domain(self, domain: str, seed: int) -> None:
        raise _no_adapters()

    def remove_domain(self, domain: str) -> None:
        raise _no_adapters()


def _no_adapters() -> UserError:
    return UserError(
        "method p5 is the same for all domains and has no adapters; score a domain that it has not "
        "seen by `evaluate --zero-shot`"
    )
