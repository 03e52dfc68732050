# kv: make help lists the targets

CC     ?= cc
CFLAGS ?= -O3 -g
STRICT  = -std=c11 -D_XOPEN_SOURCE=700 -D_FILE_OFFSET_BITS=64 -D_TIME_BITS=64 \
          -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wstrict-prototypes -Wvla -Werror
STRICT += $(if $(filter Darwin,$(shell uname)),-D_DARWIN_C_SOURCE) # or macOS hides what kv uses
PORT   ?= 8080
PREFIX ?= /usr/local
SUDO    = $(shell [ "$$(id -u)" = 0 ] || echo sudo)

all: kv ## build ./kv

kv: kv.c
	$(CC) $(STRICT) $(CFLAGS) $(LDFLAGS) -o $@ kv.c -pthread

run: kv ## build and start the server; make run PORT=9000 takes another port
	./kv --port $(PORT)

test: kv ## run the tests; they need what make deps installs
	./test.sh

asan: kv-asan ## build ./kv-asan, with AddressSanitizer and UndefinedBehaviorSanitizer
kv-asan: kv.c
	$(CC) $(STRICT) -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined \
	    -fno-sanitize-recover=all -o $@ kv.c -pthread

tsan: kv-tsan ## build ./kv-tsan, with ThreadSanitizer
	@./kv-tsan --version >/dev/null 2>&1 || { echo 'ThreadSanitizer cannot place its memory' \
	    'here, because the kernel randomises addresses too much. Either of these helps:'; \
	    echo '    sudo sysctl vm.mmap_rnd_bits=28'; \
	    echo '    SANITIZER=tsan setarch -R ./test.sh'; exit 1; }
kv-tsan: kv.c
	$(CC) $(STRICT) -O1 -g -fno-omit-frame-pointer -fsanitize=thread -o $@ kv.c -pthread

step: ## list the steps of doc/steps; make step STEP=shards builds one, shows what it adds
	@doc/course step $(STEP)
kv-step/%: kv-step/%.c
	$(CC) $(STRICT) $(CFLAGS) $(LDFLAGS) -o $@ $< -pthread

start: ## put into kv-exercise/ what you start from: make start STEP=shards, or EX=rename
	@doc/course start $(if $(STEP),step $(STEP)) $(if $(EX),exercise $(EX))

check: ## list the exercises; make check EX=rename, or STEP=shards, tests kv-exercise/
	@doc/course check $(if $(STEP),step $(STEP)) $(if $(EX),exercise $(EX))

course: ## prove steps, exercises and mutants, in 8 minutes
	@SHORT=1 doc/patches check steps solutions wrong hunts exercises mutants

# All tests at each step, with sanitizers, and twenty times what a race may pass by luck.
course-release: ## the same with all there is, in hours, before a term
	SUITE=1 doc/patches check
	for s in asan tsan; do \
	    SANITIZER=$$s SUITE=1 doc/patches check steps && \
	    SANITIZER=$$s doc/patches check solutions exercises || exit 1; \
	done
	TIMES=20 doc/patches check solutions wrong hunts

refresh: ## carry the patches of doc/ over a change of kv.c
	@doc/patches refresh

# Debian's compilers for 64-bit ARM, 32-bit ARM and a big-endian machine; an emulator runs what
# they build with the libc of each. And musl in place of glibc, for this machine.
CROSS = aarch64-linux-gnu arm-linux-gnueabihf s390x-linux-gnu

cross: kv kv-aarch64 kv-arm kv-s390x kv-musl ## build kv for other machines and for musl, try each in short
	@failed=0; for m in $(CROSS); do \
	    .ci/smoke qemu-$${m%%-*} -L /usr/$$m ./kv-$${m%%-*} || failed=1; \
	done; .ci/smoke ./kv-musl || failed=1; exit $$failed
kv-aarch64 kv-arm kv-s390x: kv-%: kv.c
	$(filter $*-%,$(CROSS))-gcc $(STRICT) -O3 -g -o $@ kv.c -pthread
kv-musl: kv.c
	musl-gcc $(STRICT) -O3 -g -o $@ kv.c -pthread

# FUZZ_SECONDS for each of the three, which begins with doc/fuzz/corpus; what it finds goes to a
# folder that it names. A variable that is read before it is set holds a pattern that is no pointer.
FUZZ_SECONDS ?= 60
FUZZERS       = stream word aof
FUZZ          = clang -std=c11 -D_GNU_SOURCE -O2 -g -fsanitize=fuzzer,address,undefined \
                -fno-sanitize-recover=all -fno-sanitize-coverage=trace-cmp \
                -ftrivial-auto-var-init=pattern -I.

fuzz: $(FUZZERS:%=kv-fuzz-%) ## throw random input at kv.c; make fuzz FUZZ_SECONDS=600 does it longer
	@for t in $(FUZZERS); do \
	    new=$$(mktemp -d); echo "$$t for $(FUZZ_SECONDS) s; new inputs go to $$new"; \
	    ASAN_OPTIONS=quarantine_size_mb=8 ./kv-fuzz-$$t -max_total_time=$(FUZZ_SECONDS) -timeout=10 \
	        -max_len=256 -dict=doc/fuzz/kv.dict -artifact_prefix=$$new/ -print_final_stats=1 \
	        $$new doc/fuzz/corpus/$$t >$$new/log 2>&1 || { tail -n 40 $$new/log; exit 1; }; \
	    sed -n 's/^stat::number_of_executed_units: */    runs, all clean: /p' $$new/log; \
	done
kv-fuzz-%: doc/fuzz/%.c doc/fuzz/system.h kv.c
	$(FUZZ) -o $@ $< -pthread

# The counts are written when kv ends: tests that end it with kill -9 add nothing.
coverage: kv-gcov ## run the tests, print how much of kv.c they reach and which lines they do not
	rm -f kv-gcov-kv.gcda
	KV=./kv-gcov ./test.sh || echo 'What gcov writes and counts itself upsets tests that trace calls or look at the clock.'
	@gcov -n -o . kv-gcov-kv.gcda | sed -n 's/^Lines executed:/kv.c: /p' | head -n 1
	@gcov -t -o . kv-gcov-kv.gcda 2>/dev/null | sed -n 's/^ *#####: *//p'
kv-gcov: kv.c
	gcc $(STRICT) -O1 -g --coverage -fprofile-update=atomic -o $@ kv.c -pthread

# What clang-tidy is not asked, and why: insecureAPI wants functions that C11 has made optional
# and libc lacks; swappable parameters and padding are matters of taste; a descriptor is passed to
# a thread as a pointer; sizeof of a pointer is meant where the table is one of pointers.
TIDY = -*,clang-analyzer-*,bugprone-*,performance-*,portability-*,$\
       -clang-analyzer-security.insecureAPI.*,-clang-analyzer-optin.performance.Padding,$\
       -bugprone-easily-swappable-parameters,-bugprone-sizeof-expression,$\
       -performance-no-int-to-ptr

lint: ## check kv.c, the scripts, the references of doc/ and the size budget
	clang-format --dry-run -Werror kv.c
	clang-tidy --quiet --warnings-as-errors='*' --checks='$(TIDY)' kv.c -- $(STRICT)
	cppcheck --quiet --std=c11 --enable=warning,performance,portability --inline-suppr \
	    --error-exitcode=1 kv.c
	shellcheck -x test.sh bench.sh $(shell grep -l '^.!.*bash' doc/measure/*) doc/measure/lib.sh doc/course doc/grade doc/handout doc/patches doc/*.bats \
	    doc/exercises/*.ba*s* doc/solutions/*.bats doc/steps/*.bats \
	    $(addprefix doc/engines/,certificates follow guard man-tables measure to-cluster engines.bats) .ci/run .ci/docrefs .ci/smoke
	.ci/docrefs
	.ci/budget

# apt-get as root, or through sudo; brew on macOS. No service is started.
deps: ## install what the tests need: bats 1.8 or newer, nc, parallel, patch, redis-cli
	@$(call install,bats netcat-openbsd parallel patch procps redis-tools util-linux,bats-core parallel redis)
	@bats --version | awk '{ split($$2, v, "."); exit !(v[1] > 1 || v[2] >= 8) }' || \
	    { echo 'bats 1.8 or newer is needed: npm install -g bats'; exit 1; }

deps-all: deps ## and what the linters, other machines and comparisons with Redis need
	@$(call install,gcc git clang musl-tools clang-format clang-tidy cppcheck shellcheck cloc \
	    strace redis-server python3-redis prometheus-redis-exporter gnuplot-nox \
	    nutcracker haproxy stunnel4 openssl perl \
	    $(CROSS_DEPS),llvm cppcheck shellcheck cloc)
	@$(call install,libclang-rt-$$(clang -dumpversion | cut -d. -f1)-dev,llvm)
	@command -v npm >/dev/null || { $(call install,npm,node); }
	@[ -d $(KV_NODE)/node_modules/ioredis ] || npm install --prefix $(KV_NODE) --no-audit --no-fund \
	    --ignore-scripts --loglevel=error ioredis@6
KV_NODE   ?= $(HOME)/.cache/kv-node# where a test finds a client library for node
CROSS_DEPS = qemu-user $(CROSS:%=gcc-%) libc6-dev-arm64-cross libc6-dev-armhf-cross libc6-dev-s390x-cross

# Debian starts the service of a package that it installs, unless a policy says no.
POLICY  = /usr/sbin/policy-rc.d
install = set -e; if command -v apt-get >/dev/null; then \
	    if [ ! -e $(POLICY) ]; then trap '$(SUDO) rm -f $(POLICY)' EXIT; \
	        printf '\#!/bin/sh\nexit 101\n' | $(SUDO) tee $(POLICY) >/dev/null; \
	        $(SUDO) chmod 755 $(POLICY); fi; \
	    $(SUDO) apt-get update -qq; \
	    $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
	        --no-install-recommends $(1) >/dev/null; \
	elif command -v brew >/dev/null; then brew install $(2); \
	else echo 'install these with your package manager: $(1)'; exit 1; fi

format: ## format kv.c
	clang-format -i kv.c

install: kv ## put kv and its man page below PREFIX, /usr/local if not given
	install -d '$(DESTDIR)$(PREFIX)/bin' '$(DESTDIR)$(PREFIX)/share/man/man1'
	install -m 755 kv '$(DESTDIR)$(PREFIX)/bin/kv'
	install -m 644 doc/kv.1 '$(DESTDIR)$(PREFIX)/share/man/man1/kv.1'

clean: ## remove what was built
	rm -f kv kv-asan kv-tsan kv-aarch64 kv-arm kv-s390x kv-musl kv-gcov $(FUZZERS:%=kv-fuzz-%) *.gcda *.gcno
	rm -rf kv-step

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r t d; do \
	    printf '%-14s %s\n' "$$t" "$$d"; done

.PHONY: all run test deps deps-all asan tsan cross fuzz coverage lint format install clean help \
    step start check course course-release refresh

# For who teaches.
grade: ## grade answers: make grade EX=strlen SUBMISSION=kv.c; or DIR=answers CSV=out.csv
	@doc/grade '$(EX)' '$(or $(SUBMISSION),$(DIR))' $(CSV)

handout: ## pack what students get: make handout OUT=kv-course.tar.gz
	@doc/handout '$(OUT)'

.PHONY: grade handout
