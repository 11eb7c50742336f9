"""Train on a SLURM cluster: python slurm/submit.py CONFIG [key=value ...] --nodes 4 --gpus-per-node 8 --engine zero2

One rank a GPU (with --gpus-per-node 0 one CPU rank a node, or --ranks-per-node). The package and the configuration are
copied into output_dir/job and run from there. The job checkpoints and comes back by itself after preemption, time
limits, lost nodes and failures; submitting again into the same output_dir goes on from its newest checkpoint. What your
cluster needs (partition, account, modules, network) goes into a profile: slurm/profiles/example.yaml.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lzn_dist.cluster.profile import ProfileError, load_profile
from lzn_dist.cluster.submission import (
    Request,
    SubmissionError,
    check,
    make_job,
    parse_minutes,
    script,
    submit,
)
from lzn_dist.config import ConfigError
from lzn_dist.networks import trust
from lzn_dist.terminal import TRUST, command


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, or 2 for what the user can mend, said in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, for example configs/imagenet_representation.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of its keys")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="default: 0, ranks on CPUs")
    parser.add_argument("--ranks-per-node", type=int, metavar="N", help="default: one a GPU, or one")
    parser.add_argument("--engine", default="ddp", help="a launch configuration: ddp, zero1 … fsdp (default: ddp)")
    parser.add_argument("--time", default="24h", help="time limit of one start of the job: 90m, 24h, 2d (default: 24h)")
    parser.add_argument("--profile", metavar="NAME", help="of slurm/profiles/, or a file (default: SLURM's defaults)")
    parser.add_argument("--preflight", action="store_true", help="check nodes and network before training")
    parser.add_argument("--verify", action="store_true", help="compare gradients with one process before training")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help=TRUST)
    parser.add_argument("--local", action="store_true", help="run on this machine, without SLURM")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script, submit nothing")
    given = parser.parse_intermixed_args(arguments)
    trust(given.trust)
    try:
        request = Request(
            given.config, tuple(given.overrides), given.nodes, given.gpus_per_node,
            given.ranks_per_node or given.gpus_per_node or 1, given.engine, parse_minutes(given.time),
            load_profile(given.profile), given.preflight, given.verify, given.local,
            tuple(given.trust),
        )  # fmt: skip
        config = check(request)
        if given.dry_run:
            job = make_job(request, config, "DATE-TIME")
            print(script(request, job))
            print(f"# each of the {job.ranks} ranks runs: {' then '.join(job.phases)} with engine {job.engine}")
            print(f"# python -m lzn_dist.train {job.config}")
            return 0
        job = submit(request, config, sys.argv if arguments is None else ["slurm/submit.py", *arguments])
    except (ConfigError, ProfileError, SubmissionError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run = Path(job.run)
    here = run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
    print(f"job {job.id}: {job.ranks} ranks on {job.nodes} node(s), engine {job.engine}")
    print(f"run:   {here}")
    print(f"watch: python slurm/status.py {here} --watch")
    print(f"logs:  {job.logs}/{job.id}_0_log.err")
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
