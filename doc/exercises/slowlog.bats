#!/usr/bin/env bats
# chapter: 8
# concept: bounded memory for many threads
# level: 3
# lines: 82
# minutes: 180
# task: Build SLOWLOG GET [n], SLOWLOG LEN and SLOWLOG RESET. They are about the last 128 commands that took as many microseconds as the new option --slowlog-us says (10000 if not given; 0: all), except SLOWLOG itself. GET replies the last n (10 if not given), the newest first, each as a line "number=7 time=1700000000 us=12 client=3 SET a 1": a number that counts up from 1, the time since 1970 in s, how long it took, the id of the connection as HELLO shows it, and the words as -vv logs them. RESET removes all, and the numbers go on.
# needs: linux
#
# SC2016: an awk program. SC2030, SC2031: bats runs each test as a process. SC2154: common.bash sets it.
# shellcheck disable=SC2016,SC2030,SC2031,SC2154

load common

start_slow() { start_kv --fsync no --slowlog-us 0 "$@" || because "kv does not start with --slowlog-us 0"; } # OPTION...

talk() { timeout 50 nc -N 127.0.0.1 "$port"; }

# Whether the last commands are these, the newest first.
shows() { # WORDS...
    ask_soon "SLOWLOG GET $#" >"$tmp/shown"
    sed -E 's/^number=[0-9]+ time=[0-9]{10} us=[0-9]+ client=[0-9]+ //' "$tmp/shown" >"$tmp/words"
    if (($# == 1)); then set -- "$@" '(1 command)'; else set -- "$@" "($# commands)"; fi
    is "$@" <"$tmp/words" || { cat "$tmp/shown" && return 1; }
}

memory() { awk '/^VmRSS/ { print $2 }' "/proc/$pid/status"; } # in KiB

@test "SLOWLOG has a row, and --slowlog-us is an option" {
    start_slow
    has_row SLOWLOG || because "HELP and the error for a wrong number of words come from the row of the command"
    gets_error 'SLOWLOG NOSUCH' 'ERR syntax error' && gets_error 'SLOWLOG LEN 1' 'ERR syntax error' &&
        gets_error 'SLOWLOG GET x' 'ERR value is not an integer or out of range' || because "a wrong word gets an error"
}

@test "with --slowlog-us 0 each command is there, the newest first, except SLOWLOG" {
    start_slow
    ask 'SET a "hello world"' 'GET a' HELLO | grep '^id:' >"$tmp/id"
    shows HELLO 'GET a' 'SET a "hello world"' ||
        because "each line is as the task says it, and the newest command comes first"
    grep -q "^number=3 .* client=$(sed 's/id://' "$tmp/id") HELLO" "$tmp/shown" ||
        because "the number counts the commands from 1, and client is the id that HELLO shows"
    gets 'SLOWLOG LEN' 3 || because "SLOWLOG is not in the slow log, so that to look changes nothing"
    resp SLOWLOG GET 1 | talk | head -n 1 | is $'*1\r' || because "in RESP the reply is a list: list_start has its length"
}

@test "a command that was faster than --slowlog-us is not there" {
    start_slow --slowlog-us 2000000000
    gets 'SET a 1' OK && gets 'SLOWLOG LEN' 0 && gets 'SLOWLOG GET' '(0 commands)' ||
        because "SLOWLOG has commands that took less than --slowlog-us, of about half an hour"
}

@test "the last 128 are there, and after RESET none" {
    start_slow
    seq -f 'ECHO %.0f' 1000 | talk >"$tmp/out"
    gets 'SLOWLOG LEN' 128 || because "128 commands are kept, not more and not less"
    ask_soon 'SLOWLOG GET 1000' | sed -E 's/ .* / /' |
        is "$(seq 1000 -1 873 | sed 's/.*/number=& &/')" '(128 commands)' || because "the last 128 are there, the newest first"
    ask_soon 'SLOWLOG GET' | tail -n 1 | is '(10 commands)' || because "without a number GET replies ten"
    gets 'SLOWLOG RESET' OK && gets 'SLOWLOG LEN' 0 && gets 'SLOWLOG GET' '(0 commands)' || because "RESET removes all"
    gets PING PONG && shows PING && grep -q '^number=1001 ' "$tmp/shown" || because "after RESET the numbers go on"
}

@test "the slow log needs no more memory after many commands than after few" {
    start_slow
    words="ECHO $(x 500)"
    yes "$words" | head -n 2000 | talk >"$tmp/out"
    before=$(memory)
    many=100000 && if [[ ${SANITIZER:-} ]]; then many=5000; fi # there memory says nothing about kv
    yes "$words" | head -n "$many" | talk >"$tmp/out"
    more=$(($(memory) - before))
    [[ ${SANITIZER:-} ]] || ((more < 6000)) ||
        because "the slow log takes more memory with each command: $more KiB more after $many"
    yes "SET big $(x 100000)" | head -n 130 | talk >"$tmp/out"
    (($(ask_soon 'SLOWLOG GET 128' | wc -c) < 128 * 700)) ||
        because "a long word is shown cut off, as -vv logs it, or one command could take megabytes"
}

@test "no password is there" {
    echo 'the password' >"$tmp/password"
    chmod 600 "$tmp/password"
    start_slow --password-file "$tmp/password"
    ask_soon 'AUTH wrong' 'AUTH "the password"' 'HELLO 2 AUTH default "the password"' 'SLOWLOG GET 128' >"$tmp/out"
    tail -n 1 "$tmp/out" | is '(3 commands)' || because "AUTH and HELLO are commands, too"
    ! grep -E 'password"|wrong$' "$tmp/out" || because "SLOWLOG shows a password: -vv of kv does not"
}

# Each client sends its letter, and a number that grows. So do the numbers of the slow log.
consistent='
    /^number=/ {
        number = substr($1, 8); letter = substr($6, 1, 1); n = substr($6, 2) + 0
        if (NF != 6 || $5 != "ECHO" || number in seen && seen[number] != $4 $6) wrong = wrong ? wrong : $0
        seen[number] = $4 $6
        if ($4 in letters && letters[$4] != letter || $4 in last && last[$4] <= n) wrong = wrong ? wrong : $0
        letters[$4] = letter; last[$4] = n; lines++
        next
    }
    { delete last }
    END { if (wrong) print wrong; exit !!wrong || !lines }'

# Each of six clients sends commands until the file $tmp/stop is there, but at most 20000.
write_commands() { # LETTER
    awk -v letter="$1" -v stop="$tmp/stop" 'BEGIN {
        do for (i = 0; i < 50; i++) print "ECHO " letter (++n); while (n < 20000 && (getline line <stop) < 0)
    }' 2>/dev/null | talk >"$tmp/out.$1"
}

has_128() { [[ $(ask_soon 'SLOWLOG LEN') = 128 ]]; }

@test "each line is of one command, while many clients add some" {
    start_slow
    clients=()
    for letter in a b c d e f; do
        write_commands "$letter" &
        clients+=("$!")
    done
    wait_until has_128 || because "there are not yet 128 commands, though six clients send some"
    yes 'SLOWLOG GET 20' | head -n 4000 | talk >"$tmp/slow"
    : >"$tmp/stop"
    wait "${clients[@]}" || because "a client has waited in vain for its replies"
    awk "$consistent" "$tmp/slow" ||
        because "a line has the number of one command and the words of another: is an entry written and read with a lock, all of it?"
    count=$(cat "$tmp"/out.? | wc -l)
    ask_soon 'SLOWLOG GET 1' | grep -q "^number=$count " || because "the last of $count commands does not have this number"
}
