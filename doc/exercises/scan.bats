#!/usr/bin/env bats
# chapter: 8
# concept: a cursor that survives growth
# level: 3
# lines: 108
# minutes: 180
# task: Build SCAN cursor [MATCH pattern] [COUNT n]: as text the next cursor, a line for each key, and (n keys). A key that is there all the time is in one of the replies, also when the table grows meanwhile.
#
# SC2030, SC2031: bats runs each test as a process. SC2154: common.bash sets it.
# shellcheck disable=SC2030,SC2031,SC2154

load common

# Asks SCAN until its cursor is 0 again; $tmp/keys gets all keys, a line for each.
scan() { # [WORD...]: sets $calls
    local cursor=0 lines
    : >"$tmp/keys"
    for ((calls = 1; calls < 20000; calls++)); do
        ask "SCAN $cursor $*" >"$tmp/reply"
        cursor=$(head -n 1 "$tmp/reply")
        [[ $cursor =~ ^[0-9]+$ ]] || { cat "$tmp/reply" && return 1; }
        lines=$(($(wc -l <"$tmp/reply") - 2))
        [[ $(tail -n 1 "$tmp/reply") =~ ^\($lines\ keys?\)$ ]] || { cat "$tmp/reply" && return 1; }
        sed '1d; $d' "$tmp/reply" >>"$tmp/keys"
        if [[ $cursor = 0 ]]; then return 0; fi
        if [[ ${meanwhile:-} ]]; then "$meanwhile"; fi
    done
    return 1
}

# bats looks at each step, which is slow.
quickly() { trap - DEBUG && "$@"; }

fill() { seq -f "SET $1%.0f $1" "$2" "$3" | nc -N 127.0.0.1 "$port" | uniq -c | grep -q " $(($3 - $2 + 1)) OK"; }

@test "SCAN lists each key once while none comes or goes, whatever COUNT and the number of shards are" {
    for options in '-s 1' '-s 32'; do
        # shellcheck disable=SC2086 # words are what is meant
        start_kv $options
        scan
        ((calls == 1)) && [[ ! -s $tmp/keys ]]
        fill k 1 3000
        for count in 100 1000 1000000; do
            (quickly scan COUNT "$count" && echo "$calls" >"$tmp/calls")
            sort "$tmp/keys" | cmp - <(seq -f 'k%.0f' 3000 | sort)
            (($(<"$tmp/calls") <= 3000 / count + 1))
        done
        stop_kv
        rm "$tmp/aof"
    done
}

grow() {
    if ((calls > 30)); then return; fi # or else the end runs away
    fill new:"$calls": 1 300
    ask "DEL gone:$calls" >"$tmp/out"
}

@test "SCAN misses no key that is there all the time, though the table grows to 16 times its size" {
    start_kv -s 2
    fill k 1 500
    fill gone: 1 100
    meanwhile=grow
    (quickly scan COUNT 60)
    grep '^k' "$tmp/keys" | sort | cmp - <(seq -f 'k%.0f' 500 | sort) # each once, too
    (($(ask DBSIZE) > 600 * 12))
}

flush_and_fill() {
    if ((calls == 3)); then ask FLUSHALL | is OK; fi
    if ((calls == 3)); then fill small: 1 20; fi
}

@test "SCAN ends also after a FLUSHALL amid it, and with a cursor that nobody gave out" {
    start_kv -s 1
    fill k 1 5000
    meanwhile=flush_and_fill
    scan COUNT 100
    ask 'SCAN 9223372036854775807' 'SCAN 4294967296' | is 0 '(0 keys)' 0 '(0 keys)'
    ask 'SCAN 1 COUNT 100' | sed 1q | is 0
    for cursor in 0 1 12345 4294967295; do
        ask "SCAN $cursor COUNT 1" | grep -Ecx '[0-9]+' | is 1
    done
}

@test "SCAN takes MATCH and COUNT, shows no expired key, and makes each key a word that can be sent back" {
    start_kv
    ask 'SET user:1 a' 'SET user:2 b' 'SET "a key" c' 'SET (x d' 'SET gone e PX 1' | is OK OK OK OK OK
    until [[ $(ask 'EXISTS gone') = 0 ]]; do sleep 0.01; done
    scan MATCH 'user:*' COUNT 100
    sort "$tmp/keys" | is user:1 user:2
    scan count 2
    sort "$tmp/keys" | is '"(x"' '"a key"' user:1 user:2
    resp SCAN 0 MATCH 'user:[12]' COUNT 1000 | nc -N 127.0.0.1 "$port" >"$tmp/out"
    head -n 4 "$tmp/out" | is $'*2\r' $'$1\r' $'0\r' $'*2\r'
    grep -c '^user:' "$tmp/out" | is 2
    resp SCAN 0 MATCH none COUNT 1000 | nc -N 127.0.0.1 "$port" | is $'*2\r' $'$1\r' $'0\r' $'*0\r'
    redis-cli -p "$port" --scan --pattern 'user:*' | sort | is user:1 user:2
}

@test "a wrong SCAN has one exact error, in text and in RESP" {
    start_kv
    wrong=(
        'SCAN x' 'ERR invalid cursor'
        'SCAN -1' 'ERR invalid cursor'
        'SCAN 9223372036854775808' 'ERR invalid cursor'
        'SCAN 0 COUNT 0' 'ERR syntax error'
        'SCAN 0 COUNT' 'ERR syntax error'
        'SCAN 0 MATCH' 'ERR syntax error'
        'SCAN 0 NOSUCH 1' 'ERR syntax error'
        'SCAN 0 COUNT x' 'ERR value is not an integer or out of range'
        'SCAN' "ERR wrong number of arguments for 'scan' command: SCAN cursor [MATCH pattern] [COUNT n]"
    )
    each_is_wrong "${wrong[@]}"
}
