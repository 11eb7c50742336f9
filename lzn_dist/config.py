"""The configuration of a run: typed, strict, one sentence a field.

A YAML file, perhaps with ``base: other.yaml`` (read first, relative to the file), then ``key=value`` overrides
(``optimizer.clip_norm=1``). Anything unknown, of the wrong type or impossible together is one clear error
before any work begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from lzn_dist.paths import expand_path, without_secrets
from lzn_dist.shipped import find
from lzn_dist.yaml_core import dump_yaml, parse_yaml, read_yaml

UserPath = Annotated[str, AfterValidator(expand_path)]
ObjectiveName = Literal["lzn", "rectified_flow", "simclr", "moco", "supervised", "clip", "siglip"]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key and what to do, without the secrets of URLs."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class DataConfig(_Section):
    shards: UserPath = Field("data/digits", description="Folder or URL of WebDataset shards and their manifest.")
    embedded: Literal["none", "digits"] = Field(
        "none", description="An embedded data set to write to `shards` where it is missing."
    )
    global_batch: PositiveInt = Field(256, description="Samples an optimiser step, over all ranks.")
    image_size: NonNegativeInt = Field(8, description="Height and width of the images in pixels; 0: as in the shards.")
    image_channels: Literal[0, 1, 3] = Field(1, description="1 for grey, 3 for RGB; 0: as the shards' first image is.")
    num_classes: int = Field(
        10, ge=-1, description="Number of classes; 0 where there are no labels; -1: as many as the shards have."
    )
    cache_decoded: bool = Field(False, description="Keep decoded images in memory (small data sets).")
    workers: NonNegativeInt = Field(0, description="Loader processes a rank; 0 reads in a background thread.")
    streams: PositiveInt = Field(
        1, description="Canonical streams of an epoch's order, a multiple of the ranks (or 1); part of the order."
    )
    shuffle_window: NonNegativeInt = Field(
        0, description="Samples of a stream that are shuffled together; 0: all, which reads shards at random."
    )
    resize: NonNegativeInt = Field(
        0, description="Shorter side in pixels before a centre crop to image_size; 0: images have that size already."
    )
    views: Literal["digits", "simclr", "none"] = Field(
        "digits", description="Augmentations of the two views (representation); none: the images (supervised alone)."
    )
    scaled_decoding: bool = Field(
        False, description="Decode JPEGs at 1/2, 1/4 or 1/8 where that suffices: faster for large ones, other pixels."
    )
    max_bad_samples: NonNegativeInt = Field(
        100, description="Samples an epoch that may be replaced because they are damaged before the run stops."
    )
    cache: UserPath = Field(
        "", description="Folder for local copies of remote shards; default: one in the system's /tmp."
    )
    retry_seconds: PositiveFloat = Field(600.0, description="Seconds for which a lost server is tried again.")
    tokenizer: UserPath = Field(
        "", description="File of the captions' tokenizer (a tokenizer.json); default: the one that is with the shards."
    )
    tokenizer_sha256: str = Field("", description="Which tokenizer it has to be; default: the one that is there.")
    vocabulary: NonNegativeInt = Field(0, description="Numbers that tokens are below; 0: as the tokenizer says.")
    text_length: PositiveInt = Field(32, description="Tokens of a caption that are seen; longer ones are cut.")
    partial: bool = Field(
        False,
        description="Samples may lack a caption or a label: losses that need it leave them out; else they are bad.",
    )
    flip: bool = Field(False, description="Mirror images horizontally with probability 1/2 (generation).")


class LatentConfig(_Section):
    dim: PositiveInt = Field(32, description="Dimension D of the shared latent space.")
    solver: Literal["euler", "dpm_solver_pp", "dopri5"] = Field("euler", description="Solver of latent computation.")
    steps: PositiveInt = Field(20, description="Steps of latent computation.")
    noise_scale: float = Field(1.0, ge=0.0, description="Scale of the noise that places a latent in its zone.")


class PairConfig(_Section):
    """latents and anchors: of a data type (image), or of one of its views (image.1, image.2)."""

    latents: str = Field(description="Data type, or view of it, whose latents are aligned.")
    anchors: str = Field(description="Data type, or view of it, in whose zones they are to lie.")
    weight: float = Field(1.0, ge=0.0, description="Weight of this pair's loss.")
    over: Literal["max", "mean", "last", "softmax"] = Field(
        "max", description="How a sample's steps become one number: its best (the paper's), mean, last or smooth best."
    )
    temperature: PositiveFloat = Field(1.0, description="Of over=softmax: the best for small ones, the mean for large.")

    @model_validator(mode="after")
    def _possible(self) -> PairConfig:
        if self.temperature != 1.0 and self.over != "softmax":
            raise ValueError("temperature is for over=softmax")
        return self


class AlignmentConfig(_Section):
    pairs: tuple[PairConfig, ...] = Field((), description="What is aligned with what, one loss each.")
    steps: PositiveInt = Field(20, description="Steps of latent alignment.")
    cutoff: float = Field(0.2, ge=0.0, lt=1.0, description="Leading fraction of the steps that the loss skips.")
    kind: Literal["cross_entropy", "probability"] = Field("cross_entropy", description="Loss on the assignment.")
    class_weights: bool = Field(True, description="Weight label anchors by the global batch's class frequencies.")


class DecodingConfig(_Section):
    what: str = Field("image", description="Data type that is decoded.")
    latents: str = Field("image", description="Data type, or view of it, from whose latents.")
    point: Literal["latent", "anchor"] = Field(
        "latent", description="Decode from latents (the paper's), or from the anchors as alignment sees them."
    )
    class_conditional: bool = Field(False, description="Give the decoder the labels as well.")
    condition_dropout: float = Field(
        0.0, ge=0.0, le=1.0, description="Share of samples that are decoded without latent and label, for guidance."
    )
    weight: float = Field(1.0, ge=0.0, description="Weight of this decoder's loss.")
    latent_dropout: float = Field(
        0.0, ge=0.0, le=1.0, description="Share of samples that are decoded from a latent of the prior, not of theirs."
    )

    @model_validator(mode="after")
    def _possible(self) -> DecodingConfig:
        if self.latent_dropout and self.point == "anchor":
            raise ValueError("latent_dropout draws latents: with point=anchor it is condition_dropout")
        return self


class ContrastConfig(_Section):
    temperature: PositiveFloat = Field(0.2, description="Temperature of cosine similarities (simclr, moco).")
    queue: PositiveInt = Field(65536, description="Keys in MoCo's queue, a multiple of the global batch.")
    momentum: float = Field(0.999, ge=0.0, le=1.0, description="Share that MoCo's key encoder keeps of itself a step.")


class NetworkConfig(_Section):
    target: str = Field(
        description="Class of the network: a short name (ncsnpp, resnet, label_anchors, transformer) or "
        "package.module:Class. "
        "Naming another one than a base does drops the base's arguments."
    )
    arguments: dict[str, Any] = Field({}, description="What the class takes besides what follows from the data.")
    lr: PositiveFloat = Field(1e-3, description="Learning rate.")
    stop: PositiveInt | None = Field(None, description="Step after which the network stays as it is.")


class ModalityConfig(_Section):
    encoder: NetworkConfig | None = Field(None, description="Network from samples to anchors.")
    decoder: NetworkConfig | None = Field(None, description="Network from latents to samples.")
    anchor_centred: bool = Field(
        False, description="Subtract the mean of the batch's anchors of this data type (lzn); false: as published."
    )
    anchor_norm: PositiveFloat | None = Field(
        None, description="Length that anchors are brought to (lzn); null: as the encoder gives them, as published."
    )


class OptimizerConfig(_Section):
    betas: tuple[float, float] = Field((0.9, 0.999), description="Adam's decay rates.")
    eps: PositiveFloat = Field(1e-8, description="Adam's epsilon.")
    clip_norm: PositiveFloat = Field(1.0, description="Largest norm of the gradient over all parameters.")
    warmup_steps: NonNegativeInt = Field(5000, description="Linear warm-up from lr/warmup_steps, then constant.")
    ema_decay: float = Field(0.9999, ge=0.0, lt=1.0, description="Decay of the averaged weights.")


class FlowConfig(_Section):
    t_min: float = Field(1e-3, gt=0.0, lt=1.0, description="Smallest time of rectified flow.")
    sampler: Literal["euler", "dopri5"] = Field("euler", description="Sampler of evaluation's images.")
    sampler_steps: PositiveInt = Field(10, description="Steps of the Euler sampler.")


class EvaluationConfig(_Section):
    batch: PositiveInt = Field(360, description="Images of an evaluation batch, the same on any number of ranks.")
    noise_scales: tuple[float, ...] = Field((0.0, 0.25, 0.5, 0.75, 1.0), description="Noise scales of accuracy.")
    alignment_steps: PositiveInt = Field(100, description="Steps of alignment with labels in evaluation.")
    samples_per_class: PositiveInt = Field(50, description="Conditional samples drawn a class.")
    templates: tuple[str, ...] = Field(
        ("{}",), description="Texts around a class's name, {}, whose mean embedding stands for the class (zero-shot)."
    )
    class_names: tuple[str, ...] = Field((), description="The classes in words (zero-shot); default: the shards'.")
    centre_samples: PositiveInt = Field(
        1024, description="First training samples whose anchors' mean is the centre where anchors are centred."
    )
    split: str = Field("", description="Split whose images are measured; default: test, else val. train is named so.")
    inception: UserPath = Field(
        "",
        description="Weights of the Inception network, for FID and the like at each evaluation: a file, or hub.",
    )
    fid_samples: int = Field(50000, ge=10, description="Generated images for FID and the like.")
    fid_seeds: PositiveInt = Field(
        3, description="Seeds over which FID and the like are averaged; during training it is one."
    )
    cache: UserPath = Field("~/.cache/lzn_dist", description="Folder for the statistics of real images.")


class TrackingConfig(_Section):
    wandb: Literal["auto", "offline", "online", "disabled"] = Field(
        "auto", description="auto: online where the user is logged in, else offline."
    )
    project: str = Field("lzn_dist", description="Project name for wandb.")


class Config(_Section):
    """A run. `step` counts completed optimiser steps everywhere."""

    objective: ObjectiveName = Field(
        "lzn",
        description="What is optimised: LZN's, or a baseline: rectified_flow, simclr, moco, supervised, clip, siglip.",
    )
    output_dir: UserPath = Field(description="Folder of the run.")
    max_steps: PositiveInt = Field(description="Total optimiser steps, also after resuming.")
    log_every: PositiveInt = Field(10, description="Steps between lines of metrics.jsonl.")
    checkpoint_every: PositiveInt = Field(1000, description="Steps between checkpoints.")
    keep_last: PositiveInt = Field(2, description="Newest checkpoints that are kept.")
    keep_every: NonNegativeInt = Field(0, description="Also keep the checkpoints at multiples of this step; 0: none.")
    evaluate_every: NonNegativeInt = Field(0, description="Steps between evaluations on EMA weights; 0: at the end.")
    seed: int = Field(0, description="Seed of every random number of the run.")
    resume: UserPath = Field("auto", description="auto: the newest complete checkpoint; none; or a checkpoint's path.")
    init_from: UserPath = Field(
        "", description="Run, checkpoint or exported folder whose averaged weights a new run starts with, as far as "
        "they fit; what is left out and what is new is told."
    )  # fmt: skip
    init_networks: tuple[str, ...] = Field(
        (), description="Which networks init_from fills (image.encoder, …); default: all that are there and here."
    )
    precision: Literal["float32", "float64", "bf16"] = Field(
        "float32", description="Arithmetic of the networks; zones and label anchors stay in float32 at least."
    )
    tf32: bool = Field(False, description="Allow TF32 products in the networks on CUDA.")
    compile: bool = Field(
        False,
        description="Compile the networks with torch.compile, which fuses their normalisations and, where that "
        "pays, runs convolutions channels last.",
    )
    cpu_threads: NonNegativeInt = Field(
        0, description="Threads on the CPU, shared out among a machine's processes; 0: one a core. Small networks: 1."
    )
    deterministic: bool = Field(False, description="Deterministic algorithms alone: on CUDA, for resuming bit by bit.")
    micro_batch: NonNegativeInt = Field(
        0, description="Samples a rank has in memory at once (gradient caching, equal results); 0: its whole share."
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="Recompute activations in the backward: selective: residual and attention blocks; full."
    )
    flow_store_every: PositiveInt = Field(1, description="Keep every k-th state of the zones' flow, recompute others.")
    anchors: Literal["gathered", "ring"] = Field(
        "gathered", description="All anchors on every rank, or each rank's share passed round a ring."
    )
    max_nonfinite: PositiveInt = Field(
        10, description="Steps in a row that may be skipped for a gradient that is not finite before the run stops."
    )
    collective_timeout: PositiveFloat = Field(1800.0, description="Seconds a collective may take before all ranks end.")
    profile_steps: NonNegativeInt = Field(
        0, description="Steps to profile, after two: a trace, the GPU's memory and a table, in the run's profile/."
    )
    watchdog: float = Field(
        300.0, ge=0.0, description="Seconds a step may take before the ranks that are behind are named; 0: never."
    )
    backend: Literal["auto", "tiled", "triton", "plain"] = Field(
        "auto", description="How the zones' field is computed: auto is triton on a GPU that has it, else tiled."
    )
    data: DataConfig = DataConfig()
    latent: LatentConfig = LatentConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    contrast: ContrastConfig = ContrastConfig()
    modalities: dict[str, ModalityConfig] = Field({}, description="The data types and their networks, by name.")
    decode: tuple[DecodingConfig, ...] = Field((), description="What is decoded, and from whose latents.")
    optimizer: OptimizerConfig = OptimizerConfig()
    flow: FlowConfig = FlowConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if int(self.alignment.steps * self.alignment.cutoff) >= self.alignment.steps:
            raise ValueError("alignment.cutoff leaves no step of alignment.steps; lower it")
        if self.anchors == "ring" and (self.latent.solver == "dopri5" or self.backend == "plain"):
            raise ValueError("anchors=ring needs a solver with fixed steps and backend auto, tiled or triton")
        if self.data.embedded != "none" and "://" in self.data.shards:
            raise ValueError("an embedded data set is written to a folder: set data.embedded=none for shards at a URL")
        if 0 < self.data.resize < self.data.image_size or (self.data.resize and not self.data.image_size):
            raise ValueError("data.resize is smaller than data.image_size, or that is not given; set both")
        if self.data.embedded == "digits" and (self.data.image_size, self.data.image_channels) != (8, 1):
            raise ValueError("data.embedded=digits holds 8x8 grey images: set data.image_size=8 data.image_channels=1")
        return self

    @property
    def task(self) -> str:
        """The paper's word for it, for people; nothing is decided by it."""
        if any(pair.anchors == "label" for pair in self.alignment.pairs) and self.objective == "lzn":
            return "joint"
        return "generation" if self.decode and self.objective in ("lzn", "rectified_flow") else "representation"

    def network(self, modality: str, role: str) -> NetworkConfig:
        """Raises ConfigError where there is none."""
        section = self.modalities.get(modality)
        found: NetworkConfig | None = getattr(section, role, None)
        if found is None:
            raise ConfigError(f"modalities.{modality}.{role} is missing: its target names the class of the network")
        return found


def _layers(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """A file's values and those of its bases, the lowest first."""
    if not path.is_file():
        raise ConfigError(f"no configuration file {path}")
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base` goes round in a circle")
    try:
        own = read_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if own is None:
        own = {}
    if not isinstance(own, dict):
        kind = "list" if isinstance(own, list) else "single value"
        raise ConfigError(f"{path} is a {kind}: a configuration has a line `key: value` for each key")
    base = own.pop("base", None)
    if base is None:
        return [(path, own)]
    return [*_layers(path.parent / _path(str(base), path), (*seen, path.resolve())), (path, own)]


def named_file(name: str | Path, folder: str = "configs", what: str = "configuration") -> Path:
    """A file by its path, or one of a shipped folder by its name. Raises ConfigError, which says what is not there."""
    try:
        return find(_path(str(name), what), folder)
    except FileNotFoundError as error:
        raise ConfigError(f"no {what}: {error}") from error


def layers(path: str | Path, overrides: Sequence[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """What a configuration is made of, the lowest first: files' values, then the overrides'. Raises ConfigError."""
    files = [(str(file), values) for file, values in _layers(named_file(path))]
    return files + [("override", _nested(item)) for item in overrides]


def _path(text: str, where: str | Path) -> str:
    try:
        return expand_path(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _merge(below: dict[str, Any], above: dict[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """Sections key by key, everything else as a whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if key in merged and isinstance(old, dict) != isinstance(value, dict):
            raise ConfigError(f"{where}: {prefix}{key}: a section of keys in one place, a value in another")
        merged[key] = _merge(old, value, where, f"{prefix}{key}.") if isinstance(old, dict) else value
    if below.get("target", above.get("target")) != above.get("target", below.get("target")):
        merged["arguments"] = above.get("arguments", {})  # another class takes others
    return merged


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, apply ``key=value`` overrides, check everything.

    path: a file, or the name of a configuration that comes with lzn_dist (digits_joint).
    The value of a key of text (a path, a name) is the text after the first ``=`` as it stands; all others are YAML 1.2.
    Raises ConfigError, one line a problem: a missing file, an unknown key, a wrong type, an impossible combination.
    """
    values: dict[str, Any] = {}
    for file, own in _layers(named_file(path)):
        values = _merge(values, own, str(file))
    return _merged(values, overrides, str(path))


def override(config: Config, overrides: Sequence[str]) -> Config:
    """A configuration with ``key=value`` overrides. Raises ConfigError as `load_config` does."""
    return _merged(config.model_dump(mode="json"), overrides, "configuration")


def _nested(item: str) -> dict[str, Any]:
    """What an override says."""
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {item!r} is not of the form key=value")
    *sections, name = key.strip().split(".")
    try:
        value = text if _is_text(sections, name) else parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"override {item!r} is not readable YAML: {error}") from error
    nested: dict[str, Any] = {name: value}
    for section in reversed(sections):
        nested = {section: nested}
    return nested


def _merged(values: dict[str, Any], overrides: Sequence[str], where: str) -> Config:
    for item in overrides:
        values = _merge(values, _nested(item), f"override {item!r}")
    return config_from(values, where)


def config_from(values: dict[str, Any], where: str) -> Config:
    """Checked. where: what the values are from. Raises ConfigError, one line a problem."""
    try:
        return Config.model_validate(_tuples(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(where, e) for e in error.errors())) from None


def _model(kind: Any) -> type[BaseModel] | None:
    """The section that a key's type is, perhaps an optional one or one of several by name."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next((model for part in get_args(kind) if (model := _model(part)) is not None), None)


def _section(keys: Sequence[Any]) -> type[BaseModel] | None:
    """The section that keys lead to; None where they lead to none."""
    model: type[BaseModel] | None = Config
    by_name = False
    for key in keys:
        if model is None:
            return None
        if by_name or isinstance(key, int):  # a name of the user's, or a place in a list
            by_name = False
            continue
        field = model.model_fields.get(key)
        kind = None if field is None else field.annotation
        by_name = get_origin(kind) is dict
        model = _model(kind)
    return model


def _is_text(sections: Sequence[str], name: str) -> bool:
    """Whether a key's values are text alone; False for a key that there is not."""
    model = _section(sections)
    kind = model.model_fields[name].annotation if model is not None and name in model.model_fields else None
    return kind is str or (get_origin(kind) is Literal and all(isinstance(value, str) for value in get_args(kind)))


def _tuples(value: Any) -> Any:
    """YAML's lists as the tuples that a frozen configuration has."""
    if isinstance(value, dict):
        return {key: _tuples(part) for key, part in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _explain(path: str | Path, error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section = _section(error["loc"][:-1])
        known = sorted(section.model_fields) if section is not None else []
        return f"{path}: unknown key {key!r}; known here: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{path}: key {key!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "bool_type":
        message += ": true or false"
    return f"{path}: {key + ': ' if key else ''}{message}" + (f" (got {error['input']!r})" if key else "")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections' values by their whole keys: optimizer.clip_norm."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def changed_keys(before: Config, now: Config) -> list[str]:
    """Keys of a checkpoint's configuration that the present one has changed, as "key: before → now"."""
    ignored = {
        "output_dir", "max_steps", "resume", "init_from", "init_networks", "tracking", "log_every", "checkpoint_every",
        "keep_last", "cpu_threads", "profile_steps",
    }  # fmt: skip
    old, new = (flat(config.model_dump(exclude=ignored)) for config in (before, now))
    return [f"{key}: {old.get(key)} → {value}" for key, value in new.items() if old.get(key) != value]


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML that load_config reads back to an equal one."""
    path.write_text(dump_yaml(config.model_dump(mode="json")), encoding="utf-8")
