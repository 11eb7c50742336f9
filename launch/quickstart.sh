#!/usr/bin/env bash
# From nothing to trained and evaluated models on this machine's CPU, in minutes: installs into .venv, writes the
# handwritten digits as WebDataset shards, trains the joint and the representation task, evaluates both.
. "$(dirname "$0")/setup.sh" ""
export WANDB_MODE=offline
out=runs/quickstart
python data_prep/digits.py --output data/digits
for task in joint representation; do
    accelerate launch --config_file launch/cpu.yaml lzn_dist/train.py "configs/digits_$task.yaml" \
        "output_dir=$out/$task" "checkpoint_every=1000"
    python -m lzn_dist.evaluate "$out/$task"
done
python launch/summary.py "$out"
