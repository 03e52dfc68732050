#!/usr/bin/env bats
# Here go tests that every correct kv passes, each time, and that mutants of it do not. To try them:
#
#     KV=./kv bats kv-exercise/kill-mutants.bats
#
# doc/exercises/common.bash says what start_kv, ask, is and resp do; the other files there use them.
# Hand in this file alone. It is graded in kv-exercise/ of a clean checkout, so leave the line with load.

load ../doc/exercises/common

@test "the name of a test says what kv promises" {
    start_kv -s 1
    ask 'SET a 1' 'GET a' | is OK 1
}
