#!/usr/bin/env bats
# on: kill-mutants
# chapter: 8
# expect: it tries what everybody tries, nothing at a limit: each mutant passes this
# fails: seven of ten mutants are caught
# says: your tests catch too few of the mutants
#
# SC2154: common.bash sets it.
# shellcheck disable=SC2154

load "$PWD/doc/exercises/common"

@test "SET stores, GET looks up, DEL removes" {
    start_kv
    ask 'SET a 1' 'GET a' 'DEL a' 'GET a' | is OK 1 1 '(nil)'
}
