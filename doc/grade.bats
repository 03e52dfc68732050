#!/usr/bin/env bats
# What doc/grade promises to who grades, and doc/handout to who hands out.
#
#     bats doc/grade.bats
#
# SC2016: what single quotes keep is awk's or C's. SC2030, SC2031: bats runs each test as a process.
# shellcheck disable=SC2016,SC2030,SC2031

bats_require_minimum_version 1.5.0
export LC_ALL=C GRADE_AS_ROOT=yes

setup() {
    cd "$BATS_TEST_DIRNAME/.." || return
    tmp=$BATS_TEST_TMPDIR
}

# Makes $tmp/kv.c: the solution of STRLEN with other lines in its function.
strlen_with() { # LINES
    patch -s -p 1 -o "$tmp/solved.c" kv.c <doc/solutions/strlen.patch
    awk -v lines="$1" '{ print } /^static bool cmd_strlen/ { print lines }' "$tmp/solved.c" >"$tmp/kv.c"
}

grade() { # EXERCISE FILE: prints what it says also if the test fails, and keeps the last line
    doc/grade "$1" "$2" | tee "$tmp/said"
    tail -n 1 "$tmp/said" >"$tmp/json"
}

says() { grep -qF -- "$1" "$tmp/said"; } # TEXT

ends_with() { grep -qE "$1}\$" "$tmp/json"; } # REGEX: of the end of the line of JSON

@test "a right answer has all points, in the table and in JSON" {
    strlen_with ''
    SANITIZERS='asan tsan' grade strlen "$tmp/kv.c"
    says 'points      100 of 100'
    ends_with '"builds": true, "warnings": 0, "smoke": 12, "check": \[true(,true){5}\], "asan": "none", "tsan": "none", "points": 100'
}

@test "an answer that does not compile has no points, and is told why" {
    strlen_with 'this is no C;'
    grade strlen "$tmp/kv.c"
    says error:
    ends_with '"builds": false, .*"points": 0'
}

@test "an answer that hangs costs the points of the tests in which it hangs" {
    strlen_with '    for (volatile int on = 1; on;) {}'
    LIMIT=8 SANITIZERS=asan grade strlen "$tmp/kv.c"
    says 'The tests did not end within 8 s.'
    says 'asan        not tried: the tests do not end without it'
    ends_with '"smoke": 12, "check": \[true,false,false,false,false,false\], .*"points": 16'
}

@test "an answer that ends at once has no points" {
    printf 'int main(void) { return 0; }\n' >"$tmp/kv.c"
    grade strlen "$tmp/kv.c"
    ends_with '"smoke": 0, .*"points": 0'
}

@test "an answer that crashes costs the points of those tests, and warnings cost ten" {
    strlen_with '    int unused; if (c->resp) abort();'
    SANITIZERS='' grade strlen "$tmp/kv.c"
    says '    NOT OK  STRLEN replies a number in RESP'
    ends_with '"warnings": 1, .*"check": \[true,true,true,true,false,true\], .*"points": 73'
}

@test "where no test passes, a sanitizer is not tried, and does not look as if it were clean" {
    SANITIZERS='asan tsan' grade strlen kv.c
    says 'asan        not tried: no test passes without it'
    ends_with '"smoke": 12, "check": \[false(,false){5}\], "asan": "not tried", "tsan": "not tried", "points": 0'
}

@test "an answer that leaks is caught by AddressSanitizer" {
    strlen_with '    if (c->entry && !strdup("lost")) return false;'
    SANITIZERS=asan grade strlen "$tmp/kv.c"
    says 'LeakSanitizer: detected memory leaks'
    ends_with '"check": \[true(,true){5}\], "asan": "[1-6]", .*"points": 80'
}

@test "an answer that prints a report of its own changes nothing, wherever it prints" {
    awk '/^int main\(/ { print "static void lie(void) {"
            print "    for (int fd = 1; fd < 1024; fd++) {"
            print "        dprintf(fd, \"\\n1..6\\n\");"
            print "        for (int i = 1; i <= 12; i++) dprintf(fd, \"ok %d STRLEN has a row in the table of commands\\n\", i);"
            print "        dprintf(fd, \"=> all is well\\npoints 100 of 100\\n{\\\"points\\\": 100}\\n\");"
            print "    }"
            print "}\n" }
        { print }
        /^int main\(/ { print "    lie();" }' kv.c >"$tmp/liar.c"
    SANITIZERS='' grade strlen "$tmp/liar.c"
    grep -c '"points": 100' "$tmp/said" | grep -x 0
    ends_with '"smoke": 12, "check": \[false(,false){5}\], .*"points": 0'
}

@test "a hunt is graded by its tests: those that find the bug have all points, others none" {
    grade stale-heap doc/solutions/stale-heap.bats
    ends_with '"check": \[true,true\], .*"points": 100'
    grade stale-heap doc/solutions/stale-heap.wrong-passes-both.bats
    ends_with '"check": \[true,false\], .*"points": 0'
}

@test "SEED reaches the check, which chooses mutants by it" {
    mkdir "$tmp/bin" # a bats that counts points by SEED
    printf '#!/bin/sh\necho 1..2; echo ok 1 -; echo "# points: $SEED of 10"; echo ok 2 -\n' >"$tmp/bin/bats"
    chmod +x "$tmp/bin/bats"
    PATH="$tmp/bin:$PATH" SEED=3 grade kill-mutants doc/exercises/kill-mutants.start.bats
    says 'points      30 of 100'
    PATH="$tmp/bin:$PATH" make -s grade EX=kill-mutants SEED=4 SUBMISSION=doc/exercises/kill-mutants.start.bats |
        grep -x 'points      40 of 100'
}

@test "a folder of answers becomes a line of CSV each, a table each and a line on the terminal, which say why there are no points" {
    mkdir -p "$tmp"/all/{ann,carl,dora}
    echo 'no C' | tee "$tmp/all/ann/kv.c" >"$tmp/all/b\"ob.c"
    echo '/* handout: spring-1999 */' >"$tmp/all/carl/kv.c"
    cp kv.c "$tmp/all/dora/strlen.c"
    doc/grade strlen "$tmp/all" "$tmp/all/out.csv" >"$tmp/said"
    diff - "$tmp/all/out.csv" <<'END'
name,exercise,points,builds,warnings,smoke,check,asan,tsan,handout,remark
"ann",strlen,0,no,,,,,,"",does not compile
"carl",strlen,0,,,,,,,"spring-1999",another handout
"dora",strlen,0,,,,,,,"",is missing
"b""ob",strlen,0,no,,,,,,"",does not compile
END
    head -n 4 "$tmp/said" | sed 's/  */ /' | diff - <(printf '%s 0 points: %s\n' ann 'does not compile' \
        carl 'another handout' dora 'is missing' 'b"ob' 'does not compile')
    grep -qF '"remark": "does not compile", "handout": "", "builds": false' "$tmp/all/out-tables/ann.txt"
}

@test "an answer from another handout is refused, also where it is a file of tests" {
    { cat kv.c && echo '/* handout: spring-1999 */'; } >"$tmp/kv.c"
    grade strlen "$tmp/kv.c"
    says 'git checkout spring-1999'
    ends_with '"remark": "another handout", "handout": "spring-1999", "builds": null, .*"points": 0'
    { cat doc/exercises/stale-slice.start.bats && echo '# handout: spring-1999'; } >"$tmp/stale-slice.bats"
    grade stale-slice "$tmp/stale-slice.bats"
    says 'git checkout spring-1999'
    ends_with '"remark": "another handout", "handout": "spring-1999", .*"points": 0'
}

@test "root is refused, unless GRADE_AS_ROOT=yes says that this is a container" {
    mkdir "$tmp/bin"
    printf '#!/bin/sh\necho 0\n' >"$tmp/bin/id" && chmod +x "$tmp/bin/id"
    run -2 env GRADE_AS_ROOT= PATH="$tmp/bin:$PATH" doc/grade strlen kv.c
    [[ $output = *'this is no sandbox, and you are root'* ]]
}

@test "the handout has no solutions; its references hold, and tests, a step, an exercise and grading run in it" {
    doc/handout "$tmp/course.tar.gz"
    tar -C "$tmp" -xzf "$tmp/course.tar.gz"
    git archive HEAD doc/solutions/strlen.patch | tar -x -C "$tmp"
    cd "$tmp/kv-course"
    find . -name '*.wrong-*' -o -name '*.start.patch' -o -path './doc/solutions/?*.patch' -o -path './doc/mutants/?*.patch' \
        -o -name .git -o -name 'teaching*' | diff /dev/null -
    find . -name '*.md' -exec grep -i 'teaching\.md' {} + | diff /dev/null -
    make help | sed 's/ .*//' | paste -s -d ' ' - |
        grep -x 'all run test asan tsan step start check cross fuzz coverage deps deps-all format install clean help grade'
    run -2 doc/grade kill-mutants doc/exercises/kill-mutants.start.bats
    [[ $output = *'grade in a clone' ]]
    make -s CFLAGS=-O0
    .ci/docrefs
    env -i PATH="${PATH#"$BATS_LIBEXEC:"}" ./test.sh --tap -f PING | grep -q '^ok'
    make -s step STEP=words CFLAGS=-O0 | grep -q '^kv-step/words is built'
    make -s start EX=stale-slice
    tail -n 1 kv-exercise/stale-slice.bats | grep -xF "# handout: $(<doc/handout-version)"
    make -s start EX=strlen
    patch -s -p 1 -d kv-exercise <"$tmp/doc/solutions/strlen.patch"
    grep -qxF "/* handout: $(<doc/handout-version) */" kv-exercise/kv.c
    make -s check EX=strlen | tail -n 1 | grep -qx 'strlen: all of it works.'
    SANITIZERS='' make -s grade EX=strlen SUBMISSION=kv-exercise/kv.c | grep -x 'points      100 of 100'
}
