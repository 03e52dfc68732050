#!/usr/bin/env bats
# What the configurations and scripts beside this file promise. Each is run as it stands, by the line
# `run:` in it. Only its ports, which are all 70xx, are moved to a range that is free.
#
#     bats doc/engines/engines.bats                  needs what make deps-all installs
#
# SC2030, SC2031: bats runs each test as a process. SC2016: what looks like a variable is RESP.
# shellcheck disable=SC2030,SC2031,SC2016

bats_require_minimum_version 1.5.0
export LC_ALL=C
KV=$(realpath "${KV:-$BATS_TEST_DIRNAME/../../kv}")
here=$BATS_TEST_DIRNAME root=$(realpath "$BATS_TEST_DIRNAME/../..")
command -v pkill >/dev/null && export BATS_TEST_TIMEOUT=180

# A process in the background dies with its test, however that ends.
leash=() && if command -v setpriv >/dev/null; then leash=(setpriv --pdeathsig TERM); fi

setup() {
    tmp=$BATS_TEST_TMPDIR
    declare -gA pid=()
    cd "$tmp" || return
    find_ports
}

teardown() {
    local name
    if [[ ! ${BATS_TEST_COMPLETED:-} ]]; then tail -n 15 ./*.log; fi
    for name in "${!pid[@]}"; do kill "${pid[$name]}" 2>/dev/null || true; done
    for name in "${!pid[@]}"; do wait_until gone "${pid[$name]}" || kill -9 "${pid[$name]}"; done
    for name in /dev/shm/kv-"$$"/node-*/pid; do
        if [[ -e $name ]]; then kill "$(<"$name")" || true; fi
    done
    rm -rf "/dev/shm/kv-$$"
}

# Sets $ports to the first digits of a range of free ports. A node of a cluster has a second one, by
# 10000 higher.
find_ports() {
    local n
    while ports=$((100 + RANDOM % 120)); do
        for n in {00..14}; do
            if is_open "$ports$n" || is_open "$((10000 + 10#$ports$n))"; then continue 2; fi
        done
        return
    done
}

is_open() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; } # PORT

# Puts a file from here, with ports that are free, into the present directory.
take() { sed "s/\b70\([01][0-9]\)\b/$ports\1/g" "$here/$1" >"$1"; } # FILE

# Starts what the line `run:` of a configuration says, with what is added.
run_config() { # FILE PORT [ARGUMENT...]: and waits until it listens on this port of 70xx
    local command
    take "$1"
    read -ra command <<<"$(sed -n "s/^[#;] run: //p" "$1")"
    run_in_background "$1" "${command[@]}" "${@:3}"
    wait_until is_open "$ports${2#70}"
}

run_in_background() { # NAME COMMAND...
    "${leash[@]}" "${@:2}" </dev/null >>"$1.log" 2>&1 3>&- 4>&- &
    pid[$1]=$!
}

start_kv() { # NAME PORT [OPTION...]
    run_in_background "$1" "$KV" -q -p "$ports${2#70}" "${@:3}"
    wait_until is_open "$ports${2#70}"
}

stop() { # NAME [SIGNAL]
    kill -s "${2:-TERM}" "${pid[$1]}"
    wait "${pid[$1]}" 2>/dev/null || true
    unset "pid[$1]"
}

gone() { ! kill -0 "$@" 2>/dev/null; } # PID...

wait_until() { # COMMAND...
    local end=$((SECONDS + 40))
    until "$@"; do
        ((SECONDS < end)) || { echo "waited in vain until: $*" && return 1; }
        sleep 0.05
    done
}

ask() { # PORT LINE...: with $secret as the password, if there is one
    { if [[ ${secret:-} ]]; then printf 'AUTH "%s"\n' "$secret"; fi && printf '%s\n' "${@:2}" QUIT; } |
        timeout 20 nc 127.0.0.1 "$ports${1#70}" | sed "${secret:+1d;}\$d"
}

cli() { timeout 20 redis-cli -p "$ports${1#70}" "${@:2}"; } # PORT WORD...

says() { [[ $("${@:2}" 2>/dev/null) = "$1" ]]; } # TEXT COMMAND...

is() { diff -a <(printf '%s\n' "$@") -; } # LINE...

# Requests in RESP, one for each line "key value" of the input, or "key".
resp_set() { awk '{ printf "*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n", length($1), $1, length($2), $2 }'; }
resp_get() { awk '{ printf "*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n", length($1), $1 }'; }

# Sends requests and prints the replies. QUIT, because redis-server drops what it owes a client that
# half-closes; its +OK is cut off.
send() { # PORT
    { cat && printf '*1\r\n$4\r\nQUIT\r\n'; } | timeout 60 nc 127.0.0.1 "$ports${1#70}" | head -c -5
}

# Values with all that a filter could stumble over.
hostile() {
    printf 'SET "a key" "\\x00\\xff\\r\\n"\n'
    printf 'SET sum "before\\r\\n#SUM:0123456789abcdef\\r\\nbehind"\nSET record "*1\\r\\n$8\\r\\nFLUSHALL\\r\\n"\n'
    printf 'SET later 1 PXAT 9999999999999\nSET empty ""\nSET gone 1\nDEL gone\nSET n 41\nINCR n\n'
}
hostile_keys=('a key' sum record later empty gone n)
hostile_gets() {
    local key
    for key in "${hostile_keys[@]}"; do printf '*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n' "${#key}" "$key"; done
}

# --- TLS ----------------------------------------------------------------------------------

@test "stunnel and HAProxy speak TLS for kv, and who does not trust their certificate learns it" {
    "$here/certificates"
    start_kv kv 7001
    run_config tls.stunnel.conf 7003
    run_config tls.haproxy.cfg 7002
    for port in 7002 7003; do
        wait_until says OK cli "$port" --tls --cacert ca.crt SET key "$port"
        says "$port" ask 7001 'GET key'
        openssl s_client -connect "127.0.0.1:$ports${port#70}" -verify_return_error </dev/null >out 2>&1 && false
        grep -q 'unable to get local issuer certificate' out
    done
    ask 7001 'SET plain "never sent"' | is OK
    says '' ask 7002 'GET plain'
    openssl s_client -connect "127.0.0.1:${ports}02" -CAfile ca.crt -verify_return_error \
        -verify_hostname localhost -quiet <<<$'GET key\nQUIT' 2>/dev/null | tr -d '\r' | is 7003 OK
}

@test "by its certificate a client is led to kv or to the copy, and without one nowhere" {
    "$here/certificates" writer reader
    start_kv kv 7001 --aof kv.aof
    start_kv copy 7005
    run_in_background follow "$here/follow" localhost "${ports}05" tail -c +1 -F kv.aof
    run_config tls.haproxy.cfg 7004
    as() { cli 7004 --tls --cacert ca.crt --cert "$1.pem" --key "$1.pem" "${@:2}"; } # NAME WORD...
    wait_until says OK as writer SET key 1
    wait_until says 1 as reader GET key
    as reader SET mine 1 | is OK # in the copy; kv does not have it
    says '(nil)' ask 7001 'GET mine'
    says '' cli 7004 --tls --cacert ca.crt GET key
    "$here/certificates" writer # of another authority
    says '' cli 7004 --tls --insecure --cert writer.pem --key writer.pem GET key
}

# --- shards -------------------------------------------------------------------------------

# Writes or reads key:1 to key:300 through nutcracker, and counts the replies that are equal. It closes
# when a client half-closes, but not before it has answered.
through() { timeout 30 nc -N 127.0.0.1 "${ports}00" | tr -d '\r' | grep -v '^\$[0-9]' | sort | uniq -c | sed 's/^ *//'; }
set_all() { seq -f "key:%.0f $1" 300 | resp_set | through; } # VALUE
get_all() { seq -f 'key:%.0f' 300 | resp_get | through; }

start_shards() { # [OPTION...]
    local n=1 name
    for name in one two three; do
        start_kv "$name" "700$((n++))" --aof "$name.aof"
    done
}

@test "nutcracker spreads keys over three kv, and a shard that dies loses nothing" {
    start_shards
    run_config shards.nutcracker.yml 7000
    set_all old | is '300 +OK'
    for port in 7001 7002 7003; do
        n=$(ask "$port" DBSIZE) && echo "# $n keys on $port" >&3
        ((n > 70 && n < 130))
    done
    dead=$(ask 7002 DBSIZE)
    stop two KILL
    wait_until dead_are "$dead" # an error each; the other keys are there
    set_all new | grep -q "^$((300 - dead)) +OK"
    start_kv two 7002 --aof two.aof
    wait_until served "$dead"
}

dead_are() { (($(get_all | sed -n 's/^\([0-9]*\) -.*/\1/p' | paste -sd +) == $1)); }
served() { [[ $(get_all) = "$((300 - $1)) new"$'\n'"$1 old" ]]; }

@test "with auto_eject_hosts a shard's keys are nil, and what was written meanwhile is nil again" {
    start_shards
    take shards.nutcracker.yml
    sed -i 's/auto_eject_hosts: false/auto_eject_hosts: true/; s/server_retry_timeout: 1000/server_retry_timeout: 5000/' \
        shards.nutcracker.yml
    run_in_background nutcracker nutcracker -c shards.nutcracker.yml -p p -o o.log -a 127.0.0.1 -s "${ports}09"
    wait_until is_open "${ports}00"
    set_all old | is '300 +OK'
    dead=$(ask 7002 DBSIZE)
    stop two KILL
    get_all >/dev/null # the errors for which it is ejected
    get_all | is "$dead "'$-1' "$((300 - dead)) old"
    set_all new | is '300 +OK'
    get_all | is '300 new'
    start_kv two 7002 # without its file, as with one that is lost
    wait_until says "$dead "'$-1'$'\n'"$((300 - dead)) new" get_all
}

@test "through nutcracker KEYS, DBSIZE, FLUSHALL, INFO, HELLO and text close the connection" {
    start_shards
    run_config shards.nutcracker.yml 7000
    for request in 'KEYS *' DBSIZE FLUSHALL INFO 'HELLO 3' 'SELECT 0' 'ECHO hi'; do
        read -ra words <<<"$request"
        cli 7000 "${words[@]}" 2>&1 | is 'Error: Server closed the connection'
    done
    printf 'SET a 1\r\nSET b 1\r\n' | timeout 10 nc 127.0.0.1 "${ports}00" | cmp - /dev/null
    cli 7000 SET a 1 | is OK
    cli 7000 UNLINK a b | is 1
}

# --- a copy -------------------------------------------------------------------------------

@test "follow makes a server a copy, notices a broken link, and begins anew without what does not belong there" {
    start_kv kv 7001 --aof kv.aof
    start_kv copy 7002
    hostile | send 7001 >out
    ask 7002 'SET stray 1' | is OK
    run_in_background follow "$here/follow" localhost "${ports}02" tail -c +1 -F kv.aof
    wait_until says 6 ask 7002 DBSIZE
    hostile_gets | send 7002 | cmp - <(hostile_gets | send 7001)
    stop copy
    start_kv copy 7002
    ask 7002 'SET stray 1' 'SET n other' | is OK OK
    wait_until says 42 ask 7002 'GET n'
    wait_until says 6 ask 7002 DBSIZE
    grep -q 'no link' follow.log
    # A record that the copy refuses is seen, too.
    stop copy
    start_kv copy 7002 --max-request 1024
    ask 7001 "SET large $(printf %02000d 1)" | is OK
    wait_until grep -q '^-ERR' follow.log
}

@test "follow leaves a server alone while there is nothing to copy" {
    start_kv copy 7002
    ask 7002 'SET a 1' | is OK
    echo 'no file of kv' >other
    run_in_background follow "$here/follow" localhost "${ports}02" tail -c +1 -F other
    wait_until grep -q 'no link' follow.log
    ask 7002 'GET a' | is 1
}

# --- failover -----------------------------------------------------------------------------

start_guard() { # NAME PORT OTHER PORT
    LEASE_MS=4000 run_in_background "guard-$1" "$here/guard" "$1" "$ports${2#70}" "$3" localhost "$ports${4#70}" \
        tail -c +1 -f "$3.aof"
}

# Writes w:1, w:2, ... through HAProxy until it is killed, twenty at a time. Prints the number of each
# that was answered, and the time.
write_on() {
    local i=0 n c='' line lines
    trap '' PIPE
    while :; do
        if [[ ! $c ]]; then exec {c}<>"/dev/tcp/127.0.0.1/${ports}00" || { c='' && sleep 0.02 && continue; }; fi
        lines='' && for n in {1..20}; do lines+="SET w:$((i + n)) $((i + n))"$'\n'; done
        printf '%s' "$lines" >&"$c"
        for n in {1..20}; do
            i=$((i + 1))
            if read -r -t 5 -u "$c" line && [[ $line = OK ]]; then echo "$i ${EPOCHREALTIME/./}"; continue; fi
            exec {c}>&- && c='' && sleep 0.02
            break
        done
    done 2>/dev/null >>written
}

# How many of the answered writes a server does not have.
missing() { # PORT
    cut -d ' ' -f 1 written >answered
    sed 's/^/w:/' answered | resp_get | send "$1" | tr -d '\r' | grep -v '^\$' >found
    diff found answered | grep -c '^>' || true
}

@test "failover: nothing that was answered is missing, and who comes back is a copy before it may serve" {
    start_kv a 7001 --aof a.aof
    start_kv b 7002 --aof b.aof
    run_config failover.haproxy.cfg 7000
    start_guard a 7001 b 7002
    start_guard b 7002 a 7001
    ask 7001 'SET serving a PX 4000' 'SET only-on-a 1' | is OK OK
    wait_until says a ask 7002 'GET serving'
    wait_until says 1 ask 7000 'GET only-on-a'
    write_on 3>&- 4>&- &
    pid[writer]=$!
    wait_until test -s written
    wait_until more_than 1000
    stop a KILL
    before=$(wc -l <written)
    wait_until says b ask 7000 'GET serving'
    wait_until more_than "$before"
    echo "# killed after $before writes were answered; $(missing 7002) of $(wc -l <answered) are missing" >&3
    says 0 missing 7002

    # The first comes back with its old file. Nobody is served by it until it has all.
    ask 7000 'SET newer b' 'DEL only-on-a' | is OK 1
    start_kv a 7001 --aof a.aof
    for _ in {1..10}; do
        ask 7000 'GET newer' | is b
        sleep 0.05
    done
    wait_until says b ask 7001 'GET serving'
    wait_until says b ask 7001 'GET newer'
    ask 7001 'EXISTS only-on-a' | is 0
    before=$(wc -l <written)
    wait_until more_than "$before"
    wait_until grep -q 'a copy of b' guard-a.log

    # And then it can take over in turn.
    sleep 1
    stop b KILL
    before=$(wc -l <written)
    wait_until says a ask 7000 'GET serving'
    wait_until more_than "$before"
    stop writer KILL
    ask 7000 'GET newer' | is b
    says 0 missing 7001
    awk '{ if (last && $2 - last > gap) gap = $2 - last; last = $2 }
        END { printf "# %d writes were answered, the longest gap was %.2f s\n", NR, gap / 1e6 }' written >&3
}

more_than() { (($(wc -l <written) > $1)); } # LINES

@test "nobody serves by itself: two that have both been away wait for a person; all with a password" {
    secret='a long secret'
    (umask 077 && echo "$secret" >password)
    export KV_PASSWORD=$secret
    start_kv a 7001 --aof a.aof --password-file password
    start_kv b 7002 --aof b.aof --password-file password
    take failover.haproxy.cfg
    sed -i 's/^    #     tcp-check/    tcp-check/' failover.haproxy.cfg
    run_in_background haproxy haproxy -db -f failover.haproxy.cfg
    wait_until is_open "${ports}00"
    ask 7001 'SET from a' | is OK
    ask 7002 'SET from b' | is OK
    start_guard a 7001 b 7002
    start_guard b 7002 a 7001
    wait_until grep -q 'a person has to choose' guard-a.log
    wait_until grep -q 'a person has to choose' guard-b.log
    says '' ask 7000 PING
    ask 7001 'GET from' | is a
    ask 7002 'GET from' 'SET serving b PX 4000' | is b OK
    wait_until says b ask 7000 'GET from'
    wait_until says b ask 7001 'GET from'
    ask 7000 FLUSHALL | is OK # takes the lease along, and the guard renews it
    wait_until says b ask 7002 'GET serving'
    wait_until says OK ask 7000 'SET from b'
}

# --- Redis --------------------------------------------------------------------------------

@test "a redis-server that follows kv has all keys and deadlines, its replica too, and nobody can write to that" {
    start_kv kv 7001 --aof kv.aof
    run_config redis-copy.conf 7006
    mkdir replica
    run_config redis-replica.conf 7007 --dir replica
    hostile | send 7001 >out
    seq 3000 | sed 's/.*/k:& v&/' | resp_set | send 7001 >out
    run_in_background follow "$here/follow" localhost "${ports}06" tail -c +1 -F kv.aof
    seq -f 'EXPIREAT k:%.0f 9999999999' 1000 | send 7001 >out
    seq -f 'DEL k:%.0f' 2500 3000 | send 7001 >out
    ask 7001 'SET last 1' | is OK
    for port in 7006 7007; do
        wait_until says 1 cli "$port" GET last
        wait_until says "$(ask 7001 DBSIZE)" cli "$port" DBSIZE
        { hostile_gets; seq -f 'k:%.0f' 3000 | resp_get; } >gets
        send "$port" <gets | cmp - <(send 7001 <gets)
        cli "$port" PEXPIRETIME k:1000 | is 9999999999000
        cli "$port" PEXPIRETIME later | is 9999999999999
    done
    cli 7006 INFO errorstats | grep -q '^errorstat_ERR:count=[1-9]' # one for each batch
    run ! grep 'no link' follow.log
    cli 7007 SET k:1 1 2>&1 | is "READONLY You can't write against a read only replica." ''
}

@test "redis-cli --pipe counts an error for each line of a checksum; through records there is none" {
    start_kv kv 7001 --aof kv.aof
    run_config redis-copy.conf 7006
    hostile | while IFS= read -r line; do ask 7001 "$line"; done >out
    n=$(grep -ac '^#SUM:' kv.aof)
    cli 7006 --pipe <kv.aof 2>&1 | grep -q "errors: $((n - 1)), replies:" # one of them is in a value
    hostile_gets | send 7006 | cmp - <(hostile_gets | send 7001)
    cli 7006 FLUSHALL | is OK
    "$here/records" kv.aof | cli 7006 --pipe 2>&1 | grep -q 'errors: 0, replies:'
    hostile_gets | send 7006 | cmp - <(hostile_gets | send 7001)
    head -c -30 kv.aof >short.aof
    "$here/records" short.aof >out 2>short.log && false
    grep -q 'cut short' short.log
}

@test "kv's file becomes a Redis Cluster of three, and a primary that dies is replaced, without the loss of a key" {
    start_kv kv 7001 --aof kv.aof
    hostile | send 7001 >out
    seq 3000 | sed 's/.*/k:& v&/' | resp_set | send 7001 >out
    { hostile_gets; seq -f 'k:%.0f' 3000 | resp_get; } >gets
    send 7001 <gets >before
    keys=$(ask 7001 DBSIZE)
    printf 'GET "%s"\n' "${hostile_keys[@]}" >all
    seq -f 'GET k:%.0f' 3000 >>all
    cli 7001 <all >before
    stop kv
    take cluster-node.conf
    nodes=/dev/shm/kv-$$ # each of thousands of slots that move costs some fsyncs
    if [[ ! -d /dev/shm ]]; then nodes=$tmp/nodes; fi
    mkdir "$nodes"
    cp kv.aof cluster-node.conf "$nodes"
    (cd "$nodes" && "$here/to-cluster" kv.aof cluster-node.conf "$ports"{11,12,13,14})
    n=0 && for port in 7011 7012 7013; do n=$((n + $(cli "$port" DBSIZE))); done
    ((n == keys))
    victim=$(cli 7014 ROLE | sed -n 3p) # it is a replica of this one
    kill -9 "$(<"$nodes/node-$victim/pid")"
    rm "$nodes/node-$victim/pid"
    for port in 7011 7012 7013 7014; do
        if [[ $ports${port#70} != "$victim" ]]; then wait_until cluster_is_ok "$port"; fi
    done
    cli 7014 ROLE | head -n 1 | is master
    timeout 60 redis-cli -c -p "${ports}14" <all | grep -av '^-> Redirected' | cmp - before
}

# Whether a node sees all slots served, and one node that has failed.
cluster_is_ok() { # PORT
    cli "$1" CLUSTER NODES | grep -q 'master,fail ' && cli "$1" CLUSTER INFO | grep -q '^cluster_state:ok'
}

@test "what a redis-server has written goes to kv with nc; what kv does not know it refuses by name" {
    start_kv kv 7001
    run_config redis-source.conf 7008
    {
        printf 'SET a 1\nINCR a\nINCRBY a 5\nDECR a\nSET b "\\x00\\xff\\r\\n"\nSET gone 1\nDEL gone\nSET c 1\nUNLINK c\n'
        printf 'SET t 1 PXAT 9999999999999\nSET u 1\nEXPIRE u 1000\nSET v 1 EX 1000\nPERSIST v\nINCRBYFLOAT f 1.5\nGETSET g 1\n'
    } | cli 7008 >out
    { cat appendonlydir/*.base.aof appendonlydir/*.incr.aof && echo QUIT; } | nc 127.0.0.1 "${ports}01" >replies
    run ! grep -a '^[-(]' replies
    for key in a b gone c t v f g; do
        cmp <(cli 7001 GET "$key") <(cli 7008 GET "$key")
    done
    says "$(cli 7008 DBSIZE)" ask 7001 DBSIZE
    says "$(cli 7008 PTTL t | cut -c 1-9)" eval 'ask 7001 "PTTL t" | cut -c 1-9'

    # What is no string is refused, and so is what works on a part of one. A rewrite makes a SET of that.
    cli 7008 APPEND a 0 | is 2
    cli 7008 MSET m 1 n 2 | is OK
    cli 7008 RPUSH list 1 | is 1
    cli 7008 -n 1 SET other 1 | is OK
    { cat appendonlydir/*.incr.aof && echo QUIT; } | nc 127.0.0.1 "${ports}01" | tr -d '\r' | grep -a '^-' >refused
    is "-ERR unknown command 'APPEND', see HELP" "-ERR unknown command 'MSET', see HELP" \
        "-ERR unknown command 'RPUSH', see HELP" '-ERR DB index is out of range' <refused
    ask 7001 'GET other' | is 1 # of another database, so the error is one to look for
    cli 7008 DEL list | is 1
    cli 7008 FLUSHALL | is OK
    cli 7008 MSET m 1 n 2 | is OK
    cli 7008 APPEND m 0 | is 2
    printf 'MULTI\nSET x 1\nSET y 1\nEXEC\nDEL y\n' | cli 7008 >out
    { cat appendonlydir/*.incr.aof && echo QUIT; } | nc 127.0.0.1 "${ports}01" | tail -n 1 | grep -q 'ERR .*transactions'
    ask 7001 'GET x' | is '(nil)'
    cli 7008 BGREWRITEAOF >out
    wait_until is_rewritten
    ask 7001 FLUSHALL | is OK
    { cat appendonlydir/*.base.aof && echo QUIT; } | nc 127.0.0.1 "${ports}01" | tr -d '\r' | sort | uniq -c >replies
    ask 7001 'GET m' 'GET n' 'GET x' DBSIZE | is 10 2 1 3
}

is_rewritten() { cli 7008 INFO persistence | tr -d '\r' | paste -sd ' ' | grep -q 'rewrite_in_progress:0 .*rewrite_scheduled:0 '; }

# --- where it runs ------------------------------------------------------------------------

@test "the unit file is right for systemd, and hardened" {
    if command -v systemd-analyze >/dev/null; then
        make -s -C "$root" install DESTDIR="$tmp/root" PREFIX=/usr/local
        mkdir -p root/etc/systemd/system && cp "$here/kv.service" root/etc/systemd/system
        sed "s|/usr/local/bin/kv|$tmp/root&|" "$here/kv.service" >kv.service
        systemd-analyze verify --man=no ./kv.service 2>&1 | cmp - /dev/null
        systemd-analyze security --offline=true --threshold=15 ./kv.service >out
    fi
    # Its options are options of kv.
    grep '^ExecStart=' "$here/kv.service" | grep -o -- ' --[a-z-]*' | while read -r option; do
        "$KV" --help | grep -q -- " $option "
    done
}

@test "as in the Dockerfile: a static kv of less than 200 KB is process 1 of an empty image" {
    local make
    cp "$root/kv.c" "$root/Makefile" .
    make=$(sed -n 's/^RUN \(make .*\)/\1/p' "$here/Dockerfile")
    eval "${make/CC=gcc/CC=musl-gcc}" # Alpine's gcc is one for musl
    (($(wc -c <kv) < 200000))
    mkdir -p image/data image/dev
    cp kv image
    echo secret >image/password
    entry=$(sed -n 's/^ENTRYPOINT \[\(.*\)\]/\1/p' "$here/Dockerfile" | tr -d '",')
    entry=${entry/0.0.0.0/127.0.0.1} # only here
    # A container without Docker: process 1, no file but these, and a device. Where the system forbids
    # that, the program runs as it is, with the same options.
    run_in_background image unshare --user --map-root-user --pid --mount --fork --kill-child sh -c "
        mount -t tmpfs none image/dev && touch image/dev/urandom &&
        mount --bind /dev/urandom image/dev/urandom && exec chroot image $entry --port ${ports}01"
    if unshare --user --map-root-user --pid --mount --fork true 2>/dev/null; then
        wait_until grep -q 'listening on' image.log
        inner=$(pgrep -P "${pid[image]}")
        [[ $(sed -n 's/^NSpid:.*\t//p' "/proc/$inner/status") = 1 ]]
    else
        entry=${entry//' /'/ image/}
        eval "run_in_background inner image${entry} --port ${ports}01"
        inner=${pid[inner]}
    fi
    wait_until says $'OK\nOK' ask 7001 'AUTH secret' 'SET a 1'
    kill "$inner"
    wait_until grep -q INFO.stopped ./*.log
    grep -aq SET image/data/kv.aof
    if docker info >out 2>&1; then docker build -t kv -f "$here/Dockerfile" "$root"; fi
}

@test "make install brings a man page that says what --help and HELP say" {
    start_kv kv 7001
    make -s -C "$root" install DESTDIR="$tmp/root" PREFIX=/usr
    "$here/man-tables" "$KV" "${ports}01" >tables
    sed -n '/^\.SH OPTIONS/,$ { /^\.SH SIGNALS/q; p; }' root/usr/share/man/man1/kv.1 | diff tables -
    (($(grep -c '^\.TP' tables) > 40))
    [[ $(root/usr/bin/kv --version) = 'kv '* ]]
}

# --- what is said of costs ----------------------------------------------------------------

@test "measure prints a line for each that it compares" {
    export ROUNDS=1 REQUESTS=1000 KV
    for what in tls shards costs; do
        timeout 60 "$here/measure" "$what" >"$what.out"
    done
    (($(grep -c 'HAProxy\|stunnel' tls.out) == 3 && $(grep -c 'kv,3-shards' shards.out) == 4 && $(grep -c 'processor time' costs.out) == 8))
}
