# shellcheck shell=bash
# Shell functions that launch/quickstart and launch/test share. Source it; it changes to the root of the repository.

set -euo pipefail
export LC_ALL=C.UTF-8

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export ROOT=$PWD
JOBS=${SALA_JOBS:-$(nproc)}

if [ -t 1 ] && [ -z "${CI:-}" ]; then BOLD=$'\e[1m' RED=$'\e[31m' PLAIN=$'\e[0m'; else BOLD='' RED='' PLAIN=''; fi

# One line that says what comes next.
say() { printf '%s==>%s %s\n' "$BOLD" "$PLAIN" "$*"; }

# One line that says what went wrong and what to do, then the end.
fail() {
  printf '%serror:%s %s\n' "$RED" "$PLAIN" "$*" >&2
  exit 1
}

# 75 -> "1 min 15 s"
duration() {
  if [ "$1" -lt 60 ]; then echo "$1 s"; else echo "$(($1 / 60)) min $(($1 % 60)) s"; fi
}

# Runs a command quietly: its output goes to a file, of which the end is shown when the command fails.
quietly() {
  local log=$1
  shift
  mkdir -p "$(dirname "$log")"
  if ! "$@" >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    fail "'$*' failed; its whole output is in $log"
  fi
}

# The files of the project with these suffixes, one a line; works without git, and as root in another user's clone.
project_files() {
  local patterns=() suffix
  for suffix in "$@"; do patterns+=("*.$suffix"); done
  git -c 'safe.directory=*' ls-files --cached --others --exclude-standard -- "${patterns[@]}" 2>/dev/null |
    while read -r file; do if [ -e "$file" ]; then echo "$file"; fi; done | grep . && return
  for suffix in "$@"; do find . -name "*.$suffix" -not -path './build/*' -printf '%P\n'; done | sort
}

# ---- packages ----

# Those of the named sets of launch/packages.txt that are not installed.
missing_packages() {
  local wanted installed
  wanted=$(awk -v sets=" $* " '/^[a-z]/ && index(sets, " " $1 " ") { print $2 }' launch/packages.txt)
  # shellcheck disable=SC2086 # one word per package
  installed=$(dpkg-query -W -f='${Package} ${db:Status-Status}\n' $wanted 2>/dev/null | awk '$2 == "installed" { print $1 }')
  comm -23 <(sort -u <<<"$wanted") <(sort -u <<<"$installed") | xargs
}

# Installs what is missing of the named sets. Needs neither root nor network when nothing is.
install_packages() {
  if [ -n "${SALA_SKIP_PACKAGES:-}" ]; then
    say "packages: not looked at (SALA_SKIP_PACKAGES is set)"
    return
  fi
  if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    fail "this is not a Debian or Ubuntu system: install the packages of launch/packages.txt by other means, then run" \
      "this again with SALA_SKIP_PACKAGES=1"
  fi
  local missing as_root=()
  missing=$(missing_packages "$@")
  if [ -z "$missing" ]; then
    say "packages: all installed"
    return
  fi
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null ||
      fail "packages are missing and there is neither root nor sudo; ask for: apt-get install $missing"
    as_root=(sudo)
    if [ ! -t 0 ]; then as_root+=(-n); fi # nobody can type a password
  fi
  say "packages: installing $missing"
  quietly build/logs/apt-update.log "${as_root[@]}" apt-get update
  # shellcheck disable=SC2086 # one word per package
  quietly build/logs/apt-install.log "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends $missing
  missing=$(missing_packages "$@")
  if [ -n "$missing" ]; then fail "apt-get ended without error, yet these packages are not installed: $missing"; fi
}

# ---- Python packages ----

make_oracle_python() {
  rm -rf "$1" &&
    python3 -c 'import sys
if sys.version_info < (3, 11):
    sys.exit(f"python3 is {sys.version.split()[0]}, the packages of tests/oracle/requirements.txt need 3.11 or later")' &&
    python3 -m venv "$1" &&
    "$1/bin/pip" --no-cache-dir install "$(grep -o '^uv==[^ ]*' tests/oracle/requirements.txt)" &&
    UV_CACHE_DIR=$PWD/build/uv-cache "$1/bin/uv" pip install --python "$1/bin/python" -r tests/oracle/requirements.txt &&
    rm -rf build/uv-cache # the files stay: they are linked, not copied
}

# Makes build/oracle-python, a Python with the packages of tests/oracle/requirements.txt (7 GB), unless it is there. Where that fails
# (no network, an old Python) prints one line that says why and returns 1. Writes nothing outside build/.
oracle_python() {
  local folder=build/oracle-python log=build/logs/oracle-python.log key
  key=$(sha256sum <tests/oracle/requirements.txt)
  if [ "$(cat "$folder/stamp" 2>/dev/null)" = "$key" ]; then return; fi
  mkdir -p build/logs
  if ! make_oracle_python "$folder" >"$log" 2>&1; then
    echo "$(grep . "$log" | tail -n 1) ($log)"
    return 1
  fi
  echo "$key" >"$folder/stamp"
}

# ---- environment ----

# Open MPI on a machine with fewer cores than ranks, in a container, as root; compute threads are ours, so no OpenMP team.
# Settings that the user made stay.
mpi_environment() {
  export OMPI_ALLOW_RUN_AS_ROOT=${OMPI_ALLOW_RUN_AS_ROOT:-1}
  export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=${OMPI_ALLOW_RUN_AS_ROOT_CONFIRM:-1}
  export OMPI_MCA_rmaps_base_oversubscribe=${OMPI_MCA_rmaps_base_oversubscribe:-1}
  export OMPI_MCA_hwloc_base_binding_policy=${OMPI_MCA_hwloc_base_binding_policy:-none}
  export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle:-1}
  export OMPI_MCA_pml=${OMPI_MCA_pml:-ob1}
  export OMPI_MCA_btl=${OMPI_MCA_btl:-self,vader,tcp}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}
  export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
}

# ---- build ----

# configure_build PRESET FOLDER [-D...]: writes build/FOLDER.
configure_build() {
  local preset=$1 folder=build/$2
  shift 2
  say "build: configuring $folder (preset $preset)"
  quietly "build/logs/configure-$(basename "$folder").log" cmake --preset "$preset" -B "$folder" "$@"
}

# build_targets FOLDER [TARGETS]: in build/FOLDER; everything when none is named.
build_targets() {
  local folder=build/$1
  shift
  say "build: $folder: ${*:-everything}, $JOBS jobs"
  if [ -t 1 ] && [ -z "${CI:-}" ]; then
    ninja -C "$folder" -j "$JOBS" "$@" || fail "the build in $folder failed"
  else
    quietly "build/logs/build-$(basename "$folder").log" ninja -C "$folder" -j "$JOBS" "$@"
  fi
}
