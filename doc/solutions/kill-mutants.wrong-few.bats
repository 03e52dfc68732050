#!/usr/bin/env bats
# on: kill-mutants
# chapter: 8
# expect: what is asked is what every mutant does right
# fails: seven of ten mutants are caught
# says: your tests catch too few of the mutants
#
# SC2154: common.bash sets it. SC2119: start_kv may have no options.
# shellcheck disable=SC2154,SC2119

load ../exercises/common

@test "SET and GET" {
    start_kv
    ask 'SET a 1' 'GET a' | is OK 1
}
