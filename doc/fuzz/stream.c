/* A request stream in both forms, cut at random: whatever a client sends, and however the
   network cuts it, the replies are the same.

   The input: three bytes that say how to cut, when memory runs out ('0': never) and how
   the end comes, whether memory stays out, whether there is a password and how time
   moves, then the stream. Byte 0xfe and one more, n, stand for 300 * n times x,
   0xfd and n for 8 * n times " x". */
#include "system.h"

static char stream[1 << 18], replies[2][1 << 20];
static size_t stream_len, stream_at, replies_len[2];
static int run, last_errno;

DRIVER static ssize_t from_client(char *to, size_t n, int flags) {
    size_t left = stream_len - stream_at, room = n;
    check_no_locks();
    if (chance && draw(8) == 0) return fails(EINTR);
    if (chance && flags && draw(2)) return fails(EAGAIN);
    if (left == 0 && last_errno && !flags) return fails(last_errno);
    if (left == 0) return last_errno ? fails(EAGAIN) : 0;
    n = chance && draw(4) ? draw(left > 9000 ? 3000 : 9) + 1 : left;
    if (n > room) n = room;
    if (n > left) n = left;
    memcpy(to, stream + stream_at, n);
    stream_at += n;
    return (ssize_t)n;
}

DRIVER static ssize_t to_client(const char *p, size_t n) {
    check_no_locks();
    if (chance && draw(8) == 0) return fails(EINTR);
    if (chance && draw(2)) n = draw((uint32_t)n) + 1;
    CLAIM(replies_len[run] + n <= sizeof replies[run]);
    memcpy(replies[run] + replies_len[run], p, n);
    replies_len[run] += n;
    return (ssize_t)n;
}

DRIVER static void expand(const uint8_t *data, size_t size) {
    stream_len = 0;
    for (size_t i = 0; i < size; i++) {
        bool words = data[i] == 0xfd, long_word = data[i] == 0xfe;
        char *to = stream + stream_len;
        size_t n = 1;
        *to = (char)data[i];
        if ((words || long_word) && i + 1 < size)
            n = (words ? 16 : 300) * (size_t)data[++i];
        if (stream_len + n + 1 > sizeof stream) break;
        if (long_word) memset(to, 'x', n);
        for (size_t k = 0; words && k < n; k++) to[k] = k % 2 ? 'x' : ' ';
        stream_len += n;
    }
}

/* Where a line is too long, the answer comes before its end, which alone says whether it
   is CRLF. So this CR is not compared. */
DRIVER static void drop_cr_of_refusal(void) {
    static const char refusal[] = "too long\r\n";
    size_t n = sizeof refusal - 1, len = replies_len[run];
    char *end = replies[run] + len;
    if (len < n || memcmp(end - n, refusal, n) != 0) return;
    end[-2] = '\n';
    replies_len[run]--;
}

/* How many requests behind a transaction get its error depends on how many had arrived
   when it was run. So only the first of these errors is compared. */
DRIVER static void drop_errors_behind_transaction(void) {
    static const char error[] = "-ERR kv has no transactions\r\n";
    size_t n = sizeof error - 1;
    char *at = memmem(replies[run], replies_len[run], error, n);
    if (at) replies_len[run] = (size_t)(at - replies[run]) + n;
}

/* A hundred years later the expiry thread leaves nothing that has a deadline before. */
DRIVER static void expire_all(void) {
    wall_ms += INT64_C(100) * 366 * 86400 * 1000;
    expiry_main(NULL);
    stopping = SERVING;
    check_tables();
    for (struct shard *s = shards; s < shards + opt.shards; s++)
        if (s->table.heap_len) CLAIM(s->table.heap[1].when > wall_ms - wall_step);
}

DRIVER int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 3) return 0;
    size_t failure = data[1] == '0' ? 0 : data[1];
    expand(data + 3, size - 3);
    for (run = 0; run < 2; run++) {
        if (run == 0 && failure) continue;
        chance = run ? data[0] | 256 : 0;
        last_errno = data[2] % 4 == 1 ? EAGAIN : data[2] % 4 == 2 ? ECONNRESET : 0;
        until_failure = failure;
        stays_out = data[2] & 32;
        stream_at = replies_len[run] = 0;
        wall_ms = 1700000000000;
        wall_step = data[2] >> 6;
        strcpy(password, data[2] & 16 ? "p" : ""); /* then AUTH is needed */
        clients = threads = 1;
        conn_main(NULL);
        until_failure = 0;
        CLAIM(clients == 0 && threads == 0);
        drop_cr_of_refusal();
        drop_errors_behind_transaction();
        check_tables();
        expire_all();
        free_tables();
        forget();
    }
    if (failure || last_errno == ECONNRESET) return 0;
    CLAIM(replies_len[0] == replies_len[1]);
    CLAIM(!memcmp(replies[0], replies[1], replies_len[0]));
    return 0;
}
