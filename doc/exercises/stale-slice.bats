#!/usr/bin/env bats
# chapter: 3
# concept: how long a slice is valid
# level: 2
# lines: 7
# minutes: 60
# task: One of the words of a request is used after the memory that it points to has moved. Find out where, and write a test that fails because of it, and passes with a correct kv: not a fix, the test is what is asked for.
#
# HUNT names the file with the tests, KV a correct kv, BUG the broken one; set_hunt finds what is not given.
# Both programs are tested at the same path: its name does not tell which it is.
#
load common

setup_file() { set_hunt stale-slice; }

@test "there are tests, and a correct kv passes them, each of three times" {
    passes_the_correct_kv
}

@test "the broken kv fails them, each of three times" {
    fails_the_broken_kv
}
