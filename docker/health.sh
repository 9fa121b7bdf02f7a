#!/usr/bin/env bash
# Is this container well? With COCOA_RUN_DIR: does that run make progress (0), or is it stalled,
# given up or not readable (1)? Without: does the launcher start? About half a second; no torch.
set -uo pipefail

if [[ -z ${COCOA_RUN_DIR:-} ]]; then
    exec python -c 'import cocoa_dist.config, launcher.status'
fi
found=$(python -m launcher status "$COCOA_RUN_DIR" --json) || exit 1
state=$(python -c 'import json, sys; print(json.load(sys.stdin)["state"])' <<<"$found") || exit 1
printf '%s\n' "$state"
[[ $state != stalled && $state != given_up ]]
