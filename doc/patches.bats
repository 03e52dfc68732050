#!/usr/bin/env bats
# That doc/patches proves what it says, and nothing that is not so. It is tried with a kv.c of a few
# lines, and with patches, checks and tests that are made up here.
#
# SC2016: what single quotes keep from expanding is for bats. SC2030, SC2031: each test is a process.
# shellcheck disable=SC2016,SC2030,SC2031

bats_require_minimum_version 1.5.0

setup() {
    cd "$BATS_TEST_TMPDIR" || return 1
    mkdir -p .ci doc/{alternatives,steps,solutions,exercises,mutants}
    cp "$BATS_TEST_DIRNAME/patches" doc
    cp "$BATS_TEST_DIRNAME/../.ci/budget" .ci
    cp "$BATS_TEST_DIRNAME"/../{Makefile,.clang-format} .
    unset STEP SANITIZER TIMES SUITE
    export JOBS=2 CFLAGS=-O0
    cat >kv.c <<'END'
#include <stdio.h>

/* The first number. */
static int first(void) { return 1; }

static int middle(void) { return 0; }

/* The second number. */
static int second(void) { return 2; }

int main(void) {
    printf("%d %d\n", first(), second() + middle());
    return 0;
}
END
    { echo '#!/usr/bin/env bats' && a_test 'first is 1' '[[ $("$KV") = "1 "* ]]'
        a_test 'second is 2' '[[ $("$KV") = *" 2" ]]'; } >test.sh
    chmod +x test.sh
    a_test 'it prints two numbers' '[[ $("$KV") =~ ^[0-9]+\ [0-9]+$ ]]' >doc/exercises/smoke.bats
    # An exercise: the second number is to be 3. One wrong answer makes it 4.
    exercise three '[[ $("$KV") = *" 3" ]] || { echo "=> the second is not 3" && false; }'
    patch_by 's/return 2/return 3/' doc/solutions/three.patch 'chapter: 1' 'expect: 3'
    wrong_by 's/return 3/return 4/' doc/solutions/three.wrong-four.patch
}

a_test() { printf '@test "%s" {\n    %s\n}\n' "$1" "$2"; } # NAME COMMAND

exercise() { # NAME COMMAND
    { printf '#!/usr/bin/env bats\n# %s\n' 'chapter: 1' 'concept: counting' 'level: 1' 'lines: 1' 'minutes: 1' 'task: Count.' &&
        echo && a_test 'it counts' "$2"; } | sed '3,$ { /^#!/d; }' >"doc/exercises/$1.bats"
}

# Makes a patch of what sed does to kv.c.
patch_by() { # SCRIPT PATCH FIELD...
    local from=${on:-kv.c}
    sed "$1" "$from" >new.c
    { printf '# %s\n' "${@:3}" && diff -U 2 --label a/kv.c --label b/kv.c "$from" new.c; } >"$2" || true
    mv new.c changed.c
}

wrong_by() { # SCRIPT PATCH [FIELD...]: on the exercise three
    sed 's/return 2/return 3/' kv.c >three.c
    if (($# == 2)); then set -- "$@" 'on: three' 'expect: 4' 'fails: it counts' 'says: the second is not 3'; fi
    on=three.c patch_by "$@"
}

proves() { # WORDS: all is proved
    run doc/patches check "$@"
    echo "$output"
    ((status == 0)) && not grep -q '^not ok' <<<"$output" && grep -q '^ok' <<<"$output"
}

refuses() { # ID SENTENCE: this one patch is not, and the log says why
    run doc/patches check
    echo "$output"
    ((status == 1))
    [[ $(grep -c '^not ok' <<<"$output") = 1 ]]
    grep -q "^not ok [0-9]* - $1 " <<<"$output"
    grep -qF -- "$2" <<<"$output"
}

not() { ! "$@"; }

@test "a solution that passes and a wrong answer that fails are proved, in TAP" {
    proves
    grep -qx '1[.][.]3' <<<"$output"
    proves wrong
    proves solutions three
    run doc/patches check wrong nobody
    ((status != 0))
    run doc/patches check families three
    ((status != 0))
}

@test "a check that asserts nothing is found out" {
    exercise three true
    refuses wrong/three.wrong-four 'NOT AS MEANT, that is not ok (1)'
}

@test "a check without a wrong answer is not enough" {
    rm doc/solutions/three.wrong-four.patch
    refuses solutions/three 'there is no wrong answer'
}

@test "a wrong answer that passes is found out" {
    wrong_by 's/The second/The other/' doc/solutions/three.wrong-four.patch
    refuses wrong/three.wrong-four 'NOT AS MEANT, that is not ok (1)'
}

@test "a wrong answer must fail with the sentence that its header has" {
    sed -i 's/the second is not 3"/it is wrong"/' doc/exercises/three.bats
    refuses wrong/three.wrong-four 'NOT SAID: the second is not 3'
}

@test "a wrong answer that does not even run is not one" {
    wrong_by 's/printf(.*);/return first() + second() + middle();/' doc/solutions/three.wrong-four.patch
    refuses wrong/three.wrong-four 'it prints two numbers'
}

@test "a test that is not there fails nothing" {
    sed -i 's/^# fails: .*/# fails: it can count/' doc/solutions/three.wrong-four.patch
    refuses wrong/three.wrong-four 'NOT AS MEANT'
    sed -i 's/^# fails: .*/# fails: it count/' doc/solutions/three.wrong-four.patch
    refuses wrong/three.wrong-four 'NOT AS MEANT'
}

@test "a solution that does not pass its check is found out" {
    patch_by 's/return 2/return 5/' doc/solutions/three.patch 'chapter: 1' 'expect: 3'
    rm doc/solutions/three.wrong-four.patch
    on=changed.c patch_by 's/return 5/return 4/' doc/solutions/three.wrong-four.patch \
        'on: three' 'expect: 4' 'fails: it counts' 'says: the second is not 3'
    refuses solutions/three 'NOT AS MEANT, that is ok'
}

@test "a patch that needs fuzz is refused, one whose lines have moved is not" {
    patch_by 's/return 1/return 7/' doc/mutants/seven.patch 'chapter: 1' 'expect: the first number is 1' 'fails: first is 1'
    sed -i '2i /* a line more */' kv.c
    proves
    sed -i 's/first number/first of all/' kv.c
    refuses mutants/seven 'does not apply'
}

@test "a patch that builds with a warning is refused" {
    patch_by 's/{ return 1; }/{\n    int unused = 1;\n    return 7;\n}/' doc/mutants/seven.patch \
        'chapter: 1' 'expect: the first number is 1' 'fails: first is 1'
    refuses mutants/seven 'does not build'
}

@test "a mutant that its test does not catch, or that another one catches, is found out" {
    patch_by 's/return 1/return 7/' doc/mutants/seven.patch 'chapter: 1' 'expect: the first number is 1' 'fails: first is 1'
    proves mutants
    sed -i 's/^# fails: .*/# fails: second is 2/' doc/mutants/seven.patch
    refuses mutants/seven 'NOT AS MEANT, that is not ok (1)'
}

@test "an unknown field, a missing one, one that is there twice and a line that is none are errors" {
    patch_by 's/return 1/return 7/' doc/mutants/seven.patch 'chapter: 1' 'expect: the first number is 1' 'fails: first is 1'
    cp doc/mutants/seven.patch good
    sed '1i # failes: first is 1' good >doc/mutants/seven.patch
    refuses mutants/seven 'the field failes is unknown here'
    sed '/^# expect/d' good >doc/mutants/seven.patch
    refuses mutants/seven 'the field expect is missing'
    sed '1i # chapter: 2' good >doc/mutants/seven.patch
    refuses mutants/seven 'the field chapter is there twice'
    sed '1i seven' good >doc/mutants/seven.patch
    refuses mutants/seven 'this is no field of a header: seven'
    cp good doc/mutants/seven.patch
    sed -i '/^# minutes/d' doc/exercises/three.bats
    refuses solutions/three 'the field minutes is missing'
}

@test "what a solution adds is not too dense" {
    patch_by 's/return 2/return 3 + 1 - 1 + 1 - 1 + 1 - 1 + 1 - 1 + 1 - 1/' doc/solutions/three.patch 'chapter: 1' 'expect: 3'
    rm doc/solutions/three.wrong-four.patch
    on=changed.c patch_by 's/return 3/return 4/' doc/solutions/three.wrong-four.patch \
        'on: three' 'expect: 4' 'fails: it counts' 'says: the second is not 3'
    refuses solutions/three 'tokens in a line, at most 28'
}

@test "solutions that are in the way of each other are found out" {
    exercise four '[[ $("$KV") = *" 4" ]]'
    patch_by 's/return 2/return 4/' doc/solutions/four.patch 'chapter: 1' 'expect: 4'
    sed 's/return 2/return 4/' kv.c >four.c
    on=four.c patch_by 's/return 4/return 5/' doc/solutions/four.wrong-five.patch \
        'on: four' 'expect: 5' 'fails: it counts' 'says: it counts'
    refuses 'all solutions together' 'does not apply'
}

@test "a step fails the goal of the step above, which passes there" {
    mkdir -p doc/steps
    patch_by 's/return 2/return 9/' doc/steps/high.patch 'on: kv' 'expect: no 2 yet' 'passes: low high' 'fails: second is 2'
    cp changed.c high.c
    on=high.c patch_by 's/return 1/return 8/' doc/steps/low.patch 'on: high' 'expect: no 1 yet' 'passes: low' 'fails: first is 1'
    proves steps
    sed -i 's/^# fails: .*/# fails: second is 2/' doc/steps/low.patch
    refuses steps/low 'NOT AS MEANT, that is ok (1)'
    on=high.c patch_by 's/The first/The other/' doc/steps/low.patch 'on: high' 'expect: no 1 yet' 'passes: low' 'fails: first is 1'
    refuses steps/low 'NOT AS MEANT, that is not ok (1)'
}

# --- a change of kv.c ---------------------------------------------------------------------

begin_history() {
    git init -q .
    git config user.name test
    git config user.email test@localhost
    printf '%s\n' kv kv-refresh changed.c three.c high.c >.gitignore
    patch_by 's/return 2/return 9/' doc/steps/high.patch 'on: kv' 'expect: no 2 yet' 'passes: low high' 'fails: second is 2'
    git add . && git commit -qm 'all apply'
}

commit_change() { # SED-SCRIPT
    sed -i "$1" kv.c
    git commit -qam "$1"
}

@test "refresh carries patches over a change beside theirs, with their headers" {
    begin_history
    head -n 4 doc/steps/high.patch >header
    commit_change 's|^int main(void) {|& /* prints both */|'
    refuses_all_of_these
    doc/patches refresh
    [[ ! -e kv-refresh ]]
    head -n 4 doc/steps/high.patch | cmp - header
    proves
    git status --porcelain | grep -v '^ M doc/' >left || true
    cat left && [[ $(grep -vc '^??' left) = 0 ]]
}

refuses_all_of_these() { # for that a change is needed
    run doc/patches check
    ((status == 1))
}

@test "refresh stops at a conflict, names it, goes on with what was resolved, and knows it the next time" {
    begin_history
    commit_change 's/return 2;/return 1 + 1;/'
    run doc/patches refresh
    echo "$output"
    ((status == 1))
    grep -q '^steps/high: has a conflict' <<<"$output" && grep -q 'doc/steps/high.patch' <<<"$output"
    run doc/patches refresh # it is under way
    ((status == 1)) && grep -q -e --continue <<<"$output"
    run doc/patches refresh --continue # the marks are still there
    ((status == 1)) && grep -q 'still has the marks' <<<"$output"
    [[ -z $(git status --porcelain doc) ]] # nothing is written before the end
    resolve 'static int second(void) { return 9; }'
    run doc/patches refresh --continue
    echo "$output"
    ((status == 1)) && grep -q '^solutions/three: has a conflict' <<<"$output"
    resolve 'static int second(void) { return 3; }'
    run doc/patches refresh --continue # the wrong answer is on what was resolved
    echo "$output"
    ((status == 0)) && grep -q '3 patches, 2 changed, 2 by hand' <<<"$output"
    proves
    git checkout -q doc
    run doc/patches refresh
    echo "$output"
    ((status == 0)) && grep -q '3 patches, 2 changed, 0 by hand' <<<"$output"
    proves
}

resolve() { # LINE: in place of the conflict
    sed -i "/^<<<<<<</,/^>>>>>>>/c\\$1" kv-refresh/kv.c
}

@test "refresh stops at a patch that applies but does not build" {
    begin_history
    patch_by 's/return 1/return middle() + 7/' doc/mutants/seven.patch \
        'chapter: 1' 'expect: the first number is 1' 'fails: first is 1'
    sed -i 's/middle(/between(/' kv.c
    sed -i 's|^/\* The first|static int between(void);\n\n&|' kv.c
    run doc/patches refresh
    echo "$output"
    ((status == 1)) && grep -q '^mutants/seven: applies, but does not build' <<<"$output"
    sed -i 's/middle()/between()/' kv-refresh/kv.c
    run doc/patches refresh --continue
    echo "$output"
    ((status == 0))
    proves
    run doc/patches refresh --continue
    ((status == 1))
}
