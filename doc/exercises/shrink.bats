#!/usr/bin/env bats
# chapter: 6
# concept: a table that becomes smaller
# level: 3
# lines: 20
# minutes: 90
# task: Let the table of a shard become smaller as its keys go, by DEL as well as by expiry. INFO shows two new fields: table_buckets, the sum of the sizes of all tables, and table_resizes, how often a table got other buckets, more or less. Once it is done, there are at most 16 buckets per shard or 10 per key, and a key that comes and goes seldom makes a table resize.
#
# SC2030, SC2031: bats runs each test as a process. SC2154: common.bash sets it.
# shellcheck disable=SC2030,SC2031,SC2154

load common

info() { ask_soon INFO | sed -n "s/^$1://p"; } # FIELD

# MALLOC_PERTURB_ makes glibc fill what is freed, so that what is read from there is wrong each time.
start_one_shard() { MALLOC_PERTURB_=165 start_kv -s 1 --fsync no; }

send_all() { timeout 15 nc -N 127.0.0.1 "$port" >"$tmp/out"; } # requests come from stdin

has_shrunk() { (($(info table_buckets) <= $1)); } # BUCKETS

@test "INFO shows table_buckets and table_resizes" {
    start_one_shard
    [[ $(info table_buckets) = 0 && $(info table_resizes) = 0 ]] ||
        because "before the first key table_buckets and table_resizes are 0"
    seq -f 'SET k%.0f v' 1000 | send_all
    (($(info table_buckets) >= 256)) || because "with a thousand keys in a table its size, table_buckets, is not so small"
    (($(info table_resizes) >= 4)) || because "table_resizes also counts how often a table has grown"
}

@test "as keys are deleted the table becomes smaller" {
    start_one_shard
    seq -f 'SET k%.0f v' 10000 | send_all
    seq -f 'DEL k%.0f' 9900 | send_all
    has_shrunk 1000 || because "100 of 10000 keys are left, but there are $(info table_buckets) buckets: at most 10 per key"
    seq -f 'DEL k%.0f' 9901 10000 | send_all
    has_shrunk 16 || because "no key is left, but there are $(info table_buckets) buckets: at most 16 in a shard"
    seq -f 'SET k%.0f v' 10000 | send_all
    gets DBSIZE 10000 || because "a table that has become smaller can grow again"
}

@test "as keys expire the table becomes smaller" {
    start_one_shard
    seq -f 'SET k%.0f v PX 1' 10000 | send_all
    wait_until has_shrunk 16 || because "all keys have expired, but there are $(info table_buckets) buckets"
}

@test "a table that has become smaller holds the keys that are left, and no others" {
    start_one_shard
    seq -f 'SET k%.0f v%.0f' 3000 | send_all || true
    for last in 1500 2500 2900 2990; do
        seq -f 'DEL k%.0f' "$last" | send_all || true
        { ask_soon KEYS | sort | cmp - <({ seq -f 'k%.0f' $((last + 1)) 3000 && echo "($((3000 - last)) keys)"; } | sort) &&
            seq -f 'EXISTS k%.0f' 3000 | send_all && [[ $(paste -s -d + "$tmp/out" | bc) = "$((3000 - last))" ]]; } >"$tmp/differ" ||
            because "after the table has become smaller it does not hold the keys that are left: is a pointer into the old buckets still used?"
    done
}

# Up and down again, and at each number of keys 20 more that come and go, and 20 changes of a value.
@test "a key that comes and goes seldom makes the table resize, however many keys there are" {
    start_one_shard
    {
        seq 300 | awk '{ print "SET k" $1 " v" } END { for (n = 300; n > 0; n--) print "DEL k" n }'
    } | awk '{ print; for (i = 0; i < 20; i++) printf "SET x 1\nDEL x\nSET k1 %d\n", 10 ^ (i % 2); print "DEL x" }' | send_all
    count=$(info table_resizes)
    ((count > 0 && count <= 30)) ||
        because "the number of keys at which the table halves is too near to the one at which it doubles: $count resizes, 30 are plenty"
}

@test "many clients at once, whose keys come and go, find what they have stored" {
    start_kv -s 2 --fsync no
    clients=()
    for c in {1..8}; do
        awk -v c="$c" 'BEGIN { for (round = 1; round <= 4; round++) {
            for (i = 1; i <= 500; i++) printf "SET %d:%d %d\n", c, i, i
            for (i = 1; i <= 500; i++) printf "GET %d:%d\nDEL %d:%d\n", c, i, c, i } }' |
            timeout 15 nc -N 127.0.0.1 "$port" >"$tmp/out.$c" &
        clients+=("$!")
    done
    wait "${clients[@]}" || because "a client has waited in vain for its replies"
    awk 'BEGIN { for (round = 1; round <= 4; round++) {
        for (i = 1; i <= 500; i++) print "OK"
        for (i = 1; i <= 500; i++) printf "%d\n1\n", i } }' >"$tmp/right"
    for c in {1..8}; do cmp "$tmp/out.$c" "$tmp/right" || because "a client did not get what it has stored"; done
    gets DBSIZE 0 && has_shrunk 32 || because "all keys are gone, but the tables are not small: $(info table_buckets) buckets"
}
