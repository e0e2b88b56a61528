#!/usr/bin/env bash
# The runner of a bundle, with these arguments: by itself, or as one of the tests of the program `whole`,
# which takes them, one a line, from RUNNER. PROGRAMS names the folder of the programs.
programs=${PROGRAMS:-/tmp/prism-gpu/bin}
[ -e "$programs/runner" ] && exec "$programs/runner" "$@"
RUNNER=$(printf '%s\n' "$@")
export RUNNER
exec "$programs/whole" --exact runner --ignored --nocapture --quiet
