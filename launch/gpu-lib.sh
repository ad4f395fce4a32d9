# shellcheck shell=bash
# Shell functions that launch/gpu-test and launch/gpu-bench share; source it behind launch/lib.sh.

CARRY=build/carry # made by launch/gpu-carry on another machine; may be absent

# Refuses at once where there is no GPU.
need_gpu() {
  command -v nvidia-smi >/dev/null ||
    fail "there is no GPU on this machine (no nvidia-smi). This needs one; --rehearse runs it on the emulator instead"
  local listed
  listed=$(nvidia-smi -L 2>&1 || true)
  grep -q '^GPU 0' <<<"$listed" ||
    fail "there is no usable GPU on this machine: nvidia-smi -L says '${listed:0:200}'. --rehearse runs this on the emulator"
  say "GPU: $(head -n 1 <<<"$listed")"
}

gpu_query() { nvidia-smi --query-gpu="$1" --format=csv,noheader --id=0 2>/dev/null | head -n 1; }

# "9.0" -> "90a-real": Hopper's own instructions need the a.
gpu_architecture() {
  local capability
  capability=$(gpu_query compute_cap)
  [[ $capability =~ ^[0-9]+\.[0-9]+$ ]] || fail "nvidia-smi does not tell the compute capability (found '$capability')"
  capability=${capability/./}
  if [ "$capability" = 90 ]; then echo 90a-real; else echo "$capability-real"; fi
}

# Where NCCL and cuBLASLt come with Python packages instead of the toolkit: -D options that name them.
library_hints() {
  python3 - <<'PYTHON' 2>/dev/null || true
import glob, importlib.util, os
spec = importlib.util.find_spec("nvidia")
for root in spec.submodule_search_locations if spec else []:
    def first(*patterns):
        found = [f for p in patterns for f in sorted(glob.glob(os.path.join(root, "*", p)))]
        return found[0] if found else None
    for option, path in (("SALA_NCCL_LIBRARY", first("lib/libnccl.so*")), ("SALA_CUBLASLT_LIBRARY", first("lib/libcublasLt.so*"))):
        if path: print(f"-D{option}={path}")
    for option, path in (("SALA_NCCL_INCLUDE", first("include/nccl.h")), ("SALA_CUBLASLT_INCLUDE", first("include/cublasLt.h"))):
        if path: print(f"-D{option}={os.path.dirname(path)}")
PYTHON
}

toolkit_has() { [ -n "$(find -L /usr/local/cuda /usr/lib/x86_64-linux-gnu /usr/include /usr/local/include -maxdepth 5 -name "$1" -print -quit 2>/dev/null)" ]; }

# Configures build/gpu for the GPU of this machine and builds the targets. With a carried folder: from its packages, without MPI.
build_for_gpu() {
  local options=("-DSALA_CUDA=ON" "-DSALA_CUDA_ARCHITECTURES=$(gpu_architecture)") hint hints
  if [ -d $CARRY ]; then
    say "build: with the packages of $CARRY ($(cat $CARRY/COMMIT))"
    options+=("-DSALA_GPU_SUITE=ON" "-DSALA_CARRY=$CARRY")
  elif [ -n "$(missing_packages build test)" ]; then
    fail "packages are missing here ($(missing_packages build test)). Install them, or run launch/gpu-carry on a machine that" \
      "has them and bring its folder $CARRY along"
  fi
  # Other compilers warn of other things; what they build here is tested, not shipped.
  case $(g++ -dumpversion 2>/dev/null) in 12*) ;; *) options+=("-DSALA_WERROR=OFF") ;; esac
  if ! command -v nvcc >/dev/null && [ -x /usr/local/cuda/bin/nvcc ]; then export PATH=$PATH:/usr/local/cuda/bin; fi
  command -v nvcc >/dev/null || fail "there is no nvcc on this machine: the CUDA module cannot be built"
  hints=$(library_hints)
  for hint in $hints; do
    case $hint in
      *NCCL*) toolkit_has nccl.h && toolkit_has 'libnccl.so' || options+=("$hint") ;;
      *CUBLASLT*) toolkit_has cublasLt.h && toolkit_has 'libcublasLt.so' || options+=("$hint") ;;
    esac
  done
  configure_build release gpu "${options[@]}"
  build_targets gpu "$@"
}

# The rehearsal's build: the release tree and the emulated module.
build_for_rehearsal() {
  if [ ! -e build/release/build.ninja ]; then configure_build release release; fi
  build_targets release sala_cuda_emulated "$@"
}

# describe_machine: lines "name<TAB>value" for the head of a report.
describe_machine() {
  printf 'processor\t%s, %s logical CPUs\n' "$(sed -n 's/^model name\s*: //p' /proc/cpuinfo | head -n 1)" "$(nproc)"
  if [ -n "${REHEARSE:-}" ]; then
    printf 'GPU\tnone: a rehearsal on the emulator\n'
  else
    printf 'GPU\t%s\n' "$(gpu_query name)"
    printf 'driver\t%s\n' "$(gpu_query driver_version)"
    printf 'GPU memory\t%s\n' "$(gpu_query memory.total)"
    printf 'power limit\t%s\n' "$(gpu_query power.limit)"
    printf 'clocks now (SM, memory)\t%s, %s of at most %s, %s\n' "$(gpu_query clocks.sm)" "$(gpu_query clocks.mem)" \
      "$(gpu_query clocks.max.sm)" "$(gpu_query clocks.max.mem)"
    printf 'nvcc\t%s\n' "$(nvcc --version | sed -n 's/.*release //p')"
  fi
  printf 'commit\t%s\n' "$(git -c 'safe.directory=*' describe --always --dirty --abbrev=12 2>/dev/null || cat $CARRY/COMMIT 2>/dev/null || echo unknown)"
}
