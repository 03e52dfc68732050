#!/usr/bin/env bats
# on: stale-slice
# chapter: 3
# expect: the reply of EXISTS counts a key twice that is named twice
# fails: there are tests, and a correct kv passes them, each of three times
# says: your test fails on a correct kv
#
# SC2154: common.bash sets it.
# shellcheck disable=SC2154

load "$PWD/doc/exercises/common"

@test "EXISTS counts the keys of a long array" {
    start_kv
    mapfile -t keys < <(seq -f 'key:%.0f' 200)
    printf 'SET %s 1\n' "${keys[@]}" | nc -N 127.0.0.1 "$port" >"$tmp/out"
    { resp PING && resp EXISTS "${keys[@]}" "${keys[@]}"; } | nc -N 127.0.0.1 "$port" | tail -n 1 | is $':200\r'
}
