"""Uni-CTR (Fu et al., 2023): an encoder tuned for all domains, a head for each, a general network.

Phase 1 trains LoRA, general network and all heads together; phase 2 freezes the former two and
trains heads. Prompts are encoded once however many rows have them, shortest first in
`EncoderConfig.chunks` calls; a head sees its own domain's prompts alone.

A decoder encodes beginnings once, too. The paper's prompt (`uni_ctr`) tells domain, user and
history first and the item last: rows of one user at one time share all but the item, other rows of
a domain the words before the user's id. Ladders and gates read both ways; they share nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from data_shards.schema import Field
from models.backbones import Inputs
from models.distinct import Prompts, States, distinct, take
from models.domain_head import HeadShape, new_head
from models.encoder import Encoder, EncoderConfig
from models.method import Features, Method, Needs, Tokens, cross_entropy
from models.shared_beginnings import arranged, encode
from models.state_cache import StateCache


@dataclass(frozen=True)
class UniCTRConfig(Needs):
    """The `[method]` section of a run file."""

    name: Literal["unictr"] = "unictr"
    ladder: Literal["transformer", "none"] = "transformer"
    ladder_width: int = 0
    """Inside a block; 0: a quarter of the encoder's. Smaller for many domains."""
    ladder_heads: int = 2
    ladder_dropout: float = 0.2
    combine: Literal["concat", "sum"] = "concat"
    """Of last layer and ladder: along the tokens (Eq. 8), or added, as in the released code."""
    tower: tuple[int, ...] = (512, 256, 128)
    dropout: float = 0.3
    general: Literal["pool", "ladder"] = "pool"
    """Gate and tower over the last layer, or a full extra head, as in the released code."""
    ids: bool = False
    """Whether the tables' vectors join the pooled prompt before each tower."""

    def reads(self, field: Field) -> bool:
        return self.ids

    def __post_init__(self) -> None:
        for key, value, known in (
            ("ladder", self.ladder, ("transformer", "none")),
            ("combine", self.combine, ("concat", "sum")),
            ("general", self.general, ("pool", "ladder")),
        ):
            if value not in known:
                raise UserError(f"method.{key}: unknown {value!r}; there are: {', '.join(known)}")
        for key, value in (("ladder_dropout", self.ladder_dropout), ("dropout", self.dropout)):
            if not 0 <= value < 1:
                raise UserError(f"method.{key} is 0 to below 1, not {value}")
        if self.ladder_width < 0 or min((self.ladder_heads, *self.tower)) < 1:
            raise UserError("method: ladder_heads and tower are 1 or more, ladder_width 0 or more")


class Rows(NamedTuple):
    """What networks read of some rows, beside their prompts' states."""

    slot: Tensor
    prompt: Tensor
    """Its place among the batch's distinct prompts"""
    beside: Tensor
    """[n, E] the row's vectors from tables"""

    def at(self, place: Tensor) -> "Rows":
        return Rows(*(part[place] for part in self))


class UniCTR(Method):
    """Logits [B, 3] of a row: the own head's (the general network's where slot is -1), the
    general network's, and 1 where a head of its own has answered, else 0."""

    modules_per_domain: ClassVar[bool] = True
    adapters_in_pretrain: ClassVar[bool] = True

    def __init__(
        self, inputs: Inputs, encoder: EncoderConfig, config: UniCTRConfig, seed: int
    ) -> None:
        super().__init__()
        self.domains: list[str] = []
        self.calls = encoder.chunks
        self.cache = StateCache(int(encoder.cache_gb * 1e9))
        self._frozen = self._keeps = False
        self.dim = inputs.dim if config.ids else 0
        self.encoder = Encoder(encoder, seed)
        self.shape = _head_shape(inputs, self.encoder, config)
        blocks = self.shape.blocks if config.general == "ladder" else 0
        self.general = new_head(replace(self.shape, blocks=blocks), seed, "")
        self.heads = nn.ModuleList()

    def forward(self, features: Features) -> Tensor:
        prompts, encoded = self._encode(distinct(_prompts(features)))
        order = torch.argsort(prompts.of_row, stable=True)  # whatever that of the rows
        beside = features.embedded[:, :, : self.dim].flatten(1)
        rows = Rows(features.slot, prompts.of_row, beside).at(order)
        pooled = torch.cat([self.general.pool(*chunk) for chunk in encoded])[-len(prompts.ids) :]
        # a frozen general network must not teach an added domain's own rows
        fixed = rows.beside.detach() if self._frozen else rows.beside
        general = self.general.score(pooled, rows.prompt, fixed)
        slots = _present(rows.slot) if features.slots is None else features.slots
        own = self._own(encoded, prompts, rows, slots, general) if slots else general
        return torch.stack([own, general, (rows.slot >= 0).to(own)], dim=1)[order.argsort()]

    def freeze_shared(self, keep: bool) -> None:
        self._frozen, self._keeps = True, keep
        self.train(self.training)

    def over_states(self, tokens: int) -> list[Tensor]:
        zeros = self.general.tower.out.weight.new_zeros
        shape, taps = (1, tokens, self.shape.hidden), max(self.shape.blocks, 1)
        states = [zeros(shape, requires_grad=True) for _ in range(taps)]
        for head in (self.general, *self.heads[:1]):  # a prompt has one domain
            head(states, zeros(1, tokens) == 0, torch.tensor([0]), zeros(1, self.shape.beside))
        return states

    def train(self, mode: bool = True) -> "UniCTR":
        """As for any module; a frozen shared part drops nothing, so its states can be kept."""
        super().train(mode)
        for part in (self.encoder, self.general):
            part.train(mode and not self._frozen)
        return self

    def loss(self, logit: Tensor, label: Tensor, weight: Tensor, rows: int) -> Tensor:
        """Eq. 13-15 as a mean over rows: cross entropy of the own head, and with it that of the
        general network; of the latter alone where a row's domain has no head."""
        own, general, has_own = logit.unbind(1)
        known = weight * has_own.detach()
        summed = cross_entropy(own, label, weight) + cross_entropy(general, label, known)
        return summed / max(rows, 1)

    def shared(self) -> dict[str, Tensor]:
        lora = {f"encoder.{name}": tensor for name, tensor in self.encoder.lora().items()}
        general = {f"general.{name}": p.data for name, p in self.general.named_parameters()}
        return {**lora, **general}

    def adapter(self, domain: str) -> dict[str, Tensor]:
        head = self.heads[self.slot_of(domain)]
        return {name: p.data for name, p in head.named_parameters()}

    def frozen(self) -> dict[str, Tensor]:
        return {f"encoder.{name}": tensor for name, tensor in self.encoder.frozen().items()}

    def shared_parameters(self) -> list[nn.Parameter]:
        return [*self.encoder.lora_parameters(), *self.general.parameters()]

    def adapter_parameters(self) -> list[nn.Parameter]:
        return list(self.heads.parameters())

    def add_domain(self, domain: str, seed: int) -> None:
        self.require_new(domain)
        head = new_head(self.shape, seed, domain)
        self.heads.append(head.to(self.general.tower.out.weight))
        self.domains.append(domain)

    def remove_domain(self, domain: str) -> None:
        del self.heads[self.slot_of(domain)]
        self.domains.remove(domain)

    def _encode(self, prompts: Prompts) -> tuple[Prompts, list[States]]:
        """The prompts, maybe in another order, and their states in that order."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen):
            if self._keeps:
                return self.cache.encode(self.encoder, prompts, self.calls, self.encoder.shares)
            prompts = arranged(prompts, self.encoder.shares)
            return prompts, encode(self.encoder, prompts, self.calls)

    def _own(
        self,
        encoded: Sequence[States],
        prompts: Prompts,
        rows: Rows,
        slots: Sequence[int],
        general: Tensor,
    ) -> Tensor:
        """Each row's logit from its own head; the general network's where it has none.

        The head of a slot that has no rows here runs on none: under ZeRO 3 all ranks must gather
        its weights.
        """
        sizes = (rows.slot == torch.tensor(slots).to(rows.slot).unsqueeze(1)).sum(1).tolist()
        order = torch.argsort(rows.slot, stable=True)[int((rows.slot < 0).sum()) :]
        assert sum(sizes) == len(order), "a row's slot is not among Features.slots"
        rows = rows.at(order)
        found = [torch.unique_consecutive(p, return_inverse=True) for p in rows.prompt.split(sizes)]
        if self.shape.blocks == 0:
            encoded = [States(chunk.states[-1:], chunk.mask) for chunk in encoded]
        taken = take(encoded, prompts, [own for own, _ in found])
        logits = [
            self.heads[slot](*states, place, beside)
            for slot, states, (_, place), beside in zip(
                slots, taken, found, rows.beside.split(sizes), strict=True
            )
        ]
        return general.index_copy(0, order, torch.cat(logits))


def _prompts(features: Features) -> Tokens:
    if features.tokens is None:
        raise UserError(
            "method unictr reads prompts, and these shards hold none; write shards with a prompt"
        )
    return features.tokens


def _present(slot: Tensor) -> tuple[int, ...]:
    """The slots of these rows, ascending."""
    return tuple(torch.unique(slot[slot >= 0]).tolist())


def _head_shape(inputs: Inputs, encoder: Encoder, config: UniCTRConfig) -> HeadShape:
    if config.ids and inputs.fields == 0:
        raise UserError("method.ids: the schema has no id field to join; set it to false")
    width = config.ladder_width or max(encoder.hidden // 4, 1)
    if width % config.ladder_heads:
        raise UserError(
            f"method.ladder_heads: {config.ladder_heads} heads do not divide the ladder's width "
            f"{width}; set method.ladder_width (0: a quarter of the encoder's {encoder.hidden})"
        )
    return HeadShape(
        hidden=encoder.hidden,
        blocks=len(encoder.taps) if config.ladder == "transformer" else 0,
        width=width,
        heads=config.ladder_heads,
        ladder_dropout=config.ladder_dropout,
        combine=config.combine,
        tower=config.tower,
        dropout=config.dropout,
        beside=inputs.fields * inputs.dim if config.ids else 0,
    )
