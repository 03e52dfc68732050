/* SHARDS KEYS REQUESTS: stores so many keys, and prints the most entries that a shard has,
   the longest times in ms of processor time that table_grow and copy_keys take, both of
   which run under its lock, and how many GETs one thread and two threads do, without
   a network. */
#define main kv_main
#include "kv.c"
#undef main

static long keys, requests;
static atomic_long hits;

static struct slice key_of(char *text, long i) {
    return (struct slice){text, (size_t)sprintf(text, "k%012ld", i)};
}

static double cpu_ms(void) { return (double)read_clock_us(CLOCK_THREAD_CPUTIME_ID) / 1000; }

static void *get(void *seed) {
    uint64_t random = (uint64_t)(uintptr_t)seed;
    struct conn c = {.cmd = find_command(str("GET"))};
    char text[32];
    long found = 0;
    for (long i = 0; i < requests; i++) {
        random = random * 6364136223846793005 + 1442695040888963407;
        lock_key(&c, key_of(text, (long)((random >> 33) % (uint64_t)keys)));
        if (c.entry) found++;
        cmd_get(&c);
        unlock_key(&c);
        c.out.len = 0;
    }
    hits += found;
    return NULL;
}

int main(int argc, char **argv) {
    struct conn c = {.cmd = find_command(str("SET"))};
    struct buf copy = {0};
    double grow = 0, walk = 0, rate[2];
    size_t most = 0;
    char text[32];
    (void)argc;
    opt.shards = atol(argv[1]);
    keys = atol(argv[2]);
    requests = atol(argv[3]);
    draw_table_key();
    for (long i = 0; i < opt.shards; i++) pthread_mutex_init(&shards[i].lock, NULL);
    for (long i = 0; i < keys; i++) {
        lock_key(&c, key_of(text, i));
        struct table *t = &c.shard->table;
        if (t->count >= t->size) { /* store would do the same */
            double start = cpu_ms();
            table_grow(t);
            if (grow < cpu_ms() - start) grow = cpu_ms() - start;
        }
        if (!store(&c, str("x"), NEVER)) return 1;
        unlock_key(&c);
    }
    for (long i = 0; i < opt.shards; i++) {
        if (most < shards[i].table.count) most = shards[i].table.count;
        double start = cpu_ms();
        copy.len = 0;
        copy_keys(&c, &shards[i], &copy);
        if (walk < cpu_ms() - start) walk = cpu_ms() - start;
    }
    for (int two = 0; two < 2; two++) {
        pthread_t other;
        int64_t start = monotonic_us();
        if (two) pthread_create(&other, NULL, get, (void *)2);
        get((void *)1);
        if (two) pthread_join(other, NULL);
        rate[two] = (double)(requests * (two + 1)) / (double)(monotonic_us() - start);
    }
    if (hits != 3 * requests) return 1;
    printf("%6ld%12zu%11.1f%10.1f%15.2f%15.2f\n", opt.shards, most, grow, walk, rate[0], rate[1]);
    return 0;
}
