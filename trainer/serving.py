"""A run's model in one process, for rows that are not in any shard."""

import contextlib
from collections import Counter

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from data_shards import Index, UserError, Vocabulary, encode_batch
from trainer.config import RunConfig
from trainer.model import with_adapters
from trainer.prompting import prompter_of
from trainer.ranks import Ranks
from trainer.run_folder import RunFolder


class Server:
    """The trunk with every kept adapter; each domain's rows see its own vocabulary."""

    def __init__(self, config: RunConfig, folder: RunFolder, ranks: Ranks) -> None:
        trunk = folder.load_trunk(config, ranks)
        self.raw = config.data.raw
        self._schema = trunk.schema
        self._prompter = prompter_of(config)
        self._ranks = ranks
        adapters = folder.kept_adapters(trunk, trunk.fingerprint())
        self._model = with_adapters(trunk, adapters)
        self._open_texts(config)
        base = folder.load_vocabulary()
        self._base = base
        self._vocabularies = {
            a.domain: base.with_added(a.vocabulary) for a in adapters if a.vocabulary
        }

    @property
    def domains(self) -> tuple[str, ...]:
        """Those that have an adapter."""
        return tuple(self._model.domains)

    @torch.no_grad()
    def probabilities(self, rows: pa.Table) -> np.ndarray:
        """Of a click, in the rows' order, from `row_id`, `domain` and the fields of `raw`."""
        if self._prompter:
            rows = self._prompter.add(rows, Counter())
        names = rows["domain"].to_numpy(zero_copy_only=False)
        probability = np.empty(len(rows))
        place = {domain: slot for slot, domain in enumerate(self._model.domains)}
        groups = {None: ~np.isin(names, list(self._vocabularies))}
        groups |= {domain: names == domain for domain in self._vocabularies}
        for owner, mask in groups.items():
            if not mask.any():
                continue
            vocabulary = self._base if owner is None else self._vocabularies[owner]
            part = rows.filter(pa.array(mask))
            label = pa.array(np.zeros(len(part), np.float32))
            encoded = vocabulary.encode(part.append_column("label", label))
            slots = np.array([place.get(name, -1) for name in names[mask]])
            batch = encode_batch(self._schema, encoded, slots).to(self._ranks.device)
            text = self._text(encoded, vocabulary, names[mask])
            identity = torch.arange(len(place) + 1, device=self._ranks.device)
            identity[-1] = -1
            logit = self._model.logits(batch, identity, owner is not None, text)
            probability[mask] = torch.sigmoid(logit.double()).cpu().numpy()
        return probability

    @property
    def encoded(self) -> int:
        """Texts so far that were in no cache, so that they were encoded on the spot."""
        return self._model.text.encoded if self._model.text else 0

    def _text(self, rows: pa.Table, vocabulary: Vocabulary, domains: np.ndarray) -> Tensor | None:
        if self._model.text is None:
            return None
        return self._model.text.encode(rows, vocabulary, pa.array(domains)).to(self._ranks.device)

    def _open_texts(self, config: RunConfig) -> None:
        """Those of the run's own shards, where they are at hand: a server need not have them."""
        if self._model.text is not None:
            with contextlib.suppress(UserError):
                self._model.text.open(Index.load(config.data.shards))
