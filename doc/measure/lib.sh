# shellcheck shell=bash
# What the scripts in this folder share. Each measures what a chapter shows, and prints its table:
#
#     ./bench.sh measure NAME            measures, as the chapter shows it
#     ./bench.sh measure --check [NAME]  in short: does it still measure what it says?
#
# A script begins with:   . "${BASH_SOURCE%/*}/lib.sh"
# $short is 1 in a check: then it takes few rounds, and calls check with what must hold of
# the figures. They must not depend on how fast the machine is.
set -euo pipefail
export LC_ALL=C
cd "${BASH_SOURCE%/*}/../.."
short=${SHORT:-0}
optimise=-O3
if ((short)); then optimise=-O1; fi # it compiles faster
export CFLAGS="$optimise -g"
T=$(mktemp -d)
servers=()

cleanup() {
    if ((${#servers[@]})); then kill -KILL "${servers[@]}" 2>/dev/null || true; wait; fi
    rm -rf "$T"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

# Starts a server on a free port, which it sets as $port; its process is $!.
start() { # BINARY OPTION...
    local line='listening on .*:([0-9]+)' end=$((SECONDS + 30)) log=$T/log.${#servers[@]}
    : >"$log"
    "$@" -p 0 2>"$log" &
    servers+=($!)
    until [[ $(<"$log") =~ $line ]]; do
        if ! kill -0 "${servers[-1]}" || ((SECONDS > end)); then cat "$log" >&2 && exit 1; fi
        sleep 0.01
    done
    # shellcheck disable=SC2034 # the scripts use it
    port=${BASH_REMATCH[1]}
}

stop() { # the server that was started last
    kill "${servers[-1]}"
    wait "${servers[-1]}" || true
    unset 'servers[-1]'
}

# Builds kv.c with a patch of doc/alternatives as $T/NAME.
build_patched() { # NAME
    mkdir "$T/$1.d"
    cp kv.c Makefile "$T/$1.d"
    patch -s -F 0 -p 1 -d "$T/$1.d" <"doc/alternatives/$1.patch"
    make -s -C "$T/$1.d" kv
    cp "$T/$1.d/kv" "$T/$1"
}

# Builds doc/measure/NAME.c, which includes kv.c, as $T/NAME.
build_with_kv() { # NAME
    cc -std=c11 -D_GNU_SOURCE "$optimise" -w -I. -o "$T/$1" "doc/measure/$1.c" -pthread
}

# In a check, ends with an error unless a condition of bash's (( )) holds.
check() { # CONDITION WHAT
    ((!short)) || (($1)) || { echo "${0##*/}: not so: $2 ($1)" >&2; exit 1; }
}
