#!/usr/bin/env bats
# chapter: 9
# concept: who owns a connection
# level: 3
# lines: 63
# minutes: 150
# task: Build CLIENT LIST: for each connection, in any order, a line "id=3 addr=127.0.0.1:50123 age=12 cmd=GET": the id that HELLO shows, the address of the client, for how many seconds it is connected, and the last command that it had run, as the table of commands spells it, or - if there was none. In text a line (n clients) ends the list; in RESP all lines are one string, as in INFO.
# replaces: COMMAND, CONFIG and CLIENT are unknown commands|what redis-py 8, node-redis 6
# needs: linux
#
# SC2030, SC2031: bats runs each test as a process. SC2154: common.bash sets it.
# shellcheck disable=SC2030,SC2031,SC2154

load common

# MALLOC_PERTURB_ makes glibc fill what is freed. A list that goes round in a circle shall not take
# all memory. $asker is a connection that asks for the list, the first one.
start_listing() { # OPTION...
    MALLOC_PERTURB_=165 start_kv --fsync no "$@"
    if [[ ! ${SANITIZER:-} ]]; then prlimit --pid "$pid" --as=1000000000; fi
    connect
    asker=$c
    says "$asker" PING
}

connect() { exec {c}<>"/dev/tcp/127.0.0.1/$port"; } # sets $c

disconnect() { # FD
    local fd=$1
    exec {fd}>&-
}

# Sends a line and waits for a line of reply.
says() { # FD LINE
    echo "$2" >&"$1"
    read -r -t 10 -u "$1" reply || because "kv does not reply to $2"
}

# Asks for the list, and prints it.
list() {
    local line n=0
    echo 'CLIENT LIST' >&"$asker"
    while read -r -t 10 -u "$asker" line && ((n++ < 1000)); do
        echo "$line"
        if [[ $line = '('[0-9]* ]]; then return 0; fi
        if [[ $line = '(error)'* ]]; then break; fi
    done
    hopeless=1
    echo 'the list has no end'
}

# Whether the list is like this, but for the order; in each regex ADDR is an address, and AGE an age.
lists() { # REGEX...: one for each client but the asker
    local regex line lines i=0
    list >"$tmp/list"
    mapfile -t lines <"$tmp/list"
    for regex in "$@" 'id=1 ADDR AGE cmd=CLIENT' "\\($(($# + 1)) clients?\\)"; do
        regex=${regex/ADDR/addr=127\\.0\\.0\\.1:[0-9]+}
        regex=${regex/AGE/age=[0-9]{1,2\}}
        for line in "${lines[@]}"; do if [[ $line =~ ^$regex$ ]]; then i=$((i + 1)); fi; done
    done
    ((i == $# + 2 && i == ${#lines[@]}))
}

# What a client does takes a moment to arrive.
lists_soon() { # REGEX...
    (
        trap - DEBUG # bats looks at each step, which is slow
        for ((try = 0; try < 100; try++)); do
            if lists "$@"; then exit 0; fi
            if [[ ${hopeless:-} ]]; then break; fi
            sleep 0.02
        done
        head -n 20 "$tmp/list" && exit 1
    )
}

@test "CLIENT has a row, and CLIENT LIST shows the client that asks" {
    start_listing
    lists || because "the list has one line, as the task says it, and (1 client)"
    { resp CLIENT LIST && resp QUIT; } | timeout 10 nc -N 127.0.0.1 "$port" | tr -d '\r' >"$tmp/out"
    { head -n 1 "$tmp/out" | grep -qE '^\$[0-9]{2,3}$' && sed -n '2,3p' "$tmp/out" | grep -qE '^id=.* cmd=CLIENT$'; } ||
        because "in RESP the reply is one string"
    has_row CLIENT || because "HELP and the error for a wrong number of words come from the row of the command"
    gets_error 'CLIENT NOSUCH' 'ERR syntax error' || because "a wrong word gets an error"
}

@test "CLIENT LIST shows each client, with its id, its address and its last command" {
    start_listing -v
    ids=()
    for command in 'GET a' 'SET a 1' 'EXISTS a'; do
        connect
        says "$c" HELLO
        while [[ $reply != '(6 items)' ]]; do
            if [[ $reply = id:* ]]; then ids+=("${reply#id:}"); fi
            read -r -t 10 -u "$c" reply || because "kv does not reply to HELLO"
        done
        says "$c" "$command"
    done
    connect
    lists_soon "id=${ids[0]} ADDR AGE cmd=GET" "id=${ids[1]} ADDR AGE cmd=SET" "id=${ids[2]} ADDR AGE cmd=EXISTS" 'id=[0-9]+ ADDR AGE cmd=-' ||
        because "each client is listed once, with the id that HELLO shows and the command that it had run last"
    sed -n 's/.* addr=\([^ ]*\) .* cmd=\([A-Z]*\)$/\1 \2/p' "$tmp/list" >"$tmp/addresses"
    sed -n 's/.* \([0-9.:]*\) connected$/\1/p' "$log" | head -n 4 | paste -d ' ' - <(printf '%s\n' CLIENT GET SET EXISTS) >"$tmp/logged"
    (($(grep -cxFf "$tmp/logged" "$tmp/addresses") == 4)) || because "addr is the client's address, as -v logs it"
}

@test "a client that has left is not listed, however it left" {
    start_listing
    connect
    says "$c" PING
    says "$c" QUIT
    lists_soon || because "a client that has said QUIT is still listed"
    disconnect "$c"
    for request in '' 'GET a' $'SET a\n' $'GET a\n'; do
        connect
        says "$c" PING
        printf '%s' "$request" >&"$c"
        disconnect "$c"
        lists_soon || because "a client that has closed its connection is still listed"
    done
}

# What has quotes in a wrong place is answered, but is no command; it arrives where PING was.
@test "the last command of a client stays what it was while that client sends more" {
    start_listing
    connect
    says "$c" PING
    says "$c" "\"$(x 100)"
    [[ $reply = *'unbalanced quotes'* ]] || because "a line with one quote is an error"
    lists_soon 'id=2 ADDR AGE cmd=PING' ||
        because "the last command is shown from memory that the client's thread uses for something else by now"
    connect
    says "$c" "ECHO $(x 100000)"
    lists_soon 'id=2 ADDR AGE cmd=PING' 'id=3 ADDR AGE cmd=ECHO' ||
        because "the last command is shown from memory that the client's thread has freed"
}

come_and_go() { # COUNT
    local n
    trap - DEBUG
    for ((n = 0; n < $1; n++)); do
        connect
        says "$c" PING && says "$c" QUIT || return 1
        disconnect "$c"
    done
} 2>/dev/null

@test "while many clients come and go, each line of the list is whole" {
    start_listing
    clients=()
    for _ in 1 2 3 4; do
        come_and_go 100 &
        clients+=("$!")
    done
    { yes 'CLIENT LIST' | head -n 3000 && echo QUIT; } | timeout 15 nc -N 127.0.0.1 "$port" >"$tmp/out" || true
    for client in "${clients[@]}"; do wait "$client" || because "a client has waited in vain for a reply, or kv has crashed"; done
    line='id=[0-9]+ addr=(127\.0\.0\.1:[0-9]+|a client that is gone) age=[0-9]{1,2} cmd=(PING|QUIT|CLIENT|-)'
    if grep -vEx -m 3 -e "$line" -e '\([0-9]+ clients?\)' -e OK "$tmp/out"; then because "a line of the list is no line of a client"; fi
    (($(grep -c '^(' "$tmp/out") == 3000)) || because "CLIENT LIST was not answered each time: does the list go round in a circle?"
    lists_soon || because "all clients have left but the one that asks, and others are listed"
}
