#!/usr/bin/env bats
# chapter: 7
# expect: after a removal the key that moves up in the heap shows the deadline of another
#
# SC2154: common.bash sets it.
# shellcheck disable=SC2154

load "$PWD/doc/exercises/common"

@test "each key keeps its deadline when others are removed" {
    start_kv -s 1
    ask 'SET a 1 EXAT 4000000001' 'SET b 2 EXAT 4000000002' 'SET c 3 EXAT 4000000003' 'DEL a' | is OK OK OK 1
    ask 'TTL b' 'TTL c' >"$tmp/ttl"
    mapfile -t ttl <"$tmp/ttl"
    ((ttl[0] < ttl[1]))
}
