#!/usr/bin/env bash
# From nothing to trained and evaluated models on this machine's CPU, in minutes: installs into .venv, writes the
# handwritten digits as WebDataset shards, trains the joint and the representation task side by side (networks this
# small keep one core busy, not two), evaluates both.
. "$(dirname "$0")/setup.sh" ""
export WANDB_MODE=offline
out=runs/quickstart
log="$out/representation.log"
python data_prep/digits.py --output data/digits
train() { # TASK [key=value ...]
    accelerate launch --quiet --config_file launch/cpu.yaml lzn_dist/train.py "configs/digits_$1.yaml" \
        "output_dir=$out/$1" checkpoint_every=1000 cpu_threads=1 "${@:2}"
    python -m lzn_dist.evaluate "$out/$1"
}
mkdir -p "$out"
set -m # a process group of its own, so that whatever ends this script ends all of it
train representation > "$log" 2>&1 &
beside=$!
set +m
trap 'kill -- "-$beside" 2> /dev/null || true' EXIT
echo "the representation task trains beside the joint one; what it says is in $log"
train joint max_steps=500 # fewer than the configuration's, for minutes
echo "waiting for the representation task"
wait "$beside" || { cat "$log"; exit 1; }
sed -n "\\|^$out/representation · |,\$p" "$log"
python launch/summary.py "$out"
