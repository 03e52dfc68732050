#!/usr/bin/env bats
# on: lost-update
# chapter: 8
# expect: the sum is read before all clients are done
# fails: there are tests, and a correct kv passes them, each of three times
# says: your test fails on a correct kv
#
# SC2154: common.bash sets it.
# shellcheck disable=SC2154

load "$PWD/doc/exercises/common"

@test "what four clients add to one key is all there" {
    start_kv
    for _ in 1 2 3 4; do
        { echo 'INCR n' && sleep 1; } | nc -N 127.0.0.1 "$port" >/dev/null &
    done
    ask 'GET n' | is 4000
}
