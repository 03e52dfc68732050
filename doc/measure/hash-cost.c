/* Nanoseconds of processor time for one hash of so many bytes. Each hash waits for the one
   before. */
#define main kv_main
#include "kv.c"
#undef main

static uint64_t fnv1a(struct slice s) {
    uint64_t h = 0xcbf29ce484222325;
    for (size_t i = 0; i < s.len; i++) h = (h ^ (unsigned char)s.p[i]) * 0x100000001b3;
    return h;
}

int main(int argc, char **argv) {
    static char key[1048576];
    const size_t lengths[] = {8, 16, 32, 64, 256, 1024, sizeof key};
    double bytes = argc > 1 ? atof(argv[1]) : 200000000;
    for (int is_fnv = 0; is_fnv < 2; is_fnv++) {
        printf(is_fnv ? "FNV-1a     " : "SipHash-1-3");
        for (int i = 0; i < 7; i++) {
            struct slice s = {key, lengths[i]};
            int n = (int)(bytes / (double)(s.len + 32)) + 1;
            int64_t start = read_clock_us(CLOCK_THREAD_CPUTIME_ID);
            for (int j = 0; j < n; j++)
                key[0] = (char)(is_fnv ? fnv1a(s) : siphash(table_key, s));
            int64_t us = read_clock_us(CLOCK_THREAD_CPUTIME_ID) - start;
            printf("%8.0f", (double)us * 1000 / n);
        }
        puts("");
    }
}
