#!/usr/bin/env bash
# The paper's chain, from shards to editing, as jobs that wait for each other; run it on the login node, from the root:
#   launch/slurm/pipeline.sh [NODES]
# A job that fails stops what depends on it; after the repair run it again: finished steps end at once.
set -euo pipefail
nodes=${1:-4}
previous=

submit() { # NODES LAUNCHER_SCRIPT CONFIG
    local arguments=(--parsable --nodes "$1" --job-name "rpiae-$(basename "$3" .yaml)")
    if [ -n "$previous" ]; then
        arguments+=(--dependency "afterok:$previous" --kill-on-invalid-dep=yes)
    fi
    previous=$(sbatch "${arguments[@]}" launch/slurm/train.sbatch "launch/$2" --config "configs/$3")
    echo "$previous $3"
}

submit "$nodes" train_tokenizer.py tokenizer/pivot.yaml
submit "$nodes" train_tokenizer.py tokenizer/bridge.yaml
submit "$nodes" train_tokenizer.py tokenizer/decoder.yaml
submit "$nodes" encode_latents.py latents/cc12m.yaml
submit "$nodes" encode_latents.py latents/omniedit.yaml
submit "$nodes" train_t2i.py generator/t2i_cc12m.yaml
submit "$nodes" train_edit.py generator/edit_omniedit.yaml
