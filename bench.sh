#!/usr/bin/env bash
# How fast kv is: alone, beside others, and beside itself as it was decided not to be.
# ./bench.sh --help tells how to use it, doc/measuring.md how to read what it prints.
#
# The rejected alternative of a chapter is a patch, doc/alternatives/NAME.patch, that begins with
# lines like these; to `patch` they are nothing.
#
#     # chapter: 06
#     # expect: slower, for only one thread works at a time         any text
#     # load: -t set,get -c 50 -P 16 -r 100000 -n 1000000           several lines: several loads
#     # first: -t set -c 50 -P 16 -r 100000 -n 1000000              fills both before the first load
#     # options: --aof DIR/aof                                      of kv; DIR: one of its own
#     # measure: rate p99           rate if not said; avg min p50 p99 max in ms; cpu in s per
#                                   million requests; rss and virtual, peaks of memory, in MB
#     # passes, fails: SET|GET      tests; doc/patches check proves them
#
# load and first are arguments of redis-benchmark, words without quotes; what follows its options
# is a command to send instead of a test: -n 100000 -r 100000 SET key:__rand_int__ x EX 60.

# SC2016: what looks like a variable in single quotes is RESP.
# shellcheck disable=SC2016

set -euo pipefail
export LC_ALL=C

usage() {
    cat <<'END'
./bench.sh                             kv alone: commands, connections, pipelining, nc
./bench.sh compare                     kv beside redis-server: memory, rates, latencies, processor
                                       time; first apart, where there are two processors and
                                       taskset: redis-benchmark on one, the server on the others;
                                       then together: both on all. And beside memcached, where
                                       memtier_benchmark is there
./bench.sh compare busy                the same together with two processes that only burn
                                       processor time: rates, latencies, processor time
./bench.sh aof                         kv with its file beside kv without, and beside redis-server:
                                       rates, fsyncs per write, seconds to replay
./bench.sh aof busy                    kv --fsync always beside redis-server, while two processes burn
./bench.sh alternatives [NAME]         kv beside what was rejected, doc/alternatives/NAME.patch
./bench.sh measure                     lists what else the chapters of doc/ measure
./bench.sh measure NAME                measures it: doc/measure/NAME
./bench.sh measure --check [NAME]      does each still measure what it says? In short
./bench.sh plot                        draws doc/rate-over-connections.svg, doc/latency-over-rate.svg

    --csv FILE   also each figure of each round: table,load,program,round,name,value,unit
    --quick      3 rounds, a tenth of the requests, up to 1000 connections: to see that it works
    -h, --help   print this

Environment:
    KV           the program to measure; ./kv, built first, if not given
    OTHER        another kv, which compare measures in place of redis-server
    ROUNDS       how often two programs take turns: 7; at 10000 connections and in plot 3
    SCALE        requests in per cent of the usual number: 100
    CONNECTIONS  the most connections at once: 10000
    TMPDIR       for temporary files, of the servers too
END
}

progress() { if [[ -t 2 ]]; then printf '\r\e[K%3d s  %s' "$SECONDS" "$*" >&2; fi; }

# shellcheck disable=SC2059 # as printf does
say() { # FORMAT ARGUMENT...: prints, where the progress line was
    if [[ -t 2 ]]; then printf '\r\e[K' >&2; fi
    printf "$@"
}

die() { say 'bench.sh: %s\n' "$*" >&2 && exit 1; }
wrong() { printf 'bench.sh: %s (./bench.sh --help)\n' "$*" >&2 && exit 2; }

need() { # COMMAND...
    local command missing=''
    for command; do command -v "$command" >/dev/null || missing+=" $command"; done
    [[ ! $missing ]] || die "this needs$missing: make deps-all installs what is missing"
}

# What single chapters measure. Each is a script of its own, see doc/measure/lib.sh.
measure() { # [--check] [NAME]
    local script number=0 failed=0 log scripts=()
    for script in doc/measure/*; do
        if [[ -x $script && ${2:-${script##*/}} = "${script##*/}" ]]; then scripts+=("$script"); fi
    done
    if [[ ! ${1:-} ]]; then
        for script in "${scripts[@]}"; do say '%-20s%s\n' "${script##*/}" "$(sed -n '2s/^# //p' "$script")"; done
        return
    fi
    need make
    make -s kv
    if [[ $1 != --check ]]; then
        [[ -x doc/measure/$1 ]] || wrong "there is no doc/measure/$1"
        "doc/measure/$1"
        return
    fi
    ((${#scripts[@]})) || wrong "there is no doc/measure/${2:-}"
    log=$(mktemp)
    printf '1..%d\n' "${#scripts[@]}"
    for script in "${scripts[@]}"; do
        number=$((number + 1))
        if SHORT=1 "$script" >"$log" 2>&1 </dev/null; then printf 'ok %d %s\n' "$number" "${script##*/}"; else
            printf 'not ok %d %s\n' "$number" "${script##*/}"
            sed 's/^/# /' "$log"
            failed=1
        fi
    done
    rm -f "$log"
    return "$failed"
}

# --- starting and stopping ----------------------------------------------------------------

declare -A pid=() port=() # of the running servers, by name

# On Linux a server dies with this script, however that ends.
leash=()
if command -v setpriv >/dev/null; then leash=(setpriv --pdeathsig KILL); fi

launch() { # NAME REGEX COMMAND...: starts a server and waits for a line of its log
    local end=$((SECONDS + 60))
    : >"$tmp/$1.log"
    "${leash[@]}" "${on_server[@]}" "${@:3}" </dev/null >"$tmp/$1.log" 2>&1 &
    pid[$1]=$!
    until [[ $(<"$tmp/$1.log") =~ $2 ]]; do
        kill -0 "${pid[$1]}" 2>/dev/null && ((SECONDS < end)) || return 1
        sleep 0.005 # replay measures how long a start takes
    done
}

start_kv() { # NAME BINARY OPTION...
    launch "$1" 'listening on .*:([0-9]+)' "${@:2}" -p 0 || die "$1: $(tail -n 1 "$tmp/$1.log")"
    port[$1]=${BASH_REMATCH[1]}
}

start_redis() { # NAME OPTION...: without persistence, unless the options ask for it
    local try
    for try in {1..20}; do # for a port that is free
        port[$1]=$((20000 + RANDOM % 12000))
        launch "$1" 'Ready to accept' redis-server --port "${port[$1]}" --bind 127.0.0.1 \
            --save '' --appendonly no --dir "$tmp" "${@:2}" && return
    done
    die "redis-server ended $try times: $(tail -n 1 "$tmp/$1.log")"
}

start() { # kv|other|Redis
    case $1 in kv) start_kv kv "$kv" ;; other) start_kv other "$other" ;; *) start_redis "$1" ;; esac
}

stop() { # NAME...
    local name
    for name; do
        kill "${pid[$name]}" || true
        wait "${pid[$name]}" || true
        unset "pid[$name]"
    done
}

# Bash heeds Ctrl-C at once while it waits, but not while a command runs in the foreground.
run() { "$@" & wait "$!"; } # COMMAND...

cleanup() { # however this script ends: nothing runs on, no file is left
    local signal jobs groups IFS=$' \n' # a signal may come during IFS=, read
    trap '' INT TERM HUP # another Ctrl-C does not stop this
    say ''
    {
        groups=$(jobs -pr) # timeout makes one of itself and what it runs
        for signal in TERM KILL; do
            for _ in {1..50}; do
                jobs=$(jobs -pr)
                [[ $jobs ]] || break 2
                # shellcheck disable=SC2086 # many words
                kill -s "$signal" $jobs || true
                sleep 0.1
            done
        done
        for jobs in $groups; do kill -s KILL -- "-$jobs" || true; done
        wait
        rm -rf "$tmp"
    } 2>/dev/null
}

# --- who runs where -----------------------------------------------------------------------

on_load=() on_server=() # before the command of the load generator, of a server
burners=()              # names of processes that burn while a load runs

set_apart() { # fails where it cannot be; sets $apart, which says what it is, or why it cannot be
    local part all=() others
    if ! command -v taskset >/dev/null; then apart='left out, as taskset is not there' && return 1; fi
    for part in $(taskset -pc $$ | sed 's/.*: //; s/,/ /g'); do # of 0,2-3: 0, then 2-3
        # shellcheck disable=SC2207 # numbers
        all+=($(seq "${part%-*}" "${part#*-}"))
    done
    if ((${#all[@]} < 2)); then apart='left out, as there is only one processor' && return 1; fi
    others=${all[*]::${#all[@]}-1}
    on_load=(taskset -c "${all[-1]}") on_server=(taskset -c "${others// /,}")
    apart="redis-benchmark on processor ${all[-1]}, the server on $others, as if clients were elsewhere"
}

set_together() { on_load=() on_server=(); }

set_busy() { burners=(burner-1 burner-2); }

burn() { # until stop, but at most for 240 s of processor time each
    local name
    for name in "${burners[@]}"; do
        launch "$name" '' bash -c 'ulimit -t 240; while :; do :; done' || die "$name ended at once"
    done
}

# --- measuring ----------------------------------------------------------------------------
# bench, stream, memtier, fsyncs and replay run a load, and set $result, or $error and fail.

declare -A result=() unit=([rate]=1/s [avg]=ms [min]=ms [p50]=ms [p99]=ms [max]=ms [cpu]=s/million
    [rss]=MB [virtual]=MB [key]=bytes [connection]=KiB [fsyncs]=1/100 [start]=s
    [ratio]=1 [mad]=1 [low]=1 [high]=1)

# redis-benchmark runs on for ever when its server dies: hence timeout. At 10000 connections it
# takes some eight seconds to connect, for it sleeps after every 64.
bench() { # NAME REQUESTS ARGUMENT...
    local name=$1 n=$2 before rate avg min p50 p99 max
    shift 2
    before=$(cpu_ticks "$name")
    if ! run "${on_load[@]}" timeout 240 redis-benchmark -p "${port[$name]}" -n "$n" --csv "$@" \
        >"$tmp/out" 2>&1; then
        error="redis-benchmark $* with $name: $(tail -n 1 "$tmp/out")"
        return 1
    fi
    IFS=, read -r _ rate avg min p50 _ p99 max < <(tail -n 1 "$tmp/out" | tr -d '"')
    result=([rate]=$rate [avg]=$avg [min]=$min [p50]=$p50 [p99]=$p99 [max]=$max)
    add_costs "$name" "$n" "$before"
}

# Prepares requests for stream, with $keys keys of 16 bytes and values of 32.
prepare() { # text|resp SET|GET PARTS
    local format="SET key:%012d value:%026d\\n"
    if [[ $2 = GET ]]; then format='GET key:%012d\n'; fi
    if [[ $1 = resp ]]; then
        format='*3\r\n$3\r\nSET\r\n$16\r\nkey:%012d\r\n$32\r\nvalue:%026d\r\n'
    fi
    mkdir "$tmp/$1.$2.$3"
    progress "preparing $keys requests"
    run awk -v n="$keys" -v parts="$3" -v format="$format" -v file="$tmp/$1.$2.$3/" '
        BEGIN {for (i = 0; i < n; i++) printf format, i, i >(file int(i * parts / n))}'
}

# Sends what was prepared, text to kv and RESP to Redis, each part by an nc of its own, all at once.
# The length of the replies tells whether each was the right one.
stream() { # NAME IGNORED SET|GET PARTS
    local name=$1 files=$tmp/text.$3.$4 length=3 before start file got pids=()
    if [[ $3 = GET ]]; then length=33; fi
    if [[ $name = Redis ]]; then files=$tmp/resp.$3.$4 length=5; fi
    before=$(cpu_ticks "$name") start=${EPOCHREALTIME/./}
    for file in "$files/"*; do
        timeout 240 nc -N 127.0.0.1 "${port[$name]}" <"$file" >"$tmp/${file##*/}.replies" &
        pids+=($!)
    done
    wait "${pids[@]}" || true
    result=([rate]=$((keys * 1000000 / (${EPOCHREALTIME/./} - start))))
    add_costs "$name" "$keys" "$before"
    got=$(cat "$tmp/"*.replies | wc -c)
    error="$name sent $got bytes of replies through nc, not $((keys * length))"
    ((got == keys * length))
}

cpu_ticks() { # NAME: the processor time that a server has taken, in 1/100 s; Linux tells
    local stat=''
    if [[ -r /proc/${pid[$1]}/stat ]]; then stat=$(<"/proc/${pid[$1]}/stat"); fi
    read -ra stat <<<"${stat##*) }"
    echo $((${stat[11]:-0} + ${stat[12]:-0}))
}

memory() { # NAME FIELD: in kB
    awk -v field="$2:" '$1 == field {print $2}' "/proc/${pid[$1]}/status" 2>/dev/null || echo 0
}

add_costs() { # NAME REQUESTS TICKS_BEFORE
    result[cpu]=$(calc "($(cpu_ticks "$1") - $3) * 10000 / $2")
    result[rss]=$(calc "$(memory "$1" VmHWM) / 1024")
    result[virtual]=$(calc "$(memory "$1" VmPeak) / 1024")
}

calc() { awk "BEGIN {print $1}"; }

record() { # TABLE LOAD PROGRAM ROUND [NAME VALUE]...: all of $result if none is given
    local name
    [[ $csv ]] || return 0
    if (($# == 4)); then
        for name in "${!result[@]}"; do set -- "$@" "$name" "${result[$name]}"; done
    fi
    for (( ; $# > 4; )); do
        printf '%s,"%s",%s,%s,%s,%s,%s\n' "${@:1:6}" "${unit[$5]}" >>"$csv"
        set -- "${@:1:4}" "${@:7}"
    done
}

set_most() { # sets $most: a connection takes a descriptor and a thread, of which there are so many
    local n cgroup=''
    ulimit -Sn "$(ulimit -Hn)" || true
    if [[ -r /proc/self/cgroup ]]; then cgroup=$(tail -n 1 /proc/self/cgroup); fi
    most=${CONNECTIONS:-$((quick ? 1000 : 10000))}
    for n in $(ulimit -n; ulimit -u; cat /proc/sys/kernel/threads-max /proc/sys/kernel/pid_max \
        "/sys/fs/cgroup${cgroup##*:}/pids.max" 2>/dev/null || true); do
        if [[ $n =~ ^[0-9]+$ ]] && ((n - 200 < most)); then
            most=$((n - 200))
            say 'Limits of this machine, descriptors or threads, allow %d connections.\n' "$most"
        fi
    done
}

# --- two programs in turns ----------------------------------------------------------------

# Two programs take turns with the same load, and in being first. $tmp/rounds gets lines "NAME A B".
# Round 0 warms up with a tenth of the requests and does not count. If $renew is a function that
# starts a program, then each round has servers of its own, and filling them is the warm-up.
pair() { # TABLE LOAD A B REQUESTS bench|stream|... ARGUMENT...
    local table=$1 load=$2 a=$3 b=$4 n=$5 round=0 name program turn
    local -A of=()
    shift 5
    : >"$tmp/rounds"
    if [[ $renew ]]; then round=1; fi
    for (( ; round <= rounds; round++)); do
        turn=("$a" "$b")
        if ((round % 2)); then turn=("$b" "$a"); fi
        for program in "${turn[@]}"; do
            progress "$table: $load: $program, round $round of $rounds"
            if [[ $renew ]]; then anew "$program"; fi
            "$1" "$program" $((round ? n : n / 10 + 1)) "${@:2}" || die "$error"
            if [[ $renew ]]; then stop "$program" "${burners[@]}"; fi
            for name in "${!result[@]}"; do of[$program.$name]=${result[$name]}; done
            if ((round)); then record "$table" "$load" "$program" "$round"; fi
        done
        for name in "${!result[@]}"; do
            ((round == 0)) || echo "$name ${of[$a.$name]} ${of[$b.$name]}" >>"$tmp/rounds"
        done
    done
}

# So that no round depends on how memory came to lie in a server, or on what the server has been
# through before. It gets the keys of -r 100000.
anew() { # NAME
    "$renew" "$1"
    bench "$1" $((300000 * scale / 100)) -t set -r 100000 -P 64 || die "$error"
    burn
}

pair_heading() { # A B
    say '\n%-31s %10s %10s %6s %6s  %s\n' '' "$1" "$2" ratio MAD 'interval of the ratio'
}

# A line for what $tmp/rounds says of one name. Sets $seen to less, more or same.
pair_row() { # TABLE LOAD A B NAME [LABEL]
    local a b ratio mad low high level digits=0
    read -r a b ratio mad low high level seen < <(summary "$5")
    if [[ $5 != rate ]]; then digits=2; fi
    if [[ ${unit[$5]} = ms ]]; then digits=3; fi
    say "%-31s %10.${digits}f %10.${digits}f %6.2f %6.2f  %.2f to %.2f (%s %%)\n" \
        "${6:-$2}" "$a" "$b" "$ratio" "$mad" "$low" "$high" "$level"
    record "$1" "$2, $5" "$3/$4" '' ratio "$ratio" mad "$mad" low "$low" high "$high"
}

# Median of A, of B, of the ratios A / B; their MAD, the median distance from that; and an interval
# with its level in per cent. A round falls above or below the true median as a coin falls, so the
# k-th lowest to the k-th highest of n rounds encloses it, unless fewer than k fell on one side. k
# is the largest for which that is rarer than 5 %, or 1. Seven rounds: lowest to highest, 98.4 %;
# three: the same, but 75.0 %; nine: without the two outermost, 96.1 %.
summary() { # NAME
    awk -v name="$1" '
        function sort(v,    i, j, x) {
            for (i = 2; i <= n; i++) {
                for (x = v[j = i]; j > 1 && v[j - 1] > x; j--) v[j] = v[j - 1]
                v[j] = x
            }
        }
        function median(v) { sort(v); return (v[int((n + 1) / 2)] + v[int(n / 2) + 1]) / 2 }
        $1 == name { a[++n] = $2; b[n] = $3; ratio[n] = $3 > 0 ? $2 / $3 : 0 }
        END {
            m = median(ratio)
            for (i = 1; i <= n; i++) off[i] = ratio[i] > m ? ratio[i] - m : m - ratio[i]
            ways = 2 ^ -n # of all ways to fall, those with k - 1 rounds on one side
            level = 1 - 2 * ways
            for (k = 1; k < n / 2; k++) {
                ways *= (n - k + 1) / k
                if (level - 2 * ways < 0.95) break
                level -= 2 * ways
            }
            low = ratio[k]; high = ratio[n + 1 - k]
            seen = high < 1 ? "less" : low > 1 ? "more" : "same"
            printf "%.9g %.9g %.3f %.3f %.3f %.3f %.1f %s\n", median(a), median(b), m, median(off),
                low, high, 100 * level, seen
        }' "$tmp/rounds"
}

# --- kv alone -----------------------------------------------------------------------------

alone() {
    local n=$((120000 * scale / 100)) test c parts verb arguments cells
    need nc redis-benchmark
    start_kv kv "$kv"
    bench kv $((n * 5)) -t set -r 100000 -P 16 || die "$error" # warms up

    say '\nredis-benchmark -c 50 -r 100000 -t COMMAND\n'
    say '%11s   %9s %8s %8s %8s %8s %8s\n' '' 1/s 'min ms' 'avg' p50 p99 max
    for test in PING SET GET INCR DEL; do
        arguments=(-t "${test,,}")
        case $test in PING) arguments=(-t ping_mbulk) ;; DEL) arguments=(DEL key:__rand_int__) ;; esac
        progress "$test"
        bench kv "$n" -r 100000 "${arguments[@]}" || die "$error"
        record commands "$test" kv 1
        say '%11s   %9.0f %8s %8s %8s %8s %8s\n' "$test" "${result[rate]}" "${result[min]}" \
            "${result[avg]}" "${result[p50]}" "${result[p99]}" "${result[max]}"
    done

    set_get_heading '-c CONNECTIONS' connections
    for c in 1 10 50 100 1000 10000; do
        c=$((c > most ? most : c))
        set_get_row connections "$c" $((c == 1 ? n / 2 : c > 5000 ? n * 2 : n)) -c "$c"
        ((c < most)) || break
    done

    set_get_heading '-c 50 -P PIPELINED' pipelined
    for c in 1 4 16 64; do set_get_row pipelined "$c" $((n + n * c / 6)) -P "$c"; done

    say '\nnc -N <FILE of %d lines, split among as many nc at once\n' "$keys"
    say '%11s   %9s %9s\n' streams SET/s GET/s
    for parts in 1 2 4; do
        cells=()
        for verb in SET GET; do
            prepare text "$verb" "$parts"
            progress "nc, streams: $parts, $verb"
            stream kv "$keys" "$verb" "$parts" || die "$error"
            record text "$verb streams $parts" kv 1
            cells+=("${result[rate]}")
        done
        say '%11s   %9s %9s\n' "$parts" "${cells[@]}"
    done
}

set_get_heading() { # ARGUMENTS LABEL
    say '\nredis-benchmark -r 100000 -t set,get %s\n' "$1"
    say '%11s   %9s %8s %8s   %9s %8s %8s\n' "$2" SET/s 'p50 ms' p99 GET/s 'p50 ms' p99
}

set_get_row() { # TABLE LABEL REQUESTS ARGUMENT...
    local test cells=() failed=''
    for test in set get; do
        progress "$1 $2, $test"
        if bench kv "$3" -r 100000 -t "$test" "${@:4}"; then
            cells+=("${result[rate]%.*}" "${result[p50]}" "${result[p99]}")
            record "$1" "$test $2" kv 1
        else
            cells+=(- - -) failed=$error
        fi
    done
    say '%11s   %9s %8s %8s   %9s %8s %8s\n' "$2" "${cells[@]}"
    [[ ! $failed ]] || say '            %s\n' "$failed"
}

# --- kv beside others ---------------------------------------------------------------------

compare() {
    local beside=Redis label
    need nc redis-benchmark
    if [[ $other ]]; then
        beside=other
        say 'other: %s\n' "$other"
    else
        need redis-server
        say '%s\n' "$(redis-server --version | cut -d ' ' -f 1-3) --save '' --appendonly no"
    fi
    if ((busy)); then
        set_busy
        compare_loads busy 'as in "together", with two more processes that only burn processor time' <<'END'
1|get|10000|
10|get|20000|
50|get|30000|
END
        compare_explain
        return
    fi
    prepare text SET 1
    prepare resp SET 1
    compare_memory

    if set_apart; then
        compare_loads apart "$apart" <<'END'
1|get|20000|
10|get|40000|
50|get|60000|
50|get|500000| -P 16
200|get|60000|
1000|get|60000|
10000|get|200000|
END
    else
        say '\napart: %s.\n' "$apart"
    fi
    set_together
    compare_loads together 'redis-benchmark and the server may both run on every processor' <<'END'
1|set get|20000|
10|get|40000|
50|set get|60000|
50|set get|500000| -P 16
1000|set get|60000|
10000|set get|200000|
END
    compare_explain
    start kv
    start "$beside"
    label='SET nc -N'
    if [[ $beside = Redis ]]; then label+=', text / RESP'; fi
    pair_heading kv/s "$beside/s"
    pair together "$label" kv "$beside" "$keys" stream SET 1
    pair_row together "$label" kv "$beside" rate
    pair_row together "$label" kv "$beside" cpu '    CPU, s per million'
    say 'Together, the same servers for all rounds. nc sends kv the text%s.\n' \
        "$([[ $other ]] || echo ', Redis the same commands as RESP')"
    stop "$beside"
    compare_memcached
}

compare_loads() { # SETTING DESCRIPTION: reads lines CONNECTIONS|TESTS|REQUESTS|ARGUMENTS
    local c tests n arguments test label most_rounds=$rounds p99=() cpu=()
    say '\n%s: %s.\n' "$1" "$2"
    renew=start
    pair_heading kv/s "$beside/s"
    while IFS='|' read -r -u 3 c tests n arguments; do
        if ((c > most)); then say '%-31s %s\n' "$c connections" 'more than is allowed' && continue; fi
        rounds=$((c > 5000 ? ${ROUNDS:-3} : most_rounds))
        for test in $tests; do
            label="${test^^} -c $c$arguments"
            # shellcheck disable=SC2086 # many words
            pair "$1" "$label" kv "$beside" $((n * scale / 100)) \
                bench -r 100000 -t "$test" -c "$c" $arguments
            pair_row "$1" "$label" kv "$beside" rate
            p99+=("$(pair_row "$1" "$label" kv "$beside" p99)")
            cpu+=("$(pair_row "$1" "$label" kv "$beside" cpu)")
        done
    done 3<&0
    pair_heading 'kv, p99 ms' "$beside"
    say '%s\n' "${p99[@]}"
    pair_heading 'kv, CPU s' "$beside"
    say '%s\n' "${cpu[@]}"
    renew='' rounds=$most_rounds
}

compare_explain() {
    local fewer=''
    if ((!busy && most >= 10000)); then fewer=" (at -c 10000: of ${ROUNDS:-3})"; fi
    say '\n/s: requests a second. p99 ms: 99 of 100 requests took no longer. CPU s: processor time of the\n'
    say 'server per million requests, user and system. Medians of %s.\n' "$rounds rounds$fewer"
    say 'Both servers are started anew for each round. Each round gives one ratio, kv / %s; the column\n' "$beside"
    say '"ratio" shows the median of these ratios.\n'
}

compare_memory() {
    say '\n%-31s %10s %10s %6s\n' 'memory of the process (VmRSS)' kv "$beside" ratio
    memory_row key "$keys" 'bytes per key, of ' 1024
    memory_row connection $((most < 5000 ? most : 5000)) 'KiB per idle connection, of ' 1
    say 'Keys of 16 bytes, values of 32. Each connection has said PING. VmRSS does not include what the\n'
    say 'kernel keeps for each socket and for each thread of kv.\n'
}

# How much servers that have just started grow by, in kB times FACTOR, divided by NUMBER.
memory_row() { # key|connection NUMBER LABEL FACTOR
    local program before fd used=() fds=()
    start kv
    start "$beside"
    for program in kv "$beside"; do
        progress "memory per $1, $program"
        before=$(memory "$program" VmRSS)
        case $1 in
            key) stream "$program" "$2" SET 1 || die "$error" ;;
            connection) open_idle "$program" "$2" ;;
        esac
        run sleep 5 # until what is freed late has been freed
        used+=("$(calc "($(memory "$program" VmRSS) - $before) * $4 / $2")")
        record memory "per $1" "$program" 1 "$1" "${used[-1]}"
        for fd in "${fds[@]}"; do exec {fd}>&-; done
        fds=()
    done
    stop kv "$beside"
    say '%-31s %10.1f %10.1f %6.2f\n' "${3/%of /of $2}" "${used[@]}" "$(calc "${used[0]} / ${used[1]}")"
}

open_idle() { # NAME NUMBER: opens connections that have spoken once, as $fds
    local i fd reply=''
    for ((i = 0; i < $2; i++)); do
        exec {fd}<>"/dev/tcp/127.0.0.1/${port[$1]}"
        fds+=("$fd")
        printf '*1\r\n$4\r\nPING\r\n' >&"$fd"
        read -r -u "$fd" reply || true
        [[ $reply = +PONG* ]] || die "$1, connection $i: $reply"
    done
}

compare_memcached() { # which speaks neither protocol: it takes a tool that knows both
    local verb user=()
    if ! command -v memcached >/dev/null || ! command -v memtier_benchmark >/dev/null; then
        say '\nmemcached: left out, as memcached or memtier_benchmark is not there.\n' && return
    fi
    if ((UID == 0)); then user=(-u nobody); fi
    port[memcached]=$((20000 + RANDOM % 12000))
    launch memcached '' memcached -l 127.0.0.1 -p "${port[memcached]}" -m 1024 "${user[@]}"
    run sleep 1
    pair_heading kv/s memcached/s
    for verb in SET GET; do
        pair memcached "$verb -c 50" kv memcached $((150000 * scale / 100)) memtier "$verb"
        pair_row memcached "$verb -c 50" kv memcached rate
    done
}

memtier() { # NAME REQUESTS SET|GET
    local protocol=redis mix=1:0
    if [[ $1 = memcached ]]; then protocol=memcache_text; fi
    if [[ $3 = GET ]]; then mix=0:1; fi
    run timeout 240 memtier_benchmark -s 127.0.0.1 -p "${port[$1]}" -P "$protocol" -t 1 -c 50 -d 3 \
        -n $(($2 / 50 + 1)) --ratio "$mix" --key-maximum 100000 --hide-histogram >"$tmp/out" 2>&1 || true
    error="memtier_benchmark with $1: $(tail -n 1 "$tmp/out")"
    result=([rate]=$(awk '$1 == "Totals" {print $2}' "$tmp/out"))
    [[ ${result[rate]} ]]
}

# --- the append-only file -----------------------------------------------------------------
# A server's name is kv or Redis, with what --fsync or appendfsync says: kv-always. kv-none has no
# file. The files are in $tmp: TMPDIR on another disk measures that one.

aof() {
    local start
    need nc redis-benchmark redis-server
    say '%s\n' "$(redis-server --version | cut -d ' ' -f 1-3) --auto-aof-rewrite-percentage 0"
    start=${EPOCHREALTIME/./}
    run dd if=/dev/zero of="$tmp/disk" bs=64 count=200 oflag=sync 2>/dev/null || true
    say 'Files in %s, %s; dd needs %d us to write 64 bytes and wait for the disk.\n' "${tmp%/*}" \
        "$(df -T "$tmp" 2>/dev/null | awk 'END {print $2}')" $(((${EPOCHREALTIME/./} - start) / 200))

    if ((busy)); then
        set_busy
        say 'busy: beside two processes that only burn processor time.\n'
        aof_rates <<<'kv-always|Redis-always|20000|'
        return
    fi
    aof_rates <<'END'
kv-always|Redis-always|50000|
kv-everysec|Redis-everysec|150000|
kv-everysec|Redis-everysec|1000000| -P 16
kv-everysec|kv-none|150000|
kv-everysec|kv-none|1000000| -P 16
END
    aof_fsyncs
    aof_replay
}

aof_rates() { # reads lines A|B|REQUESTS|ARGUMENTS
    local a b n arguments policy label
    renew=start_aof
    pair_heading A/s B/s
    while IFS='|' read -r -u 3 a b n arguments; do
        policy=${a#*-} label="$a / ${b%-"$policy"}$arguments"
        # shellcheck disable=SC2086 # many words
        pair aof "$label" "$a" "$b" $((n * scale / 100)) bench -t set -r 100000 -c 50 $arguments
        pair_row aof "$label" "$a" "$b" rate
    done 3<&0
    renew=''
    say 'SETs a second by redis-benchmark -c 50 -r 100000, medians of %d rounds. Both servers are started\n' \
        "$rounds"
    say 'anew for each round, on a new file. Each round gives one ratio, A / B; the column "ratio" shows\n'
    say 'the median of these ratios. Both servers have the same policy, always or everysec.\n'
    say 'kv-none has no file.\n'
}

start_aof() { # NAME: on a new file
    rm -rf "${tmp:?}/$1"
    mkdir "$tmp/$1"
    case $1 in
        kv-none) start_kv "$1" "$kv" ;;
        kv-*) start_kv "$1" "$kv" --aof "$tmp/$1/aof" --fsync "${1#*-}" ;;
        *) start_redis "$1" --appendonly yes --dir "$tmp/$1" --appendfsync "${1#*-}" \
            --auto-aof-rewrite-percentage 0 ;; # nor does kv rewrite its file
    esac
}

aof_fsyncs() {
    local name tracer=(strace -D -f --seccomp-bpf -e 'trace=fsync,fdatasync')
    if ! strace -f --seccomp-bpf -o "$tmp/out" true 2>/dev/null; then
        say '\nfsyncs per SET: left out, as strace is not there, is too old or may not trace.\n' && return
    fi
    tracer=("${leash[@]}" "${tracer[@]}")
    for name in kv-always Redis-always; do
        local leash=("${tracer[@]}" -o "$tmp/$name.trace")
        start_aof "$name"
    done
    pair_heading kv Redis
    pair aof 'fsyncs, always' kv-always Redis-always $((20000 * scale / 100)) fsyncs \
        -t set -r 100000 -c 50
    pair_row aof 'fsyncs, always' kv-always Redis-always fsyncs 'fsyncs per 100 SETs, always'
    stop kv-always Redis-always
    say 'Counted by strace during redis-benchmark -c 50 -r 100000. Tracing makes an fsync slower.\n'
}

fsyncs() { # NAME REQUESTS ARGUMENT...
    local call='sync.*= 0$' before
    before=$(grep -c "$call" "$tmp/$1.trace" || true)
    bench "$@" || return 1
    result=([fsyncs]=$(calc "($(grep -c "$call" "$tmp/$1.trace") - $before) * 100 / $2"))
}

aof_replay() {
    local label="replay of $keys"
    prepare text SET 1
    progress 'making a file to replay'
    start_aof kv-no
    stream kv-no "$keys" SET 1 || die "$error"
    stop kv-no
    pair_heading 'kv, s' Redis
    pair aof "$label" kv Redis "$keys" replay
    pair_row aof "$label" kv Redis start "start, $keys records"
    say 'Seconds until clients are let in. Both servers load the same file of %d bytes. kv wrote it\n' \
        "$(wc -c <"$tmp/kv-no/aof")"
    say 'before, from SETs of keys of 16 bytes and values of 32 bytes.\n'
}

# Starts on the file of kv-no. The warm-up replays all of it too.
replay() { # NAME IGNORED
    local start=${EPOCHREALTIME/./} fd got=''
    if [[ $1 = kv ]]; then start_kv kv "$kv" --aof "$tmp/kv-no/aof"; else
        rm -rf "$tmp/replay"
        mkdir "$tmp/replay"
        ln "$tmp/kv-no/aof" "$tmp/replay/aof" # Redis moves it, and appends to one of its own
        start_redis "$1" --appendonly yes --dir "$tmp/replay" --appendfilename aof
    fi
    result=([start]=$(calc "(${EPOCHREALTIME/./} - $start) / 1000000"))
    exec {fd}<>"/dev/tcp/127.0.0.1/${port[$1]}"
    printf '*1\r\n$6\r\nDBSIZE\r\n' >&"$fd"
    read -r -u "$fd" got || true
    exec {fd}>&-
    stop "$1"
    error="$1 has loaded ${got//[^0-9]/} keys, not $keys"
    [[ $got = :$keys$'\r' ]]
}

# --- what was rejected --------------------------------------------------------------------

alternatives() { # [NAME]
    local patch name failed=0 patches=(doc/alternatives/*.patch)
    if [[ ${1:-} ]]; then patches=("doc/alternatives/${1%.patch}.patch"); fi
    if [[ ! -e ${patches[0]} ]]; then
        [[ ! ${1:-} ]] || wrong "there is no ${patches[0]}"
        say 'doc/alternatives has no patch.\n' && return
    fi
    need make patch redis-benchmark
    build "$tmp/kv" || die "kv.c: $error"
    for patch in "${patches[@]}"; do
        name=${patch##*/} name=${name%.patch}
        say '\n%s, chapter %s\n' "$name" "$(field chapter "$patch")"
        progress "building $name"
        if build "$tmp/$name" "$patch"; then alternative "$name" "$patch"; else
            say '    %s\n' "$error"
            failed=1
        fi
    done
    return "$failed"
}

field() { # NAME PATCH: what the first lines of the patch say
    awk -v start="# $1:" '/^(diff|---) / {exit}
        index($0, start) == 1 {sub(/^[^:]*: */, ""); print}' "$2"
}

build() { # DIRECTORY [PATCH]
    mkdir "$1"
    cp kv.c Makefile "$1"
    if [[ ${2:-} ]] && ! patch -s -p1 -d "$1" <"$2" >"$tmp/out" 2>&1; then
        error="does not apply: $(<"$tmp/out")" && return 1
    fi
    run make -s -C "$1" kv >"$tmp/out" 2>&1 || { error="does not build: $(<"$tmp/out")" && return 1; }
}

alternative() { # NAME PATCH
    local name=$1 patch=$2 line program test measure load all n tests words options measures
    read -ra options < <(field options "$patch") || true
    measures=$(field measure "$patch")
    read -ra measures <<<"${measures:-rate}"
    for program in kv "$name"; do
        mkdir "$tmp/$program/$name"
        start_kv "$program" "$tmp/$program/kv" "${options[@]//DIR/"$tmp/$program/$name"}"
        while IFS= read -r -u 3 line; do
            split_load "$line"
            for test in "${tests[@]}"; do
                progress "$name: filling $program"
                bench "$program" "$n" ${test:+-t "$test"} "${words[@]}" || die "$error"
            done
        done 3< <(field first "$patch")
    done
    say 'expected: %s\n' "$(field expect "$patch")"
    pair_heading patched kv
    while IFS= read -r -u 3 line; do
        split_load "$line"
        for test in "${tests[@]}"; do
            load="${test:+-t $test }${words[*]}" all=''
            pair "$name" "$load" "$name" kv "$n" bench ${test:+-t "$test"} "${words[@]}"
            say '%s\n' "$load"
            for measure in "${measures[@]}"; do
                pair_row "$name" "$load" "$name" kv "$measure" "    $measure, ${unit[$measure]}"
                all+="${all:+, }$seen $measure"
            done
            all=${all/less rate/slower} all=${all/more rate/faster}
            say '    with the patch: %s\n' "${all/same rate/same}"
        done
    done 3< <(field load "$patch")
    stop kv "$name"
}

split_load() { # LOAD: sets $tests, or one that is empty, $n, and $words to what is left
    local i load
    read -ra load <<<"$1"
    tests=('') n=100000 words=()
    for ((i = 0; i < ${#load[@]}; i++)); do
        case ${load[i]} in
            -t) IFS=, read -ra tests <<<"${load[++i]}" ;;
            -n) n=${load[++i]} ;;
            *) words+=("${load[i]}") ;;
        esac
    done
    n=$((n * scale / 100))
}

# --- pictures -----------------------------------------------------------------------------

plot() {
    local c n name round program programs=(kv) medians
    need redis-benchmark gnuplot
    start_kv kv "$kv"
    if command -v redis-server >/dev/null; then start_redis Redis && programs+=(Redis); fi
    for program in "${programs[@]}"; do
        bench "$program" $((1000000 * scale / 100)) -t set -r 100000 -P 16 || die "$error"
    done
    say '\n%-7s %11s %9s %8s %8s\n' GET connections 1/s 'p50 ms' 'p99 ms'
    for c in 1 2 5 10 20 50 100 200 500 1000 2000 5000 10000; do
        ((c <= most)) || break
        n=$(((c < 5 ? 50000 : c > 1000 ? 300000 : 100000) * scale / 100))
        rm -f "$tmp/"*.all
        for ((round = 1; round <= rounds; round++)); do
            for program in "${programs[@]}"; do
                progress "GET, $c connections: $program, round $round of $rounds"
                bench "$program" "$n" -t get -r 100000 -c "$c" || die "$error"
                record plot "GET -c $c" "$program" "$round"
                for name in rate p50 p99; do echo "${result[$name]}" >>"$tmp/$program.$name.all"; done
            done
        done
        for program in "${programs[@]}"; do
            medians=("$c")
            for name in rate p50 p99; do
                medians+=("$(sort -n "$tmp/$program.$name.all" | head -n $(((rounds + 1) / 2)) | tail -n 1)")
            done
            echo "${medians[*]}" >>"$tmp/$program.dat"
            say '%-7s %11d %9.0f %8.3f %8.3f\n' "$program" "${medians[@]}"
        done
    done
    gnuplot -e "tmp = '$tmp'; programs = '${programs[*]}'" - <<'END'
set terminal svg size 720,420 background '#ffffff' font 'sans-serif,13'
set grid lt 1 lc rgb '#dddddd'
name(i) = word(programs, i)
file(i) = tmp . '/' . name(i) . '.dat'
n = words(programs)
set key bottom right
set logscale x
set yrange [0:*]
set xlabel 'connections'
set ylabel 'GET, thousands a second'
set output 'doc/rate-over-connections.svg'
plot for [i = 1:n] file(i) using 1:($2 / 1000) with linespoints lw 2 pt 7 ps 0.5 lc i title name(i)
unset logscale x
set logscale y
set key top left
set xrange [0:*]
set yrange [*:*]
set xlabel 'GET, thousands a second, with as many connections as stand at the point'
set ylabel 'latency in ms'
set output 'doc/latency-over-rate.svg'
plot for [i = 1:n] file(i) using ($2 / 1000):4 with linespoints lw 1 dt 2 pt 7 ps 0.3 lc i \
        title name(i) . ', p99', \
    for [i = 1:n] file(i) using ($2 / 1000):3 with linespoints lw 2 pt 7 ps 0.5 lc i \
        title name(i) . ', p50', \
    file(1) using ($2 / 1000):3:1 with labels offset 0,-0.8 font ',9' notitle
END
    say 'Drawn: doc/rate-over-connections.svg doc/latency-over-rate.svg\n'
}

# --- options ------------------------------------------------------------------------------

if [[ ${1:-} = measure ]]; then
    cd "$(dirname "$0")"
    measure "${@:2}"
    exit
fi
mode=alone name='' csv='' quick=0 busy=0
while (($#)); do
    case $1 in
        -h | --help) usage && exit ;;
        --csv) (($# > 1)) || wrong '--csv needs a file' && csv=$(realpath -- "$2") && shift ;;
        --quick) quick=1 ;;
        compare | aof | alternatives | plot) [[ $mode = alone ]] || wrong "$mode or $1?" && mode=$1 ;;
        busy) [[ $mode = @(compare|aof) ]] || wrong 'busy belongs to compare or aof' && busy=1 ;;
        *) [[ $mode = alternatives && $1 != -* && ! $name ]] || wrong "what is $1?" && name=$1 ;;
    esac
    shift
done
for n in "${ROUNDS:-1}" "${SCALE:-1}" "${CONNECTIONS:-1}"; do
    [[ $n =~ ^[1-9][0-9]{0,5}$ ]] || wrong "ROUNDS, SCALE and CONNECTIONS are numbers from 1, not $n"
done
rounds=${ROUNDS:-7} scale=${SCALE:-100} renew=''
if ((quick)); then scale=${SCALE:-10}; fi
if ((quick)) || [[ $mode = plot ]]; then rounds=${ROUNDS:-3}; fi
keys=$((1000000 * scale / 100)) kv=./kv other=''
if [[ ${OTHER:-} ]]; then other=$(realpath -- "$OTHER"); fi
if [[ ${KV:-} ]]; then kv=$(realpath -- "$KV"); fi
cd "$(dirname "$0")"

tmp=$(mktemp -d)
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
if [[ $csv ]]; then echo table,load,program,round,name,value,unit >"$csv"; fi
if [[ $mode != alternatives && ! ${KV:-} ]]; then
    need make
    progress 'make kv'
    run make -s kv >"$tmp/out" 2>&1 || die "make kv: $(<"$tmp/out")"
fi
say '%s, %d processors: %s\n' "$(uname -sr)" "$(nproc)" \
    "$(awk -F ': ' '/^model name/ {print $2; exit}' /proc/cpuinfo 2>/dev/null || true)"
set_most
case $mode in alternatives) alternatives "$name" ;; *) "$mode" ;; esac
