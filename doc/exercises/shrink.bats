#!/usr/bin/env bats
# chapter: 6
# concept: a table that becomes smaller
# level: 3
# lines: 17
# minutes: 90
# task: Let the table of a shard become smaller as its keys go, by DEL as well as by expiry. INFO shows two new fields: table_buckets, the sum of the sizes of all tables, and table_resizes, how often a table got other buckets, more or less. Once it is done, there are at most 16 buckets per shard or 10 per key, and a key that comes and goes seldom makes a table resize.
#
# SC2030, SC2031: bats runs each test as a process. SC2154: common.bash sets it.
# shellcheck disable=SC2030,SC2031,SC2154

load common

info() { ask_soon INFO | sed -n "s/^$1://p"; } # FIELD: nothing if kv does not answer

# MALLOC_PERTURB_ makes glibc fill what is freed, so that what is read from there is wrong each time.
start_one_shard() { MALLOC_PERTURB_=165 start_kv -s 1 --fsync no; }

send_all() { # requests come from stdin
    timeout 15 nc -N 127.0.0.1 "$port" >"$tmp/out" || because "kv does not reply any more: has it crashed?"
}

are_few() { # BUCKETS WHEN: whether there are no more
    buckets=$(info table_buckets)
    [[ $buckets ]] || because "INFO shows no table_buckets, or kv has crashed" || return
    ((buckets <= $1)) || because "$2 there are $buckets buckets, and $1 are enough"
}

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
    are_few 1000 "100 of 10000 keys are left, but"
    seq -f 'DEL k%.0f' 9901 10000 | send_all
    are_few 16 "no key is left, but"
    seq -f 'SET k%.0f v' 10000 | send_all
    gets DBSIZE 10000 || because "a table that has become smaller can grow again"
}

are_gone() { gone "$pid" || gets DBSIZE 0; }

@test "as keys expire the table becomes smaller" {
    start_one_shard
    seq -f 'SET k%.0f v PX 1' 10000 | send_all
    wait_until are_gone >"$tmp/waited" || because "10000 keys that expire in 1 ms are still there"
    are_few 16 "all keys have expired, but"
}

@test "a table that has become smaller holds the keys that are left, and no others" {
    start_one_shard
    seq 3000 | sed 's/.*/SET k& v&/' | send_all
    for last in 1500 2500 2900 2990; do
        seq -f 'DEL k%.0f' "$last" | send_all >"$tmp/sent" || true
        { ask_soon KEYS | sort | cmp - <({ seq -f 'k%.0f' $((last + 1)) 3000 && echo "($((3000 - last)) keys)"; } | sort) &&
            seq -f 'GET k%.0f' 3000 | send_all && awk -v last="$last" 'NR > last { n += $0 == "v" NR } NR <= last { n += $0 == "(nil)" }
                END { exit n != 3000 }' "$tmp/out"; } >"$tmp/differ" ||
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
    [[ $count ]] || because "INFO shows no table_resizes, or kv has crashed"
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
    gets DBSIZE 0 || because "each key was deleted, but some are left"
    are_few 32 "no key is left in two shards, but"
}
