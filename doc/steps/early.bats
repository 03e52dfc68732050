#!/usr/bin/env bats
# What the first two steps promise: echo and words.
#
#     KV=kv-step/echo bats --filter-tags echo --filter-tags echo-only doc/steps/early.bats
#     KV=kv-step/words bats --filter-tags echo --filter-tags words doc/steps/early.bats
#
# The tag echo-only: this step alone sends back what it reads. What has the tag echo or words holds
# for all later steps, too, and for kv. It needs no nc: bash opens connections itself.
#
# SC2154: bats sets the variable.
# shellcheck disable=SC2154

bats_require_minimum_version 1.5.0
export LC_ALL=C TSAN_OPTIONS="report_thread_leaks=0 ${TSAN_OPTIONS:-}"
KV=$(realpath "${KV:-$BATS_TEST_DIRNAME/../../kv}")
command -v pkill >/dev/null && export BATS_TEST_TIMEOUT=${TIME_LIMIT:-60}

setup() {
    tmp=$BATS_TEST_TMPDIR log=$BATS_TEST_TMPDIR/log pid='' port='' line='' c=''
    : >"$log"
    "$KV" -p 0 </dev/null 2>"$log" 3>&- 4>&- &
    pid=$!
    wait_until listening && [[ $port ]]
}

teardown() {
    if [[ $pid ]]; then stop KILL; fi
    if grep -E 'ERROR: AddressSanitizer|runtime error:|WARNING: ThreadSanitizer|LeakSanitizer' "$log"; then return 1; fi
    if [[ ! ${BATS_TEST_COMPLETED:-} ]]; then tail -n 20 "$log"; fi
}

listening() {
    if ! kill -0 "$pid" 2>/dev/null; then return 0; fi # it has ended
    [[ $(<"$log") =~ 'listening on 127.0.0.1:'([0-9]+) ]] && port=${BASH_REMATCH[1]}
}

wait_until() { # COMMAND...
    local end=$((SECONDS + ${patience:-20}))
    until "$@"; do
        ((SECONDS < end)) || { echo "waited in vain until: $*" && return 1; }
        sleep 0.01
    done
}

stop() { # SIGNAL: sets $status
    status=0
    kill -s "$1" "$pid"
    { wait "$pid" || status=$?; } 2>/dev/null
    pid=''
}

connect() { exec {c}<>"/dev/tcp/127.0.0.1/$port"; } # sets $c

# Sends all at once, as the shell's own printf does not: it writes line by line.
send() { # FD TEXT: with \n and \xHH
    printf '%b' "$2" >"$tmp/packet"
    cat "$tmp/packet" >&"$1"
}

take() { timeout "${patience:-20}" head -c "$2" <&"$1"; } # FD N: prints the next N bytes

receive() { IFS= read -r -t "${patience:-20}" -u "$1" line; } # FD: sets $line to the next line

answers() { # FD REQUEST REPLY...: a line for each reply
    local reply
    send "$1" "$2"
    for reply in "${@:3}"; do
        receive "$1" || true
        [[ $line = "$reply" ]] || { echo "expected: $reply, received: $line" && return 1; }
    done
}

ended() { # FD: whether the server closes the connection, without another byte
    local code=0
    IFS= read -r -t "${patience:-20}" -u "$1" line || code=$?
    ((code == 1)) && [[ $line = '' ]]
}

bytes() { # prints each of the 256 byte values
    local i
    for i in {0..255}; do printf '%b' "\\x$(printf %02x "$i")"; done
}

# bats test_tags=echo-only
@test "what is sent comes back as it came, all 256 byte values" {
    (trap - DEBUG && bytes) >"$tmp/bytes"
    connect
    cat "$tmp/bytes" >&"$c"
    take "$c" 256 | cmp - "$tmp/bytes"
}

# bats test_tags=echo-only
@test "part of a line comes back before the rest is sent" {
    connect
    for part in a bc '\n' d; do
        send "$c" "$part"
        printf '%b' "$part" >"$tmp/part"
        take "$c" "$(wc -c <"$tmp/part")" | cmp - "$tmp/part"
    done
}

# bats test_tags=echo-only
@test "two clients are served at the same time, and each gets what is its own" {
    connect && first=$c
    connect && second=$c
    answers "$second" 'two\n' two
    answers "$first" 'one\n' one
    answers "$second" 'two again\n' 'two again'
}

# bats test_tags=echo-only
@test "two megabytes come back whole" {
    head -c 2000000 /dev/urandom >"$tmp/much"
    connect
    cat "$tmp/much" >&"$c" 3>&- &
    take "$c" 2000000 | cmp - "$tmp/much"
}

# bats test_tags=echo
@test "with -p 0 the system chooses the port, and the only line of the log names it" {
    ((port > 0))
    (($(wc -l <"$log") == 1))
    grep -Ex "[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\.[0-9]{3}Z INFO listening on 127\.0\.0\.1:$port" "$log"
    connect
}

# bats test_tags=echo
@test "SIGTERM ends the server with status 0, also while clients are connected" {
    connect
    connect
    stop TERM
    ((status == 0))
    tail -n 1 "$log" | grep -E 'Z INFO stopped$'
}

# bats test_tags=words
@test "PING answers PONG or its message, ECHO its message, QUIT OK and the end" {
    connect
    answers "$c" 'PING\n' PONG
    answers "$c" 'ping hello\n' hello
    answers "$c" 'ECHO hello\r\n' $'hello\r'
    answers "$c" 'QUIT\nPING\n' OK
    ended "$c"
}

# bats test_tags=words
@test "a quoted word holds blanks and escapes, and a reply that could be misread has quotes" {
    connect
    answers "$c" '\n  \t# a comment\nECHO "two words"\n' 'two words'
    answers "$c" "ECHO 'two words'\n" 'two words'
    answers "$c" 'ECHO "\\x41\\t\\"\\\\"\n' '"A\t\x22\\"'
    answers "$c" 'ECHO ""\nECHO "(nil)"\n' '""' '"(nil)"'
}

# bats test_tags=words
@test "a request is run when its newline has come; of several at once each is answered, in order" {
    connect && first=$c
    send "$first" 'ECHO on'
    connect && second=$c
    answers "$second" 'PING\n' PONG
    answers "$first" 'e\nECHO two\nECHO three\n' one two three
}

# bats test_tags=words
@test "what is wrong gets one line of error, and the connection goes on" {
    connect
    for wrong in 'NOSUCH' 'ECHO' 'ECHO a b' 'ECHO "a' 'ECHO "\\q"'; do
        send "$c" "$wrong\nPING\n"
        receive "$c" && [[ $line = '(error) ERR '?* ]]
        receive "$c" && [[ $line = PONG ]]
    done
}
