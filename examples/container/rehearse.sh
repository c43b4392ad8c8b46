#!/usr/bin/env bash
# rehearse.sh MODEL: what the Containerfile does, on this machine without a container engine.
#
# Prewarms a pack, then runs app.py in a mount namespace in which every file system is read-only, as
# a user that does not exist, with no home and nothing else in its environment. Needs root, for the
# namespace. The last line that it prints says how many kernels were emitted: 0.
#
# Tested by tests/python/test_container.py.
set -euo pipefail

model=$(realpath "$1")
here=$(realpath "$(dirname "$0")")
tilewright=$(command -v tilewright)
python=$(dirname "$tilewright")/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"

TILEWRIGHT_CACHE=off "$tilewright" prewarm "$model" --pack "$work/kernels.pack" >&2

# The mounts of the namespace are its own: they end with it, and nobody else sees them.
unshare --mount --propagation private bash -c '
  set -euo pipefail
  while read -r _ _ _ _ point _; do
    case $point in
      /proc* | /sys* | /dev*) ;;
      *) mount -o remount,bind,ro "$(printf %b "$point")" ;;
    esac
  done < /proc/self/mountinfo
  exec setpriv --reuid 12345 --regid 12345 --clear-groups --no-new-privs \
    env --ignore-environment "$@"
' rehearse \
  PATH="$PATH" \
  TILEWRIGHT_CACHE=off TILEWRIGHT_CACHE_PACK="$work/kernels.pack" \
  "$python" -m tilewright.cli run -- "$python" "$here/app.py" "$model"
