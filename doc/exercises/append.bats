#!/usr/bin/env bats
# chapter: 8
# concept: a command that changes a value
# level: 2
# lines: 15
# minutes: 45
# task: Build APPEND key value: it adds to the end of a value, or makes the key, keeps the deadline, and replies the new length. A value longer than --max-request gets an error and stays as it is.
#
# SC2030, SC2031: bats runs each test as a process. SC2154: common.bash sets it.
# shellcheck disable=SC2030,SC2031,SC2154

load common

@test "APPEND adds to a value, makes a key that is not there, keeps the deadline, and replies the length" {
    start_kv
    ask 'APPEND a hello' 'APPEND a ""' 'APPEND a " world"' 'GET a' 'TTL a' | is 5 5 11 'hello world' -1
    ask 'APPEND empty ""' 'EXISTS empty' 'GET empty' | is 0 1 '""'
    ask 'EXPIRE a 1000' 'APPEND a "\x00\r\n"' 'GET a' 'TTL a' | is 1 14 '"hello world\x00\r\n"' 1000 ||
        because 'APPEND adds bytes and changes nothing else: is the deadline still there?'
    ask 'SET n 1' 'APPEND n 0' 'INCR n' 'APPEND gone 1' 'PEXPIREAT gone 1' 'APPEND gone 2' | is OK 2 11 1 1 1
    { resp APPEND a more && resp APPEND a && resp APPEND a b c; } | nc -N 127.0.0.1 "$port" | is $':18\r' \
        $'-ERR wrong number of arguments for \'append\' command: APPEND key value\r' \
        $'-ERR wrong number of arguments for \'append\' command: APPEND key value\r'
    loads_the_same 'GET a' 'GET empty' 'GET n' 'GET gone' DBSIZE
}

@test "many connections that append to one key lose nothing" {
    start_kv
    clients=()
    for i in {1..20}; do
        yes "APPEND a $((i % 10))" | head -n 200 | nc -N 127.0.0.1 "$port" >"$tmp/out.$i" &
        clients+=("$!")
    done
    wait "${clients[@]}"
    ask 'GET a' | fold -w 1 | sort | uniq -c | sed 's/ *//' | is '400 '{0..9}
}

@test "a value that APPEND would make longer than --max-request stays as it is" {
    start_kv --max-request 1024
    ask "APPEND a $(x 1000)" "APPEND a $(x 24)" 'APPEND a 1' | is 1000 1024 \
        '(error) ERR string exceeds maximum allowed size (--max-request)' ||
        because 'APPEND made a value longer than --max-request, or another reply than the error.'
    ask 'GET a' | is "$(x 1024)"
}
