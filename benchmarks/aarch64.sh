#!/usr/bin/env bash
# The same bundle trains 20 steps on this x86-64 machine and under an emulated 64-bit Arm userland; are the results the
# same? docs/aarch64.md. Everything it makes is in one folder; nothing is installed and root is not needed.
#
#     PYTHON=python3.11 benchmarks/aarch64.sh out/aarch64
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-out/aarch64}
PYTHON=${PYTHON:-python3}
CONSTRAINTS=${CONSTRAINTS:-constraints/newest.txt}
LIBRARIES=(numpy onnxruntime click rich)

fail() {
    echo "aarch64: $*" >&2
    exit 2
}

check_prerequisites() {
    local missing=()
    [[ $(uname -m) == x86_64 ]] || fail "this is $(uname -m): the comparison is with x86-64"
    type apt-get dpkg-deb > /dev/null 2>&1 || fail "the arm64 root is made of Debian's packages: apt-get and dpkg-deb"
    QEMU=$(command -v qemu-aarch64-static || command -v qemu-aarch64) || missing+=(qemu-user-static)
    command -v "$PYTHON" > /dev/null || missing+=(python3)
    "$PYTHON" -m pip --version > /dev/null 2>&1 || missing+=(python3-pip)
    ((${#missing[@]} == 0)) || fail "to begin, as root:  apt-get install --no-install-recommends ${missing[*]}"
}

# Python for arm64 with all it depends on, from the package sources of this machine but with lists and a status of its
# own: unpacked, not installed: installing would run programs of it.
make_root() {
    [[ -e $ROOT/ready ]] && return
    echo "arm64 root: Debian's python3 and what it needs"
    local apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o APT::Sandbox::User=root
        -o Dir::State="$OUT/apt" -o Dir::State::status="$OUT/apt/status" -o Dir::Cache="$OUT/apt" -o Debug::NoLocking=1)
    rm -rf "$ROOT" "$OUT/apt"
    mkdir -p "$OUT/apt/lists/partial" "$OUT/apt/archives/partial" "$ROOT/usr/bin" "$ROOT/usr/lib" "$ROOT/usr/sbin"
    touch "$OUT/apt/status"
    ln -s usr/bin usr/lib usr/sbin "$ROOT"
    "${apt[@]}" update
    "${apt[@]}" install --download-only --yes --no-install-recommends python3 libstdc++6 > /dev/null
    for package in "$OUT"/apt/archives/*.deb; do
        dpkg-deb --extract "$package" "$ROOT"
    done
    describe_processor
    touch "$ROOT/ready"
}

# The emulator looks for files below the root first. ONNX Runtime reads these to learn which processor it is on, and
# dies of the x86-64 ones: a Cortex-A72, as QEMU_CPU below.
describe_processor() {
    mkdir -p "$ROOT/proc" "$ROOT/sys/devices/system/cpu"
    for core in 0 1; do
        printf '%s\t: %s\n' processor "$core" BogoMIPS 108.00 Features "fp asimd evtstrm crc32 cpuid" \
            "CPU implementer" 0x41 "CPU architecture" 8 "CPU variant" 0x0 "CPU part" 0xd08 "CPU revision" 3
        echo
    done > "$ROOT/proc/cpuinfo"
    echo 0-1 > "$ROOT/sys/devices/system/cpu/possible"
    echo 0-1 > "$ROOT/sys/devices/system/cpu/present"
}

# The libraries, of the same versions, for a machine and a version of Python, from wheels.
install_libraries() {
    local machine=$1 python=$2 folder=$OUT/libraries/$1 wanted platforms=() glibc
    wanted=$(echo "$python" && cat "$CONSTRAINTS")
    [[ -e $folder/ready && $(cat "$folder/ready") == "$wanted" ]] && return
    echo "$machine libraries: ${LIBRARIES[*]} for Python $python"
    for glibc in manylinux2014 manylinux_2_27 manylinux_2_28; do
        platforms+=(--platform "${glibc}_$machine")
    done
    rm -rf "$folder"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --target "$folder" --only-binary=:all: \
        --implementation cp --python-version "$python" "${platforms[@]}" \
        --constraint "$CONSTRAINTS" "${LIBRARIES[@]}"
    echo "$wanted" > "$folder/ready"
}

python_on() {
    local machine=$1 command=("$PYTHON")
    shift
    [[ $machine == x86_64 ]] || command=("$QEMU" "$ROOT/usr/bin/python3")
    PYTHONPATH=$OUT/libraries/$machine:$PWD PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1 \
        QEMU_LD_PREFIX=$ROOT QEMU_CPU=${QEMU_CPU:-cortex-a72} "${command[@]}" "$@"
}

# What is compared, all of it made on the machine itself: `doctor`, 20 steps, and a run of 20 steps by the commands.
train_on() {
    local machine=$1 out=$OUT/$1
    echo "training on $machine"
    rm -rf "$out"
    mkdir "$out"
    python_on "$machine" -m edgelocal doctor --json > "$out/doctor.json"
    python_on "$machine" benchmarks/aarch64.py steps "$out"
    python_on "$machine" -m edgelocal train device_tests/device/golden/residual --data "$out/data.npz" \
        --out "$out/run" --epochs 1 --lr 0.02 --lr-schedule constant --threads 2 --json \
        > "$out/train.json" 2> "$out/train.log" || { cat "$out/train.log" >&2; return 1; }
    python_on "$machine" -m edgelocal finish "$out/run" --out "$out/model" --json > "$out/finish.json"
}

check_prerequisites
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
ROOT=$OUT/root
version='import sys; print("%d.%d" % sys.version_info[:2])'
make_root
install_libraries x86_64 "$("$PYTHON" -c "$version")"
install_libraries aarch64 "$(python_on aarch64 -c "$version")"
train_on x86_64
train_on aarch64
python_on x86_64 benchmarks/aarch64.py compare "$OUT/x86_64" "$OUT/aarch64"
