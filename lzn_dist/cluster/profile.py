"""A cluster's profile: what its users would otherwise repeat at every submission."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    ValidationError,
)

from lzn_dist.paths import expand_path
from lzn_dist.shipped import shipped
from lzn_dist.yaml_core import read_yaml

FOLDER = shipped("slurm") / "profiles"


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the key and what to do."""


def _one_line(value: Any) -> Any:
    """What follows a line break would be a line of its own in the batch script: a command."""
    if isinstance(value, str) and not value.isprintable():
        raise ValueError("a line break or another character that cannot be seen: shell lines belong into setup")
    return value


Line = Annotated[str, AfterValidator(_one_line)]
Flag = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]*$")]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Profile(BaseModel):
    """Everything has a default: SLURM's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    partition: Line | None = Field(None, description="Partition of the job.")
    account: Line | None = Field(None, description="Account that the job is charged to.")
    qos: Line | None = Field(None, description="Quality of service.")
    constraint: Line | None = Field(None, description="Features that nodes must have, for example a100&nvlink.")
    exclude: Line | None = Field(None, description="Nodes to keep away from.")
    cpus_per_rank: PositiveInt | None = Field(None, description="CPU cores of each rank (of each GPU).")
    memory_gb: PositiveFloat | None = Field(None, description="Memory of a node in GB.")
    setup: tuple[str, ...] = Field((), description="Shell lines before the job: modules, a virtual environment.")
    python: Line | None = Field(None, description="Python to run; default: the one that submits.")
    container: Line | None = Field(None, description="Image for srun --container-image (pyxis).")
    srun: tuple[Line, ...] = Field((), description="More arguments of srun.")
    environment: dict[Variable, str] = Field(
        {}, description="Variables of the job: NCCL_SOCKET_IFNAME, HF_HOME and others."
    )
    scratch: Line | None = Field(None, description="Folder on each node's own disk, for copies of remote shards.")
    requeue: bool = Field(True, description="Whether the job comes back after preemption, time limits and failures.")
    signal_seconds: NonNegativeInt = Field(120, description="Seconds before the time limit at which it checkpoints.")
    sbatch: dict[Flag, Annotated[Any, AfterValidator(_one_line)]] = Field(
        {}, description="More flags of sbatch, by name."
    )


def load_profile(name: str | None) -> Profile:
    """slurm/profiles/NAME.yaml, or the file of that path; without a name, SLURM's defaults. Raises ProfileError."""
    if name is None:
        return Profile()
    path = Path(expand_path(name)) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in FOLDER.glob("*.yaml")))
        raise ProfileError(f"no profile {path}; known: {known}. Copy slurm/profiles/example.yaml and adapt it")
    try:
        return Profile.model_validate(read_yaml(path) or {})
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ProfileError(
            f"{path}: {'; '.join(problems)}. Known keys: {', '.join(sorted(Profile.model_fields))}"
        ) from None
    except ValueError as error:
        raise ProfileError(str(error)) from error
