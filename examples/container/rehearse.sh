#!/usr/bin/env bash
# rehearse.sh MODEL: what the Containerfile does, on this machine without a container engine.
#
# Prewarms a pack, then runs app.py in a mount namespace in which every file system is read-only, as
# a user that does not exist, with no home and nothing else in its environment. Directories that
# only their owner may enter (/root, say) are covered there by empty ones, in which no more than
# Python and the model are, as in an image. Needs root, for the namespace. The last line that it
# prints says how many kernels were emitted: 0.
#
# Tested by tests/python/test_container.py; perf/results/container-rehearsal.md is a run of it.
set -euo pipefail

model=$(realpath "$1")
here=$(realpath "$(dirname "$0")")
tilewright=$(command -v tilewright)
python=$(dirname "$tilewright")/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
mkdir "$work/mounts"
unreadable=$(find -L "$model" \( ! -perm -o=r -o -type d ! -perm -o=x \) -print -quit)
if [[ -n $unreadable ]]; then
  echo "rehearse.sh: others may not read $unreadable; chmod a+rX it" >&2
  exit 1
fi

TILEWRIGHT_CACHE=off "$tilewright" prewarm "$model" --pack "$work/kernels.pack" >&2

mapfile -t needed < <("$python" -c 'import sys; print(sys.base_prefix, sys.prefix, sep="\n")')
needed+=("$model" "$here")

# The mounts of the namespace are its own: they end with it, and nobody else sees them.
unshare --mount --propagation private bash -c '
  set -euo pipefail
  mounts=$1 count=$2
  needed=("${@:3:count}")
  shift $((2 + count))
  # The outermost directory above a path that others may not enter, if there is one.
  private_part() {
    local part= name names
    IFS=/ read -ra names <<< "${1#/}"
    for name in "${names[@]}"; do
      part+=/$name
      [[ -e $part ]] || return 0  # covered already
      if (( (8#$(stat -Lc %a "$part") & 1) == 0 )); then printf "%s\n" "$part"; return; fi
    done
  }
  for i in "${!needed[@]}"; do
    mkdir "$mounts/$i"
    mount --bind "${needed[i]}" "$mounts/$i"
  done
  for path in "${needed[@]}"; do
    part=$(private_part "$path")
    [[ -z $part ]] || mount -t tmpfs -o mode=755 tmpfs "$part"
  done
  for i in "${!needed[@]}"; do
    [[ -e ${needed[i]} ]] || mkdir -p "${needed[i]}"
    mountpoint -q "${needed[i]}" || mount --bind "$mounts/$i" "${needed[i]}"
  done
  while read -r _ _ _ _ point _; do
    case $point in
      /proc* | /sys* | /dev*) ;;
      *) mount -o remount,bind,ro "$(printf %b "$point")" ;;
    esac
  done < /proc/self/mountinfo
  exec setpriv --reuid 12345 --regid 12345 --clear-groups --no-new-privs \
    env --ignore-environment "$@"
' rehearse "$work/mounts" "${#needed[@]}" "${needed[@]}" \
  PATH="$PATH" \
  TORCHINDUCTOR_CACHE_DIR=/tmp TILEWRIGHT_CACHE=off TILEWRIGHT_CACHE_PACK="$work/kernels.pack" \
  "$python" -m tilewright.cli run -- "$python" "$here/app.py" "$model"
