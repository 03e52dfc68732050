#!/usr/bin/env bats
# chapter: 8
# concept: how long a value lives
# level: 2
# lines: 14
# minutes: 60
# task: Build GETDEL key: it replies the value, or null if there is none, and removes the key. No other client sees the moment between the two.
#
# SC2030, SC2031: bats runs each test as a process. SC2154: common.bash sets it.
# shellcheck disable=SC2030,SC2031,SC2154

load common

@test "GETDEL has a row in the table of commands" {
    start_kv
    has_row GETDEL || because "HELP and the error for a wrong number of words come from the row of the command"
}

@test "GETDEL replies the value, and then the key is gone" {
    start_kv
    ask 'SET a "hello world"' 'SET b 2' 'EXPIRE b 1000' | is OK OK 1
    gets 'GETDEL a' 'hello world' && gets 'GETDEL b' 2 || because "GETDEL replies the value as GET does"
    gets 'EXISTS a b' 0 && gets 'GETDEL a' '(nil)' && gets DBSIZE 0 || because "after GETDEL there is no such key"
    { resp SET c 3 && resp GETDEL c && resp GETDEL c; } | nc -N -w 10 127.0.0.1 "$port" |
        is $'+OK\r' $'$1\r' $'3\r' $'$-1\r' || because "in RESP the reply is a string, or null: see reply_value and reply_nil"
}

# In a small block free leaves most bytes as they are. A large block goes back to the system.
# MALLOC_PERTURB_ makes glibc fill what is freed.
@test "GETDEL replies all of a long value" {
    MALLOC_PERTURB_=165 start_kv
    for size in 1000000 100000 5000; do
        { printf 'SET long ' && x "$size" && echo; } | nc -N -w 10 127.0.0.1 "$port" | is OK
        ask_soon 'GETDEL long' | cmp - <(x "$size" && echo) ||
            because "the reply is not the value: was its memory freed before the reply was made?"
    done
}

@test "what GETDEL has removed does not come back after a crash" {
    start_kv
    ask 'SET a 1' 'SET b 2' | is OK OK
    gets 'GETDEL a' 1 || because "GETDEL replies the value as GET does"
    stop_kv KILL
    start_kv
    gets 'EXISTS a' 0 && gets 'GET b' 2 ||
        because "after a restart the key is there again: the removal has no record in the file"
}

@test "of many clients that GETDEL a key at once just one gets the value" {
    start_kv
    seq 1000 | sed 's/.*/SET k& v&/' | nc -N 127.0.0.1 "$port" | grep -c OK | is 1000
    clients=()
    for i in {1..8}; do
        seq -f 'GETDEL k%.0f' 1000 | timeout 10 nc -N 127.0.0.1 "$port" >"$tmp/out.$i" &
        clients+=("$!")
    done
    wait "${clients[@]}"
    sort "$tmp"/out.* | grep -v nil | cmp - <(seq -f 'v%.0f' 1000 | sort) >"$tmp/differ" ||
        because "a value was given to two clients or to none: the key must stay locked from the lookup to the removal"
}

@test "while the file cannot be written GETDEL gets an error and removes nothing" {
    start_kv_with_a_full_disk 8
    gets 'GETDEL fill' '(error) MISCONF the append-only file cannot be written' && gets 'EXISTS fill' 1 ||
        because "GETDEL changes something, so its row has the flag WRITES"
}
