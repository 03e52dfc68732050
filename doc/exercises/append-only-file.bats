
# ==========================================================================================
# Append-only file: crashes
# ==========================================================================================

start_aof() { start_kv --aof "$tmp/aof" "$@"; } # OPTION...

restart() { stop_kv KILL && start_aof "$@"; } # OPTION...: after a crash

size_of() { wc -c <"$1"; } # FILE

# A long form of this: KILLS=100 ./test.sh -f 'kill -9'
if [[ ${KILLS:-} && ${BATS_TEST_TIMEOUT:-} ]]; then
    export BATS_TEST_TIMEOUT=$((time_limit + KILLS * 5))
fi

@test "after kill -9 under load all that was answered is there, and nothing that was not sent" {
    moment=$(date +%s)
    for i in {1..20}; do
        awk -v id="$i" -v moment="$moment" "$random_requests" >"$tmp/requests.$i"
        for key in {0..5}; do echo "$i:$key"; done
    done >"$tmp/keys"
    policies=(always everysec no) unfinished=0
    for ((kill = 0; kill < ${KILLS:-10}; kill++)); do
        if ((kill % 6 == 0)); then rm -f "$tmp/aof" && : >"$tmp/state"; fi
        start_aof --fsync "${policies[kill % 3]}"
        load
        stop_kv KILL
        wait "${clients[@]}" || true
        start_aof
        mv "$tmp/state" "$tmp/state.before"
        sed 's/.*/GET &\nTTL &/' "$tmp/keys" | talk | paste -d ' ' "$tmp/keys" - - >"$tmp/state"
        check_states
        stop_kv KILL
    done
    # Or else it was not under load.
    echo "$unfinished of $((kill * 20)) clients were still sending"
    ((unfinished > kill * 5))
}

# 5,000 requests of one client, for keys that are its own. Deadlines are multiples of 100,000 s.
random_requests='BEGIN {
    srand(id)
    for (i = 0; i < 5000; i++) {
        key = id ":" int(rand() * 6)
        what = int(rand() * 16)
        value = int(rand() * 100000)
        later = int(rand() * 9 + 1) "00000"
        if (what < 4) print "INCR", key
        else if (what < 6) print "SET", key, value
        else if (what == 6) printf "SET %s %0600d.\n", key, value
        else if (what == 7) print "SET", key, value, "EX", later
        else if (what == 8) print "SET", key, value, "KEEPTTL"
        else if (what == 9) print "SET", key, value, "NX"
        else if (what == 10) print "DEL", key
        else if (what == 11) print "DEL", key, id ":" int(rand() * 6)
        else if (what == 12) print "EXPIRE", key, later
        else if (what == 13) printf "PEXPIREAT %s %.0f000\n", key, moment + later
        else if (what == 14) print "PERSIST", key
        else print "GET", key
    }
}'

# 20 clients send all they have, which makes the file grow by 7 MB. Returns while they do, when
# it has grown by a random part of that. Sets $clients to their process ids.
load() {
    local i goal=$(($(size_of "$tmp/aof") + RANDOM * 150))
    clients=()
    for i in {1..20}; do
        timeout 60 nc 127.0.0.1 "$port" <"$tmp/requests.$i" >"$tmp/answers.$i" 2>/dev/null 3>&- &
        clients+=("$!")
    done
    for ((i = 0; i < 5000 && $(size_of "$tmp/aof") < goal; i++)); do :; done
}

# Whether the state of each client's keys is what its requests make of the state before: those
# that were answered, in their order, and maybe some more. The answers must be right as well.
check_states() {
    local i answered checks=()
    for i in {1..20}; do
        answered=$(wc -l <"$tmp/answers.$i") # what the crash cut off has no newline
        if ((answered < 5000)); then unfinished=$((unfinished + 1)); fi
        awk -v id="$i" -v moment="$moment" -v answered="$answered" "$replay_requests" \
            file=before "$tmp/state.before" file=after "$tmp/state" \
            file=answers "$tmp/answers.$i" file=requests "$tmp/requests.$i" &
        checks+=("$!")
    done
    for i in "${checks[@]}"; do wait "$i" || return 1; done
}

# A line of a state is: key, value or (nil), TTL.
replay_requests='
    function as_it_is(    key) {
        for (key in after_value)
            if ((key in value ? value[key] " " later[key] + 0 : "(nil) 0") != after_value[key])
                return 0
        return 1
    }
    function run(name, key,    i, n) {
        if (name == "GET") return key in value ? value[key] : "(nil)"
        if (name == "INCR") {
            if (value[key] ~ /\./) return "(error)"
            return value[key] = value[key] + 1
        }
        if (name == "SET") {
            if ($4 == "NX" && key in value) return "(nil)"
            value[key] = $3
            if ($4 != "KEEPTTL") later[key] = $4 == "EX" ? $5 / 100000 : 0
            return "OK"
        }
        if (name == "DEL") {
            for (i = 2; i <= NF; i++) {
                n += $i in value
                delete value[$i]
                delete later[$i]
                if (FNR > answered && as_it_is()) found = 1 # a crash may part its keys
            }
            return n + 0
        }
        if (!(key in value) || (name == "PERSIST" && !later[key])) return 0
        later[key] = name == "EXPIRE" ? $3 / 100000 : 0
        if (name == "PEXPIREAT") later[key] = int(($3 / 1000 - moment) / 100000 + 0.5)
        return 1
    }
    file == "answers" { answer[FNR] = $1 }
    file == "requests" {
        if (FNR > answered && as_it_is()) found = 1
        reply = run($1, $2)
        if (found) exit
        if (FNR <= answered && reply != answer[FNR]) {
            print "client " id, "request " FNR, $0, "answer", answer[FNR], "expected", reply
            wrong = 1
            exit
        }
    }
    file != "answers" && file != "requests" && index($1, id ":") == 1 {
        if (file == "after") after_value[$1] = $2 " " ($3 > 0 ? int($3 / 100000 + 0.5) : 0)
        else if ($2 != "(nil)") {
            value[$1] = $2
            later[$1] = $3 > 0 ? int($3 / 100000 + 0.5) : 0
        }
    }
    END {
        if (wrong) exit 1
        if (found || as_it_is()) exit 0
        print "client " id ": " answered " answers, but no such state of its keys:"
        for (key in after_value) print key, after_value[key]
        exit 1
    }'

# What the server at the port holds of the keys in $tmp/keys: their values and deadlines, the
# latter rounded to 10 s because time passes between two looks; and how many keys it has in all.
contents() { # [PORT]
    local now
    now=$(now_ms)
    sed 's/.*/GET &/' "$tmp/keys" | redis-cli -p "${1:-$port}"
    sed 's/.*/PTTL &/' "$tmp/keys" | redis-cli -p "${1:-$port}" |
        awk -v now="$now" '{ print $1 < 0 ? $1 : int(($1 + now) / 10000) }'
    redis-cli -p "${1:-$port}" DBSIZE
}

# A deadline in some 28 hours, in ms, which rounding to 10 s puts in the middle.
deadline() { echo $((($(date +%s) / 10 * 10 + 100005) * 1000)); }

keys() { ask KEYS | head -n -1 | sort >"$tmp/keys"; } # all of them, to $tmp/keys

# Of each key only the last record counts. So there are many keys, and all work on the same one.
@test "what many connections do to the same keys at the same time is the same after a crash" {
    start_aof
    awk 'BEGIN {
        for (i = 0; i < 20000; i++) {
            key = "k" i
            print "INCR", key
            if (i % 4 == 1) print "DEL", key
            else if (i % 4 == 2) printf "PERSIST %s\nINCR %s\nEXPIRE %s 100000\n", key, key, key
            else if (i % 4 == 3) printf "SET %s %d NX\nSET %s %d\n", key, i, key, i * 2
        }
    }' >"$tmp/in"
    seq 0 19999 | sed 's/.*/GET k&\nTTL k&/' >"$tmp/look"
    (quickly swarm 10 "$tmp/in")
    talk <"$tmp/look" | sed -E 's/^(99...|100000)$/later/' >"$tmp/before"
    (($(wc -l <"$tmp/before") == 40000 && $(grep -c nil "$tmp/before") <= 5000))
    restart
    talk <"$tmp/look" | sed -E 's/^(99...|100000)$/later/' | cmp - "$tmp/before"
}

@test "FLUSHALL amid writers is one moment for all keys, in memory and in the file" {
    start_aof
    for i in {1..5}; do
        seq -f "SET w$i:%.0f x" 20000 | talk >"$tmp/out.$i" &
        writers[i]=$!
    done
    until gone "${writers[@]}"; do
        ask FLUSHALL | is OK
        sleep 0.02
    done
    wait "${writers[@]}"
    ask KEYS | sort >"$tmp/before"
    restart
    ask KEYS | sort | cmp - "$tmp/before"
}

# Starts a server on each of these files, all at once; FILE.log is its log.
start_each() { # FILE...
    local file
    for file; do
        : >"$file.log"
        background "$KV" -p 0 -s 4 --aof "$file" </dev/null 2>>"$file.log"
    done
    wait_until each_listens "$@"
    cat "${@/%/.log}" >>"$log"
}

each_listens() { (($(cat "${@/%/.log}" | grep -c listening) == $#)); } # FILE...

turn_to() { [[ $(<"$1.log") =~ listening\ on\ .*:([0-9]+) ]] && port=${BASH_REMATCH[1]}; } # FILE

kill_each() {
    kill -9 "${helpers[@]}"
    wait_until gone "${helpers[@]}"
    helpers=()
}

# Writes a file of six batches; keeps where each of them ends, and the values of a, b and c then.
six_batches() { # sets $ends and $values
    local request
    start_aof
    ends=("$(size_of "$tmp/aof")") values=("$(abc)")
    for request in 'SET a 1' 'SET b "two\r\nlines" PXAT 9999999999999' FLUSHALL 'INCR c' 'SET a ""' 'DEL c'; do
        ask "$request" | is_like 'OK|1'
        ends+=("$(size_of "$tmp/aof")") values+=("$(abc)")
    done
    stop_kv
}

abc() { ask 'GET a' 'GET b' 'GET c' DBSIZE; }

@test "a file cut anywhere in its last three batches loses those that are not whole, and says where" {
    six_batches
    files=()
    for ((size = ends[3]; size <= ends[6]; size++)); do
        head -c "$size" "$tmp/aof" >"$tmp/cut.$size"
        files+=("$tmp/cut.$size")
    done
    start_each "${files[@]}"
    (quickly check_cuts "${files[@]}")
    kill_each
    files=("$tmp/cut.$((ends[3] + 1))" "$tmp/cut.$((ends[5] - 1))" "$tmp/cut.${ends[6]}")
    start_each "${files[@]}"
    for file in "${files[@]}"; do
        turn_to "$file"
        ask 'INCR new' | is 2
    done
}

check_cuts() { # FILE...
    local file i warned
    for file; do
        for ((i = 0; ${file##*.} >= ends[i + 1] && i < 6; i++)); do :; done
        warned=$(grep -c "WARN .*byte ${ends[i]}\b" "$file.log" || true)
        turn_to "$file"
        cmp "$file" <(head -c "${ends[i]}" "$tmp/aof") || return 1
        [[ $(abc) = "${values[i]}" && $warned = $((${file##*.} > ends[i])) ]] ||
            { echo "$file, after batch $i: $(abc)" && cat "$file.log" && return 1; }
        ask 'INCR new' | is 1 || return 1
    done
}

@test "a file cut anywhere in its first line is a new one" {
    start_aof
    stop_kv
    files=()
    for size in {0..18}; do
        head -c "$size" "$tmp/aof" >"$tmp/cut.$size"
        files+=("$tmp/cut.$size")
    done
    start_each "${files[@]}"
    for file in "${files[@]}"; do
        turn_to "$file"
        ask 'INCR a' | is 1
        head -n 1 "$file" | is $'#CRC32C:00000000\r'
    done
}

@test "zero bytes at the end of a file, as after a power loss, are torn" {
    six_batches
    for zeros in 1 7 18 4096 100000; do
        { head -c "${ends[5]}" "$tmp/aof" && head -c "$zeros" /dev/zero; } >"$tmp/zeros"
        start_kv --aof "$tmp/zeros"
        [[ $(abc) = "${values[5]}" ]]
        cmp "$tmp/zeros" <(head -c "${ends[5]}" "$tmp/aof")
        grep "WARN .*byte ${ends[5]}\b" "$log"
        stop_kv KILL
    done
}

@test "whole records without a checksum line are torn" {
    start_aof
    ask 'SET a 1' | is OK
    stop_kv
    size=$(size_of "$tmp/aof")
    { resp SET a 2 && resp SET b 2; } >>"$tmp/aof"
    start_aof
    ask 'GET a' 'GET b' | is 1 '(nil)'
    (($(size_of "$tmp/aof") == size))
}

@test "a flipped bit anywhere is found and named, the file untouched; truncate -s helps" {
    six_batches
    hex=$(od -An -v -tx1 "$tmp/aof" | tr -d '\n' | sed 's/ /\\x/g')
    workers=()
    for n in 0 1 2 3; do
        quickly flips "$n" >"$tmp/flips.$n" &
        workers+=("$!")
    done
    for n in 0 1 2 3; do wait "${workers[n]}" || { tail -n 3 "$tmp/flips.$n" && return 1; }; done
    eval "$(grep -o 'truncate -s .*' "$tmp/stderr.3")" # for a byte of the last batch
    start_kv --aof "$tmp/flipped.3"
    [[ $(abc) = "${values[5]}" ]]
}

# Flips a bit of each fourth byte, from offset FIRST on, but for those of the last line.
flips() { # FIRST
    local at i from code file=$tmp/flipped.$1
    for ((at = $1; at < ends[6] - 18; at += 4)); do
        flip "$at" >"$file"
        code=0
        timeout 20 "$KV" -p 0 -s 4 --aof "$file" 2>"$tmp/stderr.$1" || code=$?
        for ((i = 6; i > 0 && at < ends[i - 1]; i--)); do :; done # it is in batch i
        # Of the first line it may be found only at the end of what follows.
        from=${ends[i - 1]} && if ((i == 0)); then from='[0-9]+'; fi
        [[ $code = 1 && $(wc -l <"$tmp/stderr.$1") = 1 &&
            $(<"$tmp/stderr.$1") =~ ERROR\ .*byte\ $from\ .*truncate\ -s\ $from\ $file$ ]] ||
            { echo "byte $at: status $code, $(<"$tmp/stderr.$1")" && return 1; }
        cmp "$file" <(flip "$at") || return 1
    done
}

flip() { # OFFSET: prints the file with a bit of that byte flipped
    printf '%b' "${hex:0:$1*4}\\x$(printf %x $((0${hex:$1*4+1:3} ^ 1 << $1 % 8)))${hex:$1*4+4}"
}

@test "a flipped bit in the last checksum line is found, or passes for torn" {
    six_batches
    hex=$(od -An -v -tx1 "$tmp/aof" | tr -d '\n' | sed 's/ /\\x/g')
    for ((at = ends[6] - 18; at < ends[6]; at++)); do
        (quickly flip "$at") >"$tmp/flipped"
        if start_kv --aof "$tmp/flipped"; then
            [[ $(abc) = "${values[5]}" ]]
            (($(size_of "$tmp/flipped") == ends[5]))
            grep "WARN .*byte ${ends[5]}\b" "$log"
            stop_kv KILL
        else
            stop_kv none
            ((status == 1))
            grep "ERROR .*byte ${ends[5]}\b.*truncate -s ${ends[5]} " "$log"
            (($(size_of "$tmp/flipped") == ends[6]))
        fi
    done
}

# Whether kv refuses the file with this reason, in one line, and leaves it alone.
refuses_file() { # REGEX FILE
    cp "$2" "$tmp/copy"
    refuses 1 "ERROR .*$1" -p 0 --aof "$2"
    cmp "$2" "$tmp/copy"
}

@test "a file that is something else is refused and untouched" {
    cp "$BATS_TEST_DIRNAME/README.md" "$tmp/readme"
    refuses_file 'byte 0\b' "$tmp/readme"
    head -c 10000 "$KV" >"$tmp/program"
    refuses_file 'byte 0\b' "$tmp/program"
    for text in hello '# a comment' 'SET a 1' '*' '*1' '*x' 'REDIS0011' '{}' '#CRC32X:00000000'; do
        echo "$text" >"$tmp/text"
        refuses_file 'byte 0\b' "$tmp/text" || { echo "that was $text" && return 1; }
    done
}

@test "a record of no words, or with a wrong number of them, is refused" {
    for record in '*0\r\n' '*-1\r\n' '*1\r\n$3\r\nSET\r\n' '*2\r\n$3\r\nSET\r\n$1\r\na\r\n'; do
        # shellcheck disable=SC2059  # a format is what this is about
        printf "$record" >"$tmp/file"
        sum=$(crc32c <"$tmp/file")
        printf '#CRC32C:%s\r\n' "$sum" >>"$tmp/file"
        refuses_file 'byte 0\b' "$tmp/file"
        { printf '#CRC32C:00000000\r\n' && cat "$tmp/file"; } >"$tmp/second"
        refuses_file 'byte 18\b' "$tmp/second"
    done
}

@test "a file on which another kv is running is refused, again and again" {
    start_aof
    ask 'SET a 1' | is OK
    refuses_file 'in use' "$tmp/aof"
    refuses_file 'in use' "$tmp/aof"
    ask 'INCR a' | is 2
    restart
    ask 'GET a' | is 2
}

@test "a file that cannot be opened ends with status 1 and one line" {
    : >"$tmp/file"
    refuses 1 "$tmp.*Is a directory" -p 0 --aof "$tmp"
    refuses 1 "$tmp/none/aof.*No such file" -p 0 --aof "$tmp/none/aof"
    refuses 1 "$tmp/file/aof.*Not a directory" -p 0 --aof "$tmp/file/aof"
    refuses 1 'No such file' -p 0 --aof ''
    ((UID == 0)) || {
        chmod 400 "$tmp/file"
        refuses 1 "$tmp/file.*Permission denied" -p 0 --aof "$tmp/file"
    }
}

@test "a file is made with mode 0600, whatever the umask, and keeps the mode that it has" {
    umask 0
    start_aof
    stat -c %a "$tmp/aof" | is 600
    stop_kv
    chmod 640 "$tmp/aof"
    start_aof
    stat -c %a "$tmp/aof" | is 640
}

@test "--fsync takes always, everysec or no, and anything else ends with status 2" {
    for word in '' never Always alway always1; do
        refuses 2 'fsync.*always.*everysec.*no' --fsync "$word"
        refuses 2 'fsync.*always.*everysec.*no' -p 0 --aof "$tmp/aof" "--fsync=$word"
    done
    [[ ! -e $tmp/aof ]]
    start_kv --fsync always
    ask 'SET a 1' | is OK
}

# ==========================================================================================
# Append-only file: what it holds
# ==========================================================================================

@test "the file is made of SET, DEL and FLUSHALL, and a line with a checksum behind each batch" {
    start_aof
    later=$(deadline)
    {
        printf '#CRC32C:\r\n'
        while IFS='|' read -r request record; do
            ask "$request" | is_like 'OK|-?[0-9]+' >&2
            # shellcheck disable=SC2086  # words are what this is about
            if [[ $record ]]; then resp $record && printf '#CRC32C:\r\n'; fi
        done
    } >"$tmp/expected" <<END
SET k v|SET k v
SET k w EXAT ${later%000}|SET k w PXAT $later
SET n 5 NX PXAT $later|SET n 5 PXAT $later
INCR n|SET n 6 PXAT $later
SET n 7 KEEPTTL|SET n 7 PXAT $later
PERSIST n|SET n 7
DECRBY n 10|SET n -3
EXPIREAT n ${later%000}|SET n -3 PXAT $later
PEXPIREAT n ${later}1|SET n -3 PXAT ${later}1
SET n 1 XX|SET n 1
EXPIRE n -1|DEL n
SET k x PXAT 1|DEL k
INCR i|SET i 1
DEL none i none i|DEL i
SET a b|SET a b
FLUSHDB|FLUSHALL
SET c "d"|SET c d
FLUSHALL|FLUSHALL
END
    sed 's/^#CRC32C:[0-9a-f]\{8\}\r$/#CRC32C:\r/' "$tmp/aof" | diff -a "$tmp/expected" -
    head -n 1 "$tmp/aof" | is $'#CRC32C:00000000\r'
    (quickly checksums "$tmp/aof")
}

# CRC-32C of the input, a bit at a time, as RFC 3720 describes it.
crc32c() {
    local crc=0xffffffff byte bit
    for byte in $(od -An -v -tu1); do
        ((crc ^= byte, 1))
        for ((bit = 0; bit < 8; bit++)); do ((crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78 : 0), 1)); done
    done
    printf '%08x\n' $((crc ^ 0xffffffff))
}

# Whether each checksum line of a file is that of the bytes since the line before, and the
# last one stands at its end.
checksums() { # FILE
    local at=0 offset text
    while IFS=: read -r offset _ text; do
        text=${text%$'\r'}
        [[ $text = "$(tail -c +$((at + 1)) "$1" | head -c $((offset - at)) | crc32c)" ]] ||
            { echo "at byte $offset: $text" && return 1; }
        at=$((offset + 18))
    done < <(grep -abo $'^#CRC32C:[0-9a-f]\\{8\\}\r$' "$1")
    (($(size_of "$1") == at))
}

@test "the checksum is that of RFC 3720, also for binary values and batches of many records" {
    [[ $(printf 123456789 | crc32c) = e3069283 ]]
    start_aof
    ask "SET $(quickly every_byte '\\x%02x' | sed 's/.*/"&"/') 1" 'SET "" ""' | is OK OK
    connect
    send_packet "$c" 'INCR n\n%.0s' {1..100}
    for i in {1..100}; do receive "$c"; done
    (quickly checksums "$tmp/aof")
    (($(grep -ac '^#CRC32C:' "$tmp/aof") < 50))
}

@test "what changes nothing is not logged, nor is expiry" {
    start_aof
    ask 'SET a x' 'SET t 1 PX 50' | is OK OK
    size=$(size_of "$tmp/aof")
    ask 'SET a 2 NX' 'SET b 2 XX' 'DEL none' 'DEL none none' 'PERSIST a' 'PERSIST none' \
        'EXPIRE none 100' 'PEXPIREAT none 1' 'SET none 1 PXAT 1' 'INCR a' 'INCRBY a x' 'SET a 1 EX 0' \
        'SET a 1 FOO' 'EXPIRE a x' 'GET a' 'TTL a' 'EXISTS a' KEYS DBSIZE INFO PING 'FLUSHALL x' >"$tmp/out"
    (($(grep -c '^(error)' "$tmp/out") == 6))
    wait_until info_is keys 1
    ask 'GET t' 'DEL t' 'PERSIST t' | is '(nil)' 0 0
    (($(size_of "$tmp/aof") == size))
}

@test "counters go on after a crash, what was removed stays away, big and binary values are whole" {
    start_aof --fsync no
    all=$(quickly every_byte '\\x%02x')
    { echo 'SET early 1' && echo FLUSHALL && yes 'INCR n' | head -n 1000 &&
        printf 'SET big "' && yes "$all" | head -n 4096 | tr -d '\n' && printf '"\n' &&
        printf '%s\n' 'SET gone 1' 'DEL gone' 'SET "\x00\r\n#CRC32C:01234567\r\n" ""'; } | talk >/dev/null
    ask 'GET big' >"$tmp/big"
    (($(wc -c <"$tmp/big") > 1048576))
    for i in 1 2; do
        restart
        ask 'INCR n' 'GET early' 'GET gone' 'GET "\x00\r\n#CRC32C:01234567\r\n"' DBSIZE |
            is $((1000 + i)) '(nil)' '(nil)' '""' 3
        ask 'GET big' | cmp - "$tmp/big"
    done
}

@test "a file loads though --max-value is smaller than what it holds" {
    start_aof
    value=$(x 100000)
    ask "SET a $value" | is OK
    restart --max-value 10
    ask 'GET a' | is "$value"
    ask "SET a $value" | is_like '\(error\) ERR .*too long'
}

@test "deadlines survive a crash, moved, kept or taken away; what passed meanwhile is gone" {
    command -v redis-cli || skip "redis-cli is missing: make deps installs it"
    later=$(deadline) much=$(($(deadline) + 1000000))
    start_aof
    start=$(now_ms)
    ask "SET a 1 PXAT $later" "SET b 2 PXAT $later" 'PERSIST b' "SET c 3 PXAT $later" 'SET c 4' \
        "SET d 1 PXAT $later" "PEXPIREAT d $much" "SET e 1 PXAT $later" 'SET e 2 KEEPTTL' \
        "SET f 1 PXAT $later" 'INCR f' 'SET g 1' "PEXPIREAT g $later" >/dev/null
    ask 'SET soon 1 PX 400' 'SET back 5 PX 20' 'SET saved 1 PX 400' 'PERSIST saved' \
        'SET moved 1 PX 400' "PEXPIREAT moved $later" 'SET soon2 1' 'PEXPIRE soon2 400' >/dev/null
    wait_until value_is back '(nil)'
    ask 'INCR back' | is 1
    printf '%s\n' a b c d e f g back saved moved >"$tmp/keys"
    contents | head -n -1 >"$tmp/before"
    tail -n 10 "$tmp/before" | tr '\n' ' ' |
        is_like "$((later / 10000)) -1 -1 $((much / 10000)) ($((later / 10000)) ){3}-1 -1 $((later / 10000)) "
    stop_kv KILL
    wait_until past $((start + 700))
    start_aof
    ask 'GET soon' 'EXISTS soon soon2' KEYS | is_like '\(nil\)' 0 '.*' '.*' '.*' '.*' '.*' '.*' '.*' \
        '.*' '.*' '.*' '\(10 keys\)'
    contents | head -n -1 | cmp - "$tmp/before"
    info_is expires 6
}

value_is() { [[ $(ask "GET $1") = "$2" ]]; } # KEY REPLY

past() { (($(now_ms) > $1)); } # MS

@test "real Redis loads the file and holds the same keys, values and deadlines" {
    command -v redis-server || skip "redis-server is missing: make deps-all installs it"
    later=$(deadline)
    start_aof
    {
        for i in {1..50}; do
            echo "SET k$i v$i" && echo "SET t$i $i PXAT $((later + i * 100000))" && echo "INCR n$((i % 7))"
        done
        echo "DEL k7 t8" && echo 'PERSIST t9' && echo 'INCR t10' && echo "PEXPIREAT k11 $later"
        echo 'SET t12 x KEEPTTL' && echo 'SET t13 x' && echo 'EXPIRE t14 -1' && echo 'SET "" ""'
        printf '%s\n' 'SET line "\r\n#CRC32C:01234567\r\n*1\r\n"' 'SET "#CRC32C:01234567\r\n" "#"'
        # Without quotes, which redis-cli reads in its own way.
        (quickly every_byte '"<\\x%02x>"\n') | sed '/x2[27]/d; s/.*/SET & &/'
    } >"$tmp/in"
    { echo 'SET lost 1' && echo FLUSHALL && cat "$tmp/in"; } | talk >"$tmp/out"
    not grep error "$tmp/out"
    keys
    contents "$port" >"$tmp/before"
    (($(wc -l <"$tmp/keys") > 200))
    stop_kv
    mkdir "$tmp/redis"
    cp "$tmp/aof" "$tmp/redis/"
    start_redis --dir "$tmp/redis" --appendonly yes --appendfilename aof
    not grep -iE 'error|bad|truncated' "$tmp/redis.log"
    contents "$redis_port" | cmp - "$tmp/before"
}

@test "a file that Redis has written loads, goes on as kv's own, and Redis loads that too" {
    command -v redis-server || skip "redis-server is missing: make deps-all installs it"
    later=$(deadline)
    mkdir "$tmp/redis" "$tmp/again"
    start_redis --dir "$tmp/redis" --appendonly yes --aof-use-rdb-preamble no
    printf '%s\n' 'SET lost 1' FLUSHALL 'SELECT 0' 'SET a "x\r\n#CRC32C:00000000\r\n"' 'SET b 5 EX 100000' \
        "SET b 5 PXAT $later" 'INCR b' 'INCRBY n 7' 'DECR n' 'DECRBY n 2' "SET c 1 PXAT $later" 'PERSIST c' \
        'SET d 1' "PEXPIREAT d $later" 'SET e 1' 'DEL e lost' 'SET f 1 NX' 'SET f 2 KEEPTTL' \
        'SET soon 1 PX 1' "SET g 1 PXAT $later" 'SET g 2' 'GET a' 'EXPIREAT f 1' 'SET "\x00" "\xff"' |
        redis-cli -p "$redis_port" >"$tmp/out"
    not grep -i err "$tmp/out"
    printf '%s\n' a b n c d e f g soon lost '"\x00"' >"$tmp/keys"
    contents "$redis_port" >"$tmp/before"
    end_redis
    cp "$tmp"/redis/appendonlydir/*.incr.aof "$tmp/aof"
    cp "$tmp/aof" "$tmp/original"
    start_aof
    contents "$port" | cmp - "$tmp/before"
    ask 'INCR n' 'GET n' | is 5 5
    restart
    ask 'DECR n' | is 4
    contents "$port" | cmp - "$tmp/before"
    restart
    contents "$port" | cmp - "$tmp/before"
    cmp <(head -c "$(size_of "$tmp/original")" "$tmp/aof") "$tmp/original"
    tail -c "+$(($(size_of "$tmp/original") + 1))" "$tmp/aof" | head -n 1 | # over all before it
        is "#CRC32C:$(quickly crc32c <"$tmp/original")"$'\r'
    cp "$tmp/aof" "$tmp/again/"
    start_redis --dir "$tmp/again" --appendonly yes --appendfilename aof
    contents "$redis_port" | cmp - "$tmp/before"
}

end_redis() {
    kill "${helpers[-1]}"
    wait_until gone "${helpers[-1]}"
}

@test "in a file of Redis nothing expires before its end: INCR and PERSIST meet what is past" {
    { resp SELECT 0 && resp SET a 5 PXAT 1000 && resp INCR a && resp PERSIST a &&
        resp SET b 5 && resp PEXPIREAT b 1000 && resp SET c 5 PXAT 1000 && resp INCR c &&
        printf '#TS:1700000000\r\n' && resp PEXPIREAT c 9999999999999; } >"$tmp/aof"
    start_aof
    ask 'GET a' 'TTL a' 'GET b' 'GET c' KEYS | is_like 6 -1 '\(nil\)' 6 '[ac]' '[ac]' '\(2 keys\)'
}

@test "a command that kv does not know is refused by its name, and not skipped" {
    { resp SELECT 0 && resp SET a 1; } >"$tmp/start"
    { cat "$tmp/start" && resp LPUSH list x && resp SET b 1; } >"$tmp/aof"
    refuses_file "byte $(size_of "$tmp/start")\b.*LPUSH" "$tmp/aof"
    { resp SET a 1 && resp SELECT 1 && resp SET a 2; } >"$tmp/aof" # there is one database
    refuses_file 'byte 27\b' "$tmp/aof"
    { printf '#CRC32C:00000000\r\n' && resp MULTI; } >"$tmp/aof"
    printf '#CRC32C:%s\r\n' "$(resp MULTI | crc32c)" >>"$tmp/aof"
    refuses_file 'byte 18\b.*MULTI' "$tmp/aof"
}

@test "a file of Redis that ends within a record is refused and untouched" {
    { resp SELECT 0 && resp SET a 1; } >"$tmp/start"
    size=$(size_of "$tmp/start")
    { cat "$tmp/start" && resp SET b 2; } >"$tmp/redis"
    for ((cut = size + 1; cut < size + 27; cut++)); do
        head -c "$cut" "$tmp/redis" >"$tmp/aof"
        refuses_file "byte $size\b.*truncate -s $size " "$tmp/aof"
    done
    truncate -s "$size" "$tmp/aof"
    start_aof
    ask 'GET a' DBSIZE | is 1 1
}

@test "tail -F of the file, sent to a second kv, keeps that one equal through 100,000 writes" {
    command -v redis-cli || skip "redis-cli is missing: make deps installs it"
    later=$(deadline)
    start_kv
    second=$port second_pid=$pid
    helpers+=("$pid")
    start_aof --fsync no
    ask 'SET early 1' | is OK
    mkfifo "$tmp/pipe" # the same as |, with both ends on the leash
    background bash -c 'exec tail -c +1 -F "$1" >"$2"' - "$tmp/aof" "$tmp/pipe"
    background bash -c 'exec nc 127.0.0.1 "$1" <"$2" >/dev/null' - "$second" "$tmp/pipe"
    awk -v later="$later" 'BEGIN {
        for (i = 1; i <= 100000; i++) {
            key = "k" i * 7919 % 1000
            if (i % 8 == 0) print "DEL", key
            else if (i % 8 < 3) printf "SET %s %d PXAT %.0f\n", key, i, later + i % 100 * 10000
            else if (i % 8 == 3) printf "PEXPIREAT %s %.0f\n", key, later + 1000000
            else if (i % 8 == 4) print "PERSIST", key
            else print "INCR", key
            if (i == 20000) print "FLUSHALL"
        }
    }' >"$tmp/in"
    (($(talk <"$tmp/in" | grep -vc error) == 100001))
    ask 'SET last 1' | is OK
    wait_until last_is_there
    keys
    (($(wc -l <"$tmp/keys") > 500))
    contents "$port" >"$tmp/first"
    contents "$second" | cmp - "$tmp/first"
    kill "$second_pid" && wait "$second_pid"
}

last_is_there() { [[ $(redis-cli -p "$second" GET last) = 1 ]]; }

# ==========================================================================================
# Append-only file: the disk
# ==========================================================================================

# From now on servers run under strace; what it was told to look for is in $tmp/trace.
trace_kv() { # STRACE-OPTION...
    command -v strace >/dev/null || skip "strace is missing: make deps-all installs it"
    export ASAN_OPTIONS=detect_leaks=0 # the search for leaks cannot be traced
    leash+=(strace -D -f -o "$tmp/trace" "$@")
}

# With this many connections and no pipelining an fsync should serve some thirty writes.
@test "with --fsync always 50 connections share their fsyncs" {
    command -v redis-benchmark || skip "redis-benchmark is missing: make deps installs it"
    trace_kv -e trace=fsync,fdatasync
    start_aof --fsync always
    timeout 50 redis-benchmark -p "$port" -q -c 50 -n 5000 -r 100000 -t set >"$tmp/out" 2>&1
    wait_until info_is connected_clients 1
    end_trace
    syncs=$(grep -c 'sync.*= 0$' "$tmp/trace")
    echo "$syncs fsyncs for 5000 writes"
    ((syncs > 10 && syncs < 5000 / 4))
}

@test "with --fsync always each reply comes after the fsync of what it tells" {
    start_aof # so that later a start writes nothing
    stop_kv
    trace_kv -e trace=write,pwrite64,writev,fsync,fdatasync,sendto
    start_aof --fsync always
    connect
    for i in {1..20}; do answers "$c" 'INCR n' "$i"; done
    end_trace
    awk "$synced_first"' END { exit wrong || replies != 20 || syncs < 20 }' "$tmp/trace"
}

# In a trace: whether each reply is behind a write of its own, and each write before it was fsynced.
# Writes to descriptor 2 go to the log. A call that others interrupt is over when it is resumed.
synced_first='
    / (write|pwrite64|writev)\(/ && !/ write\(2,/ { dirty = 1; writes++ }
    /sync.*= 0$/ { dirty = 0; syncs++ }
    / sendto\(/ { if (dirty || writes < ++replies) wrong = 1 }'

@test "with --fsync no only the end fsyncs" {
    trace_kv -e trace=fsync,fdatasync
    start_aof --fsync no
    before=$(grep -c 'sync.*= 0$' "$tmp/trace")
    ask 'INCR n' | is 1
    sleep 1.2
    (($(grep -c 'sync.*= 0$' "$tmp/trace") == before))
    end_trace
    (($(grep -c 'sync.*= 0$' "$tmp/trace") > before))
}

@test "SIGTERM leaves a complete file that has been fsynced, whatever the policy" {
    trace_kv -e trace=write,pwrite64,writev,fsync,fdatasync,sendto
    for policy in always everysec no; do
        rm -f "$tmp/trace" "$tmp/aof" "$tmp/answers"
        start_aof --fsync "$policy"
        yes 'INCR n' | head -n 20000 | talk >"$tmp/answers" &
        client=$!
        wait_until [ -s "$tmp/answers" ]
        end_trace
        wait "$client"
        answered=$(wc -l <"$tmp/answers")
        ((answered > 0))
        tail -n 1 "$tmp/answers" | is "$answered"
        tail -n 2 "$tmp/aof" | head -n 1 | is "$answered"$'\r'
        awk "$synced_first"' END { exit dirty || syncs == 0 }' "$tmp/trace"
    done
}

@test "no reply reveals what a crash could undo: while an fsync lasts, who looks at that key waits" {
    trace_kv -e trace=fsync,fdatasync -e inject=fsync,fdatasync:delay_enter=1000000:when=5+
    start_aof --fsync always -s 4096 # so that hardly any two keys share a shard
    connect
    writer=$c
    for i in 1 2 3 4; do answers "$writer" 'INCR key' "$i"; done # a thread's first four are fast
    waiting=()
    for request in 'GET key' 'TTL key' 'EXISTS key' DBSIZE KEYS; do
        connect
        answers "$c" PING PONG
        waiting+=("$c")
    done
    connect
    other=$c
    answers "$other" 'GET other' '(nil)'
    for try in 5 6 7; do # a busy machine may be too slow, but not three times
        n=0 size=$(size_of "$tmp/aof") start=$(now_ms)
        send "$writer" 'INCR key'
        wait_until larger "$size"
        for request in 'GET key' 'TTL key' 'EXISTS key' DBSIZE KEYS; do
            send "${waiting[n++]}" "$request"
        done
        answers "$other" 'GET other' '(nil)' # of another shard: at once
        answers "$other" PING PONG
        early=$(for c in "$writer" "${waiting[@]}"; do if read -r -t 0 -u "$c"; then echo "$c"; fi; done)
        took=$(($(now_ms) - start)) n=0
        for reply in "$try" -1 1 1 key; do receive "${waiting[n++]}" && [[ $line = "$reply" ]]; done
        receive "${waiting[4]}" && [[ $line = '(1 key)' ]]
        receive "$writer" && [[ $line = "$try" ]]
        (($(now_ms) - start >= 990))
        if ((took < 950)); then break; fi
    done
    echo "descriptors $early had a reply after $took ms"
    [[ ! $early ]] && ((took < 950))
}

larger() { (($(size_of "$tmp/aof") > $1)); } # BYTES: whether the file is

@test "a failed fsync ends the server with status 1 and a line that says so" {
    trace_kv -e trace=fsync,fdatasync -e inject=fsync,fdatasync:error=EIO:when=5+
    start_aof --fsync always
    connect
    for i in 1 2 3 4; do answers "$c" 'INCR n' "$i"; done
    send "$c" 'INCR n'
    closed "$c"
    stop_kv none
    ((status == 1))
    grep -E "ERROR .*$tmp/aof.*: Input/output error" "$log"
    leash=()
    start_aof
    ask 'GET n' | is_like '[45]'
}

@test "with --fsync everysec each second has its fsync while there are writes, and a failed one is the end" {
    start_aof
    stop_kv
    trace_kv -e trace=fsync,fdatasync -e inject=fsync,fdatasync:error=EIO:when=2+ -P "$tmp/aof"
    start_aof --fsync everysec
    start=$(now_ms)
    while ask 'INCR n' >"$tmp/out" 2>&1 && grep -q . "$tmp/out"; do
        cp "$tmp/out" "$tmp/last"
        sleep 0.1
    done
    stop_kv none
    ((status == 1 && $(now_ms) - start > 900 && $(now_ms) - start < 6000))
    grep -E "ERROR .*$tmp/aof.*: Input/output error" "$log"
    leash=()
    start_aof
    (($(ask 'GET n') >= $(<"$tmp/last")))
}

@test "a failed fsync at the end ends the server with status 1" {
    start_aof
    stop_kv
    trace_kv -e trace=fsync,fdatasync -e inject=fsync,fdatasync:error=EIO:when=3+
    start_aof --fsync no
    ask 'INCR n' | is 1
    stop_kv
    ((status == 1))
    grep -E "ERROR .*$tmp/aof.*: Input/output error" "$log"
}

# Lets the file grow by that much and no more. The log is smaller, and goes on.
leave_room() { prlimit --pid "$pid" --fsize="$(($(size_of "$tmp/aof") + $1)):"; } # BYTES

more_room() { prlimit --pid "$pid" --fsize=unlimited:; }

# A server that has a file of some 20 kB on a disk that is full but for 10 bytes.
start_on_full_disk() { # [OPTION...]: sets $full to the size that the file can reach
    command -v prlimit >/dev/null || skip "prlimit is missing"
    start_aof "$@"
    ask "SET big $(x 20000)" 'SET a 1' 'SET b 2' | is OK OK OK
    full=$(($(size_of "$tmp/aof") + 10))
    leave_room 10
}

@test "on a full disk writes get MISCONF, reads go on, and all resumes by itself" {
    start_on_full_disk --fsync always
    ask 'SET a 10' | is_like '\(error\) MISCONF .*'
    start=$(now_ms)
    for i in {1..5}; do
        ask 'SET b 20' 'DEL a' 'INCR n' FLUSHALL 'EXPIRE b 100' | sort -u | is_like '\(error\) MISCONF .*'
        ask 'GET b' 'EXISTS n' 'TTL b' DBSIZE PING 'GET a' | is_like 2 0 -1 3 PONG '1|10'
    done
    (($(now_ms) - start < 1000)) # nobody waits
    grep -E 'ERROR .*: File too large' "$log"
    (($(size_of "$tmp/aof") == full))
    more_room
    patience=3 wait_until larger "$full" # though nobody asks
    ask 'SET b 30' 'INCR n' | is OK 1
    ask 'GET a' 'GET b' 'GET n' DBSIZE | is 10 30 1 4
    leave_room 0 # and again
    ask 'INCR n' | is_like '\(error\) MISCONF .*'
    more_room
    patience=3 wait_until writes_work
    (quickly checksums "$tmp/aof")
    restart
    ask 'GET a' 'GET b' 'GET n' DBSIZE | is 10 30 2 5
}

writes_work() { [[ $(ask 'SET probe 1') = OK ]]; }

@test "when the disk becomes full each request of a pipeline gets one reply" {
    start_on_full_disk
    printf 'GET a\nSET p 1\nNOSUCH\nGET p\n\nGET "\nINCR n\nSET p\nPING\nINCR n\n' | talk |
        is_like 1 '\(error\) MISCONF .*' '.+' '.+' '.+' '\(error\) MISCONF .*' '.+' '.+' '\(error\) MISCONF .*'
    more_room
    stop_kv
    rm "$tmp/aof"
    start_on_full_disk
    { resp GET a && resp SET p 1 && resp NOSUCH && resp DEL p && resp SET p && resp DEL p; } | talk |
        is_like $'\\$1\r' $'1\r' $'-MISCONF .*\r' $'-.*\r' $'-MISCONF .*\r' $'-.*\r' $'-MISCONF .*\r'
    more_room
}

@test "when the disk becomes full each request of a pipeline gets its reply in its own form" {
    start_on_full_disk
    { printf 'SET p 1\n' && resp SET p 1 && printf 'INCR p\r\n'; } | talk |
        is_like '\(error\) MISCONF .*[^'$'\r'']' $'-MISCONF .*\r' '\(error\) MISCONF .*'$'\r'
    more_room
}

@test "writers that wait for a full disk get MISCONF, each one, and file and memory stay equal" {
    command -v redis-cli || skip "redis-cli is missing: make deps installs it"
    start_on_full_disk --fsync always
    for i in {1..20}; do
        seq -f "SET w$i:%.0f x" 50 | talk >"$tmp/answers.$i" &
        writers[i]=$!
    done
    wait "${writers[@]}"
    cat "$tmp"/answers.* | sed 's/MISCONF.*/MISCONF/' | uniq -c | is_like ' *1000 \(error\) MISCONF'
    keys
    contents >"$tmp/before"
    (($(wc -l <"$tmp/keys") > 3))
    more_room
    stop_kv
    start_aof
    contents | cmp - "$tmp/before"
}

@test "SIGTERM on a full disk ends with status 1, and what was answered is there afterwards" {
    start_on_full_disk
    ask 'SET b 20' | is_like '\(error\) MISCONF .*'
    stop_kv
    ((status == 1 && took < 5000))
    start_aof
    ask 'GET a' 'GET b' DBSIZE | is 1 2 3
}

@test "SIGTERM tries a last time: when there is room again nothing is lost, and the status is 0" {
    start_on_full_disk
    ask 'SET b 20' | is_like '\(error\) MISCONF .*'
    more_room
    stop_kv
    ((status == 0))
    start_aof
    ask 'GET a' 'GET b' DBSIZE | is 1 20 3
}

@test "a start of more than a second shows its progress" {
    yes $'*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$5\r\nvalue\r' | head -n 7000000 >"$tmp/aof"
    : >"$log"
    "${leash[@]}" "$KV" -p 0 --aof "$tmp/aof" </dev/null 2>>"$log" 3>&- 4>&- &
    pid=$!
    sleep 0.1 # it reads its file
    kill -STOP "$pid"
    sleep 1
    kill -CONT "$pid"
    wait_until listening
    head -n 1 "$log" | is_like "${log_lines}.*$tmp/aof.*\b[0-9]{1,2} ?%.*"
    ask 'GET k' | is value
}
