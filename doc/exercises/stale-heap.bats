#!/usr/bin/env bats
# chapter: 7
# concept: an index that must follow what it points to
# level: 2
# lines: 8
# minutes: 60
# task: TTL, PERSIST or DEL of one key sometimes is about the deadline of another. Find out when, and write a test that fails because of it, and passes with a correct kv: not a fix, the test is what is asked for.
#
# HUNT names the file with the tests, KV a correct kv, BUG the broken one; set_hunt finds what is not given.
# Both programs are tested at the same path: its name does not tell which it is.
#
# SC2154: common.bash sets it.
# shellcheck disable=SC2154

load common

setup_file() { set_hunt stale-heap; }

@test "there are tests, and a correct kv passes them, each of three times" {
    hunt_with "$KV"
    ((tests > 0)) || because "there is no test in your file that bats can run"
    ((skipped == 0)) || because "a test that is skipped finds nothing"
    for times in 1 2 3; do
        ((failed == 0)) || because "your test fails on a correct kv, in run $times of 3"
        if ((times < 3)); then hunt_with "$KV"; fi
    done
}

@test "the broken kv fails them, each of three times" {
    for times in 1 2 3; do
        hunt_with "$BUG"
        ((failed > 0)) || because "your test passes on the broken kv, in run $times of 3"
    done
}
