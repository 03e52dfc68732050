#!/usr/bin/env bats
# chapter: 1
# concept: options, and the order of things at the start and the end
# level: 1
# lines: 13
# minutes: 45
# task: Build --pidfile FILE: once the port is open kv writes its process id and a newline into FILE, and a clean end removes it. If FILE cannot be written kv ends with status 1 and says why.
#
# SC2030, SC2031: bats runs each test as a process. SC2154: common.bash sets it.
# shellcheck disable=SC2030,SC2031,SC2154

load common

start_with_pidfile() { # waits until the file has the process id
    start_kv --pidfile "$tmp/pid" || because "kv does not start with the option --pidfile" || return 1
    soon has_pid || because "kv runs, but the file does not hold its process id: see getpid"
}

soon() { # COMMAND...: tries it for some 3 s
    for _ in {1..300}; do
        if "$@"; then return; fi
        sleep 0.01
    done
    return 1
}

has_pid() { [[ $(cat "$tmp/pid" 2>/dev/null) = "$pid" ]]; }

@test "--help has a line about --pidfile" {
    "$KV" --help | grep -E '^ +--pidfile +FILE +.+' || because "a row of options says all about an option, also what --help prints"
}

@test "while kv runs the file has its process id, and nothing else" {
    start_with_pidfile
    echo "$pid" | cmp - "$tmp/pid" || because "the file is to hold the process id and a newline, nothing else"
}

@test "a kv that cannot have its port leaves the file of the one that has it alone" {
    start_with_pidfile
    for file in pid other; do
        code=0
        timeout 10 "$KV" -p "$port" --pidfile "$tmp/$file" </dev/null 2>"$tmp/second" || code=$?
        ((code == 1)) || because "a kv whose port is in use ends with status 1, this one with status $code"
        { has_pid && [[ ! -e $tmp/other ]]; } ||
            because "write the file only when the port is open: this kv found its port in use and wrote the file before"
    done
}

@test "a clean end, by SIGTERM or SIGINT, removes the file" {
    for signal in TERM INT; do
        start_with_pidfile
        stop_kv "$signal"
        [[ $status = 0 ]] || because "kv ended with status $status, not 0"
        [[ ! -e $tmp/pid ]] || because "kv ended after a signal, but its file is still there"
    done
}

has_written() { grep -q "^$pid" "$tmp/pid"; }

@test "a file that kill -9 has left is written anew" {
    start_with_pidfile
    stop_kv KILL
    echo 'a long line that is left of an earlier time' >>"$tmp/pid"
    start_kv --pidfile "$tmp/pid"
    soon has_written && echo "$pid" | cmp - "$tmp/pid" ||
        because "a file that is there already is replaced, all of it"
}

@test "if the file cannot be written kv ends with status 1 and names it" {
    code=0
    timeout 10 "$KV" -p 0 --pidfile "$tmp/none/pid" </dev/null 2>"$tmp/second" || code=$?
    ((code == 1)) || because "kv is to end with status 1, not $code, where it cannot write the file"
    grep -q "ERROR.*$tmp/none/pid" "$tmp/second" || because "the last line of the log is to name the file"
}
