/* kv.c with the system taken away: what it reads comes from the fuzzer, what it sends is
   kept, the append-only file is an array, time stands or moves as it is told, memory runs
   out where it is told, a lock says who holds it, exit() comes back. So a run costs microseconds, is the same each
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
#include <sys/resource.h>
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

/* Below, behind kv.c, whose variables they look at. */
static int sys_sleep(const struct timespec *t, struct timespec *rest);
static int sys_lock(void *m);
static int sys_unlock(void *m);
static void check_no_locks(void);

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
static bool stays_out; /* once it has run out; else it runs out once */

DRIVER static bool memory_is_out(void) {
    if (until_failure == 0 || --until_failure > 0) return false;
    if (stays_out) until_failure = 1;
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
static int64_t yield_ms; /* what the last yield took; only the next look sees it */

DRIVER static int sys_time(clockid_t clock, struct timespec *t) {
    if (clock == CLOCK_REALTIME) wall_ms += wall_step;
    int64_t ms = wall_ms;
    if (clock == CLOCK_MONOTONIC) {
        ms += yield_ms;
        yield_ms = 0;
    }
    t->tv_sec = ms / 1000;
    t->tv_nsec = ms % 1000 * 1000000;
    return 0;
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

/* To let other threads run may take long. */
DRIVER static int sys_yield(void) {
    if (chance && draw(16) == 0) yield_ms = 10;
    return 0;
}

/* The append-only file, and the one that is to replace it. What is open as 1000 or 1001 is
   the first or the second of files; their directory is 1002. */
static struct file {
    char p[1 << 18];
    size_t len, synced; /* synced: so many bytes are on the disk */
} files[2], *file = files;
static bool name_synced;   /* the directory is on the disk */
static char *mapped;       /* what kv has of it in memory */
static size_t good_len;    /* up to here it was found good */
static char logged[1024];  /* the log's last line */
static size_t until_crash; /* so many calls write or rename; 0: there is no crash */

static jmp_buf at_exit;

DRIVER static int fd_of_file(void) { return 1000 + (int)(file - files); }
DRIVER static struct file *other_file(void) { return file == files ? files + 1 : files; }

DRIVER static void maybe_crash(void) {
    if (until_crash > 0 && --until_crash == 0) longjmp(at_exit, 1);
}

DRIVER static ssize_t sys_write(int fd, const char *p, size_t n) {
    if (fd == STDERR_FILENO) {
        CLAIM(n < sizeof logged && n > 0 && p[n - 1] == '\n');
        memcpy(logged, p, n);
        logged[n] = 0;
        return (ssize_t)n;
    }
    uint32_t event = chance ? draw(8) : 9;
    struct file *f = &files[fd - 1000];
    CLAIM(f == files || f == files + 1);
    check_no_locks();
    if (event < 2) return fails(event ? EINTR : ENOSPC);
    if (event < 5) n = draw((uint32_t)n) + 1;
    CLAIM(f->len + n <= sizeof f->p);
    memcpy(f->p + f->len, p, n);
    f->len += n;
    maybe_crash();
    return (ssize_t)n;
}

DRIVER static int sys_fsync(int fd) {
    check_no_locks();
    if (chance && draw(4) == 0) return (int)fails(EINTR);
    if (fd == 1002) name_synced = true;
    else files[fd - 1000].synced = files[fd - 1000].len;
    return 0;
}

DRIVER static bool is_compact(const char *name) {
    const char *dot = strrchr(name, '.');
    return dot && !strcmp(dot, ".kv-compact");
}

DRIVER static int sys_open(const char *name, int flags, ...) {
    if (!strcmp(name, ".")) return 1002;
    if (!is_compact(name)) return fd_of_file();
    CLAIM(flags & O_EXCL);
    other_file()->len = other_file()->synced = 0;
    return 1000 + (int)(other_file() - files);
}

DRIVER static int sys_rename(const char *from, const char *to) {
    CLAIM(is_compact(from) && !is_compact(to));
    if (chance && draw(2)) return (int)fails(EBUSY);
    maybe_crash();
    CLAIM(other_file()->synced == other_file()->len);
    file = other_file();
    name_synced = false;
    maybe_crash();
    return 0;
}

DRIVER static int sys_unlink(const char *name) {
    CLAIM(is_compact(name));
    return 0;
}

DRIVER static int sys_fstat(int fd, struct stat *st) {
    *st = (struct stat){.st_nlink = 1, .st_ino = (ino_t)fd};
    return 0;
}

DRIVER static off_t sys_lseek(int fd) {
    CLAIM(fd == fd_of_file());
    return (off_t)file->len;
}

/* kv asks for a byte more than the file has, which it may not touch: a block without it. */
DRIVER static void *sys_mmap(size_t n) {
    CLAIM(n == file->len + 1);
    mapped = sys_malloc(file->len);
    return mapped ? memcpy(mapped, file->p, file->len) : MAP_FAILED;
}

DRIVER static int sys_munmap(void *p) {
    CLAIM(p == mapped && !memcmp(mapped, file->p, file->len)); /* it may only be read */
    sys_free(p);
    return 0;
}

DRIVER static int sys_truncate(int fd, off_t n) {
    CLAIM(fd == fd_of_file() && n >= 0 && (size_t)n <= file->len);
    file->len = good_len = (size_t)n;
    file->synced = 0;
    return 0;
}

DRIVER static int sys_fcntl(int fd, int what, ...) { return (fd + what) * 0; }
DRIVER static int zero(int fd) { return fd * 0; }
DRIVER static int minus_one(int fd) { return zero(fd) - 1; }

#define realloc(p, n) sys_realloc(p, n)
#define malloc(n) sys_malloc(n)
#define calloc(n, size) sys_calloc(n, size)
#define strdup(s) sys_strdup(s)
#define free(p) sys_free(p)
#define clock_gettime(clock, t) sys_time(clock, t)
#define nanosleep(...) sys_sleep(__VA_ARGS__)
#define exit(status) longjmp(at_exit, 1 + (status))
#define recv(fd, p, n, flags) from_client(p, n, flags)
#define send(fd, p, n, flags) to_client(p, n)
#define poll(fds, n, ms) ((void)(fds), 1)
#define write(fd, p, n) sys_write(fd, p, n)
#define open(...) sys_open(__VA_ARGS__)
#define rename(from, to) sys_rename(from, to)
#define unlink(name) sys_unlink(name)
#define realpath(name, to) strcpy(to, name)
#define stat(name, st) sys_fstat(fd_of_file(), st)
#define fchmod(fd, mode) zero(fd)
#define fchown(fd, user, group) zero(fd)
#define fcntl(...) sys_fcntl(__VA_ARGS__)
#define fstat(fd, st) sys_fstat(fd, st)
#define lseek(fd, n, whence) sys_lseek(fd)
#define mmap(at, n, ...) sys_mmap(n)
#define munmap(p, n) sys_munmap(p)
#define ftruncate(fd, n) sys_truncate(fd, n)
#define fsync(fd) sys_fsync(fd)
#define close(fd) zero(fd)
#define sched_yield() sys_yield()
#define shutdown(fd, how) minus_one(fd)
#define getpeername(fd, address, len) minus_one(fd)
#define setsockopt(fd, level, name, value, len) ((void)(value), minus_one(fd))
#define pthread_mutex_lock(m) sys_lock(m)
#define pthread_mutex_unlock(m) sys_unlock(m)
#define pthread_cond_wait(c, m) abort() /* the only thread would wait for ever */
#define main kv_main
#include "kv.c"
#undef main

/* The expiry thread sleeps: its round is over. A short sleep means that there is more. */
DRIVER static int sys_sleep(const struct timespec *t, struct timespec *rest) {
    (void)rest;
    check_no_locks();
    if (t->tv_nsec > 1000000) stopping = ANSWERING;
    return 0;
}

/* There is one thread: to lock what it holds would be the end. */
static void *held[8];
static size_t held_count;

DRIVER static bool is_of_shard(const void *m) {
    return (const char *)m >= (char *)shards && (const char *)m < (char *)(shards + 4096);
}

/* The order of locks: a shard's, or all shards' in the order of their numbers; inside it
   the one of the file. */
DRIVER static int sys_lock(void *m) {
    CLAIM(held_count < sizeof held / sizeof *held);
    for (size_t i = 0; i < held_count; i++) {
        CLAIM(held[i] != m);
        if (is_of_shard(m)) CLAIM(is_of_shard(held[i]) && held[i] < m);
    }
    held[held_count++] = m;
    return 0;
}

DRIVER static int sys_unlock(void *m) {
    size_t i = held_count;
    while (i > 0 && held[i - 1] != m) i--;
    CLAIM(i > 0);
    held[i - 1] = held[--held_count];
    return 0;
}

/* Where the thread may block. */
DRIVER static void check_no_locks(void) { CLAIM(held_count == 0); }

/* Two shards, so that most keys share one, and small limits, so that they are met. */
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv, (void)kv_main;
    opt.shards = 2;
    opt.max_request = 4000;
    opt.quiet = 1;
    opt.aof = "file";
    return 0;
}

/* Empties the table and everything else that a run leaves. */
DRIVER static inline void forget(void) {
    for (struct shard *s = shards; s < shards + opt.shards; s++) *s = (struct shard){0};
    for (int i = 0; i < 64; i++) counters[i].commands = 0;
    connections = 0;
    aof.gathered = aof.batch = (struct buf){0};
    aof.end = aof.batch_end = 0;
    aof.safe = 0;
    aof.written = 0;
    aof.broken = aof.has_writer = false;
    aof.fd = -1;
    until_crash = held_count = 0;
    logged[0] = 0;
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
    CLAIM(block_count == 0 && held_count == 0);
}

/* What must hold of the shards at any time. */
DRIVER static inline void check_table(const struct table *t, long shard) {
    size_t count = 0, slots = 0, bytes = 0;
    for (size_t i = 0; i < t->size; i++)
        for (struct entry *e = t->buckets[i]; e; e = e->next) {
            struct slice key = {e->data, e->key_len};
            uint64_t hash = siphash(table_key, key);
            CLAIM((e->hash & (t->size - 1)) == i && e->hash == (uint32_t)hash);
            CLAIM((long)(hash >> 32 & 1) == shard);
            CLAIM(table_find(t, e->hash, key) == e);
            CLAIM(e->slot <= t->heap_len);
            if (e->slot) CLAIM(t->heap[e->slot].entry == e);
            if (e->slot) slots++;
            count++;
            bytes += sizeof *e + e->key_len + e->value_len;
        }
    CLAIM(count == t->count && bytes == t->bytes);
    CLAIM(slots == t->heap_len && slots <= t->heap_room);
    for (size_t i = 2; i <= t->heap_len; i++)
        CLAIM(t->heap[i].when >= t->heap[i / 2].when);
}

DRIVER static inline void check_tables(void) {
    for (long i = 0; i < opt.shards; i++) check_table(&shards[i].table, i);
}
