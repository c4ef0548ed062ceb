"""A run is one TOML file: frozen nested dataclasses, read strictly, written back as resolved."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

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
from trainer.phases import AdaptConfig, PretrainConfig, TeacherConfig
from trainer.ranks import FaultsConfig

UNBOUND = "faults"  # the section that says nothing of what a run learns


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
        if (self.text is not None) != method.text:
            there, way = ("none", "add one") if method.text else ("one", "leave it out")
            raise UserError(
                f"text: method {method.name} reads {'' if method.text else 'no '}text vectors, and "
                f"there is {there} of section [text]; {way}"
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


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file; each override is "a.b=value", the value in TOML (bare words are strings)."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such run file; there are some in launch/runs") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        _override(data, override)
    return from_dict(data, str(path))


def from_dict(data: Mapping[str, Any], where: str) -> RunConfig:
    """Build the config; an unknown key or a value of another type names the key and the way out."""
    if isinstance(data.get("backbone"), Mapping):
        data = {**data, "backbone": {"name": "mlp", **data["backbone"]}}
    _refuse_unknown_keys(RunConfig, data, where, "")
    try:
        return pydantic.TypeAdapter(RunConfig).validate_python(data)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_first_problem(error)}") from None


def dump(config: RunConfig) -> str:
    """The resolved run file."""
    return tomli_w.dumps(_without_none(asdict(config)))


def _without_none(value: Any) -> Any:
    """TOML has no null: what is not given is left out."""
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list | tuple) else value


def first_difference(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first key in which two resolved configs differ, dotted, or None; none of `[faults]`."""
    for key in {**a, **b}:
        if f"{prefix}{key}" == UNBOUND:
            continue
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found = first_difference(x, y, f"{prefix}{key}.")
            if found:
                return found
        elif x != y:
            return f"{prefix}{key}"
    return None


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--set {override}: write it as key=value, such as --set pretrain.lr=0.01")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.strip().split(".")
    for part in path:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {override}: {part} is a value, not a section")
    data[last] = value


def _refuse_unknown_keys(kind: type, data: Any, where: str, prefix: str) -> None:
    if not isinstance(data, Mapping):
        return  # a value where a section belongs: pydantic says so
    known = get_type_hints(kind)
    for key, value in data.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"{where}: unknown key {prefix}{key}; {hint}")
        for item in value if isinstance(value, list) else [value]:
            inner = _section(known[key], item, f"{where}: {prefix}{key}")
            if inner is not None:
                _refuse_unknown_keys(inner, item, where, f"{prefix}{key}.")


def _section(hint: Any, data: Any, where: str) -> type | None:
    """The dataclass that a section is read into; one of several by the section's kind or name."""
    choices: list[Any] = [t for t in _members(hint) if is_dataclass(t)]
    if len(choices) < 2 or not isinstance(data, Mapping):
        return choices[0] if choices else None
    hints = [get_type_hints(t) for t in choices]
    tag = "kind" if "kind" in hints[0] else "name"
    by_tag = {get_args(h[tag])[0]: t for h, t in zip(hints, choices, strict=True)}
    if tag not in data:
        raise UserError(f"{where}: {tag} is missing; there are: {', '.join(by_tag)}")
    if data[tag] not in by_tag:
        raise UserError(f"{where}: {unknown(tag, str(data[tag]), by_tag)}")
    return by_tag[data[tag]]


def _members(hint: Any) -> list[Any]:
    """A type, what it is a union or a list of, and theirs."""
    return [hint, *(t for part in get_args(hint) for t in _members(part))]


def _first_problem(error: pydantic.ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    # pydantic names the kind of a section as if it were a key
    tagged = ("source", "backbone", "method")
    loc = [part for before, part in pairwise(("", *problem["loc"])) if before not in tagged]
    key = ".".join(str(part) for part in loc) or "run file"
    message = problem["msg"].removeprefix("Value error, ")
    got = "" if problem["type"] in ("missing", "value_error") else f", not {problem['input']!r}"
    return f"{key}: {message[0].lower()}{message[1:]}{got}"
