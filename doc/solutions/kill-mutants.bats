#!/usr/bin/env bats
# chapter: 8
# expect: a test for each promise that is easy to break, at the limits: the last number, the empty word, two that are almost the same
#
# SC2154: common.bash sets it. SC2119: start_kv may have no options.
# shellcheck disable=SC2154,SC2119

load "$PWD/doc/exercises/common"

@test "an option that is no number is refused" {
    for number in 8x x ' 8'; do
        status=0
        timeout 5 "$KV" --timeout "$number" 2>"$tmp/stderr" >"$tmp/stdout" || status=$?
        [[ $status = 2 ]]
    done
}

@test "words and values may be empty, hold any byte, and end where the quote does" {
    start_kv
    { resp SET e '' && resp GET e; } | nc -N 127.0.0.1 "$port" | is $'+OK\r' $'$0\r' $'\r'
    ask 'SET u "é"' 'GET u' 'GET "u"x' | sed 's/ERR.*/ERR/' | is OK é '(error) ERR'
    resp KEYS 'no*' | nc -N 127.0.0.1 "$port" | is $'*0\r'
}

@test "a header of RESP that never ends is refused" {
    start_kv
    printf '*%0100d' 1 | nc -N 127.0.0.1 "$port" >"$tmp/out"
    grep -q '^-ERR' "$tmp/out"
}

@test "counters reach the last number, and go no further; after the error the key can be used" {
    start_kv
    ask 'SET n 9223372036854775806' 'INCR n' 'INCR n' 'GET n' >"$tmp/out"
    sed 's/ERR.*/ERR/' "$tmp/out" | is OK 9223372036854775807 '(error) ERR' 9223372036854775807
    ask_soon 'SET w word' 'INCR w' 'GET w' | sed 's/ERR.*/ERR/' | is OK '(error) ERR' word
    ask_soon 'GET w' | is word
}

@test "SET takes a deadline away, whatever the length of the value" {
    start_kv
    ask 'SET a 1 EX 100' 'SET a 2' 'TTL a' 'SET a 1 EX 100' 'SET a 22' 'TTL a' | is OK OK -1 OK OK -1
}

# On one connection, for that is fast.
answers() { # REQUEST REPLY
    echo "$1" >&"$c"
    read -r -t 10 -u "$c" line
    [[ $line = "$2" ]]
}

@test "what has expired counts for no command" {
    start_kv
    exec {c}<>"/dev/tcp/127.0.0.1/$port"
    for i in {1..10}; do # the expiry thread may come before
        answers "SET a$i 5 PX 1" OK
        sleep 0.002
        answers "INCR a$i" 1
    done
}

@test "of three deadlines each is met, though the last is far" {
    start_kv -s 1
    ask 'SET a 1 PX 200' 'SET b 1 PX 400' 'SET c 1 EX 1000' >"$tmp/out"
    wait_for_keys 1
}

wait_for_keys() { # COUNT: expired ones are gone without anybody looking
    for _ in {1..100}; do
        if [[ $(ask DBSIZE) = "$1" ]]; then return 0; fi
        sleep 0.05
    done
    return 1
}

@test "a byte of the file that has changed is found" {
    start_kv
    ask 'SET key value' | is OK
    stop_kv
    for length in 5 70000; do
        start_kv
        ask FLUSHALL "SET key $(x "$length")" | is OK OK
        stop_kv
        cp "$tmp/aof" "$tmp/good"
        size=$(size_of "$tmp/aof")
        printf 'y' | dd of="$tmp/aof" bs=1 seek=$((size - 26)) conv=notrunc 2>/dev/null # the last x of the value
        status=0
        timeout 5 "$KV" -p 0 --aof "$tmp/aof" 2>"$tmp/stderr" || status=$?
        [[ $status = 1 ]]
        cp "$tmp/good" "$tmp/aof"
    done
}
