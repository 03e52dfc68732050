#!/usr/bin/env bats
# chapter: 8
# expect: the sum is lower than the number of requests
#
# SC2154: common.bash sets it.
# shellcheck disable=SC2154

load "$PWD/doc/exercises/common"

@test "what many clients add to one key at once is all there" {
    start_kv
    clients=()
    for _ in {1..8}; do
        yes 'INCR n' | head -n 5000 | nc -N 127.0.0.1 "$port" >/dev/null &
        clients+=("$!")
    done
    wait "${clients[@]}"
    ask 'GET n' | is 40000
}
