#!/usr/bin/env bats
# chapter: 8
# concept: a cursor that survives growth
# level: 3
# lines: 108
# minutes: 180
# task: Build SCAN cursor [MATCH pattern] [COUNT n]: as text the next cursor, a line for each key, and (n keys). A key that is there all the time is in one of the replies, also when the table grows meanwhile.
#
# The reply exactly. The first request has the cursor 0, each further one the cursor of the reply
# before. At the end the reply has the cursor 0. A cursor is a number from 0 to 2^63 - 1. A key may be
# in two replies. COUNT, 10 if it is not given, is about how many keys a reply has: a reply may have
# fewer, also none, or a few more, and is never all keys. What MATCH leaves out counts as well.
#
#     text    SCAN 0 COUNT 2        RESP    an array of two: the cursor as a string, and
#             17179869184                   an array of keys
#             user:1
#             "a key"
#             (2 keys)
#
# SC2030, SC2031: bats runs each test as a process. SC2154: common.bash sets it.
# shellcheck disable=SC2030,SC2031,SC2154

load common

# Asks SCAN until its cursor is 0 or does not change any more. $tmp/keys gets all keys, a line for
# each, $tmp/largest the most that one reply had.
scan() { # [WORD...]: sets $calls and $cursor
    local last reply line n largest=0 c
    exec {c}<>"/dev/tcp/127.0.0.1/$port"
    cursor=0
    : >"$tmp/keys"
    for ((calls = 1; calls < 5000; calls++)); do
        last=$cursor reply=()
        echo "SCAN $cursor $*" >&"$c"
        while IFS= read -r -t 10 -u "$c" line; do # the last line is (n keys), or an error
            reply+=("$line")
            [[ $line != \(* ]] || break
        done
        n=$((${#reply[@]} - 2)) cursor=${reply[0]:-}
        [[ $cursor =~ ^[0-9]+$ ]] || { echo "$cursor" && because "the first line of a reply is to be a cursor"; }
        [[ ${reply[-1]} =~ ^\($n\ keys?\)$ ]] ||
            { echo "$n keys, then ${reply[-1]}" && because "the last line of a reply is to be the number of keys"; }
        if ((n > 0)); then printf '%s\n' "${reply[@]:1:n}" >>"$tmp/keys"; fi
        if ((n > largest)); then largest=$n; fi
        if [[ $cursor = 0 || $cursor = "$last" ]]; then break; fi
        if [[ ${meanwhile:-} ]]; then "$meanwhile"; fi
    done
    exec {c}>&-
    echo "$largest" >"$tmp/largest"
    echo "$cursor" >"$tmp/cursor"
}

# bats looks at each step, which is slow. Only for subshells.
quickly() { trap - DEBUG && "$@"; }

fill() { seq -f "SET $1%.0f $1" "$2" "$3" | nc -N 127.0.0.1 "$port" | uniq -c | grep -q " $(($3 - $2 + 1)) OK"; }

has_all() { sort -u "$tmp/keys" | cmp - <(seq -f "$1%.0f" "$2" | sort); } # PREFIX COUNT

@test "SCAN has a row in the table of commands" {
    start_kv
    has_row SCAN || because "HELP and the error for a wrong number of words come from the row of the command"
}

@test "SCAN lists all keys, whatever COUNT and the number of shards are" {
    for options in '-s 1' '-s 32'; do
        # shellcheck disable=SC2086 # words are what is meant
        start_kv $options
        fill k 1 2000
        for count in 70 100000; do
            (quickly scan COUNT "$count")
            has_all k 2000 || because "the keys are not all there, though none came or went"
        done
        stop_kv
        rm "$tmp/aof"
    done
}

@test "SCAN ends: the cursor behind the last key is 0, for any COUNT and number of shards" {
    endless='SCAN has seen all keys, but its cursor does not become 0: a client would ask for ever'
    for options in '-s 1' '-s 32'; do
        # shellcheck disable=SC2086 # words are what is meant
        start_kv $options
        (quickly scan)
        [[ $(<"$tmp/cursor") = 0 ]] || because "$endless"
        fill k 1 500
        for count in 40 100000; do
            (quickly scan COUNT "$count")
            [[ $(<"$tmp/cursor") = 0 ]] || because "$endless"
        done
        gets 'SCAN 9223372036854775807' 0 '(0 keys)' || because "a cursor that nobody gave out is to end, too"
        timeout 10 redis-cli -p "$port" --scan >"$tmp/keys" || because "$endless"
        has_all k 500 || because "redis-cli --scan has not found all keys"
        stop_kv
        rm "$tmp/aof"
    done
}

grow() {
    if ((calls > 20)); then return; fi # or else the end runs away
    fill new:"$calls": 1 450
    ask "DEL gone:$calls" >"$tmp/out"
}

@test "SCAN misses no key that is there all the time, though the table grows to 16 times its size" {
    start_kv -s 2
    fill k 1 500
    fill gone: 1 100
    meanwhile=grow
    (quickly scan COUNT 60)
    (($(ask DBSIZE) > 600 * 12)) || because "this is to grow the table during the scan: does SCAN reply too much at once?"
    grep '^k' "$tmp/keys" | sort -u | cmp - <(seq -f 'k%.0f' 500 | sort) ||
        because "the table grew, and SCAN missed keys that were there all the time"
}

@test "a reply of SCAN has about COUNT keys, and not all of them" {
    start_kv -s 2
    fill k 1 2000
    for count in 10 200; do
        (quickly scan COUNT "$count")
        (($(<"$tmp/largest") <= count + 50)) || because "with COUNT $count a reply had $(<"$tmp/largest") keys: others wait meanwhile"
    done
}

flush_and_fill() {
    if ((calls == 3)); then ask FLUSHALL | is OK; fi
    if ((calls == 3)); then fill small: 1 20; fi
}

@test "a FLUSHALL amid it, and cursors that nobody gave out, do SCAN no harm" {
    start_kv -s 1
    fill k 1 2000
    meanwhile=flush_and_fill
    (quickly scan COUNT 100)
    for cursor in 1 12345 4294967295 4294967296 9223372036854775807; do
        ask_soon "SCAN $cursor COUNT 1" | sed 1q | grep -Eqx '[0-9]+' || because "SCAN $cursor is to reply a cursor"
    done
    gets PING PONG && gets DBSIZE 20 || because "kv has not survived a strange cursor"
}

@test "SCAN takes MATCH, shows no expired key, and quotes keys that are not one word" {
    start_kv
    ask 'SET user:1 a' 'SET user:2 b' 'SET "a key" c' 'SET (x d' 'SET gone e PX 1' | is OK OK OK OK OK
    until [[ $(ask 'EXISTS gone') = 0 ]]; do sleep 0.01; done
    (quickly scan MATCH 'user:*' COUNT 100)
    sort -u "$tmp/keys" | is user:1 user:2 || because "MATCH is to leave only the keys that the pattern fits"
    (quickly scan count 20)
    sort -u "$tmp/keys" | is '"(x"' '"a key"' user:1 user:2 || because "as text a key is a word that can be sent back: see reply_word"
    resp SCAN 0 MATCH 'user:[12]' COUNT 1000 | nc -N -w 10 127.0.0.1 "$port" >"$tmp/out"
    sed -n '1p; 4p' "$tmp/out" | is $'*2\r' $'*2\r' && grep -c '^user:' "$tmp/out" | is 2 ||
        because "in RESP the reply is an array of a cursor, as a string, and an array of keys"
}

@test "a wrong SCAN has an error, in text and in RESP" {
    start_kv
    for cursor in x -1 9223372036854775808; do
        gets_error "SCAN $cursor" 'ERR invalid cursor' || because "a cursor is a number from 0 to 2^63 - 1"
    done
    for words in 'COUNT 0' COUNT MATCH 'NOSUCH 1'; do
        gets_error "SCAN 0 $words" 'ERR syntax error' || because "behind the cursor come MATCH pattern and COUNT n, n above 0"
    done
    gets_error 'SCAN 0 COUNT x' 'ERR value is not an integer or out of range' || because "COUNT is followed by a number"
}
