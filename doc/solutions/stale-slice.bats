#!/usr/bin/env bats
# chapter: 3
# expect: the words of the first half are read where other bytes are by now
#
# SC2154: common.bash sets it.
# shellcheck disable=SC2154

load ../exercises/common

# In one packet there is a whole request before the half one: when the rest arrives, kv moves the half
# to the beginning of its buffer.
@test "a long array that arrives in two halves has the words that were sent" {
    start_kv
    mapfile -t keys < <(seq -f 'key:%.0f' 200)
    printf 'SET %s 1\n' "${keys[@]}" | nc -N 127.0.0.1 "$port" >"$tmp/out"
    { resp PING && resp EXISTS "${keys[@]}"; } >"$tmp/request"
    exec {c}<>"/dev/tcp/127.0.0.1/$port"
    head -c 2000 "$tmp/request" >"$tmp/half"
    cat "$tmp/half" >&"$c"
    read -r -t 10 -u "$c" line
    [[ $line = +PONG* ]]
    tail -c +2001 "$tmp/request" >&"$c"
    read -r -t 10 -u "$c" line
    [[ $line = :200* ]]
}
