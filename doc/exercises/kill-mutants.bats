#!/usr/bin/env bats
# chapter: 8
# concept: tests that find faults which you have not seen
# level: 3
# lines: 60
# minutes: 180
# task: Write tests in bats that pass with every correct kv, each time, and fail with as many as possible of ten mutants: kv with one promise broken. You have one point for each mutant that your tests catch; seven are enough.
#
#     make check EX=kill-mutants                                     a line for each mutant: caught or alive
#     HUNT=my.bats KV=./kv bats doc/exercises/kill-mutants.bats      the same with another file
#     SEED=2 HUNT=...                                                ten others, for another class
#     HUNT_TIME=60 HUNT=...                                          on a machine that is busy or slow
#
# HUNT names the file with the tests. kv.c and the mutants are built here: KV is not used. Each program is
# built with a random string in it and gets a random path, so neither its name nor a checksum tells
# which it is. Three are correct: one without optimization, one with AddressSanitizer, and one that
# differs in what kv does not promise, such as the order of KEYS and the size of its buffers.
#
# What the tests need is in doc/exercises/common.bash. They have 15 s in all, or HUNT_TIME. A mutant with which they
# do not end is caught.
#
# SC2034: common.bash uses it. SC2154: bats or common.bash sets it.
# shellcheck disable=SC2034,SC2154

KV=/bin/sh hunt_time=${HUNT_TIME:-15} # common.bash wants a program; those that are tested are built here

load common
export BATS_TEST_TIMEOUT=300

setup_file() {
    export built=$BATS_FILE_TMPDIR repo=$BATS_TEST_DIRNAME/../..
    export HUNT=${HUNT:-$repo/kv-exercise/kill-mutants.bats}
    unset MAKEFLAGS MAKELEVEL CFLAGS SANITIZER
    build_all plain asan harmless
}

build_all() { # NAME...: a few at a time
    local name
    printf '%s\n' "$@" | xargs -P "$(nproc 2>/dev/null || echo 2)" -n 1 bash -c "$(declare -f build)"$'\nbuild "$1"' - || true
    for name; do [[ -x $built/$name/kv ]] || { cat "$built/$name/log" && return 1; }; done
}

# Ten of the mutants, by one SEED for each class: 3 easy, 4 medium and 3 hard.
mutants() {
    local class patch
    for class in 'easy 3' 'medium 4' 'hard 3'; do
        for patch in "$repo"/doc/mutants/*.patch; do
            patch=${patch##*/} patch=${patch%.patch}
            grep -q "^# class: ${class% *}$" "$repo/doc/mutants/$patch.patch" || continue
            echo "$(cksum <<<"${SEED:-1} $patch") $patch"
        done | sort -n | head -n "${class#* }" | cut -d ' ' -f 3
    done
}

build() { # NAME: makes $built/NAME/kv
    local dir=$built/$1 flags=-O0 patch=''
    mkdir "$dir"
    cp "$repo/kv.c" "$repo/Makefile" "$dir"
    case $1 in
        plain) ;;
        asan) flags+=' -fsanitize=address,undefined -fno-sanitize-recover=all' ;; # make asan takes twice the time
        harmless) patch=$repo/doc/exercises/kill-mutants.harmless.patch ;;
        *) patch=$repo/doc/mutants/$1.patch ;;
    esac
    if [[ $patch ]]; then patch -s -F 0 -p 1 -d "$dir" <"$patch" || return; fi
    printf '\nconst char build_of_kv[] = "%s";\n' "$RANDOM$RANDOM$RANDOM" >>"$dir/kv.c"
    make -s -C "$dir" CFLAGS="$flags" kv >"$dir/log" 2>&1
}

# Where bats shows it also for a test that passes.
tell() { echo "# $*" >&3; } # SENTENCE

# Runs the student's tests with each program, four at a time, for they mostly wait. The n-th run
# writes to $tmp/n how many tests there are, how many are skipped and how many fail.
judge_all() { # NAME...
    local n=0 name
    [[ -e $HUNT ]] || because "there is no $HUNT: make start EX=kill-mutants makes one to begin with" || return
    for name; do
        n=$((n + 1))
        echo "$n $name"
    done | tmp=$tmp hunt_time=$hunt_time xargs -P 4 -L 1 \
        bash -c "$(declare -f hunt_with because judge)"$'\njudge "$1" "$2"' -
}

judge() { # N NAME: the program gets a path of its own, made at random
    local all=$tmp tmp
    tmp=$(mktemp -d "$all/XXXXXX")
    hunt_with "$built/$2/kv" >"$all/$1.said" 2>&1
    echo "$tests $skipped $failed" >"$all/$1"
}

@test "there are tests, and three correct servers pass them, each of five times" {
    local n
    can_be_read || because "your file has a syntax error"
    judge_all {plain,asan,harmless}{,,,,}
    for n in {1..15}; do
        read -r tests skipped failed <"$tmp/$n"
        if ((tests == 0 || skipped + failed > 0)); then cat "$tmp/$n.said"; fi
        ((tests > 0)) || because "there is no test in your file that bats can run"
        ((skipped == 0)) || because "a test that is skipped finds nothing"
        ((failed == 0)) || because "your tests fail on a correct kv"
    done
    : >"$built/passed"
}

@test "seven of ten mutants are caught" {
    local n caught=0 ten class
    if ! compgen -G "$repo/doc/mutants/*.patch" >/dev/null; then
        tell "Your teacher has the mutants. Here your tests can be tried with correct servers only."
        return
    fi
    can_be_read >"$tmp/said" || because "your file has a syntax error: see above"
    if [[ ! -e $built/passed ]]; then # the first test has failed, or was not asked for
        judge_all harmless
        read -r tests skipped failed <"$tmp/1"
        ((tests > 0 && failed == 0)) || because "your tests fail on a correct kv, so they catch nothing"
    fi
    mapfile -t ten < <(mutants)
    build_all "${ten[@]}"
    judge_all "${ten[@]}"
    for ((n = 1; n <= ${#ten[@]}; n++)); do
        class=$(sed -n 's/^# class: //p' "$repo/doc/mutants/${ten[n - 1]}.patch")
        read -r tests skipped failed <"$tmp/$n"
        if ((failed > 0)); then tell "caught  $class" && caught=$((caught + 1)); else tell "alive   $class"; fi
    done
    tell "points: $caught of ${#ten[@]}"
    ((caught >= 7)) || because "your tests catch too few of the mutants"
}
