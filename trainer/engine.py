"""The dense part under DeepSpeed ZeRO: the only door to deepspeed.

The engine owns the dense module alone (it broadcasts and partitions all it is given); the tables
train themselves inside the same backward. Its state leaves and enters as plain whole tensors, so
neither ZeRO's stage nor the number of ranks is part of a checkpoint.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

# Read when deepspeed is imported: what it runs on, and how much it says of its own set-up.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
import deepspeed  # noqa: E402
from deepspeed.utils import (  # noqa: E402
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn  # noqa: E402

from data_shards.errors import UserError  # noqa: E402
from models import Features  # noqa: E402

logger.setLevel(logging.ERROR)
# DeepSpeed would compile a C++ all-reduce over shared memory, which needs a compiler on every
# machine and leaves its segment behind when a rank is killed. gloo does that work.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 500_000_000
"""Gradients that are reduced at once, at most: DeepSpeed makes a buffer of so many."""
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@dataclass(frozen=True)
class EngineConfig:
    """The `[engine]` section of a run file."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 needs no loss scaler; fp16 is not offered, because the scaler would not reach the
    tables' optimizer."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """How weight_decay works: as L2 in the gradient (MLoRA, UFIN), or apart from it (Uni-CTR)."""
    gradient_clipping: float = 0.0
    """Norm of the dense gradient; 0: none."""
    table_gradient_clipping: float = 0.0
    """Largest entry of the gradient of a looked-up vector, fbgemm's max_gradient; 0: none."""
    bad_steps: Literal["stop", "skip"] = "stop"
    """What becomes of a step whose loss or gradient is not finite; it never moves a weight."""

    def __post_init__(self) -> None:
        for name in ("gradient_clipping", "table_gradient_clipping"):
            value = vars(self)[name]
            if not 0 <= value < float("inf"):
                raise UserError(f"engine.{name}: {value:g}; it is above 0, or 0 for none")


class Engine:
    """`module` with Adam over `trainable`; every other parameter of it stays as it is."""

    def __init__(
        self,
        module: nn.Module,
        trainable: Sequence[nn.Parameter],
        config: EngineConfig,
        lr: float,
        weight_decay: float,
        rows_per_rank: int,
    ) -> None:
        if config.precision == "bf16" and config.zero_stage == 0:
            raise UserError('engine: precision = "bf16" needs zero_stage 1, 2 or 3, not 0')
        wanted = {id(p) for p in trainable}
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) in wanted)
        self.names = {id(p): name for name, p in module.named_parameters() if id(p) in wanted}
        self.trainable = list(trainable)
        groups = set(dist.distributed_c10d._world.pg_map)
        kind = OPTIMIZERS[config.optimizer]
        optimizer = kind(self.trainable, lr=lr, weight_decay=weight_decay, fused=True)
        # Any: deepspeed's own annotations name a dozen optimizers without a common face.
        self._engine: Any = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": rows_per_rank,
                "gradient_accumulation_steps": 1,
                "zero_optimization": {
                    "stage": config.zero_stage,
                    "reduce_bucket_size": bucket_of(sum(p.numel() for p in self.trainable)),
                },
                "bf16": {"enabled": config.precision == "bf16"},
                "gradient_clipping": config.gradient_clipping,
                "steps_per_print": 1 << 60,
                "zero_force_ds_cpu_optimizer": False,
            },
        )[0]
        _limit_waits(groups)
        self.config = config
        self._stage = config.zero_stage
        self.whole = config.zero_stage < 3
        """Whether each rank holds its parameters whole between steps"""
        self._dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32

    def __call__(self, features: Features) -> Tensor:
        """The module's output in fp32."""
        return self._engine(features.to(self._dtype)).float()

    def train(self, mode: bool) -> None:
        """Switch dropout on or off."""
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Backward through the dense part, to gradients averaged over all ranks."""
        self._engine.backward(loss)

    def finite(self) -> bool:
        """Whether this rank's part of the averaged gradients is, as `finite` has it."""
        return finite(self._gradients(), dist.get_world_size())

    def drop(self) -> None:
        """Forget the gradients of the last backward."""
        if self._stage == 0:
            self._engine.zero_grad()
            return
        for gradient in self._gradients():  # which DeepSpeed then drops by itself, on all ranks
            gradient.fill_(torch.nan)
        self.step()

    def step(self) -> None:
        """One optimizer step by the gradients of the last backward."""
        self._engine.step()
        if self._stage == 3:  # or a parameter without a gradient would take its last one again
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()

    def parameters(self) -> dict[str, Tensor]:
        """Whole fp32 masters of what is trained, by name, on every rank."""
        return {self.names[id(p)]: self._master(p).clone() for p in self.trainable}

    def optimizer_state(self) -> dict[str, Tensor]:
        """Whole moments as "<name>/<moment>", and "steps"; empty before the first step."""
        steps = self._steps()
        if steps == 0:
            return {}
        state = {
            f"{self.names[id(p)]}/{moment}": self._moment(p, moment).clone()
            for p in self.trainable
            for moment in MOMENTS
        }
        return {**state, "steps": torch.tensor(steps)}

    def load(self, parameters: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """The inverse of `parameters()` and `optimizer_state()`, at any stage and world size."""
        steps = int(state["steps"]) if state else 0
        self._make_state(steps)
        for p in self.trainable:
            name = self.names[id(p)]
            self._set_master(p, parameters[name])
            for moment in MOMENTS if steps else ():
                self._set_moment(p, moment, state[f"{name}/{moment}"])
        if self._stage == 3:  # which keeps small parameters gathered: as they were before
            self._engine.optimizer.checkpoint_event_prologue()
            self._engine.optimizer.checkpoint_event_epilogue()

    def _gradients(self) -> list[Tensor]:
        if self._stage == 0:
            return [p.grad for p in self.trainable if p.grad is not None]
        if self._stage == 3:
            return [self._engine.optimizer.grad_partitions_flat_buffer]
        parts = self._engine.optimizer.averaged_gradients.values()
        return [part for group in parts for part in group or ()]

    def _partitions(self) -> list[Tensor]:
        """The tensors that the inner Adam steps on: parameters, or flat slices of them."""
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._inner().param_groups for p in group["params"]]

    def _inner(self) -> torch.optim.Adam:
        optimizer = self._engine.optimizer
        return optimizer if isinstance(optimizer, torch.optim.Adam) else optimizer.optimizer

    def _steps(self) -> int:
        states = [self._inner().state[p] for p in self._partitions()]
        return max((int(s["step"]) for s in states if "step" in s), default=0)

    def _make_state(self, steps: int) -> None:
        """Adam makes its state at the first step; a load before that must make it itself.

        State that is there stays where it is: DeepSpeed has linked its tensors, once for all.
        """
        for p in self._partitions():
            state = self._inner().state.get(p)
            if state:
                state["step"].fill_(steps)
                for moment in MOMENTS:
                    state[moment].zero_()
            elif steps:
                moments = {moment: torch.zeros_like(p) for moment in MOMENTS}
                step = torch.tensor(float(steps), device=p.device)  # where a fused Adam reads it
                self._inner().state[p] = {"step": step, **moments}
        if steps and self._stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _master(self, p: nn.Parameter) -> Tensor:
        if self._stage == 0:
            return p.data
        return _present(safe_get_full_fp32_param(p))

    def _set_master(self, p: nn.Parameter, value: Tensor) -> None:
        if self._stage == 3:
            part = self._partition_of(p, None)
            part.data.copy_(_slice(value, part.numel()))
            p.ds_tensor.data.copy_(part.data)  # type: ignore[attr-defined]
            return
        if self._stage > 0:
            safe_set_full_fp32_param(p, value)
        p.data.copy_(value)  # the module's own copy, which the next forward reads

    def _moment(self, p: nn.Parameter, name: str) -> Tensor:
        if self._stage == 0:
            return self._inner().state[p][name]
        return _present(safe_get_full_optimizer_state(p, name))

    def _set_moment(self, p: nn.Parameter, name: str, value: Tensor) -> None:
        if self._stage == 0:
            self._inner().state[p][name].copy_(value)
        elif self._stage == 3:
            part = self._partition_of(p, name)
            part.data.copy_(_slice(value, part.numel()))
        else:
            safe_set_full_optimizer_state(p, value, name)

    def _partition_of(self, p: nn.Parameter, name: str | None) -> Tensor:
        """This rank's slice under ZeRO 3. DeepSpeed's own setter fails on parameters with fewer
        elements than ranks, whose last slices are padding."""
        return self._engine.optimizer._get_fp32_opt_state_partition(p, False, name)[0]


def bucket_of(trained: int) -> int:
    """Gradients in DeepSpeed's buffer, for so many weights."""
    return max(min(trained, BUCKET), 1)


def finite(tensors: Sequence[Tensor], ranks: int = 1) -> bool:
    """Whether all entries are finite numbers, and so small that the squared norm of as many ranks'
    is one too: Adam squares them, and DeepSpeed leaves out a step whose norm is infinite when the
    tables have moved already. One pass."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
    return not norms or bool((torch.stack(norms).square().sum() * ranks).isfinite())


def _limit_waits(known: set[dist.ProcessGroup]) -> None:
    """DeepSpeed's own groups wait half an hour for a rank that hangs, unless they are told."""
    backend: Any = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    for group in set(dist.distributed_c10d._world.pg_map) - known:
        dist.distributed_c10d._set_pg_timeout(backend.options._timeout, group)


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "DeepSpeed holds no state for a parameter that it was given to train"
    return tensor


def _slice(value: Tensor, size: int) -> Tensor:
    world, rank = dist.get_world_size(), dist.get_rank()
    padded = nn.functional.pad(value.flatten(), (0, size * world - value.numel()))
    return padded[rank * size : (rank + 1) * size]
