#!/usr/bin/env bats
# on: stale-heap
# chapter: 7
# expect: a key that was removed has no deadline, but TTL replies -2, not -1
# fails: there are tests, and a correct kv passes them, each of three times
# says: your test fails on a correct kv
#
# SC2154: common.bash sets it.
# shellcheck disable=SC2154

load "$PWD/doc/exercises/common"

@test "a key that was removed has no deadline" {
    start_kv -s 1
    ask 'SET a 1 EXAT 4000000001' 'SET b 2 EXAT 4000000002' 'DEL a' | is OK OK 1
    ask 'TTL a' | is -1
}
