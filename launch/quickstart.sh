#!/usr/bin/env bash
# From nothing to trained and evaluated models on this machine's CPU, in minutes: installs into .venv, writes the
# handwritten digits as WebDataset shards, trains the joint and the representation task, evaluates both.
. "$(dirname "$0")/setup.sh" ""
export WANDB_MODE=offline
out=runs/quickstart
python data_prep/digits.py --output data/digits
train() { # TASK STEPS: fewer steps than the configuration's, for minutes
    accelerate launch --config_file launch/cpu.yaml lzn_dist/train.py "configs/digits_$1.yaml" \
        "output_dir=$out/$1" "checkpoint_every=1000" "max_steps=$2"
    python -m lzn_dist.evaluate "$out/$1"
}
train joint 500
train representation 200
python launch/summary.py "$out"
