#!/usr/bin/env bats
# on: lost-update
# chapter: 8
# expect: the clients come one after the other, so that none is between the read and the write of another
# fails: the broken kv fails them, each of three times
# says: your test passes on the broken kv
#
# SC2154: common.bash sets it.
# shellcheck disable=SC2154

load "$PWD/doc/exercises/common"

@test "what four clients add to one key is all there" {
    start_kv
    for _ in 1 2 3 4; do
        yes 'INCR n' | head -n 1000 | nc -N 127.0.0.1 "$port" >/dev/null
    done
    ask 'GET n' | is 4000
}
