/* How long the lock of a shard is held by GET and SET, with a million keys, or as many as
   the argument says. The times include reading the clock. */
#define main kv_main
#include "kv.c"
#undef main

enum { MOST_KEYS = 1000000 };
static int64_t held[MOST_KEYS];
static int keys = MOST_KEYS;

static int64_t time_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int compare(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* Stores value under each key, or without a value reads each. */
static void measure(const char *what, const char *value) {
    struct conn c = {.cmd = find_command(str("SET"))};
    for (int i = 0; i < keys; i++) {
        char key[17];
        int n = (int)((int64_t)i * 387420489 % keys); /* each once, in no order */
        sprintf(key, "key:%012d", n);
        lock_key(&c, str(key));
        int64_t start = time_ns();
        if (value) store(&c, str(value), NEVER);
        else if (c.entry) reply_value(&c, entry_value(c.entry));
        held[i] = time_ns() - start;
        unlock_key(&c);
        c.out.len = 0;
    }
    qsort(held, (size_t)keys, sizeof *held, compare);
    printf("%s: median %ld ns, 99 %% below %ld, 99.99 %% below %ld\n", what,
           (long)held[keys / 2], (long)held[keys / 100 * 99], (long)held[keys / 10000 * 9999]);
}

int main(int argc, char **argv) {
    if (argc > 1) keys = atoi(argv[1]);
    measure("new", "value:00000000000000000000000000");
    measure("SET", "value:00000000000000000000000000");
    measure("GET", NULL);
}
