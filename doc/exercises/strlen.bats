#!/usr/bin/env bats
# chapter: 8
# concept: dispatch
# level: 1
# lines: 4
# minutes: 30
# task: Build STRLEN key: how many bytes the value has, 0 if there is no such key. The table of commands does most of it: which flags does the row need?
#
# SC2030, SC2031: bats runs each test as a process. SC2154: common.bash sets it.
# shellcheck disable=SC2030,SC2031,SC2154

load common

@test "STRLEN has a row in the table of commands" {
    start_kv
    has_row STRLEN || because "HELP and the error for a wrong number of words come from the row of the command"
}

@test "STRLEN replies how many bytes a value has" {
    start_kv
    ask 'SET greeting "hello world"' 'SET empty ""' | is OK OK
    [[ $(ask_soon 'STRLEN greeting') != 0 ]] ||
        because "STRLEN of a key that is there is 0: kv looks up the key only if the row has the flag KEY"
    gets 'STRLEN greeting' 11 && gets 'STRLEN empty' 0 && gets 'strlen greeting' 11 ||
        because "STRLEN is about the value: its length does not depend on the name of the key"
}

# From here on each key is as long as its value. So a mistake shows in one test only.

@test "STRLEN counts zero bytes, too" {
    start_kv
    ask 'SET zero "\x00a\x00b"' 'SET bytes "\xff\x80\x00\r\n"' | is OK OK
    gets 'STRLEN zero' 4 && gets 'STRLEN bytes' 5 ||
        because "a value may hold zero bytes: its entry says how long it is, strlen does not"
}

@test "STRLEN of a key that is not there, or that has expired, is 0, and makes no key" {
    start_kv
    ask 'SET gone 1234 PX 1' | is OK
    wait_until has_no_key gone
    gets 'STRLEN none' 0 && gets 'STRLEN gone' 0 && gets DBSIZE 0 || because "a key that is not there has length 0"
}

has_no_key() { [[ $(ask "EXISTS $1") = 0 ]]; } # KEY

@test "STRLEN replies a number in RESP" {
    start_kv
    ask 'SET abc 123' | is OK
    resp STRLEN abc | nc -N -w 10 127.0.0.1 "$port" | is $':3\r' || because "RESP has a type for numbers: see reply_int"
}

@test "STRLEN counts as a read: INFO has its hits and misses" {
    start_kv
    ask 'SET abc 123' | is OK
    for key in abc abc none; do ask "STRLEN $key" >"$tmp/out"; done
    ask INFO | grep -x 'keyspace_.*' | is keyspace_hits:2 keyspace_misses:1 ||
        because "STRLEN changes nothing, so its row has the flag KEY, but not WRITES"
}
