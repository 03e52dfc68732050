#!/usr/bin/env bats
# on: stale-slice
# chapter: 3
# expect: a small array is read from its beginning again when its rest arrives, so no slice is kept
# fails: the broken kv fails them, each of three times
# says: your test passes on the broken kv
#
# SC2154: common.bash sets it.
# shellcheck disable=SC2154

load "$PWD/doc/exercises/common"

@test "an array that arrives in two halves has the words that were sent" {
    start_kv
    resp SET key value >"$tmp/request"
    exec {c}<>"/dev/tcp/127.0.0.1/$port"
    head -c 20 "$tmp/request" >"$tmp/half"
    cat "$tmp/half" >&"$c"
    sleep 0.1
    tail -c +21 "$tmp/request" >&"$c"
    read -r -t 10 -u "$c" line
    [[ $line = +OK* ]]
    ask 'GET key' | is value
}
