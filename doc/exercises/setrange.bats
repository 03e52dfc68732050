#!/usr/bin/env bats
# chapter: 8
# concept: allocation and logging
# level: 2
# lines: 24
# minutes: 90
# task: Build SETRANGE key offset value: it writes the value over that of the key from byte offset on, which may make that longer, and replies the new length. Gaps become zero bytes. The key keeps its deadline. To write no bytes, at any offset from 0 on, changes nothing, makes no key and replies the present length. An offset below 0 gets ERR offset is out of range. No value may become longer than --max-request: else the error is that of APPEND in chapter 8. An offset that is no number gets the error of INCRBY. Where there is no memory for the new value the error is OOM out of memory, and all stays as it is.
#
# SC2030, SC2031: bats runs each test as a process. SC2154: common.bash sets it.
# shellcheck disable=SC2030,SC2031,SC2154

load common

@test "SETRANGE has a row in the table of commands" {
    start_kv
    has_row SETRANGE || because "HELP and the error for a wrong number of words come from the row of the command"
}

@test "SETRANGE writes over a part of a value, also beyond its end, and replies the length" {
    start_kv
    ask 'SET a "hello world"' | is OK
    gets 'SETRANGE a 6 there' 11 && gets 'GET a' 'hello there' || because "the bytes from the offset on are to be replaced"
    gets 'SETRANGE a 0 J' 11 && gets 'GET a' 'Jello there' || because "offset 0 is the first byte, and what is behind stays"
    gets 'SETRANGE a 9 "se days"' 16 && gets 'GET a' 'Jello these days' || because "a value that is too short becomes longer"
    gets 'SETRANGE a 16 !' 17 && gets 'GET a' 'Jello these days!' || because "at the offset of its end a value becomes longer"
}

@test "between the end of the old value and the offset SETRANGE puts zero bytes" {
    start_kv
    gets 'SETRANGE none 3 x' 4 && gets 'GET none' '"\x00\x00\x00x"' || because "a key that is not there begins as an empty value"
    gets 'SETRANGE none 6 y' 7 && gets 'GET none' '"\x00\x00\x00x\x00\x00y"' || because "the gap is to be filled with zero bytes"
    gets 'SETRANGE far 100000 x' 100001 || because "the reply is the length, which counts the gap"
    ask_soon 'GET far' | sed 's/\\x00//g' | is '"x"' || because "a gap holds bytes that are not zero: see calloc"
}

@test "SETRANGE leaves the deadline as it is" {
    start_kv
    ask 'SET a 12345' 'EXPIREAT a 99999999999' | is OK 1
    before=$(ask 'TTL a')
    gets 'SETRANGE a 2 x' 5 && gets 'SETRANGE a 5 yz' 7 || because "the reply is the length of the new value"
    after=$(ask 'TTL a')
    echo "TTL was $before and is $after"
    ((after > 0 && after <= before && after > before - 100)) ||
        because "the key had a deadline before SETRANGE, and must have the same one after it"
    gets 'SETRANGE b 0 x' 1 && gets 'TTL b' -1 || because "a new key has no deadline"
}

# The smaller offsets come first: an answer without a limit ends there, before it takes all memory.
@test "a value that SETRANGE would make longer than --max-request stays as it is" {
    start_kv --max-request 1024
    too_long='(error) ERR string exceeds maximum allowed size (--max-request)'
    gets 'SETRANGE a 1023 x' 1024 || because "a value of just --max-request bytes is allowed"
    { gets 'SETRANGE a 1024 x' "$too_long" && gets 'SETRANGE none 1020 12345' "$too_long" &&
        gets 'SETRANGE a 4000 x' "$too_long"; } ||
        because "SETRANGE needs a limit of its own: this value is longer than --max-request"
    for offset in 4294967296 999999999999 9223372036854775807; do
        gets "SETRANGE a $offset x" "$too_long" || because "an offset of $offset is too large: does offset + length overflow?"
    done
    gets DBSIZE 1 && ask 'GET a' | tail -c 7 | is '\x00x"' || because "an error must leave everything as it was"
}

@test "a value without bytes changes nothing and makes no key" {
    start_kv
    ask 'SET a 123' | is OK
    gets 'SETRANGE a 100 ""' 3 && gets 'GET a' 123 || because "to write no bytes changes nothing, and the reply is the present length"
    gets 'SETRANGE none 0 ""' 0 && gets 'EXISTS none' 0 || because "to write no bytes makes no key"
    gets 'SETRANGE a 999999999999 ""' 3 && gets 'SETRANGE none 999999999999 ""' 0 ||
        because "to write no bytes makes nothing longer, so the limit of length is not for it"
}

# A kv that has no room for 400 MB. A sanitizer itself needs more memory than any such limit leaves,
# but it can be told to give no block as large as that.
start_kv_with_little_memory() {
    local little=max_allocation_size_mb=300:allocator_may_return_null=1
    if [[ ! ${SANITIZER:-} ]]; then ulimit -S -v 300000; fi
    ASAN_OPTIONS="$little:${ASAN_OPTIONS:-}" TSAN_OPTIONS="$little:$TSAN_OPTIONS" start_kv --max-request 536870912
}

@test "when there is no memory for the new value SETRANGE gets OOM, and changes nothing" {
    start_kv_with_little_memory
    no_memory='(error) OOM out of memory'
    ask 'SET a 123' | is OK
    gets 'SETRANGE a 400000000 x' "$no_memory" && gets 'SETRANGE none 400000000 x' "$no_memory" ||
        because "where malloc or calloc returns NULL there is no memory, which is an error: see fail_oom"
    gets 'GET a' 123 && gets 'EXISTS none' 0 && gets 'SETRANGE a 3 4' 4 || because "an error must leave everything as it was"
}

@test "an offset that is negative, or no number, has an error" {
    start_kv
    ask 'SET a 123' | is OK
    gets_error 'SETRANGE a -1 x' 'ERR offset is out of range' || because "an offset below 0 is out of range"
    gets_error 'SETRANGE a one x' 'ERR value is not an integer or out of range' &&
        gets_error 'SETRANGE a 9223372036854775808 x' 'ERR value is not an integer or out of range' ||
        because "parse_int says what is a number, and NOT_AN_INTEGER is the error"
    gets 'GET a' 123 || because "an error must leave everything as it was"
}

@test "clients that write different bytes of one value at once lose nothing, and a crash loses nothing" {
    start_kv
    clients=()
    for i in 0 1 2 3 4 5 6 7; do
        for _ in {1..20}; do seq -f "SETRANGE a $i %.0f" 0 9; done | timeout 10 nc -N 127.0.0.1 "$port" >"$tmp/out.$i" &
        clients+=("$!")
    done
    wait "${clients[@]}"
    gets 'GET a' 99999999 || because "a byte is lost: the key must stay locked while the new value is made from the old one"
    stop_kv KILL
    start_kv
    gets 'GET a' 99999999 || because "after a restart the value is another one: use store, which appends a record"
}
