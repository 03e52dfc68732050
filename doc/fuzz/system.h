/* kv.c with the system taken away: what it reads comes from the fuzzer, what it sends is
   kept, time stands or moves as it is told, memory runs out where it is told, exit() comes
   back. So a run costs microseconds, is the same each time, and leaves nothing behind. */
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* What the fuzzer is after: a claim that does not hold. */
#define CLAIM(it) ((it) ? (void)0 : (fprintf(stderr, "not so: %s\n", #it), abort()))

/* Coverage is about kv.c, not about what drives it. */
#define DRIVER __attribute__((no_sanitize("coverage")))

static ssize_t from_client(char *to, size_t n, int flags);
static ssize_t to_client(const char *p, size_t n);

/* Every block that kv.c holds: exit() in mid-work, as longjmp, must not leak. */
static void *blocks[1 << 16];
static size_t block_count, until_failure; /* 0: memory never runs out */

DRIVER static void *keep(void *old, void *p) {
    size_t i = block_count;
    while (old && i > 0 && blocks[--i] != old) continue;
    if (!old) i = block_count++;
    CLAIM(i < sizeof blocks / sizeof *blocks);
    blocks[i] = p;
    if (!p) blocks[i] = blocks[--block_count];
    return p;
}

DRIVER static bool memory_is_out(void) {
    return until_failure > 0 && --until_failure == 0;
}

DRIVER static void *sys_realloc(void *old, size_t n) {
    void *p = memory_is_out() ? NULL : realloc(old, n);
    return p ? keep(old, p) : NULL;
}

DRIVER static void *sys_calloc(size_t n, size_t size) {
    void *p = memory_is_out() ? NULL : calloc(n, size);
    return p ? keep(NULL, p) : NULL;
}

DRIVER static void sys_free(void *p) {
    if (p) keep(p, NULL);
    free(p);
}

DRIVER static void free_all(void) {
    while (block_count > 0) free(blocks[--block_count]);
}

static int64_t wall_ms, wall_step; /* the wall clock, and how far each look moves it */

DRIVER static int sys_time(clockid_t clock, struct timespec *t) {
    if (clock == CLOCK_REALTIME) wall_ms += wall_step;
    t->tv_sec = wall_ms / 1000;
    t->tv_nsec = wall_ms % 1000 * 1000000;
    return 0;
}

static jmp_buf at_exit;

#define realloc(p, n) sys_realloc(p, n)
#define malloc(n) sys_realloc(NULL, n)
#define calloc(n, size) sys_calloc(n, size)
#define free(p) sys_free(p)
#define malloc_trim(pad) ((void)(pad))
#define clock_gettime(clock, t) sys_time(clock, t)
#define exit(status) longjmp(at_exit, 1 + (status))
#define recv(fd, p, n, flags) from_client(p, n, flags)
#define send(fd, p, n, flags) to_client(p, n)
#define write(fd, p, n) ((ssize_t)(n)) /* the log */
#define sched_yield() 0
#define close(fd) ((void)(fd), 0)
#define setsockopt(fd, level, name, value, len) ((void)(value), -1)
#define main kv_main
#include "kv.c"
#undef main

/* Two shards, so that most keys share one, and small limits, so that they are met. */
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    static struct shard two[2];
    (void)argc, (void)argv, (void)kv_main;
    opt.shards = 2;
    opt.max_value = 64;
    opt.quiet = 1;
    shards = two;
    for (int i = 0; i < 2; i++) pthread_mutex_init(&two[i].lock, NULL);
    return 0;
}

/* Empties the table and everything else that a run leaves. */
DRIVER static inline void forget(void) {
    for (struct shard *s = shards; s < shards + opt.shards; s++)
        s->table = (struct table){0};
    free_all();
}

/* What must hold of a shard at any time. Returns how many bytes the keys and values have. */
DRIVER static inline size_t check_table(const struct table *t) {
    size_t count = 0, slots = 0, bytes = 0, i;
    for (i = 0; t->buckets && i < (size_t)1 << t->bits; i++)
        for (struct entry *e = t->buckets[i]; e; e = e->next, count++) {
            CLAIM(e->hash >> (32 - t->bits) == i);
            CLAIM(e->hash == (uint32_t)hash_bytes((struct slice){e->data, e->klen}));
            if (e->slot != NO_SLOT) CLAIM(t->heap[e->slot].entry == e);
            slots += e->slot != NO_SLOT;
            bytes += sizeof *e + e->klen + e->vlen;
        }
    CLAIM(count == t->count && slots == t->heap_len && bytes == t->bytes);
    for (i = 1; i < t->heap_len; i++) CLAIM(t->heap[i].when >= t->heap[(i - 1) / 2].when);
    return bytes;
}
