#!/usr/bin/env bats
# on: kill-mutants
# chapter: 8
# expect: it takes for a mutant what kv does not promise: in which order KEYS lists the keys; that differs from server to server, and so from run to run
# fails: there are tests, and three correct servers pass them, each of five times
# says: your tests fail on a correct kv
#
# SC2154: common.bash sets it.
# shellcheck disable=SC2154

load "$PWD/doc/exercises/common"

@test "KEYS lists the keys as they were stored" {
    start_kv
    ask 'SET a 1' 'SET b 2' 'SET c 3' KEYS | is OK OK OK a b c '(3 keys)'
}
