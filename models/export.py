"""One domain's score as a program of its own: prompts in, logits out, LoRA merged into its layers.

Whatever runs `torch.export` programs runs it, without this package.
"""

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from data_shards.errors import UserError
from models.unictr import UniCTR


class Scorer(nn.Module):
    """Logits [n] for token ids [n, T] int64 and mask [n, T] bool, true on tokens, false on the
    padding to their right; each prompt has a token."""

    def __init__(self, method: UniCTR, domain: str) -> None:
        super().__init__()
        method.encoder.merge_lora()
        self.encoder = method.encoder
        heads = dict(zip(method.domains, method.heads, strict=True))
        self.head = heads.get(domain, method.general)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder.states(ids, attention_mask=mask.long())
        every = torch.arange(ids.shape[0], device=ids.device)
        return self.head(states, mask, every, states[0].new_empty(ids.shape[0], 0))


def exported(method: UniCTR, domain: str) -> ExportedProgram:
    """The `Scorer` of a domain's head, or of the general network where it has none, for any number
    and length of prompts; the method has no LoRA of its own afterwards.

    UserError for a method that reads more than prompts.
    """
    if method.dim:
        raise UserError("method.ids: a program reads prompts alone; train a run with ids = false")
    scorer = Scorer(method, domain).eval()
    ids = torch.ones(2, 3, dtype=torch.int64, device=next(scorer.parameters()).device)
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(scorer, (ids, ids.bool()), dynamic_shapes=(sizes, sizes))
    program.example_inputs = None  # which a file would hold pickled
    return program
