"""A run is one TOML file: frozen nested dataclasses, read strictly, written back as resolved."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import tomli_w

from data_shards import Field, Reading, Schema, SourceConfig, SplitConfig, UserError
from data_shards.errors import unknown
from data_shards.prompted import PromptedConfig
from data_shards.sources import TableConfig
from data_shards.text_parts import TextConfig
from embeddings import TablesConfig
from models import EncoderConfig, MethodConfig, MLoRAConfig
from models.backbones import BackboneConfig, MLPConfig
from trainer.engine import EngineConfig
from trainer.phases import AdaptConfig, AlignConfig, PretrainConfig, TeacherConfig
from trainer.ranks import FaultsConfig
from trainer.strictly import leave_out, override, parsed, strictly


@dataclass(frozen=True)
class DataConfig:
    """`[data]`: raw rows, what of them is read, and where the shards of it lie."""

    shards: str
    source: Annotated[SourceConfig, pydantic.Field(discriminator="kind")]
    fields: tuple[Field, ...]
    split: SplitConfig = field(default_factory=SplitConfig)
    hold_out: tuple[str, ...] = ()
    """Domains that the shard set leaves out, to be added later."""
    only: tuple[str, ...] = ()
    """Domains that the shard set is made of; none named: all."""
    block_rows: int = 4096
    shard_bytes: int = 256 << 20
    prompt: PromptedConfig | None = None
    """`[data.prompt]`: a field of tokens, made of the other fields and of some of its own."""

    def __post_init__(self) -> None:
        made = self.prompt.field if self.prompt else None
        kinds = {field.name: field.kind for field in self.fields}
        if made is not None and kinds.get(made) != "tokens":
            raise UserError(
                f"data.prompt.field: data.fields has no {made!r} of kind tokens; add "
                f"{{ name = {made!r}, kind = 'tokens' }} there"
            )
        tokens = [name for name, kind in kinds.items() if kind == "tokens"]
        if len(tokens) > 1:
            raise UserError(
                f"data.fields: {' and '.join(tokens)} are of kind tokens; a row has one prompt, so "
                "keep one of them"
            )
        for name, kind in kinds.items():
            if kind == "tokens" and name != made and not isinstance(self.source, TableConfig):
                raise UserError(
                    f"data.fields: {self.source.kind} has no tokens, so no {name!r}; make them of "
                    "the other fields by a section [data.prompt]"
                )

    @property
    def schema(self) -> Schema:
        return Schema(self.fields)

    @property
    def raw(self) -> Schema:
        """The fields of the rows before their prompts are made."""
        if self.prompt is None:
            return self.schema
        rest = (field for field in self.fields if field.name != self.prompt.field)
        return Schema((*rest, *self.prompt.fields))


@dataclass(frozen=True)
class TrackingConfig:
    """`[tracking]`: wandb, beside the metrics file that is always written."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "banyan"
    pictures: bool = True
    """Whether a run ends with pictures of what it learned, in its folder and in wandb."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run file."""

    name: str
    data: DataConfig
    seed: int = 1
    output: str = "runs"
    """The run's folder is `<output>/<name>`."""
    phases: tuple[Literal["pretrain", "adapt"], ...] = ("pretrain", "adapt")
    test: tuple[str, ...] = ("test",)
    """Splits whose rows the final table is about."""
    reading: Reading = field(default_factory=Reading)
    tables: TablesConfig = field(default_factory=TablesConfig)
    backbone: Annotated[BackboneConfig, pydantic.Field(discriminator="name")] = field(
        default_factory=MLPConfig
    )
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    method: Annotated[MethodConfig, pydantic.Field(discriminator="name")] = field(
        default_factory=MLoRAConfig
    )
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    text: TextConfig | None = None
    """`[text]`: prompts as vectors of a frozen encoder, for methods that read them."""
    teacher: TeacherConfig | None = None
    align: AlignConfig | None = None
    start_from: str = ""
    """A finished run's folder, whose dense shared part is the one that this run begins with. Tables
    are not taken: other rows have other ids."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"seed is from 0 to {(1 << 63) - 1}, not {self.seed}")
        if self.data.prompt and not self.encoder.path:
            raise UserError(
                "encoder.path: none given, and [data.prompt] needs its tokenizer; give the folder "
                "or the hub id of an encoder, or leave [data.prompt] out"
            )
        if self.encoder.cache_gb and self.engine.zero_stage == 3:
            raise UserError(
                "encoder.cache_gb: with engine.zero_stage = 3 all ranks must call the encoder "
                "equally often, so nothing can be kept; set cache_gb to 0, or zero_stage to 2"
            )
        self._require_what_the_method_reads()
        if "pretrain" not in self.phases and not self.start_from:
            raise UserError(
                "phases: without pretrain there is no shared part; add it, or name a finished run "
                "in start_from"
            )
        tables = [field.name for field in self.data.schema.ids]
        for table in self.tables.pinned:
            if table not in tables:
                raise unknown("table in tables.pinned", table, tables)
        for where, splits in (
            ("pretrain.rows", self.pretrain.rows),
            ("pretrain.validate", self.pretrain.validate),
            ("adapt.rows", self.adapt.rows),
            ("adapt.validate", self.adapt.validate),
            ("teacher.rows", self.teacher.rows if self.teacher else ()),
            ("teacher.validate", self.teacher.validate if self.teacher else ()),
            ("align.rows", self.align.rows if self.align else ()),
            ("align.validate", self.align.validate if self.align else ()),
            ("test", self.test),
        ):
            for split in splits:
                if split not in self.data.split.names:
                    raise UserError(
                        f"{where}: unknown split {split!r}; "
                        f"data.split names: {', '.join(self.data.split.names)}"
                    )

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    def _require_what_the_method_reads(self) -> None:
        method = self.method
        text = method.text or method.aligns
        if (self.text is not None) != text:
            there, way = ("none", "add one") if text else ("one", "leave it out")
            raise UserError(
                f"text: method {method.name} reads {'' if text else 'no '}text vectors, and "
                f"there is {there} of section [text]; {way}"
            )
        if (self.align is not None) != method.aligns:
            raise UserError(
                f"align: method {method.name} begins with such a stage, and there is no section "
                "[align]; add one, which may be empty"
                if method.aligns
                else f"align: method {method.name} has no such stage; leave the section out"
            )
        if "adapt" in self.phases and not method.adapts:
            raise UserError(
                f'phases: method {method.name} has no adapters; set phases to ["pretrain"]'
            )
        if self.text and not self.encoder.path:
            raise UserError(
                "encoder.path: none given, and [text] needs an encoder; give the folder or the hub "
                "id of one"
            )
        if self.teacher and not method.teacher:
            raise UserError(
                f"teacher: method {method.name} learns from no teacher; leave the section out"
            )
        if method.text and self.pretrain.one_phase:
            raise UserError(
                f"pretrain.one_phase: method {method.name} has two phases; leave it out"
            )


def load(path: Path, overrides: Sequence[str] = (), without: Sequence[str] = ()) -> RunConfig:
    """Read a run file; each override is "a.b=value", the value in TOML (bare words are strings).

    `without`: dotted keys that are left out of the file first."""
    data = parsed(path, "run file", "launch/runs")
    for key in without:
        leave_out(data, key, path)
    for one in overrides:
        override(data, one)
    return from_dict(data, str(path))


def from_dict(data: Mapping[str, Any], where: str) -> RunConfig:
    """Build the config; an unknown key or a value of another type names the key and the way out."""
    if isinstance(data.get("backbone"), Mapping):
        data = {**data, "backbone": {"name": "mlp", **data["backbone"]}}
    return strictly(RunConfig, data, where)


def dump(config: RunConfig) -> str:
    """The resolved run file."""
    return tomli_w.dumps(_without_none(asdict(config)))


def _without_none(value: Any) -> Any:
    """TOML has no null: what is not given is left out."""
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list | tuple) else value


def first_difference(
    a: Mapping[str, Any], b: Mapping[str, Any], free: Collection[str] = (), prefix: str = ""
) -> str | None:
    """The first key in which two resolved configs differ, dotted, but for those in `free`; or
    None."""
    for key in {**a, **b}:
        if f"{prefix}{key}" in free:
            continue
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found = first_difference(x, y, free, f"{prefix}{key}.")
            if found:
                return found
        elif x != y:
            return f"{prefix}{key}"
    return None
