#!/usr/bin/env bats
# chapter: 8
# concept: a command on several shards
# level: 2
# lines: 18
# minutes: 45
# task: Build MGET key...: the value or null for each key, in order. A thousand values of a megabyte are never in memory all at once.
#
# SC2030, SC2031: bats runs each test as a process. SC2154: common.bash sets it.
# shellcheck disable=SC2030,SC2031,SC2154

load common

@test "MGET replies a value or null for each key, in order: in text, RESP2 and RESP3" {
    start_kv
    ask 'SET a 1' 'SET b "x y"' 'SET c "(nil)"' 'SET gone 1 PXAT 1' | is OK OK OK OK
    ask 'MGET a none gone b c a' 'MGET a' 'mget none' | is 1 '(nil)' '(nil)' 'x y' '"(nil)"' 1 '(6 values)' \
        1 '(1 value)' '(nil)' '(1 value)'
    { resp MGET a none b && resp HELLO 3 && resp MGET none a && resp MGET; } | nc -N 127.0.0.1 "$port" >"$tmp/out"
    head -n 6 "$tmp/out" | is $'*3\r' $'$1\r' $'1\r' $'$-1\r' $'$3\r' $'x y\r'
    tail -n 5 "$tmp/out" | is $'*2\r' $'_\r' $'$1\r' $'1\r' \
        "-ERR wrong number of arguments for 'mget' command: MGET key..."$'\r'
    ask INFO | grep -cFx -e keyspace_hits:8 -e keyspace_misses:5 | is 2
}

@test "what is written and read with MGET in one packet is answered in order" {
    start_kv
    awk 'BEGIN { for (i = 1; i <= 1000; i++) printf "SET k%d %d\nMGET k%d k%d none\n", i % 7, i, i % 7, (i + 1) % 7 }' |
        nc -N 127.0.0.1 "$port" >"$tmp/out"
    awk 'BEGIN { for (i = 1; i <= 1000; i++) {
        print "OK\n" i "\n" (i < 7 ? "(nil)" : i - 6) "\n(nil)\n(3 values)" } }' | cmp - "$tmp/out"
}

@test "MGET of 100 MB does not need as much memory, also when a client takes none of it" {
    start_kv --fsync no
    { printf 'SET big ' && x 1000000 && echo; } | nc -N 127.0.0.1 "$port" | is OK
    all=$(printf ' big%.0s' {1..100})
    ask "MGET$all" | tail -c 100 | is "$(x 86)" '(100 values)'
    exec {c}<>"/dev/tcp/127.0.0.1/$port"
    echo "MGET$all" >&"$c"
    ask "MGET$all" | wc -c | is 100000113
    exec {c}>&-
    if [[ ! ${SANITIZER:-} ]]; then (($(sed -n 's/^VmHWM:[^0-9]*\([0-9]*\).*/\1/p' "/proc/$pid/status") < 50000)); fi
    ask PING | is PONG
}

@test "where the file cannot be written, MGET is answered whole, and the SET before it as it should be" {
    start_kv
    ask 'SET a 1' | is OK
    prlimit --pid "$pid" --fsize="$(($(size_of "$tmp/aof") + 10)):"
    ask 'SET a 2' 'MGET a none' | is '(error) MISCONF the append-only file cannot be written, the outcome is unknown' \
        2 '(nil)' '(2 values)'
    ask 'SET a 3' 'MGET a' | is '(error) MISCONF the append-only file cannot be written' 2 '(1 value)'
}
