/* Fills two buffers in turn, 32 bytes at a time, up to so many MB each. Prints the
   milliseconds of processor time, and how often a buffer grew. */
#define main kv_main
#include "kv.c"
#undef main

/* buf_reserve, but the capacity grows by 512 bytes. */
static char *reserve_step(struct buf *b, size_t n) {
    size_t cap = b->cap > 0 ? b->cap : SMALL_BUF;
    while (cap - b->len < n) cap += 512;
    if (cap > b->cap) b->p = realloc(b->p, cap);
    if (!b->p) exit(1);
    b->cap = cap;
    return b->p + b->len;
}

static void fill(char *(*reserve)(struct buf *, size_t), int mb, double *ms, int *steps) {
    struct buf two[2] = {{0}};
    int64_t start = read_clock_us(CLOCK_THREAD_CPUTIME_ID);
    *steps = 0;
    while (two[1].len < (size_t)mb * 1000000) {
        for (int i = 0; i < 2; i++) {
            size_t cap = two[i].cap;
            memset(reserve(&two[i], 32), 'x', 32);
            two[i].len += 32;
            *steps += two[i].cap > cap;
        }
    }
    *ms = (double)(read_clock_us(CLOCK_THREAD_CPUTIME_ID) - start) / 1000;
    free(two[0].p);
    free(two[1].p);
}

int main(int argc, char **argv) {
    int mb[2] = {atoi(argv[1]), atoi(argv[2])}, steps[2];
    double ms[2];
    printf("%-33s%5d MB%5d MB     %5d MB%5d MB\n", "", mb[0], mb[1], mb[0], mb[1]);
    for (int moves = 1; moves >= 0; moves--) {
        if (!moves) mallopt(M_MMAP_MAX, 0); /* so no block has pages of its own */
        for (int is_step = 0; is_step < 2; is_step++) {
            for (int i = 0; i < 2; i++)
                fill(is_step ? reserve_step : buf_reserve, mb[i], &ms[i], &steps[i]);
            printf("%-13s%-20s%5.0f ms%5.0f ms%7d steps%7d\n", is_step ? "512 more" : "doubles",
                   moves ? "glibc moves pages" : "glibc copies", ms[0], ms[1], steps[0],
                   steps[1]);
        }
    }
}
