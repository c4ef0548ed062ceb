"""Uni-CTR with a decoder, whose prompts share beginnings, beside transformers with peft.

    python -m benchmarks.unictr_decoder --shards data/shards/amazon-smollm2

Rows are those of launch/runs/amazon_smollm2.toml; the decoder has SmolLM2-135M's shape, but fewer
layers and random weights. As in `benchmarks.unictr`, figures and claims are of processor time.
"""

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig, LlamaModel

from benchmarks.measure import Claim
from benchmarks.sides import Setting, Training
from benchmarks.unictr import (
    ROOT,
    Peer,
    PeerRows,
    compared,
    learned_in_phase_1,
    over,
    peer_rows,
    rows_of,
    trunk_of,
)
from data_shards import Batch
from models.distinct import distinct
from models.method import Tokens
from models.shared_beginnings import arranged, encode, tree
from models.unictr import UniCTR
from trainer import config as run_files
from trainer import ranks as groups
from trainer.machine import machine

RUN_FILE = ROOT / "launch" / "runs" / "amazon_smollm2.toml"
VOCABULARY = 49152
PLAIN, OURS = "transformers and peft", "Banyan"


def decoder(folder: Path, layers: int) -> None:
    """SmolLM2-135M, but for its depth and weights."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
    )
    LlamaModel(shape).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")  # the shards hold tokens already


def sharing(batch: Batch) -> dict[str, Any]:
    """What the batch's prompts share, and what each side's decoder reads."""
    tokens = tokens_of(batch)
    prompts = arranged(distinct(tokens), shares=True)
    users = set(zip(batch.domain.tolist(), batch.ids["user"].values().tolist(), strict=True))
    return {
        "rows": len(batch),
        "rows_per_user": round(len(batch) / len(users), 2),
        "tokens": int(tokens.lengths.sum()),
        "tokens_padded": len(batch) * int(tokens.lengths.max()),
        "tokens_of_the_tree": tree(prompts.ids, prompts.lengths).ids.numel(),
    }


def tokens_of(batch: Batch) -> Tokens:
    (tokens,) = batch.tokens.values()
    return Tokens(tokens.values(), tokens.lengths())


def parts(setting: Setting) -> list[dict[str, Any]]:
    """The decoder alone, forward and backward, and then whole steps of phase 1."""
    loader, (batch, *_) = rows_of(setting)
    batches = [batch]
    print(f"  {(shared := sharing(batch))}", flush=True)
    ours = Training(trunk_of(setting, loader), loader.domains, learned_in_phase_1)
    method = ours.trainee.method
    assert isinstance(method, UniCTR)
    plain, given = Peer(setting.run, method.shape, loader.domains).train(), peer_rows(batch)
    slots = ours.model.slots(loader)
    sides: dict[str, dict[str, Callable[[], object]]] = {
        "The decoder, forward and backward": {
            PLAIN: partial(read_plainly, plain, given),
            OURS: partial(read_once, method, batch),
        },
        "Whole steps of phase 1": {
            PLAIN: partial(plain.step, given),
            OURS: partial(ours.steps, batches, slots),
        },
    }
    claim = Claim(f"times the speed of {PLAIN}", PLAIN, OURS, 2.0)
    return [
        compared(
            title,
            {name: over(batches, run) for name, run in pair.items()},
            [claim],
            setting.rounds,
            batches,
        )
        | {"sharing": shared}
        for title, pair in sides.items()
    ]


def read_plainly(peer: Peer, rows: PeerRows) -> None:
    ids, mask, *_ = rows
    peer.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.mean().backward()
    peer.optimizer.zero_grad()


def read_once(method: UniCTR, batch: Batch) -> None:
    prompts = arranged(distinct(tokens_of(batch)), method.encoder.shares)
    chunks = encode(method.encoder, prompts, method.calls)
    loss = torch.stack([chunk.states[-1].mean() for chunk in chunks]).sum()
    torch.autograd.grad(loss, method.encoder.lora_parameters())


def main() -> None:
    """Measure, print, write."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shards", required=True, help="of launch/runs/amazon_smollm2.toml")
    parser.add_argument("--layers", type=int, default=8, help="SmolLM2-135M has 30")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/unictr_decoder.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as folder:
        decoder(Path(folder), args.layers)
        overrides = [f"data.shards={args.shards}", f"encoder.path={folder}"]
        run = run_files.load(RUN_FILE, overrides)
        found = parts(Setting(run, groups.start(), args.rounds))
    groups.stop()
    content = {"date": datetime.now(UTC).isoformat(timespec="minutes"), "machine": machine()}
    content |= {"threads": args.threads, "layers": args.layers, "parts": found}
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
