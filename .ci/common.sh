# What .ci/run and .ci/long share. Source it from the root of the repository.
set -euo pipefail
export PYTHONWARNINGS=  # the suite sets its own
unset PYTHONDONTWRITEBYTECODE # commands by the hundred would compile every module anew
export HF_HUB_OFFLINE=1 # nothing is fetched but packages
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Test processes and commands compile many equal programs; those of another JAX or other flags are kept apart.
export JAX_COMPILATION_CACHE_DIR=$work/programs
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
export OMP_NUM_THREADS=1 # two processes run at a time; threads of more would wait for each other
export PIP_COMPILE=0     # most of what is installed is never imported, and the rest is compiled when it is

data=
if [ -d ../shared/data ]; then
    data=$(cd ../shared/data && pwd)
    export COREINFER_DATA=$data
elif [ -n "${CI:-}" ]; then
    echo "../shared/data is missing: the tests that need it would be skipped"
    exit 1
fi

say() { printf '\n== %s (%s s)\n' "$*" "$SECONDS"; }

# What needs one processor runs beside other things: `beside` begins it, `meet` waits for it and shows what it said.
declare -A beside=()
beside() { # name, command...
    set -m # in a process group of its own, so that all of it can be ended
    "${@:2}" >"$work/$1.log" 2>&1 &
    beside[$1]=$!
    set +m
}
end_beside() { # where something failed: what still runs is ended, and what it said is shown
    local name
    for name in "${!beside[@]}"; do
        kill -- "-${beside[$name]}" 2>/dev/null || true
        wait "${beside[$name]}" 2>/dev/null || true
        cat "$work/$name.log"
    done
}
meet() { # name
    local status=0
    wait "${beside[$1]}" || status=$?
    unset "beside[$1]"
    cat "$work/$1.log"
    return $status
}

# A skipped test is a failure where what it needs is there.
check_skips() { # log, reason that is allowed
    local skips
    skips=$(grep -E '^SKIPPED' "$1" | grep -vE "$2" || true)
    [ -z "$data" ] || [ -z "$skips" ] || { printf 'tests skipped:\n%s\n' "$skips"; exit 1; }
}

compile_for_absent_devices() { # python, which tests
    XLA_FLAGS= "$1" -m pytest -n 2 -m "$2" tests/test_compiled.py 2>&1 | tee "$work/compiled.log"
    ! grep -E '^SKIPPED' "$work/compiled.log"
}

find_python312() { # on the PATH, or among pyenv's versions, whose python3.12 answers only where it is selected
    local candidate
    for candidate in "$(command -v python3.12)" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do
        "$candidate" -c 'import sys; print(sys.executable)' 2>/dev/null && return
    done
    return 1
}

# Sets python312, to nothing where there is none and CI does not ask for one.
need_python312() {
    python312=$(find_python312) || [ -z "${CI:-}" ] || { echo "no Python 3.12 to try"; exit 1; }
}
