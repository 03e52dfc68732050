#!/usr/bin/env bats
# on: stale-heap
# chapter: 7
# expect: no deadline is taken out of the heap, so none moves up
# fails: the broken kv fails them, each of three times
# says: your test passes on the broken kv
#
# SC2154: common.bash sets it.
# shellcheck disable=SC2154

load "$PWD/doc/exercises/common"

@test "each key has a deadline of its own" {
    start_kv -s 1
    ask 'SET a 1 EXAT 4000000001' 'SET b 2 EXAT 4000001002' 'SET c 3 EXAT 4000002003' | is OK OK OK
    ask 'TTL b' 'TTL c' >"$tmp/ttl"
    mapfile -t ttl <"$tmp/ttl"
    ((ttl[0] < ttl[1]))
}
