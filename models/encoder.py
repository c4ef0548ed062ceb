"""A pretrained language model with LoRA: token ids become hidden states (Uni-CTR, Eq. 5-6).

n prompts, at least one; T tokens; L layers.
"""

import sys
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_shards.errors import UserError
from models.dropout import dropout
from models.encoder_files import EncoderConfig, find
from models.shared_beginnings import Tree, tree


class Dropout(nn.Dropout):
    """With our own random bits, which cost less on CPU than torch's."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)


class Encoder(nn.Module):
    """The frozen base in fp32, with LoRA that adds nothing yet.

    UserError for a path, a target layer or a setting that makes no encoder. On torch's device
    "meta" it is a shape alone, and its weights need not be there.
    """

    def __init__(self, config: EncoderConfig, seed: int) -> None:
        # seconds of import, for the runs alone that have an encoder
        from models.encoder_library import add_lora, load_model, read_ways

        super().__init__()
        self._files = find(config, weights=torch.get_default_device().type != "meta")
        self.model = load_model(self._files).train()
        shape = self.model.config.to_dict()
        positions = shape.get("max_position_embeddings")
        check_length(config, positions)
        self._rows: int = shape["vocab_size"]
        self._positions: int = positions or sys.maxsize
        add_lora(self.model, config, seed)
        for name, part in [*self.model.named_modules()]:
            if type(part) is nn.Dropout:
                self.model.set_submodule(name, Dropout(part.p))
        self._lora = {name for name, p in self.named_parameters() if p.requires_grad}
        if config.checkpointing:
            self.model.activation_checkpointing_enable()
        self.hidden: int = self.model.config.hidden_size
        self.layers: int = self.model.config.num_hidden_layers
        self.taps = tuple(range(0, self.layers + 1, config.every))
        """0, f, 2f, ... <= L: which hidden states `forward` gives; 0 is the embedding's output."""
        self.shares = read_ways(self.model)
        """Whether prompts that begin alike, one after the other, are encoded as a `tree`; not where
        a token's states follow from later ones too."""

    def forward(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """The tapped states and then the last one, each [n, T, hidden], for ids [n, T] int64 and
        mask [n, T] bool, true on tokens, false on the padding to their right.

        What stands in the padding changes no other state; those on it mean nothing, but are finite.
        A row of padding alone reads as its first id.
        """
        self._check_ids(ids)
        if self.shares:
            return self._once(tree(ids, mask.sum(1).clamp(min=1)), ids.shape[1])
        mask = mask.clone()
        mask[:, 0] = True  # attention over nothing is another thing in each kernel
        return self.states(ids, attention_mask=mask.long())

    def _once(self, alike: Tree, width: int) -> list[Tensor]:
        """What the prompts share is computed once; [n, width, hidden]."""
        found = self.states(alike.ids, position_ids=alike.depth, tree=alike)
        at = F.pad(alike.way, (0, width - alike.way.shape[1])).flatten()
        apart = {
            key: state.squeeze(0).index_select(0, at).unflatten(0, (-1, width))
            for key, state in {id(state): state for state in found}.items()
        }
        return [apart[id(state)] for state in found]  # one tensor where two taps are one

    def states(self, ids: Tensor, **seen: Any) -> list[Tensor]:
        """As `forward`, from what the model itself takes, unchecked."""
        found = self.model(input_ids=ids, output_hidden_states=True, **seen)
        return [*(found.hidden_states[layer] for layer in self.taps), found.last_hidden_state]

    def _check_ids(self, ids: Tensor) -> None:
        """UserError for tokens that this encoder cannot have given, as a log's own may be."""
        low, high = (int(bound) for bound in torch.aminmax(ids))
        longest = ids.shape[1]
        if low < 0 or high >= self._rows or longest > self._positions:
            raise UserError(
                f"prompts hold tokens {low} to {high}, up to {longest} of them; the encoder "
                f"reads 0 to {self._rows - 1}, up to {self._positions}: write the shards with its "
                "own tokenizer, as [data.prompt] does"
            )

    def merge_lora(self) -> None:
        """Add LoRA to the weights of its layers, for good; nothing is left to train."""
        from models.encoder_library import merge_lora

        merge_lora(self.model)
        self._lora = set()

    def lora_parameters(self) -> list[nn.Parameter]:
        """All that can be trained."""
        return [p for name, p in self.named_parameters() if name in self._lora]

    def lora(self) -> dict[str, Tensor]:
        """A and B of each target layer, live, by name."""
        return {name: p.data for name, p in self.named_parameters() if name in self._lora}

    def frozen(self) -> dict[str, Tensor]:
        """All else, live, by name: the base's weights and the buffers that its config makes."""
        base = {name: p.data for name, p in self.named_parameters() if name not in self._lora}
        return {**base, **dict(self.named_buffers())}

    @cached_property
    def fingerprint(self) -> str:
        """Of the base's files: equal for equal weights in equal files, wherever they lie."""
        return self._files.fingerprint()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Encoder":
        """Buffers keep their precision: rotary frequencies in bf16 are half a radian off at token
        256. It is what `to`, `bfloat16` and `cuda` go through."""
        buffers = {id(buffer) for buffer in self.buffers()}

        def exact(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return tensor.to(changed.device) if id(tensor) in buffers else changed

        return super()._apply(exact, recurse)


def check_length(config: EncoderConfig, positions: int | None) -> None:
    """UserError where the longest prompts have more tokens than the encoder has positions."""
    if positions is not None and config.max_tokens > positions:
        raise UserError(
            f"encoder.max_tokens: {config.max_tokens}, but {config.path} has {positions} "
            "positions; give that or less"
        )
