# How a kv has ended that was to run on: smoke.bats and common.bash load this, for their teardown.
# shellcheck shell=bash

# Ends kv, if there is one. Fails if it had crashed before, and says so: where it has crashed a reply
# is empty, and that alone says little. A process that is about to end keeps the status that it has.
ends_well() { # PID, or nothing
    local status=0
    if [[ ! $1 ]]; then return; fi
    { kill -9 "$1" || true; wait "$1" || status=$?; } 2>/dev/null
    if ((status == 0 || status == 128 + 9)); then return; fi
    if ((status > 128)); then
        echo "kv crashed: signal $((status - 128)) ($(kill -l "$status"))"
        # EX is what doc/course checks.
        if [[ ${EX:-} && ! ${SANITIZER:-} ]]; then echo "SAN=1 make check EX=$EX says where."; fi
        return 1
    fi
    if [[ ! ${BATS_TEST_COMPLETED:-} ]]; then echo "kv has ended by itself, with status $status"; fi
}
