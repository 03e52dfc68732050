/* kv.c with the system taken away: what it reads comes from the fuzzer, what it sends is
   kept, the append-only file is an array, time stands or moves as it is told, memory runs
   out where it is told, exit() comes back. So a run costs microseconds, is the same each
   time, and leaves nothing behind. */
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* What the fuzzer is after: a claim that does not hold. */
#define CLAIM(it) ((it) ? (void)0 : (fprintf(stderr, "not so: %s\n", #it), abort()))

/* Coverage is about kv.c, not about what drives it. */
#define DRIVER __attribute__((no_sanitize("coverage")))

static ssize_t from_client(char *to, size_t n, int flags);
static ssize_t to_client(const char *p, size_t n);
static atomic_int stopping; /* of kv.c */

/* All memory that kv.c has is from here, one block behind the other, with poison between
   them and where one was freed; none is used again in the same run. This is much faster
   than what AddressSanitizer has in place of malloc. We know the blocks, because exit()
   in mid-work, as longjmp, must not leak. */
static _Alignas(16) char arena[1 << 26];
static struct block {
    char *p;
    size_t n;
} blocks[1 << 16];
static size_t arena_used, block_count, until_failure; /* 0: memory never runs out */

DRIVER static bool memory_is_out(void) {
    if (until_failure == 0 || --until_failure > 0) return false;
    errno = ENOMEM;
    return true;
}

DRIVER static void *sys_malloc(size_t n) {
    if (memory_is_out()) return NULL;
    if (arena_used == 0) ASAN_POISON_MEMORY_REGION(arena, 16);
    if (block_count == 0) arena_used = 16;
    CLAIM(block_count < sizeof blocks / sizeof *blocks);
    CLAIM(n < sizeof arena - arena_used - 64);
    char *p = arena + arena_used;
    arena_used += (n + 31) & ~(size_t)15; /* so there are 16 or more behind it */
    ASAN_POISON_MEMORY_REGION(p, arena_used - (size_t)(p - arena));
    ASAN_UNPOISON_MEMORY_REGION(p, n);
    memset(p, 0xbe, n < 256 ? n : 256); /* nothing that makes sense */
    blocks[block_count++] = (struct block){p, n};
    return p;
}

DRIVER static struct block *block_of(const void *p) {
    size_t i = block_count;
    while (i > 0 && blocks[i - 1].p != p) i--;
    CLAIM(i > 0);
    return &blocks[i - 1];
}

DRIVER static void sys_free(void *p) {
    if (!p) return;
    struct block *b = block_of(p);
    ASAN_POISON_MEMORY_REGION(p, b->n);
    *b = blocks[--block_count];
}

DRIVER static void *sys_realloc(void *old, size_t n) {
    char *p = sys_malloc(n);
    if (!old || !p) return p;
    size_t was = block_of(old)->n;
    memcpy(p, old, was < n ? was : n);
    sys_free(old);
    return p;
}

DRIVER static void *sys_calloc(size_t n, size_t size) {
    void *p = sys_malloc(n * size);
    return p ? memset(p, 0, n * size) : NULL;
}

DRIVER static char *sys_strdup(const char *s) {
    char *p = sys_malloc(strlen(s) + 1);
    return p ? strcpy(p, s) : NULL;
}

DRIVER static void free_all(void) {
    while (block_count > 0) sys_free(blocks[block_count - 1].p);
}

static int64_t wall_ms, wall_step; /* the wall clock, and how far each look moves it */

DRIVER static int sys_time(clockid_t clock, struct timespec *t) {
    if (clock == CLOCK_REALTIME) wall_ms += wall_step;
    t->tv_sec = wall_ms / 1000;
    t->tv_nsec = wall_ms % 1000 * 1000000;
    return 0;
}

/* The expiry thread sleeps: its round is over. A short sleep means that there is more. */
DRIVER static int sys_sleep(const struct timespec *t, struct timespec *rest) {
    (void)rest;
    stopping = t->tv_nsec > 1000000;
    return 0;
}

/* There is one thread. It must hold no lock where it may block, and at the end. */
static int locks;

DRIVER static int sys_lock(pthread_mutex_t *m, int n) {
    (void)m;
    return (locks += n) * 0;
}

static uint32_t chance; /* the state of a random sequence; 0: nothing goes wrong */

DRIVER static uint32_t draw(uint32_t below) {
    chance ^= chance << 13;
    chance ^= chance >> 17;
    chance ^= chance << 5;
    return chance % below;
}

DRIVER static ssize_t fails(int error) {
    errno = error;
    return -1;
}

static char file[1 << 18], *mapped; /* the append-only file, and what kv has of it */
static size_t file_len, good_len;   /* up to good_len it was found good */

DRIVER static ssize_t sys_write(int fd, const char *p, size_t n) {
    uint32_t event = chance && fd != STDERR_FILENO ? draw(8) : 9;
    if (fd == STDERR_FILENO) return (ssize_t)n;
    CLAIM(locks == 0);
    if (event < 2) return fails(event ? EINTR : ENOSPC);
    if (event < 5) n = draw((uint32_t)n) + 1;
    CLAIM(file_len + n <= sizeof file);
    memcpy(file + file_len, p, n);
    file_len += n;
    return (ssize_t)n;
}

DRIVER static int sys_dprintf(int fd, const char *fmt, ...) {
    char line[256];
    uint32_t was = chance;
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(line, sizeof line, fmt, args);
    va_end(args);
    chance = 0; /* dprintf goes on after a short write */
    n = (int)sys_write(fd, line, (size_t)n);
    chance = was;
    return n;
}

DRIVER static int sys_fstat(int fd, struct stat *st) {
    (void)fd;
    *st = (struct stat){.st_size = (off_t)file_len};
    return 0;
}

DRIVER static off_t sys_lseek(int fd) { return (off_t)file_len + fd * 0; }

/* kv asks for a byte more than the file has, which it may not touch: a block without it. */
DRIVER static void *sys_mmap(size_t n) {
    (void)n;
    mapped = sys_malloc(file_len);
    return mapped ? memcpy(mapped, file, file_len) : MAP_FAILED;
}

DRIVER static int sys_truncate(int fd, off_t n) {
    (void)fd;
    CLAIM(n >= 0 && (size_t)n <= file_len);
    CLAIM(file_len == 0 || !memcmp(mapped, file, file_len)); /* it may only be read */
    file_len = good_len = (size_t)n;
    return 0;
}

DRIVER static int sys_fcntl(int fd, int what, ...) { return (fd + what) * 0; }
DRIVER static int zero(int fd) { return fd * 0; }
DRIVER static int minus_one(int fd) { return zero(fd) - 1; }

static jmp_buf at_exit;

#define realloc(p, n) sys_realloc(p, n)
#define malloc(n) sys_malloc(n)
#define calloc(n, size) sys_calloc(n, size)
#define strdup(s) sys_strdup(s)
#define free(p) sys_free(p)
#define malloc_trim(pad) ((void)(pad))
#define clock_gettime(clock, t) sys_time(clock, t)
#define nanosleep(...) sys_sleep(__VA_ARGS__)
#define exit(status) longjmp(at_exit, 1 + (status))
#define recv(fd, p, n, flags) from_client(p, n, flags)
#define send(fd, p, n, flags) to_client(p, n)
#define write(fd, p, n) sys_write(fd, p, n)
#define dprintf(...) sys_dprintf(__VA_ARGS__)
#define open(...) zero(1000)
#define fcntl(...) sys_fcntl(__VA_ARGS__)
#define fstat(fd, st) sys_fstat(fd, st)
#define lseek(fd, n, whence) sys_lseek(fd)
#define mmap(at, n, ...) sys_mmap(n)
#define munmap(p, n) sys_free(p)
#define ftruncate(fd, n) sys_truncate(fd, n)
#define fsync(fd) zero(fd)
#define close(fd) zero(fd)
#define sched_yield() 0
#define shutdown(fd, how) minus_one(fd)
#define setsockopt(fd, level, name, value, len) ((void)(value), minus_one(fd))
#define pthread_mutex_lock(m) sys_lock(m, 1)
#define pthread_mutex_unlock(m) sys_lock(m, -1)
#define main kv_main
#include "kv.c"
#undef main

/* Two shards, so that most keys share one, and small limits, so that they are met. */
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv, (void)kv_main;
    opt.shards = 2;
    opt.max_value = 64;
    opt.quiet = 1;
    opt.aof = "file";
    return 0;
}

/* Empties the table and everything else that a run leaves. */
DRIVER static inline void forget(void) {
    for (struct shard *s = shards; s < shards + opt.shards; s++) {
        s->table = (struct table){0};
        s->appended = 0;
    }
    aof.gathered = aof.batch = (struct buf){0};
    aof.end = aof.taken = aof.writing = 0;
    atomic_store(&aof.safe, 0);
    atomic_store(&disk_bad, false);
    aof_fd = -1;
    locks = 0;
    opt.max_value = 64;
    free_all();
}

/* Frees the tables. What kv holds beside them has leaked. */
DRIVER static inline void free_tables(void) {
    for (struct shard *s = shards; s < shards + opt.shards; s++) {
        table_free(&s->table);
        s->table = (struct table){0};
    }
    free(aof.gathered.p);
    free(aof.batch.p);
    aof.gathered = aof.batch = (struct buf){0};
    CLAIM(block_count == 0 && locks == 0);
}

/* What must hold of a shard at any time. */
DRIVER static inline void check_table(const struct table *t) {
    size_t count = 0, slots = 0;
    for (size_t i = 0; i < t->size; i++)
        for (struct entry *e = t->buckets[i]; e; e = e->next, count++) {
            CLAIM(e->hash * t->size >> 32 == i);
            CLAIM(e->hash == (uint32_t)hash_bytes((struct slice){e->data, e->klen}));
            CLAIM(e->slot <= t->heap_len);
            if (e->slot) CLAIM(t->heap[e->slot].entry == e);
            slots += e->slot != 0;
        }
    CLAIM(count == t->count && slots == t->heap_len);
    for (size_t i = 2; i <= t->heap_len; i++)
        CLAIM(t->heap[i].when >= t->heap[i / 2].when);
}
