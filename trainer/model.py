"""A scorer: tables and dense part joined, for one set of adapter slots.

A phase, an evaluation or a prediction builds a fresh method around the trunk, so no state is left
behind from one to the next.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_shards import Batch, Loader
from embeddings import Embedder, SentIds
from models import Features, Method, Tokens
from trainer.adapter_store import Adapter
from trainer.own_rows import Own, embedder_of, of_method, own_of
from trainer.text_cache import TextCache
from trainer.trunk import Trunk, copy_into

Dense = Callable[[Features], Tensor]
Agree = Callable[[Tensor], tuple[int, ...]]
TEACHER = "teacher"
"""The column of a sidecar that holds the logits of each domain's teacher."""


@dataclass
class Model:
    """Scores batches with whatever adapters its method holds."""

    embedder: Embedder
    dense: Dense
    domains: Sequence[str]
    agree: Agree | None = None
    """The slots of all ranks' rows, for `Features.slots`."""
    text: TextCache | None = None

    def slots(self, loader: Loader) -> Tensor:
        """The slot of each of the loader's domains, -1 where no adapter is loaded."""
        place = {domain: slot for slot, domain in enumerate(self.domains)}
        return torch.tensor([place.get(domain, -1) for domain in loader.domains])

    def logits(
        self, batch: Batch, slots: Tensor, extended: bool, text: Tensor | None = None
    ) -> Tensor:
        """[B]; `slots` from `slots(loader)`, `extended` if some shard set has own ids; `text` of
        rows that are in no shard."""
        return self.outputs(self.send(batch, slots, extended, text))[:, 0]

    def send(
        self, batch: Batch, slots: Tensor, extended: bool, text: Tensor | None = None
    ) -> "Sent":
        """Start to move a batch's ids to the ranks that hold their rows."""
        slot = slots[batch.domain]
        if self.text is not None and text is None:
            text = self.text.vectors(batch.columns).to(batch.numbers.device)
        return Sent(batch, slot, self.embedder.send(batch.ids, slot, extended), text)

    def outputs(self, sent: "Sent") -> Tensor:
        """[B, k] as in `Method.forward`, of a batch whose ids are on their way."""
        return self.dense(self.features(sent))

    def features(self, sent: "Sent") -> Features:
        """What a method sees of a batch whose ids are on their way."""
        batch, slot = sent.batch, sent.slot
        embedded = self.embedder.vectors(sent.ids)
        none = batch.numbers.new_empty(len(batch), 0, 0)
        # a schema has one field of tokens at most
        prompts = [Tokens(field.values(), field.lengths()) for field in batch.tokens.values()]
        return Features(
            embedded=none if embedded is None else embedded,
            numbers=batch.numbers,
            slot=slot,
            tokens=prompts[0] if prompts else None,
            slots=self.agree(slot) if self.agree else None,
            text=sent.text,
            own=self.embedder.own_vectors(sent.ids),
            teacher=batch.columns.get(TEACHER),
        )


@dataclass(frozen=True)
class Sent:
    """A batch whose ids are on their way to their tables; `slot` [B] of each row's adapter."""

    batch: Batch
    slot: Tensor
    ids: SentIds
    text: Tensor | None = None


def trunk_alone(trunk: Trunk) -> Model:
    """The shared part without any adapter."""
    return model_of(trunk, trunk.method().eval(), Own())


def with_adapters(trunk: Trunk, adapters: Sequence[Adapter]) -> Model:
    """The shared part and these adapters, for mixed batches of all domains."""
    method = method_with(trunk, adapters)
    return model_of(trunk, method, own_of(trunk, method.own_width, adapters))


def method_with(trunk: Trunk, adapters: Sequence[Adapter]) -> Method:
    """The method of these, as it scores rows."""
    method = trunk.method()
    for adapter in adapters:
        method.add_domain(adapter.domain, trunk.config.seed)
        own = of_method(adapter)
        copy_into(method.adapter(adapter.domain), own, f"adapter of {adapter.domain}")
    return method.eval()


def model_of(trunk: Trunk, method: Method, own: Own) -> Model:
    """What scores rows by this method, as it stands."""
    return Model(embedder_of(trunk, own), method, tuple(method.domains), text=trunk.text)


def add_domain(trunk: Trunk, method: Method, domain: str) -> bool:
    """Give the domain an adapter; returns whether it is one that phase 1 has trained."""
    method.add_domain(domain, trunk.config.seed)
    if domain in trunk.starts:
        copy_into(method.adapter(domain), trunk.starts[domain], f"adapter of {domain}")
    return domain in trunk.starts


def adapter_tensors(
    trunk: Trunk, domains: Sequence[str], parameters: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Each domain's adapter, out of the stacked parameters that an engine has trained."""
    method = trunk.method()
    for domain in domains:
        method.add_domain(domain, trunk.config.seed)
    for name, parameter in method.named_parameters():
        if name in parameters:
            parameter.data.copy_(parameters[name])
    return {d: {k: t.clone() for k, t in method.adapter(d).items()} for d in domains}
