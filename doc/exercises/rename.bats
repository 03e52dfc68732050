#!/usr/bin/env bats
# chapter: 8
# concept: two locks, one record
# level: 4
# lines: 74
# minutes: 240
# task: Build RENAME key newkey: newkey gets the value and the deadline of key, and key is gone, at one moment for all clients. Without key the error is ERR no such key. In the file of --aof this is one record, which every later start can read.
#
# SC2030, SC2031: bats runs each test as a process. SC2154: common.bash sets it.
# shellcheck disable=SC2030,SC2031,SC2154

load common

@test "RENAME has a row in the table of commands" {
    start_kv
    has_row RENAME || because "HELP and the error for a wrong number of words come from the row of the command"
}

@test "RENAME moves a value to another key, whether that is there or not" {
    start_kv
    ask 'SET a "hello world"' 'SET c 3' | is OK OK
    gets 'RENAME a b' OK && gets 'GET b' 'hello world' && gets 'EXISTS a' 0 || because "a is to be called b from now on"
    gets 'RENAME b c' OK && gets 'GET c' 'hello world' && gets DBSIZE 1 || because "the old value of c is to be gone"
    gets 'RENAME c c' OK && gets 'GET c' 'hello world' || because "a key may get the name that it has"
    gets_error 'RENAME none c' 'ERR no such key' && gets_error 'RENAME none none' 'ERR no such key' &&
        gets 'GET c' 'hello world' || because "without the first key there is an error, and nothing changes"
}

@test "RENAME moves the deadline with the value" {
    start_kv
    ask 'SET a 1 EXAT 99999999999' 'SET b 2' 'SET c 3 PX 200' 'SET d 4' | is OK OK OK OK
    gets 'RENAME a b' OK || because "RENAME replies OK"
    (($(ask 'TTL b') > 1000)) || because "the key had a deadline, and must have it under its new name"
    gets 'RENAME d c' OK && gets 'TTL c' -1 || because "the old deadline of c is to be gone"
    wait_until quarter_passed "$(time_ms)"
    gets 'GET c' 4 || because "c expired at the deadline that it had before RENAME"
}

time_ms() { echo "$((${EPOCHREALTIME/[.,]/} / 1000))"; }

quarter_passed() { (($(time_ms) > $1 + 250)); } # SINCE

@test "RENAME works where both keys are in one shard" {
    start_kv -s 1
    ask 'SET a 1' 'SET b 2' | is OK OK
    gets 'RENAME a b' OK && gets 'GET b' 1 && gets 'RENAME b b' OK ||
        because "with one shard both keys have one lock, and a thread that has it must not lock it again"
}

# Each of four clients sends as many. Where kv hangs, nc ends when nothing has come for 5 s.
rename_at_once() { # COUNT A B
    local clients=() words
    for words in "$2 $3" "$3 $2" "$2 $3" "$3 $2"; do
        yes "RENAME $words" | head -n "$1" | nc -N -w 5 127.0.0.1 "$port" >"$tmp/out.${#clients[@]}" &
        clients+=("$!")
    done
    wait "${clients[@]}" || true
    cat "$tmp"/out.? | wc -l | is "$((4 * $1))"
}

@test "RENAME a b and RENAME b a at once do not wait for each other for ever" {
    start_kv --fsync no
    for pair in 1 2 3; do # two keys may be in one shard, but not three times
        ask "SET first$pair 1" | is OK
        gets "RENAME first$pair a$pair" OK || because "RENAME replies OK"
        rename_at_once 20000 "a$pair" "b$pair" ||
            because "kv hangs: two threads hold a lock each and wait for that of the other. In what order are two shards locked?"
        gets "EXISTS a$pair b$pair" 1 || because "after many renames the value is to be under one of the two names"
    done
}

@test "of many clients that RENAME one key at once just one succeeds" {
    start_kv -s 1
    seq 500 | sed 's/.*/SET k& v&/' | nc -N 127.0.0.1 "$port" | grep -c OK | is 500
    clients=()
    for i in {1..6}; do
        seq 500 | sed "s/.*/RENAME k& k&:$i/" | timeout 10 nc -N 127.0.0.1 "$port" >"$tmp/out.$i" &
        clients+=("$!")
    done
    wait "${clients[@]}"
    cat "$tmp"/out.* | grep -c OK | is 500 && gets DBSIZE 500 ||
        because "a value got two names, or none: both keys must stay locked from the lookup to the last change"
}

records() { grep -ac '^\*' "$tmp/aof"; }

@test "RENAME is one record in the file" {
    start_kv
    ask 'SET a 1' 'SET b 2' 'EXPIRE a 1000' | is OK OK 1
    before=$(records)
    gets 'RENAME a b' OK || because "RENAME replies OK"
    (($(records) == before + 1)) ||
        because "after a crash between two records both keys would be there: RENAME must be one record"
    gets 'RENAME none b' '(error) ERR no such key' || because "without the first key there is an error"
    (($(records) == before + 1)) || because "a RENAME that fails needs no record"
}

@test "the file alone gives the same keys, also if the deadline of one that was renamed has passed since" {
    start_kv
    ask 'SET a 1' 'SET b 2' 'EXPIREAT a 99999999999' 'RENAME a b' 'SET c 3' 'RENAME c d' 'SET c 4' | is OK OK 1 OK OK OK OK ||
        because "RENAME replies OK"
    loads_the_same 'GET a' 'GET b' 'GET c' 'GET d' DBSIZE || because "after a restart the keys are others"
    (($(ask 'TTL b') > 1000)) || because "after a restart the deadline is gone"
    start=$(time_ms)
    ask 'SET soon 5 PX 600' 'RENAME soon d' | is OK OK
    stop_kv KILL
    wait_until past "$((start + 700))"
    start_kv || because "kv does not start with its file: when the file is read the first key of a RENAME may have expired"
    gets 'EXISTS soon d' 0 && gets DBSIZE 2 || because "after a restart a key that has expired is there again"
}

past() { (($(time_ms) > $1)); } # MS
