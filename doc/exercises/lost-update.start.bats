#!/usr/bin/env bats
# Here go tests that a correct kv passes and the broken one, kv-exercise/kv, does not. To try them:
#
#     make -C kv-exercise
#     make && KV=./kv bats kv-exercise/lost-update.bats       must pass
#     KV=kv-exercise/kv bats kv-exercise/lost-update.bats     must fail
#
# doc/exercises/common.bash says what start_kv, ask, is and resp do; the other files there use them.

load ../doc/exercises/common

@test "the name of a test says what kv promises" {
    start_kv -s 1
    ask 'SET a 1' 'GET a' | is OK 1
}
