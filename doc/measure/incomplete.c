/* Gives requests to the parser in pieces, as if each were one read, and prints the
   processor time until the request is complete. Values have so many bytes. */
#define main kv_main
#include "kv.c"
#undef main

static void feed(struct buf request, size_t piece, bool scans_anew) {
    struct conn c = {.authed = true, .max_bytes = 2000000, .max_words = MAX_WORDS};
    int64_t start = read_clock_us(CLOCK_THREAD_CPUTIME_ID);
    for (size_t at = 0; at < request.len; at += piece) {
        size_t left = request.len - at;
        buf_add(&c.in, request.p + at, piece < left ? piece : left);
        if (scans_anew) c.scanned = 0;
        if (next_request(&c) != (piece >= left)) exit(1);
    }
    printf("%10d", (int)(read_clock_us(CLOCK_THREAD_CPUTIME_ID) - start));
    fflush(stdout);
    free(c.in.p);
    free(c.argv);
}

int main(int argc, char **argv) {
    size_t len = (size_t)atoi(argv[1]);
    char *x = memset(malloc(len), 'x', len), header[64];
    struct buf words = {0}, resp = {0}, text = {0};
    buf_add_text(&words, "*1024\r\n");
    for (int i = 0; i < 1024; i++) buf_add_text(&words, "$1\r\na\r\n");
    sprintf(header, "*3\r\n$3\r\nSET\r\n$1\r\na\r\n$%zu\r\n", len);
    buf_add_text(&resp, header);
    buf_add(&resp, x, len);
    buf_add_text(&resp, "\r\n");
    buf_add_text(&text, "SET a ");
    buf_add(&text, x, len);
    buf_add_text(&text, "\n");
    struct {
        const char *name;
        struct buf request;
        bool scans_anew;
    } rows[] = {
        {"RESP, 1024 words", words, false},
        {"RESP, 1 MB value", resp, false},
        {"text, 1 MB value", text, false},
        {"text, 1 MB value, scanned anew", text, true},
    };
    for (int i = 0; i < 4; i++) {
        printf("%-34s", rows[i].name);
        for (size_t piece = 1000000; piece >= 10; piece /= piece > 1000 ? 1000 : 10)
            feed(rows[i].request, piece, rows[i].scans_anew);
        printf("\n");
    }
}
