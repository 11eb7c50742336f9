"""The configuration of a run: typed, strict, one sentence a field.

A YAML file, perhaps with ``base: other.yaml`` (read first, relative to the file), then ``key=value`` overrides
(``optimizer.encoder_lr=1e-4``). Anything unknown, of the wrong type or impossible together is one clear error
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
from lzn_dist.yaml_core import dump_yaml, parse_yaml, read_yaml

UserPath = Annotated[str, AfterValidator(expand_path)]
Task = Literal["generation", "representation", "joint"]
ObjectiveName = Literal["lzn", "rectified_flow", "simclr", "moco", "supervised"]


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
    flip: bool = Field(False, description="Mirror images horizontally with probability 1/2 (generation).")


class LatentConfig(_Section):
    dim: PositiveInt = Field(32, description="Dimension D of the shared latent space.")
    solver: Literal["euler", "dpm_solver_pp", "dopri5"] = Field("euler", description="Solver of latent computation.")
    steps: PositiveInt = Field(20, description="Steps of latent computation.")
    noise_scale: float = Field(1.0, ge=0.0, description="Scale of the noise that places a latent in its zone.")


class AlignmentConfig(_Section):
    steps: PositiveInt = Field(20, description="Steps of latent alignment.")
    cutoff: float = Field(0.2, ge=0.0, lt=1.0, description="Leading fraction of the steps that the loss skips.")
    kind: Literal["cross_entropy", "probability"] = Field("cross_entropy", description="Loss on the assignment.")
    both_directions: bool = Field(False, description="Align view 1 to view 2 and view 2 to view 1.")
    class_weights: bool = Field(True, description="Weight label anchors by the global batch's class frequencies.")
    weight: float = Field(1.0, ge=0.0, description="Weight of the alignment loss beside rectified flow's.")


class ContrastConfig(_Section):
    temperature: PositiveFloat = Field(0.2, description="Temperature of cosine similarities (simclr, moco).")
    queue: PositiveInt = Field(65536, description="Keys in MoCo's queue, a multiple of the global batch.")
    momentum: float = Field(0.999, ge=0.0, le=1.0, description="Share that MoCo's key encoder keeps of itself a step.")


class NetworkConfig(_Section):
    channels: PositiveInt = Field(32, description="Channels of the first level.")
    channel_multipliers: tuple[PositiveInt, ...] | None = Field(
        (1, 2), description="Channels of each level, as factors; null: as many levels as the image size has halves."
    )
    residual_blocks: PositiveInt = Field(1, description="Residual blocks a level.")
    attention_resolutions: tuple[PositiveInt, ...] | None = Field(
        (), description="Resolutions with self-attention; null: the largest level of 16 pixels or fewer."
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout rate in residual blocks.")
    fir: bool = Field(False, description="Resample with the FIR filter [1, 3, 3, 1].")
    progressive: bool = Field(False, description="Input skips and, decoding, output skips, summed (256 pixels).")


class EncoderConfig(NetworkConfig):
    kind: Literal["ncsnpp", "resnet"] = Field("ncsnpp", description="NCSN++ down half, or ResNet with GroupNorm.")
    blocks: tuple[PositiveInt, ...] = Field((3, 4, 6, 3), description="ResNet: bottleneck blocks a stage.")
    stem: Literal["imagenet", "small"] = Field("imagenet", description="ResNet: 7x7/2 and pooling, or 3x3.")
    feature_resolutions: tuple[PositiveInt, ...] | None = Field(
        None, description="NCSN++: resolutions whose feature maps are read out; null for all."
    )


class DecoderConfig(NetworkConfig):
    class_conditional: bool = Field(False, description="Give the decoder the labels (task=joint always does).")
    embedding: Literal["positional", "fourier"] = Field("positional", description="Embedding of the time.")
    scale_by_sigma: bool = Field(False, description="Divide the output by 999 t (256 pixels).")


class OptimizerConfig(_Section):
    encoder_lr: PositiveFloat = Field(1e-3, description="Learning rate of the image encoder.")
    decoder_lr: PositiveFloat = Field(1e-3, description="Learning rate of the image decoder.")
    label_lr: PositiveFloat = Field(1e-3, description="Learning rate of the label anchors.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Adam's decay rates.")
    eps: PositiveFloat = Field(1e-8, description="Adam's epsilon.")
    clip_norm: PositiveFloat = Field(1.0, description="Largest norm of the gradient over all parameters.")
    warmup_steps: NonNegativeInt = Field(5000, description="Linear warm-up from lr/warmup_steps, then constant.")
    ema_decay: float = Field(0.9999, ge=0.0, lt=1.0, description="Decay of the averaged weights.")
    encoder_stop: PositiveInt | None = Field(None, description="Step after which the image encoder stays as it is.")
    decoder_stop: PositiveInt | None = Field(None, description="Step after which the image decoder stays as it is.")
    label_stop: PositiveInt | None = Field(None, description="Step after which the label anchors stay as they are.")


class FlowConfig(_Section):
    t_min: float = Field(1e-3, gt=0.0, lt=1.0, description="Smallest time of rectified flow.")
    sampler: Literal["euler", "dopri5"] = Field("euler", description="Sampler of evaluation's images.")
    sampler_steps: PositiveInt = Field(10, description="Steps of the Euler sampler.")


class EvaluationConfig(_Section):
    batch: PositiveInt = Field(360, description="Images of an evaluation batch, the same on any number of ranks.")
    noise_scales: tuple[float, ...] = Field((0.0, 0.25, 0.5, 0.75, 1.0), description="Noise scales of accuracy.")
    alignment_steps: PositiveInt = Field(100, description="Steps of alignment with labels in evaluation.")
    samples_per_class: PositiveInt = Field(50, description="Conditional samples drawn a class.")
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

    task: Task = Field(description="generation, representation or joint.")
    objective: ObjectiveName = Field(
        "lzn", description="What is optimised: LZN's, or a baseline's (rectified_flow; simclr, moco, supervised)."
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
    precision: Literal["float32", "float64", "bf16"] = Field(
        "float32", description="Arithmetic of the networks; zones and label anchors stay in float32 at least."
    )
    tf32: bool = Field(False, description="Allow TF32 products in the networks on CUDA.")
    compile: bool = Field(False, description="Compile the networks with torch.compile.")
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
    watchdog: float = Field(
        300.0, ge=0.0, description="Seconds a step may take before the ranks that are behind are named; 0: never."
    )
    backend: Literal["auto", "tiled", "plain"] = Field("auto", description="How the zones' field is computed.")
    data: DataConfig = DataConfig()
    latent: LatentConfig = LatentConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    contrast: ContrastConfig = ContrastConfig()
    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    flow: FlowConfig = FlowConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if self.data.num_classes == 0 and (self.labels_decoder or self.objective == "supervised"):
            raise ValueError("task=joint, decoder.class_conditional and objective=supervised need data.num_classes")
        self._possible_objective()
        if int(self.alignment.steps * self.alignment.cutoff) >= self.alignment.steps:
            raise ValueError("alignment.cutoff leaves no step of alignment.steps; lower it")
        if self.anchors == "ring" and (self.latent.solver == "dopri5" or self.backend == "plain"):
            raise ValueError("anchors=ring needs a solver with fixed steps and backend auto or tiled")
        if self.task != "representation" and self.encoder.kind == "resnet" and self.data.image_channels == 1:
            raise ValueError("encoder.kind=resnet with one image channel is for task=representation")
        if self.task == "representation" and self.data.views == "simclr" and self.data.image_channels == 1:
            raise ValueError("data.views=simclr changes colours: set data.image_channels=3, or data.views=digits")
        if self.task == "representation" and self.data.views == "simclr" and self.data.cache_decoded:
            raise ValueError("data.views=simclr crops anew in each epoch: set data.cache_decoded=false")
        if self.data.embedded != "none" and "://" in self.data.shards:
            raise ValueError("an embedded data set is written to a folder: set data.embedded=none for shards at a URL")
        if 0 < self.data.resize < self.data.image_size or (self.data.resize and not self.data.image_size):
            raise ValueError("data.resize is smaller than data.image_size, or that is not given; set both")
        if self.data.embedded == "digits" and (self.data.image_size, self.data.image_channels) != (8, 1):
            raise ValueError("data.embedded=digits holds 8x8 grey images: set data.image_size=8 data.image_channels=1")
        return self

    def _possible_objective(self) -> None:
        task = "generation" if self.objective == "rectified_flow" else "representation"
        if self.objective != "lzn" and self.task != task:
            raise ValueError(f"objective={self.objective} is for task={task}")
        if self.objective != "lzn" and self.anchors == "ring":
            raise ValueError("anchors=ring is for objective=lzn")
        if self.objective == "moco" and self.contrast.queue % self.data.global_batch:
            raise ValueError(
                f"contrast.queue={self.contrast.queue} is no multiple of data.global_batch={self.data.global_batch}"
            )
        if self.task == "representation" and self.objective != "supervised" and self.data.views == "none":
            raise ValueError("data.views=none is for objective=supervised: two equal views teach nothing")
        if self.decoder.class_conditional and self.task == "representation":
            raise ValueError("decoder.class_conditional is for tasks with a decoder")

    @property
    def labels_decoder(self) -> bool:
        """Whether the decoder is given labels."""
        return self.task == "joint" or self.decoder.class_conditional

    @property
    def decoder_latent_dim(self) -> int:
        """Dimension of the latents that the decoder is given: 0 for rectified flow by itself."""
        return 0 if self.objective == "rectified_flow" else self.latent.dim


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
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
        return own
    return _merge(_read(path.parent / _path(str(base), path), (*seen, path.resolve())), own, str(path))


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
    return merged


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, apply ``key=value`` overrides, check everything.

    The value of a key of text (a path, a name) is the text after the first ``=`` as it stands; all others are YAML 1.2.
    Raises ConfigError, one line a problem: a missing file, an unknown key, a wrong type, an impossible combination.
    """
    return _merged(_read(Path(_path(str(path), "configuration"))), overrides, str(path))


def override(config: Config, overrides: Sequence[str]) -> Config:
    """A configuration with ``key=value`` overrides. Raises ConfigError as `load_config` does."""
    return _merged(config.model_dump(mode="json"), overrides, "configuration")


def _merged(values: dict[str, Any], overrides: Sequence[str], where: str) -> Config:
    for item in overrides:
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
        values = _merge(values, nested, f"override {item!r}")
    try:
        return Config.model_validate(_tuples(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(where, e) for e in error.errors())) from None


def _is_text(sections: Sequence[str], name: str) -> bool:
    """Whether a key's values are text alone; False for a key that there is not."""
    model: Any = Config
    for section in sections:
        model = model.model_fields[section].annotation if section in model.model_fields else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return False
    kind = model.model_fields[name].annotation if name in model.model_fields else None
    return kind is str or (get_origin(kind) is Literal and all(isinstance(value, str) for value in get_args(kind)))


def _tuples(value: Any) -> Any:
    """YAML's lists as the tuples that a frozen configuration has."""
    if isinstance(value, dict):
        return {key: _tuples(part) for key, part in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _explain(path: str | Path, error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: Any = Config
        for part in error["loc"][:-1]:
            section = section.model_fields[part].annotation
        return f"{path}: unknown key {key!r}; known here: {', '.join(sorted(section.model_fields))}"
    if error["type"] == "missing":
        return f"{path}: key {key!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "bool_type":
        message += ": true or false"
    return f"{path}: {key + ': ' if key else ''}{message}" + (f" (got {error['input']!r})" if key else "")


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML that load_config reads back to an equal one."""
    path.write_text(dump_yaml(config.model_dump(mode="json")), encoding="utf-8")
