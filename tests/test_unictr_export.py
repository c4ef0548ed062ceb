"""C11: a domain's exported program scores as the method does."""

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_shards import UserError
from models import EncoderConfig
from models.export import Scorer, exported
from tests.toy_encoder import VOCABULARY, write_encoder
from tests.toy_method import ABC
from tests.toy_unictr import CONFIGS, PLAIN, Row, features_of, trained

PROMPTS = [(3, 5, 8, 2, 40, 41, 6), (7,), (3, 5, 8, 9)]


def test_c11_an_exported_program_scores_as_the_method(tmp_path: Path) -> None:
    config = EncoderConfig(str(write_encoder(tmp_path, "llama")), max_tokens=48, every=2)
    method = trained(config, PLAIN, ABC).float()
    rows: list[Row] = [(1, prompt) for prompt in PROMPTS]
    own, general, _ = method(features_of(rows).to(torch.float32)).unbind(1)
    torch.export.save(exported(method, "b"), tmp_path / "b.pt2")
    members = zipfile.ZipFile(tmp_path / "b.pt2").infolist()
    assert not any(member.file_size for member in members if member.filename.endswith(".pt"))
    program = torch.export.load(tmp_path / "b.pt2").module()
    for longest in (7, 48):
        ids = torch.randint(VOCABULARY, (len(PROMPTS), longest))
        mask = torch.arange(longest) < torch.tensor([len(p) for p in PROMPTS]).unsqueeze(1)
        ids[mask] = torch.tensor([token for prompt in PROMPTS for token in prompt])
        torch.testing.assert_close(program(ids, mask), own, rtol=1e-4, atol=1e-4)
        unseen = Scorer(method, "games")(ids, mask)
        torch.testing.assert_close(unseen, general, rtol=1e-4, atol=1e-4)


def test_what_reads_tables_is_not_exported(tmp_path: Path) -> None:
    config = EncoderConfig(str(write_encoder(tmp_path, "llama")), max_tokens=48)
    with pytest.raises(UserError, match="method.ids: a program reads prompts alone; train a run"):
        exported(trained(config, replace(CONFIGS[0], ids=True), ABC), "a")
