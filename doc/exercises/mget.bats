#!/usr/bin/env bats
# chapter: 8
# concept: a command on several shards
# level: 2
# lines: 18
# minutes: 60
# task: Build MGET key...: the value or null for each key, in order; as text the last line is (n values). A thousand values of a megabyte are never in memory all at once, and a thousand of a few bytes are not sent one by one.
#
# SC2030, SC2031: bats runs each test as a process. SC2154: common.bash sets it.
# shellcheck disable=SC2030,SC2031,SC2154

load common

@test "MGET has a row in the table of commands" {
    start_kv
    has_row MGET || because "HELP and the error for a wrong number of words come from the row of the command"
}

@test "MGET replies the values of keys in the order in which they were asked for" {
    start_kv
    ask 'SET a 1' 'SET b "x y"' 'SET c "(nil)"' | is OK OK OK
    gets 'MGET a b c a' 1 'x y' '"(nil)"' 1 '(4 values)' && gets 'mget b' 'x y' '(1 value)' ||
        because "each value is to be replied as GET does it, in the order of the keys"
    resp MGET b a | nc -N -w 10 127.0.0.1 "$port" | is $'*2\r' $'$3\r' $'x y\r' $'$1\r' $'1\r' ||
        because "in RESP the reply is an array: see list_start"
}

@test "for a key that is not there MGET replies null" {
    start_kv
    ask 'SET a 1' 'SET gone 1 PXAT 1' | is OK OK
    ask_soon 'MGET none a gone' | head -n 3 | is '(nil)' 1 '(nil)' &&
        resp MGET none a gone | nc -N -w 10 127.0.0.1 "$port" | tail -n +2 | is $'$-1\r' $'$1\r' $'1\r' $'$-1\r' &&
        { resp HELLO 3 && resp MGET none; } | nc -N -w 10 127.0.0.1 "$port" | tail -n 1 | is $'_\r' ||
        because "a key that is not there has no value, also no empty one: the reply for it is null"
}

@test "the number in the reply of MGET counts all keys that were asked for" {
    start_kv
    ask 'SET a 1' 'SET b 2' | is OK OK
    ask_soon 'MGET a none b' | tail -n 1 | is '(3 values)' && ask_soon 'MGET none' | tail -n 1 | is '(1 value)' &&
        resp MGET a none b | nc -N -w 10 127.0.0.1 "$port" | head -n 1 | is $'*3\r' ||
        because "a reply has as many values as were asked for, and null is one of them"
}

@test "what is written and read with MGET in one packet is answered in order" {
    start_kv
    ask 'SET k0 first' 'SET k1 first' 'SET k2 first' >"$tmp/out"
    seq 1000 | awk '{ printf "SET k%d %d\nMGET k%d k%d\n", $1 % 3, $1, $1 % 3, ($1 + 2) % 3 }' |
        timeout 10 nc -N 127.0.0.1 "$port" >"$tmp/out" || true
    seq 1000 | awk '{ print "OK\n" $1 "\n" ($1 < 2 ? "first" : $1 - 1) "\n(2 values)" }' | cmp - "$tmp/out" ||
        because "MGET is to see what was set before it, and nothing else"
}

@test "MGET of 100 MB does not need as much memory, also when a client takes none of it" {
    start_kv --fsync no
    { printf 'SET big ' && x 1000000 && echo; } | nc -N 127.0.0.1 "$port" | is OK
    all=$(printf ' big%.0s' {1..100})
    ask_soon "MGET$all" | tail -c 100 | is "$(x 86)" '(100 values)' || because "the reply ends before it is complete"
    exec {c}<>"/dev/tcp/127.0.0.1/$port"
    echo "MGET$all" >&"$c"
    ask_soon "MGET$all" | wc -c | is 100000113 || because "while one client takes none of its reply another gets no reply"
    ask_soon 'SET big 1' | is OK || because "a lock is held while a reply is sent"
    exec {c}>&-
    if [[ ${SANITIZER:-} || ! -e /proc/$pid/status ]]; then return; fi
    kb=$(sed -n 's/^VmHWM:[^0-9]*\([0-9]*\).*/\1/p' "/proc/$pid/status")
    ((kb < 50000)) || because "kv took $kb kB: send replies when IO_CHUNK bytes of them have gathered"
}

@test "MGET sends a thousand small values together" {
    start_spied_kv --fsync no
    seq 1000 | sed 's/.*/SET k& &/' | nc -N 127.0.0.1 "$port" | grep -c OK | is 1000
    before=$(sends)
    ask_soon "MGET$(printf ' k%d' {1..1000})" | cmp - <(seq 1000 && echo '(1000 values)') ||
        because "each value is to be replied as GET does it, in the order of the keys"
    count=$(($(sends) - before))
    echo "kv has called send $count times"
    ((count <= 10)) || because "each send costs more than the value: send replies when IO_CHUNK bytes of them have gathered"
}

@test "MGET counts as a read of each key: INFO has its hits and misses" {
    start_kv
    ask 'SET a 1' 'MGET a none a' 'MGET a' >"$tmp/out"
    ask INFO | grep -x 'keyspace_.*' | is keyspace_hits:3 keyspace_misses:1 ||
        because "MGET is to look up each key once, and its row has no flag WRITES"
}

@test "where the file cannot be written MGET is answered whole, and the SET before it as it should be" {
    start_kv
    ask 'SET a 1' | is OK
    prlimit --pid "$pid" --fsize="$(($(size_of "$tmp/aof") + 10)):"
    ask_soon 'SET a 2' 'MGET a a' | is '(error) MISCONF the append-only file cannot be written, the outcome is unknown' \
        2 2 '(2 values)' && ask_soon 'SET a 3' 'MGET a' |
        is '(error) MISCONF the append-only file cannot be written' 2 '(1 value)' ||
        because "replies that may become MISCONF must be sent before the first line of a list: see c->writes"
}
