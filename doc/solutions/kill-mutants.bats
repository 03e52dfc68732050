#!/usr/bin/env bats
# chapter: 8
# expect: a test for each promise that is easy to break, at the limits: the last number, the empty word, two that are almost the same
#
# SC2154: common.bash sets it. SC2119: start_kv may have no options.
# shellcheck disable=SC2154,SC2119

load "$PWD/doc/exercises/common"

connect() { exec {c}<>"/dev/tcp/127.0.0.1/$port"; }

# On one connection, for that is fast: no program is started. A kv that hangs fails after 3 s.
answers() { # REQUEST REPLY ...: the text of an error does not matter
    local line
    while (($#)); do
        echo "$1" >&"$c"
        read -r -t 3 -u "$c" line || return 1
        [[ ${line/#'(error) '*/error} = "$2" ]] || return 1
        shift 2
    done
}

@test "an option that is no number is refused" {
    for number in 8x x ' 8'; do
        status=0
        "$KV" --timeout "$number" --version || status=$? # a kv that accepts it ends, too
        [[ $status = 2 ]]
    done
}

@test "words and values may be empty, hold any byte, and end where the quote does; a header has an end, too" {
    start_kv
    { resp SET e '' && resp GET e && resp KEYS 'no*'; } | nc -N 127.0.0.1 "$port" >"$tmp/out"
    is $'+OK\r' $'$0\r' $'\r' $'*0\r' <"$tmp/out"
    connect
    answers 'SET u "é"' OK 'GET u' é 'GET "u"x' error
    printf '*%0100d' 1 | nc -N 127.0.0.1 "$port" >"$tmp/out"
    grep -q '^-ERR' "$tmp/out"
}

@test "counters reach the last number, and go no further; after the error the key can be used" {
    start_kv
    connect
    answers 'SET n 9223372036854775806' OK 'INCR n' 9223372036854775807
    answers 'INCR n' error 'GET n' 9223372036854775807
    answers 'SET w word' OK 'INCR w' error 'GET w' word
}

@test "SET takes a deadline away, whatever the length of the value; what has expired counts for no command" {
    start_kv
    connect
    answers 'SET a 1 EX 100' OK 'SET a 2' OK 'TTL a' -1
    answers 'SET a 1 EX 100' OK 'SET a 22' OK 'TTL a' -1
    for i in {1..10}; do # the expiry thread may come before, but not each time
        answers "SET a$i 5 PX 1" OK
        read -r -t 0.002 -u "$c" || true # waits; sleep is a program, and may take long to begin
        answers "INCR a$i" 1
    done
}

@test "of three deadlines each is met, though the last is far" {
    start_kv -s 1 --fsync no # a disk that is slow holds nothing up
    ask 'SET a 1 PX 100' 'SET b 1 PX 110' 'SET c 1 EX 1000' | is OK OK OK
    connect
    for _ in {1..20}; do # they are gone without anybody looking
        if answers DBSIZE 1; then break; fi
        sleep 0.1
    done
    answers DBSIZE 1
}

@test "a byte of the file that has changed is found" {
    start_kv
    ask "SET key $(x 70000)last" | is OK
    stop_kv
    sed 's/xlast/xlost/' "$tmp/aof" >"$tmp/changed"
    mv "$tmp/changed" "$tmp/aof"
    if start_kv; then return 1; fi
    status=0
    wait "$pid" || status=$?
    [[ $status = 1 ]]
}

@test "what a client sends before AUTH is not in the log: it may be the password" {
    (umask 077 && echo right >"$tmp/password")
    start_kv -vv --password-file "$tmp/password"
    ask 'SET a mistyped' | is '(error) NOAUTH Authentication required.'
    stop_kv
    if grep mistyped "$log"; then return 1; fi
}
