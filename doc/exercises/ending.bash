# How a kv has ended that was to run on, and what a sanitizer says: common.bash and smoke.bats load this.
# shellcheck shell=bash

export UBSAN_OPTIONS="print_stacktrace=1:${UBSAN_OPTIONS:-}"

# Kills kv, if there is one, and sets $ended: to its status if it had ended before. A process that is
# about to end keeps the status that it has. The number of one that has ended may be another's by now.
end_kv() { # PID, or nothing
    ended=0
    if [[ ! $1 ]]; then return; fi
    if grep -qx "$1" <<<"$(jobs -rp)"; then kill -9 "$1" 2>/dev/null || true; fi
    wait "$1" 2>/dev/null || ended=$?
    if ((ended == 128 + 9)); then ended=0; fi
}

# Fails if kv had crashed, and says so: where it has crashed a reply is empty, and that alone says little.
ended_well() {
    if ((ended > 128)); then
        echo "kv crashed: signal $((ended - 128)) ($(kill -l "$ended"))"
        # EX is what doc/course checks.
        if [[ ${EX:-} && ! ${SANITIZER:-} ]]; then echo "SAN=1 make check EX=$EX says where."; fi
        return 1
    fi
    if ((ended > 0)) && [[ ! ${BATS_TEST_COMPLETED:-} ]]; then echo "kv has ended by itself, with status $ended"; fi
}

# Prints what matters of the first report of a sanitizer: the kind of error, and of each stack what it
# is about and the three innermost functions of kv.c. Fails if there is no report.
report_in() { # LOG
    awk '
        function say(line) { if (++said <= 12) print line }
        /ERROR: [A-Za-z]*Sanitizer|WARNING: ThreadSanitizer:|runtime error:|LeakSanitizer/ && !found {
            found = frames = 3
            sub(/^=*[0-9]*=*(ERROR: |WARNING: )?/, "")
            sub(/( on address 0x| \(pc | \(pid=).*/, "")
            say($0)
            next
        }
        !found { next }
        /^SUMMARY: / { exit }
        /^ *#[0-9]+ / {
            if (frames == 0 || !match($0, /[A-Za-z_0-9.]+ [^ ]*kv\.c:[0-9]+/)) next
            split(substr($0, RSTART, RLENGTH), part, " ")
            sub(/.*\//, "", part[2])
            if (head) say(head)
            say("    " part[1] " " part[2])
            head = ""
            frames--
            next
        }
        /^==[0-9]+==(The signal|Hint:)/ { sub(/^==[0-9]+==/, ""); say($0); next }
        sub(/^0x[0-9a-f]* is located /, "this is ") { sub(/ \[.*/, ""); say($0); next }
        /[^ ]/ { # a thread that was made, or a lock, is not where the fault is
            sub(/^ */, "")
            sub(/ (at )?0x[0-9a-f]*/, "")
            head = $0
            frames = /^(Thread|Mutex) / ? 0 : 3
        }
        END { exit !found }' "$1"
}
