#!/usr/bin/env bash
# The paper's students, one after the other, with its settings (recipes/paper.yaml):
#
#   examples/paper.sh trajectories.jsonl runs                       # all seven
#   examples/paper.sh trajectories.jsonl runs gpt2-120m opt-1.3b    # these
#   examples/paper.sh trajectories.jsonl runs gpt2-120m -- --max_steps 10000 --dry_run
#
# What stands behind -- goes to `sadkern train` and counts before the recipes. Run again, it goes on: a
# student that is finished is left out, one that was stopped resumes.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
recipes="$(cd "$(dirname "$0")" && pwd)/recipes"
data="$1" output="$2"
shift 2
students=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do students+=("$1"); shift; done
[ $# -eq 0 ] || shift
[ ${#students[@]} -gt 0 ] ||
  students=(gpt2-120m gpt2-340m gpt2-760m opt-1.3b opt-2.7b opt-6.7b llama-7b)
for student in "${students[@]}"; do
  folder="$output/$student"
  if [ -e "$folder/trainer_state.json" ]; then
    echo "$student is finished: $folder"
    continue
  fi
  resume=()
  ls -d "$folder"/checkpoint-* > /dev/null 2>&1 && resume=(--resume_from_checkpoint last)
  sadkern train --config "$recipes/paper.yaml" --config "$recipes/$student.yaml" \
    --dataset_name "$data" --output_dir "$folder" "${resume[@]}" "$@"
done
