#!/usr/bin/env bats
# chapter: 8
# concept: a row of the table is a command
# level: 1
# lines: 21
# minutes: 30
# task: Build SETEX key s value, PSETEX key ms value and SETNX key value, with the replies and errors of Redis 7.
#
# SC2030, SC2031: bats runs each test as a process. SC2154: common.bash sets it.
# shellcheck disable=SC2030,SC2031,SC2154

load common

@test "SETEX and PSETEX store a value with a deadline, SETNX only where there is no key, as in Redis 7" {
    start_kv
    {
        resp SETEX a 100 1 && resp TTL a && resp GET a && resp setex a 5 '' && resp GET a && resp TTL a
        resp PSETEX a 100400 2 && resp TTL a && resp SETNX a 3 && resp GET a && resp TTL a
        resp SETNX b 4 && resp GET b && resp TTL b && resp PSETEX b 1 5
    } | nc -N 127.0.0.1 "$port" | is $'+OK\r' $':100\r' $'$1\r' $'1\r' $'+OK\r' $'$0\r' $'\r' $':5\r' \
        $'+OK\r' $':100\r' $':0\r' $'$1\r' $'2\r' $':100\r' $':1\r' $'$1\r' $'4\r' $':-1\r' $'+OK\r' ||
        because 'a value, a deadline or a reply is another one than that of Redis'
    wait_until key_is b '(nil)'
    ask 'SETNX b 6' 'SETEX b 100 7' 'GET b' | is 1 OK 7
    loads_the_same 'GET a' 'GET b' DBSIZE
}

key_is() { [[ $(ask "GET $1") = "$2" ]]; } # KEY REPLY

@test "a wrong SETEX, PSETEX or SETNX has one exact error, in text and in RESP, and changes nothing" {
    start_kv
    ask 'SET a 1' | is OK
    wrong=(
        'SETEX a 0 2' "ERR invalid expire time in 'setex' command"
        'SETEX a -1 2' "ERR invalid expire time in 'setex' command"
        'SETEX a 9223372036854775807 2' "ERR invalid expire time in 'setex' command"
        'PSETEX a 0 2' "ERR invalid expire time in 'psetex' command"
        'PSETEX a 9223372036854775807 2' "ERR invalid expire time in 'psetex' command"
        'SETEX a x 2' 'ERR value is not an integer or out of range'
        'PSETEX a 1.5 2' 'ERR value is not an integer or out of range'
        'SETEX a 100' "ERR wrong number of arguments for 'setex' command: SETEX key s value"
        'SETEX a 100 2 NX' "ERR wrong number of arguments for 'setex' command: SETEX key s value"
        'PSETEX' "ERR wrong number of arguments for 'psetex' command: PSETEX key ms value"
        'SETNX a' "ERR wrong number of arguments for 'setnx' command: SETNX key value"
        'SETNX a 2 3' "ERR wrong number of arguments for 'setnx' command: SETNX key value"
    )
    each_is_wrong "${wrong[@]}" || because 'a wrong request got another reply than its error'
    ask 'GET a' 'TTL a' DBSIZE | is 1 -1 1
}
