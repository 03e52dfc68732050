# What the checks of the exercises have in common: a kv with a file, $tmp/aof, and words with it.
# Each NAME.bats loads this. KV names the program, SANITIZER=asan or tsan what it is built with.
#
# SC2034: a test uses it. SC2119, SC2120: start_kv may have no options. SC2154: bats sets it.
# shellcheck shell=bash disable=SC2034,SC2119,SC2120,SC2154

bats_require_minimum_version 1.5.0
# shellcheck source=doc/exercises/ending.bash
source "${BASH_SOURCE[0]%/*}/ending.bash"
export LC_ALL=C TSAN_OPTIONS="report_thread_leaks=0 ${TSAN_OPTIONS:-}"
KV=$(realpath "${KV:?names the kv to test}")
shards=() patience=20
if [[ ${SANITIZER:-} = tsan ]]; then shards=(-s 32) patience=60; fi # it gives up at 64 locks, and is slow
command -v pkill >/dev/null && export BATS_TEST_TIMEOUT=${BATS_TEST_TIMEOUT:-60}

setup() {
    tmp=$BATS_TEST_TMPDIR log=$BATS_TEST_TMPDIR/log pid='' port='' status=''
    helpers=()
}

teardown() {
    if ((${#helpers[@]})); then kill -9 "${helpers[@]}" 2>/dev/null || true; fi
    # What is lost is reported only where kv ends by itself.
    if [[ $pid && ${SANITIZER:-} = asan && ${BATS_TEST_COMPLETED:-} ]]; then
        kill "$pid" 2>/dev/null || true
        wait_until gone "$pid" || true
    fi
    end_kv "$pid"
    [[ -e $log ]] || return 0
    if report_in "$log"; then return 1; fi
    if ended_well && [[ ${BATS_TEST_COMPLETED:-} ]]; then return; fi
    tail -n 20 "$log"
    return 1
}

# After ||: the test fails and prints a sentence, which says what is wrong.
because() { # SENTENCE
    printf '=> %s\n' "$*"
    return 1
}

start_kv() { # OPTION...: sets $pid and $port
    : >"$log"
    "$KV" -p 0 "${shards[@]}" --aof "$tmp/aof" "$@" </dev/null 2>>"$log" 3>&- 4>&- &
    pid=$! port=''
    wait_until listening && [[ $port ]]
}

listening() {
    local text
    text=$(<"$log")
    gone "$pid" && return 0 # it has ended
    [[ $text =~ 'listening on '.*:([0-9]+) ]] && port=${BASH_REMATCH[1]}
}

stop_kv() { # [SIGNAL]: sets $status
    kill -s "${1:-TERM}" "$pid"
    status=0
    wait "$pid" || status=$?
    pid=''
}

gone() { ! kill -0 "$@" 2>/dev/null; } # PID...

wait_until() { # COMMAND...
    local end=$((SECONDS + patience))
    until "$@"; do
        ((SECONDS < end)) || { echo "waited in vain until: $*" && return 1; }
        sleep 0.01
    done
}

ask() { printf '%s\n' "$@" | nc -N -w 60 127.0.0.1 "$port"; } # LINE...

# Whether the input is these lines. If not, shows the difference, a CR as ^M.
is() { diff -a <(printf '%s\n' "$@") - >"$tmp/difference" || { cat -v "$tmp/difference" && return 1; }; } # LINE...

resp() { # WORD...: one request in RESP
    local word
    printf '*%d\r\n' $#
    for word; do printf '$%d\r\n%s\r\n' ${#word} "$word"; done
}

size_of() { wc -c <"$1"; } # FILE

inode() { stat -L -c %i "$1"; } # FILE

x() { head -c "$1" /dev/zero | tr '\0' x; } # N: prints that many x

# Whether the file alone makes a kv answer the same.
loads_the_same() { # REQUEST...
    ask "$@" >"$tmp/before"
    stop_kv KILL
    start_kv
    ask "$@" | cmp - "$tmp/before"
}

each_is_wrong() { # REQUEST ERROR ...: each request gets its error, in text and in RESP
    local words
    while (($#)); do
        ask "$1" | is "(error) $2" || return 1
        read -r -a words <<<"$1"
        resp "${words[@]}" | nc -N 127.0.0.1 "$port" | is "-$2"$'\r' || return 1
        shift 2
    done
}

# --- what a student sees where it fails ---------------------------------------------------

# Whether the request, as text, gets these lines. If not, shows both. A reply has 10 s to come.
gets() { # REQUEST LINE...
    local reply wanted
    wanted=$(printf '%s\n' "${@:2}")
    reply=$(ask_soon "$1")
    [[ $reply = "$wanted" ]] || printf '%s\nshould get: %.300s\nbut gets:   %.300s\n' "${1:0:100}" "$wanted" "$reply"
    [[ $reply = "$wanted" ]]
}

gets_error() { # REQUEST ERROR: whether it gets the error, in text and in RESP
    local words
    read -r -a words <<<"$1"
    gets "$1" "(error) $2" && resp "${words[@]}" | nc -N -w 10 127.0.0.1 "$port" | is "-$2"$'\r'
}

ask_soon() { printf '%s\n' "$@" | timeout 10 nc -N 127.0.0.1 "$port"; } # LINE...: a kv that hangs says nothing

# Whether the command has a row: HELP has three lines about it, and the command alone gets an error
# that shows its syntax.
has_row() { # NAME
    local syntax
    syntax=$(ask_soon "HELP $1" | head -n 1)
    [[ $syntax = "$1 "* ]] || { printf 'HELP %s\nbut gets:   %s\n' "$1" "$syntax" && return 1; }
    gets_error "$1" "ERR wrong number of arguments for '${1,,}' command: $syntax"
}

# Keeps the file of kv from growing beyond KB KiB: from some record on it cannot be written.
start_kv_with_a_full_disk() { # KB
    ulimit -S -f "$1"
    start_kv --fsync no
    ulimit -S -f unlimited
    yes "SET fill $(x 1000)" | head -n "$(($1 * 2))" | nc -N 127.0.0.1 "$port" | grep -q MISCONF
}

# --- spy.c: how often kv sends ------------------------------------------------------------

# Like start_kv, with spy.c between kv and libc. Only Linux has that: elsewhere nothing is counted.
start_spied_kv() { # OPTION...
    if [[ $(uname) != Linux ]]; then
        start_kv "$@"
        return
    fi
    cc -shared -fPIC -o "$tmp/spy.so" "$BATS_TEST_DIRNAME/spy.c" -ldl || return 1
    ASAN_OPTIONS="verify_asan_link_order=0:${ASAN_OPTIONS:-}" \
        LD_PRELOAD=$tmp/spy.so SPY_TO=$tmp/sends start_kv "$@"
}

sends() { cat "$tmp/sends" 2>/dev/null || echo 0; } # how many there were so far

# --- hunts: a file of tests is what is checked --------------------------------------------

# Sets HUNT to the file, if it is not given, KV to a correct kv and BUG to the broken one. These are built
# here if BUG is not given, for what is in kv-exercise may have been changed.
set_hunt() { # NAME
    local root=$BATS_TEST_DIRNAME/../.. start=$BATS_TEST_DIRNAME/$1.start dir=$BATS_FILE_TMPDIR name
    local program=kv${SANITIZER:+-$SANITIZER}
    export HUNT=${HUNT:-$root/kv-exercise/$1.bats} KV BUG=${BUG:-}
    if [[ $BUG ]]; then return; fi
    for name in right broken; do
        mkdir "$dir/$name"
        cp "$root/kv.c" "$root/Makefile" "$dir/$name"
        if [[ $name = broken && -e $start.c ]]; then cp "$start.c" "$dir/broken/kv.c"; fi
        if [[ $name = broken && -e $start.patch ]]; then patch -s -F 0 -p 1 -d "$dir/broken" <"$start.patch"; fi
        make -s -C "$dir/$name" CFLAGS=-O0 "$program"
    done
    KV=$dir/right/$program BUG=$dir/broken/$program
}

# Whether bash can read the file HUNT. If not, it says in which line. What bats makes of @test is a function.
can_be_read() {
    local name=${HUNT##*/}
    [[ -e $HUNT ]] || return 0 # hunt_with says so
    sed -E 's/^[[:blank:]]*@test[[:blank:]].*[[:blank:]]\{/a_test() {/' "$HUNT" >"$tmp/$name"
    (cd "$tmp" && bash -O extglob -n "$name" 2>&1)
}

# Runs the tests of the file HUNT. A copy of the program has the same path each time.
hunt_with() { # PROGRAM: sets $tests, $failed and $skipped to how many there are
    local found=$tmp/found status=0
    [[ -e ${HUNT:?names the file with the tests} ]] || because "there is no $HUNT" || return
    rm -f "$tmp/kv" && cp "$1" "$tmp/kv"
    # bats inside bats: the inner one begins as if there were no other.
    env -i PATH="${PATH#"${BATS_LIBEXEC:-}:"}" HOME="${HOME:-/}" KV="$tmp/kv" SANITIZER="${SANITIZER:-}" \
        TSAN_OPTIONS="$TSAN_OPTIONS" timeout "${hunt_time:-${HUNT_TIME:-18}}" bats --tap "$HUNT" >"$found" 2>&1 </dev/null 3>&- || status=$?
    tests=$(grep -cE '^(not )?ok ' "$found") || true
    failed=$(grep -c '^not ok ' "$found") || true
    skipped=$(grep -cE '^(not )?ok .*# skip' "$found") || true
    if ((status == 124)); then failed=1 && echo "your tests did not end within ${hunt_time:-${HUNT_TIME:-18}} s"; fi
    if ((status != 0 && failed == 0)); then failed=1 && echo "bats ended with status $status"; fi
    cat "$found"
}

# The two tests of a hunt. What the student's file does once may be chance, so each is three times.
passes_the_correct_kv() {
    local times
    can_be_read || because "your file has a syntax error" || return 1
    hunt_with "$KV"
    ((tests > 0)) || because "there is no test in your file that bats can run" || return 1
    ((skipped == 0)) || because "a test that is skipped finds nothing" || return 1
    for times in 1 2 3; do
        ((failed == 0)) || because "your test fails on a correct kv, in run $times of 3" || return 1
        if ((times < 3)); then hunt_with "$KV"; fi
    done
}

fails_the_broken_kv() {
    local times
    can_be_read >"$tmp/said" || because "your file has a syntax error: see above" || return 1
    for times in 1 2 3; do
        hunt_with "$BUG"
        ((failed > 0)) || because "your test passes on the broken kv, in run $times of 3: what has to happen before the fault shows?" || return 1
    done
}
