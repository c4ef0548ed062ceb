"""Training cost of Uni-CTR: beside transformers with peft, by phase, in memory, by domains.

    python -m benchmarks.unictr --shards data/shards/amazon-text

Sides are timed in turns, batches in memory. Figures and claims are of processor time, which other
work on the machine changes least; wall time is beside them. Memory is that of fresh processes.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel

from benchmarks.measure import Claim, Figure, Side, table
from benchmarks.pair import free_port
from benchmarks.sides import Setting, Training, learn, some
from data_shards import Batch, Loader, Rows
from embeddings import Embedder
from models import Method
from models.domain_head import HeadShape, new_head
from models.unictr import UniCTR
from trainer import config as run_files
from trainer import ranks as groups
from trainer.config import RunConfig
from trainer.machine import machine
from trainer.model import Model
from trainer.trunk import Trunk, new_trunk

ROOT = Path(__file__).parents[1]
RUN_FILE = ROOT / "launch" / "runs" / "amazon_unictr.toml"
STEPS = 2  # of one turn
PeerRows = tuple[Tensor, Tensor, Tensor, Tensor]  # ids [B, longest], mask, domains [B], labels [B]


class Peer(nn.Module):
    """The same network as a good engineer writes it: the library's model with peft's LoRA, each
    batch padded to its longest prompt, each head on its domain's rows."""

    def __init__(self, run: RunConfig, shape: HeadShape, domains: Sequence[str]) -> None:
        super().__init__()
        encoder, phase = run.encoder, run.pretrain
        lora = LoraConfig(
            r=encoder.lora_rank,
            lora_alpha=encoder.lora_alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=encoder.lora_dropout,
        )
        self.encoder = get_peft_model(AutoModel.from_pretrained(encoder.path), lora)
        self.general = new_head(replace(shape, blocks=0), run.seed, "")
        self.heads = nn.ModuleList(new_head(shape, run.seed, domain) for domain in domains)
        self.every = encoder.every
        learned = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            learned, lr=phase.lr, weight_decay=phase.weight_decay, fused=True
        )

    def step(self, rows: PeerRows) -> None:
        ids, mask, domain, label = rows
        found = self.encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        states = [*found.hidden_states[:: self.every], found.last_hidden_state]
        every = torch.arange(len(ids))
        general = self.general(states[-1:], mask, every, label.new_empty(len(ids), 0))
        own = general
        for slot, head in enumerate(self.heads):
            place = (domain == slot).nonzero().squeeze(1)
            mine = [state[place] for state in states]
            beside = label.new_empty(len(place), 0)
            own = own.index_copy(0, place, head(mine, mask[place], every[: len(place)], beside))
        loss = sum(F.binary_cross_entropy_with_logits(logit, label) for logit in (own, general))
        assert isinstance(loss, Tensor)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def peer_rows(batch: Batch) -> PeerRows:
    (tokens,) = batch.tokens.values()
    rows = tokens.values().long().split(tokens.lengths().tolist())
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], True)
    return pad_sequence(list(rows), True), mask, batch.domain, batch.label


def rows_of(setting: Setting, domains: tuple[str, ...] | None = None) -> tuple[Loader, list[Batch]]:
    """The first batches of phase 1's rows, and their loader."""
    run, ranks = setting.run, setting.ranks
    shards, rows = Path(run.data.shards), Rows(run.pretrain.rows, domains)
    loader = Loader(shards, rows, run.reading, ranks.rank, ranks.world)
    return loader, some(loader, STEPS)


def learned_in_phase_1(method: Method) -> list[nn.Parameter]:
    return [*method.shared_parameters(), *method.adapter_parameters()]


def trunk_of(setting: Setting, loader: Loader) -> Trunk:
    return new_trunk(setting.run, setting.ranks, loader.indexes[0])


def peer(setting: Setting) -> dict[str, Any]:
    """Phase 1 under the real engine, beside the plain loop."""
    loader, batches = rows_of(setting)
    ours = Training(trunk_of(setting, loader), loader.domains, learned_in_phase_1)
    method = ours.trainee.method
    assert isinstance(method, UniCTR)
    plain = Peer(setting.run, method.shape, loader.domains).train()
    given = [peer_rows(batch) for batch in batches]
    names = ("Banyan, phase 1", "transformers and peft")
    return compared(
        f"Phase 1, {len(loader.domains)} domains",
        {
            names[0]: over(batches, partial(ours.steps, batches, ours.model.slots(loader))),
            names[1]: over(batches, lambda: [plain.step(rows) for rows in given]),
        },
        [Claim("times the speed of transformers and peft", names[1], names[0], 1.0)],
        setting.rounds,
        batches,
    )


def phases(setting: Setting) -> dict[str, Any]:
    """One domain's rows in phase 1, and in phase 2 once their states are kept."""
    loader, batches = rows_of(setting, (rows_of(setting)[0].domains[0],))
    first = Training(trunk_of(setting, loader), loader.domains, learned_in_phase_1)
    trunk = trunk_of(setting, loader)
    trunk.freeze()
    second = Training(trunk, loader.domains, lambda method: method.adapter_parameters())
    second.trainee.method.freeze_shared(keep=True)
    slots = first.model.slots(loader)
    return compared(
        "Phase 2 after its first epoch against phase 1, one domain's rows",
        {
            "phase 1": over(batches, partial(first.steps, batches, slots)),
            "phase 2": over(batches, partial(second.steps, batches, slots)),
        },
        [Claim("times the speed of phase 1", "phase 1", "phase 2", 10)],
        setting.rounds,
        batches,
    )


def domains(setting: Setting) -> dict[str, Any]:
    """Batches of four domains in models with more and more heads."""
    loader, batches = rows_of(setting)
    four = [replace(batch, domain=torch.arange(len(batch)) % 4) for batch in batches[:1]]
    trunk = trunk_of(setting, loader)
    sides: dict[str, Side] = {}
    for count in (4, 16, 64):
        names = [f"domain-{number}" for number in range(count)]
        slots = torch.arange(4) * (count // 4)
        method = trunk.method()
        for name in names:
            method.add_domain(name, 1)
        model = Model(Embedder(trunk.tables, trunk.rows), method, names)
        training = Training(trunk, names, learned_in_phase_1)
        about = f"4 domains of {count}"
        sides[f"{about}, no optimizer"] = over(four, partial(learn, model, method, four, slots))
        sides[f"{about}, whole step"] = over(four, partial(training.steps, four, slots))
    claims = [
        Claim(
            f"cost of {count} heads against 4, {what}",
            f"4 domains of {count}, {what}",
            f"4 domains of 4, {what}",
            1.2,
            at_least=False,
        )
        for what in ("no optimizer", "whole step")
        for count in (16, 64)
    ]
    return compared("Heads in the model", sides, claims, setting.rounds, four)


def memory(setting: Setting) -> dict[str, Any]:
    """Peak memory of phase 1 with the base frozen, and with everything trained."""
    sides = {}
    for name, whole in (("base frozen", False), ("everything trains", True)):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            before, after = process.submit(memory_of, setting.run, whole).result()
        sides[name] = {"before_mb": before, "peak_mb": after, "training_mb": after - before}
        print(f"  {name}: {sides[name]}", flush=True)
    return {"title": "Peak memory of phase 1", "load": os.getloadavg()[0], "sides": sides}


def memory_of(run: RunConfig, whole: bool) -> tuple[int, int]:
    """Peak resident MB of this process before an engine is made, and after some steps."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    torch.set_num_threads(1)
    setting = Setting(run, groups.start(), 1)
    loader, batches = rows_of(setting)
    trunk = trunk_of(setting, loader)
    trunk.method()
    before = _peak_mb()
    trained = (lambda method: list(method.parameters())) if whole else learned_in_phase_1
    training = Training(trunk, loader.domains, trained)
    training.steps(batches, training.model.slots(loader))
    groups.stop()
    return before, _peak_mb()


def _peak_mb() -> int:
    """`ru_maxrss` would count what the parent held when it made this process."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) * 1024 // 10**6


def over(batches: Sequence[Batch], run: Callable[[], object]) -> Side:
    return Side(run, len(batches), sum(len(batch) for batch in batches))


@dataclass
class Times:
    """Seconds per step of each side, a value per round."""

    cpu: dict[str, list[float]]
    wall: dict[str, list[float]]


def in_turns(sides: Mapping[str, Side], rounds: int) -> Times:
    """After one round that warms up."""
    times = Times({name: [] for name in sides}, {name: [] for name in sides})
    for number in range(rounds + 1):
        names, shift = list(sides), number % len(sides)
        for name in names[shift:] + names[:shift]:
            cpu, wall = time.process_time(), time.perf_counter()
            sides[name].run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if number:
                times.cpu[name].append(cpu / sides[name].steps)
                times.wall[name].append(wall / sides[name].steps)
    return times


def compared(
    title: str,
    sides: Mapping[str, Side],
    claims: Sequence[Claim],
    rounds: int,
    batches: Sequence[Batch],
) -> dict[str, Any]:
    """Time the sides in turns over these batches and judge the claims by processor time."""
    load = os.getloadavg()[0]
    times = in_turns(sides, rounds)
    tokens = sum(len(t.values()) for b in batches for t in b.tokens.values()) / len(batches)
    rows = sum(len(batch) for batch in batches) / len(batches)
    title = f"{title}, batches of {rows:.0f} rows and {tokens:.0f} tokens, processor time"
    figures = {
        name: {
            "step_ms": asdict(Figure.of([1000 * s for s in cpu])),
            "rows_per_second": asdict(Figure.of([rows / s for s in cpu])),
            "tokens_per_second": asdict(Figure.of([tokens / s for s in cpu])),
            "wall_step_ms": asdict(Figure.of([1000 * s for s in times.wall[name]])),
        }
        for name, cpu in times.cpu.items()
    }
    judged = [claim.judged(times.cpu, sides) for claim in claims]
    part = {"title": title, "load": load, "rounds": rounds, "sides": figures, "claims": judged}
    print(table(part), flush=True)
    return part


PARTS = {"peer": peer, "phases": phases, "memory": memory, "domains": domains}


def main() -> None:
    """Measure, print, write."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shards", required=True, help="of launch/runs/amazon_unictr.toml")
    parser.add_argument("--part", choices=PARTS, action="append", help="may be given again")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/unictr.json")
    torch.set_num_threads((args := parser.parse_args()).threads)
    chosen = [f"data.shards={args.shards}", f"reading.global_batch={args.batch}"]
    overrides = [*chosen, "encoder.cache_gb=2", "engine.optimizer=adamw"]
    setting = Setting(run_files.load(RUN_FILE, overrides), groups.start(), args.rounds)
    parts = [PARTS[part](setting) for part in args.part or PARTS]
    groups.stop()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"date": datetime.now(UTC).isoformat(timespec="minutes"), "machine": machine()}
    content = {**about, "threads": args.threads, "parts": parts}
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
