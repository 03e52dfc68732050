# kv: make help lists the targets

CC     ?= cc
CFLAGS ?= -O2 -g
STRICT  = -std=c11 -D_POSIX_C_SOURCE=200809L -Wall -Wextra -Wpedantic -Wshadow -Wconversion \
          -Wstrict-prototypes -Wvla -Werror
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
	    echo '    KV=./kv-tsan setarch -R ./test.sh'; exit 1; }
kv-tsan: kv.c
	$(CC) $(STRICT) -O1 -g -fno-omit-frame-pointer -fsanitize=thread -o $@ kv.c -pthread

format: ## format kv.c
	clang-format -i kv.c

install: kv ## put kv into PREFIX/bin, /usr/local/bin if PREFIX is not given
	install -d '$(DESTDIR)$(PREFIX)/bin'
	install -m 755 kv '$(DESTDIR)$(PREFIX)/bin/kv'

clean: ## remove what was built
	rm -f kv kv-asan kv-tsan

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r t d; do \
	    printf '%-9s %s\n' "$$t" "$$d"; done

.PHONY: all run test deps deps-all asan tsan lint format install clean help
