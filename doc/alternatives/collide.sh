#!/usr/bin/env bash
# SET, in requests per second, of n keys that collide under FNV-1a: kv as it is, and with
# doc/alternatives/fnv1a.patch. From the top of the repository: doc/alternatives/collide.sh
set -euo pipefail
here=$(dirname "$0") kv=${KV_C:-kv.c}
tmp=$(mktemp -d)
trap 'rm -r "$tmp"' EXIT
cp "$kv" "$tmp/kv.c"
cc -std=c11 -D_XOPEN_SOURCE=700 -O2 -o "$tmp/siphash" "$tmp/kv.c" -pthread
patch -s "$tmp/kv.c" "$here/fnv1a.patch"
cc -std=c11 -D_XOPEN_SOURCE=700 -O2 -o "$tmp/fnv1a" "$tmp/kv.c" -pthread
awk -v n=15 -f "$here/collide.awk" >"$tmp/keys"
printf '%8s %10s %10s\n' keys SipHash FNV-1a
for n in 1024 2048 4096 8192 16384 32768; do
    { head -n "$n" "$tmp/keys" | sed 's/.*/SET & x/' && echo QUIT; } >"$tmp/in"
    printf '%8d' "$n"
    for hash in siphash fnv1a; do
        "$tmp/$hash" -q -p 8111 & pid=$!
        until (: <>/dev/tcp/localhost/8111) 2>/dev/null; do sleep 0.05; done
        start=${EPOCHREALTIME/./}
        nc localhost 8111 <"$tmp/in" | grep -c OK >"$tmp/count"
        printf ' %10d' "$((n * 1000000 / (${EPOCHREALTIME/./} - start)))"
        [[ $(cat "$tmp/count") = $((n + 1)) ]]
        kill "$pid"
        wait "$pid"
    done
    echo
done
