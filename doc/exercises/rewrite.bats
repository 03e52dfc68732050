#!/usr/bin/env bats
# chapter: 10
# concept: a log that is rewritten while others write
# level: 4
# lines: 163
# minutes: 480
# task: Build BGREWRITEAOF: a thread writes the file anew, as small as a start does, while clients go on; a crash at any moment loses nothing that was answered.
# needs: linux
#
# SHORT=1 makes it do fewer rounds of kill -9.
#
# SC2030, SC2031: bats runs each test as a process. SC2016: an awk program has its own $1.
# SC2154: common.bash sets it.
# shellcheck disable=SC2030,SC2031,SC2016,SC2154

load common

rounds=60 writers=8
if [[ ${SHORT:-} ]]; then rounds=6; fi
if [[ ${SANITIZER:-} = tsan ]]; then writers=2; fi # with more, a rewrite hardly gets a processor
if [[ ${BATS_TEST_TIMEOUT:-} ]]; then export BATS_TEST_TIMEOUT=$((120 + rounds * 8)); fi

started='Background append only file rewriting started'

# Rewrites the file and waits for the end, as often as the log says so.
rewrite() { # [WORDS]: what the log must say
    local before
    before=$(grep -c "${1:-: rewritten}" "$log" || true)
    ask BGREWRITEAOF | is "$started" || return 1
    wait_until more_lines "$before" "${1:-: rewritten}"
}

more_lines() { (($(grep -c "$2" "$log") > $1)); } # COUNT REGEX

# Whether another kv cannot start with this file.
second_is_refused() {
    local code=0
    timeout 20 "$KV" -p 0 --aof "$tmp/aof" </dev/null 2>"$tmp/second" || code=$?
    if ((code == 1)) && grep -q 'in use' "$tmp/second"; then return 0; fi
    echo "status $code" && cat "$tmp/second" && return 1
}

@test "BGREWRITEAOF makes the file small, keeps its mode, and loses nothing" {
    start_kv --fsync no
    chmod 640 "$tmp/aof"
    yes 'INCR n' | head -n 100000 | nc -N 127.0.0.1 "$port" | tail -n 1 | is 100000
    ask "SET big $(x 1000000)" 'SET late 1 PXAT 9999999999999' 'SET "\x00\r\n" "\xff"' 'SET gone 1' 'DEL gone' >"$tmp/out"
    old=$(inode "$tmp/aof")
    (($(size_of "$tmp/aof") > 3000000))
    rewrite
    (($(size_of "$tmp/aof") < 1002000 && $(inode "$tmp/aof") != old))
    [[ $(stat -c %a "$tmp/aof") = 640 && ! -e $tmp/aof.kv-compact ]]
    ask 'INCR n' 'DEL big' | is 100001 1
    loads_the_same 'GET n' 'GET big' 'PTTL none' 'GET "\x00\r\n"' 'GET late' 'EXISTS gone' DBSIZE
    is 100001 '(nil)' -2 $'\xff' 1 0 3 <"$tmp/before"
    ask 'PERSIST late' FLUSHALL | is 1 OK
    rewrite
    rewrite
    (($(size_of "$tmp/aof") < 100))
    loads_the_same DBSIZE 'GET n'
}

# One try can miss writes that are lost: on a busy machine none may fall amid the last rewrite.
@test "FLUSHALL, deadlines and deletions amid a rewrite are as they were after a restart" {
    for _ in 1 2 3; do
        amid_rewrites
        stop_kv KILL
        rm "$tmp/aof"
    done
}

amid_rewrites() {
    start_kv --fsync no
    seq -f "SET k%.0f $(x 300)" 30000 | nc -N 127.0.0.1 "$port" >"$tmp/out"
    for i in 1 2 3 4 5; do
        {
            echo BGREWRITEAOF
            seq -f "INCR n%.0f" 3000
            if ((i == 3)); then echo FLUSHALL; fi
            seq -f 'SET t%.0f 1 PXAT 9999999999999' 3000
            seq -f 'DEL k%.0f' 3000 7 $((3000 + i * 1000))
            seq -f 'PERSIST t%.0f' 1 3 3000
        } | nc -N 127.0.0.1 "$port" | head -n 1 | is "$started"
        wait_until more_lines $((i - 1)) ': rewritten'
    done
    ask KEYS | sort >"$tmp/keys"
    sed '/(.* keys)/d; s/.*/GET &\nPERSIST &/' "$tmp/keys" >"$tmp/look"
    cp "$tmp/aof" "$tmp/copy"
    nc -N 127.0.0.1 "$port" <"$tmp/look" >"$tmp/before"
    stop_kv KILL
    cp "$tmp/copy" "$tmp/aof"
    start_kv
    lost='what clients wrote amid a rewrite is lost after a restart'
    ask KEYS | sort | cmp - "$tmp/keys" || because "$lost"
    nc -N 127.0.0.1 "$port" <"$tmp/look" | cmp - "$tmp/before" || because "$lost"
}

# Clients (`writers`) each count up a key of their own, and set one of 5,000 others to the number. So a
# record that is lost shows, for it takes long until its key is written again.
@test "kill -9 under load, with rewrites back to back, loses nothing that was answered, nor adds what was not sent" {
    local policies=(always everysec no) i round
    rewritten=0 unfinished=0
    for ((i = 1; i <= writers; i++)); do count[i]=0; done
    for ((round = 0; round < rounds; round++)); do
        start_kv --fsync "${policies[round % 3]}"
        seq -f "SET fill:%.0f $(x 500)" 2000 | nc -N 127.0.0.1 "$port" | uniq -c | grep -q '2000 OK'
        clients=()
        for ((i = 1; i <= writers; i++)); do
            awk -v i="$i" -v n="${count[i]}" 'BEGIN {
                for (end = n + 500000; n++ < end;) printf "INCR c%d\nSET s%d:%d %d EX 100000\n", i, i, n % 5000, n
            }' 2>/dev/null | timeout 60 nc 127.0.0.1 "$port" >"$tmp/answers.$i" 2>/dev/null 3>&- &
            clients+=("$!")
        done
        (while sleep 0.002; do echo BGREWRITEAOF; done | timeout 60 nc 127.0.0.1 "$port") >/dev/null 2>&1 3>&- &
        clients+=("$!")
        wait_until more_lines $((RANDOM % 3)) ': rewritten'
        sleep "0.0$((RANDOM % 10))"
        stop_kv KILL
        wait "${clients[@]}" || true
        rewritten=$((rewritten + $(grep -c ': rewritten' "$log")))
        start_kv
        for ((i = 1; i <= writers; i++)); do
            answered=$(wc -l <"$tmp/answers.$i") # what the crash cut off has no newline
            if ((answered < 1000000)); then unfinished=$((unfinished + 1)); fi
            n=$(ask "GET c$i" | sed 's/(nil)/0/')
            if ((n < count[i] + (answered + 1) / 2 || n > count[i] + 500000)); then
                echo "round $round, client $i: $answered answers since ${count[i]}, but c is $n"
                return 1
            fi
            seq -f "GET s$i:%.0f" 0 4999 | nc -N 127.0.0.1 "$port" |
                awk -v n="$n" -v least=$((count[i] + answered / 2)) "$each_is_right"
            count[i]=$n
            if ((n > 0)); then ask "SET s$i:$((n % 5000)) $n EX 100000" | is OK; fi
        done
        seq -f 'GET fill:%.0f' 2000 | nc -N 127.0.0.1 "$port" | uniq -c | grep -q "2000 $(x 500)"
        ask KEYS | sed '/^fill:[0-9]*$/d; /^c[1-8]$/d; /^s[1-8]:[0-9]*$/d' | grep -Ex '\([0-9]+ keys\)'
        stop_kv
        ((status == 0))
    done
    echo "$rewritten rewrites in $rounds rounds; $unfinished of $((rounds * writers)) clients were still sending"
    ((rewritten >= rounds && unfinished > rounds * writers / 2))
}

# Whether line j is the greatest number up to n of which j is the rest; n itself may be lacking if
# it was not answered.
each_is_right='
    { j = NR - 1; last = n - (n - j + 5000) % 5000 }
    n < j { last = j - 5000 }
    { value = $1 == "(nil)" ? 0 : $1; want = last > 0 ? last : 0 }
    value == want { next }
    last == n && n > least && value == (n > 5000 ? n - 5000 : 0) { next }
    { print "n is " n ", answered to " least ", line " j " is " value ", not " want; exit wrong = 1 }
    END { exit wrong || NR != 5000 }'

@test "on a full disk the old file goes on, and the new one is removed" {
    start_kv
    for i in 1 2 3 4 5; do ask "SET big $(x 100000)" "SET other $(x 100000)" | is OK OK; done
    old=$(inode "$tmp/aof")
    prlimit --pid "$pid" --fsize=150000: # the file is larger, so that it cannot grow
    ask BGREWRITEAOF | is "$started"
    wait_until grep -q 'not rewritten: File too large' "$log"
    prlimit --pid "$pid" --fsize=unlimited:
    [[ $(inode "$tmp/aof") = "$old" && ! -e $tmp/aof.kv-compact ]]
    wait_until writes_work
    mkdir "$tmp/aof.kv-compact"
    rewrite 'not rewritten: File exists'
    rmdir "$tmp/aof.kv-compact"
    ln "$tmp/aof" "$tmp/backup"
    rewrite 'not rewritten: it has another name'
    rm "$tmp/backup"
    [[ $(inode "$tmp/aof") = "$old" ]]
    loads_the_same 'GET big' 'GET other' 'GET probe' DBSIZE
}

writes_work() { [[ $(ask 'SET probe 1') = OK ]]; }

deletes_work() { [[ $(ask 'DEL none') = 0 ]]; }

@test "a batch that a full disk has cut in two is finished before the file is replaced" {
    start_kv
    for i in 1 2 3 4 5; do ask "SET big $(x 100000)" | is OK; done
    prlimit --pid "$pid" --fsize="$(($(size_of "$tmp/aof") + 10)):"
    ask 'SET a 1' | grep -q MISCONF
    ask BGREWRITEAOF | is "$started"
    wait_until grep -q 'not rewritten' "$log"
    second_is_refused
    prlimit --pid "$pid" --fsize=unlimited:
    wait_until deletes_work
    rewrite
    (($(size_of "$tmp/aof") < 101000))
    ask 'INCR n' | is 1
    loads_the_same 'GET a' 'GET n' DBSIZE
    is 1 1 3 <"$tmp/before"
}

# The old file has no room any more, but is larger than the new one: only the half batch forbids it.
@test "while a batch is half written the file is not replaced" {
    start_kv --fsync no
    for i in 1 2 3; do seq -f "SET k%.0f $(x 2000)" 10000 | nc -N 127.0.0.1 "$port" >"$tmp/out"; done
    for _ in 1 2 3 4 5; do # a busy machine may be too slow to stop it in time
        exec {c}<>"/dev/tcp/127.0.0.1/$port"
        ask BGREWRITEAOF | is "$started"
        until [[ -e $tmp/aof.kv-compact ]] || grep -q ': rewritten' "$log"; do :; done
        kill -STOP "$pid"
        amid=0 && if [[ -e $tmp/aof.kv-compact ]]; then amid=1; fi
        prlimit --pid "$pid" --fsize="$(($(size_of "$tmp/aof") + 10)):"
        echo 'SET half 1' >&"$c"
        kill -CONT "$pid"
        read -r -t 20 -u "$c" line
        exec {c}>&-
        # Or the rewrite ended just before the SET: then the new file had room for it.
        if ((amid)) && [[ $line = *MISCONF* ]]; then break; fi
        prlimit --pid "$pid" --fsize=unlimited:
        for i in 1 2; do seq -f "SET k%.0f $(x 2000)" 10000 | nc -N 127.0.0.1 "$port" >"$tmp/out"; done
        : >"$log"
    done
    ((amid))
    [[ $line = *MISCONF* ]]
    wait_until grep -q 'not rewritten' "$log"
    [[ ! -e $tmp/aof.kv-compact ]]
    prlimit --pid "$pid" --fsize=unlimited:
    wait_until writes_work
    loads_the_same 'GET half' 'GET probe' 'GET k1' DBSIZE
    rewrite
    loads_the_same 'GET half' 'GET probe' 'GET k1' DBSIZE
}

@test "a second kv is refused before a rewrite and after each, and descriptors do not add up" {
    start_kv
    ask 'SET a 1' | is OK
    second_is_refused
    for i in 1 2 3 4; do
        rewrite
        second_is_refused
        ask 'INCR n' | is "$i"
        second_is_refused
        files=$(find "/proc/$pid/fd" -lname "$tmp/aof*" | wc -l)
        ((files == 2))
    done
    mkdir "$tmp/aof.kv-compact" # nor after one that has failed
    rewrite 'not rewritten'
    second_is_refused
}

@test "a rewrite that is under way is not begun again, and without a file there is none" {
    start_kv --fsync no
    seq -f "SET k%.0f $(x 2000)" 20000 | nc -N 127.0.0.1 "$port" >"$tmp/out"
    yes BGREWRITEAOF | head -n 3 | nc -N 127.0.0.1 "$port" | sort -u |
        is '(error) ERR Background append only file rewriting already in progress' "$started"
    stop_kv # in the midst of it
    ((status == 0))
    [[ ! -e $tmp/aof.kv-compact ]]
    start_kv
    ask DBSIZE | is 20000
    stop_kv
    : >"$log"
    "$KV" -p 0 </dev/null 2>>"$log" 3>&- 4>&- &
    pid=$!
    wait_until listening
    ask BGREWRITEAOF | grep -q 'ERR there is no append only file'
}
