#!/usr/bin/env bats
# chapter: 8
# concept: a critical section that is too short
# level: 2
# lines: 11
# minutes: 45
# task: Counters sometimes are lower than they should be, and ThreadSanitizer has nothing to say. Find out when, and write a test that fails because of it each time, and passes with a correct kv: not a fix, the test is what is asked for.
#
# HUNT names the file with the tests, KV a correct kv, BUG the broken one; set_hunt finds what is not given.
# Both programs are tested at the same path: its name does not tell which it is.
#
load common

setup_file() { set_hunt lost-update; }

@test "there are tests, and a correct kv passes them, each of three times" {
    passes_the_correct_kv
}

@test "the broken kv fails them, each of three times" {
    fails_the_broken_kv
}
