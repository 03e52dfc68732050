#!/usr/bin/env bats
# Here go tests that every correct kv passes, each time, and that mutants of it do not. To try them:
#
#     KV=./kv bats kv-exercise/kill-mutants.bats
#
# doc/exercises/common.bash says what start_kv, ask, is and resp do; the other files there use them.

load ../doc/exercises/common

@test "the name of a test says what kv promises" {
    start_kv -s 1
    ask 'SET a 1' 'GET a' | is OK 1
}
