#!/usr/bin/env bats
# What every kv does, right or wrong: the shortest check there is, of any build, which KV names.
#
#     KV=./kv bats doc/exercises/smoke.bats
#
# It needs no nc and no redis-cli: bash itself connects, by /dev/tcp. That has no half-close,
# so each set of requests ends with QUIT, and kv closes.
#
# SC2016: the dollar in single quotes is that of RESP. SC2030, SC2031: bats runs each test as a process.
# shellcheck disable=SC2016,SC2030,SC2031

bats_require_minimum_version 1.5.0
load ending
export LC_ALL=C
KV=$(realpath "${KV:?names the kv to test}")
command -v pkill >/dev/null && export BATS_TEST_TIMEOUT=${BATS_TEST_TIMEOUT:-30}

setup() {
    tmp=$BATS_TEST_TMPDIR log=$BATS_TEST_TMPDIR/log pid='' port=''
    : >"$log"
}

teardown() {
    end_kv "$pid"
    if report_in "$log"; then return 1; fi
    if ended_well && [[ ${BATS_TEST_COMPLETED:-} ]]; then return; fi
    cat "$log"
    return 1
}

start_kv() { # OPTION...: sets $pid and $port
    local end=$((SECONDS + 10)) text=''
    : >"$log"
    "$KV" -p 0 "$@" </dev/null 2>>"$log" 3>&- 4>&- &
    pid=$! port=''
    until [[ $text =~ 'listening on '.*:([0-9]+) ]]; do
        text=$(<"$log")
        ((SECONDS < end)) && kill -0 "$pid" || return 1
        sleep 0.01
    done
    port=${BASH_REMATCH[1]}
}

# Sends its input and QUIT, and prints the replies.
talk() {
    local c
    exec {c}<>"/dev/tcp/127.0.0.1/$port"
    { cat && echo QUIT; } >&"$c"
    timeout 10 cat <&"$c"
    exec {c}>&-
}

ask() { printf '%s\n' "$@" | talk; } # LINE...

is() { diff -a <(printf '%s\n' "$@" OK) -; } # LINE...: whether the input is these and QUIT's reply

@test "kv says where it listens, and SIGTERM ends it with status 0" {
    start_kv
    ask PING >"$tmp/out"
    kill "$pid"
    wait "$pid" # fails if the status is not 0
    pid=''
}

@test "PING, ECHO and QUIT are answered" {
    start_kv
    ask PING 'PING hello' 'ECHO hello' | is PONG hello hello
    ask 'ping' '' '# a comment' | is PONG
}

@test "SET stores a value, and GET replies it, or (nil)" {
    start_kv
    ask 'GET a' 'SET a 1' 'GET a' 'SET a two' 'GET a' 'GET b' | is '(nil)' OK 1 OK two '(nil)'
    ask 'GET a' | is two
}

@test "DEL removes keys, EXISTS counts them" {
    start_kv
    ask 'SET a 1' 'SET b 2' 'EXISTS a b c' 'DEL a c' 'GET a' 'EXISTS a b' | is OK OK 2 1 '(nil)' 1
}

@test "INCR, DECR, INCRBY and DECRBY count" {
    start_kv
    ask 'INCR n' 'INCR n' 'DECR n' 'INCRBY n 41' 'DECRBY n 2' 'GET n' | is 1 2 1 42 40 40
}

@test "a word in quotes may hold blanks and other bytes" {
    start_kv
    ask 'SET "a key" "hello world"' "GET 'a key'" 'SET b "\x00\xff\n"' 'GET b' | is OK 'hello world' OK $'"\\x00\xff\\n"'
}

@test "a wrong request has an error, and the connection goes on" {
    start_kv
    ask NOSUCH GET 'SET a' 'SET a x' 'INCR a' 'GET "a' PING >"$tmp/out"
    (($(grep -c '^(error) ' "$tmp/out") == 5))
    tail -n 2 "$tmp/out" | is PONG
}

@test "EXPIRE gives a key a deadline, TTL shows it, PERSIST takes it away" {
    start_kv
    ask 'SET a 1' 'TTL a' 'TTL b' 'EXPIRE a 100000' 'PERSIST a' 'TTL a' 'SET b 2' 'EXPIRE b -1' 'GET b' |
        is OK -1 -2 1 1 -1 OK 1 '(nil)'
    ask 'EXPIRE a 100000' 'TTL a' >"$tmp/out"
    ttl=$(sed -n 2p "$tmp/out")
    ((99000 < ttl && ttl <= 100000))
}

@test "KEYS lists keys, DBSIZE counts them, FLUSHALL removes them all" {
    start_kv -s 16
    ask 'SET user:1 a' 'SET user:2 b' 'SET other c' 'KEYS other' 'KEYS no*' DBSIZE |
        is OK OK OK other '(1 key)' '(0 keys)' 3
    ask 'KEYS user:*' | sort | sed '/^OK$/d' >"$tmp/out"
    printf '%s\n' '(2 keys)' user:1 user:2 | cmp - "$tmp/out"
    ask FLUSHALL DBSIZE 'GET other' | is OK 0 '(nil)'
}

@test "requests in RESP get replies in RESP" {
    start_kv
    printf '%s\r\n' '*3' '$3' SET '$1' a '$5' 'x y z' '*2' '$3' GET '$1' a '*2' '$3' GET '$1' b '*2' '$4' INCR '$1' n |
        talk | is $'+OK\r' $'$5\r' $'x y z\r' $'$-1\r' $':1\r'
}

@test "many requests in one packet, from many clients at once, are answered in order" {
    start_kv
    clients=()
    for i in {1..8}; do
        seq -f "INCRBY n$i %.0f" 500 | talk >"$tmp/out.$i" &
        clients+=("$!")
    done
    wait "${clients[@]}"
    seq 500 | awk '{ sum += $1; print sum } END { print "OK" }' >"$tmp/right"
    for i in {1..8}; do cmp "$tmp/out.$i" "$tmp/right"; done
}

@test "with --aof a kv that is started again has the same keys" {
    start_kv --aof "$tmp/aof"
    ask 'SET a 1' 'SET b "x y"' 'INCR n' 'INCR n' 'DEL a' | is OK OK 1 2 1
    kill -9 "$pid"
    wait "$pid" || true
    start_kv --aof "$tmp/aof"
    ask 'GET a' 'GET b' 'GET n' DBSIZE | is '(nil)' 'x y' 2 2
}
