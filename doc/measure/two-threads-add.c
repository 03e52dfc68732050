/* Two threads add 1 to a number, N times each: without a guard, with an atomic, with a mutex,
   and each to a number of its own. Prints how long one takes, and how many are missing. */
#define main kv_main
#include "kv.c"
#undef main

static long N = 10000000;
static _Alignas(64) volatile long plain[16];
static _Alignas(64) atomic_long atomic;
static _Alignas(64) pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static enum { NO_GUARD, ATOMIC, MUTEX, OWN } way;

static atomic_int ready; /* both threads begin together */

static void *add(void *number) {
    volatile long *mine = number;
    ready++;
    while (ready < 2) sched_yield();
    for (long i = 0; i < N; i++) {
        if (way == ATOMIC) atomic++;
        if (way == MUTEX) pthread_mutex_lock(&lock);
        if (way != ATOMIC) *mine = *mine + 1;
        if (way == MUTEX) pthread_mutex_unlock(&lock);
    }
    return NULL;
}

int main(int argc, char **argv) {
    static const char *names[] = {"no guard", "atomic", "mutex", "each its own"};
    if (argc > 1) N = atol(argv[1]);
    for (way = NO_GUARD; way <= OWN; way++) {
        pthread_t other;
        int distance = way == OWN ? 8 : 0; /* another cache line */
        atomic = plain[0] = plain[8] = 0;
        ready = 0;
        int64_t start = monotonic_us();
        pthread_create(&other, NULL, add, (void *)&plain[distance]);
        add((void *)&plain[0]);
        pthread_join(other, NULL);
        int64_t us = monotonic_us() - start;
        printf("%-12s%8.1f%12ld\n", names[way], (double)us * 1000 / (double)N,
               2 * N - (long)atomic - plain[0] - plain[8]);
    }
}
