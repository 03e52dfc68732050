#!/usr/bin/env bats
# chapter: 3
# expect: the words of the first half are read where other bytes are by now
#
# SC2154: common.bash sets it.
# shellcheck disable=SC2154

load "$PWD/doc/exercises/common"

# The buffer moves to larger and larger blocks as the array arrives. MALLOC_PERTURB_ has glibc fill the
# blocks that are freed.
@test "a long array has the words that were sent" {
    MALLOC_PERTURB_=165 start_kv
    mapfile -t keys < <(seq -f "$(x 2000):%.0f" 200)
    printf 'SET %s 1\n' "${keys[@]}" | nc -N 127.0.0.1 "$port" >"$tmp/out"
    resp EXISTS "${keys[@]}" | nc -N -w 10 127.0.0.1 "$port" | is $':200\r'
}
