/* A request stream in both forms, cut at random: whatever a client sends, and however the
   network cuts it, the replies are the same.

   The input: three bytes that say how to cut, when memory runs out ('0': never) and how
   the end comes, then the stream. Byte 0xfe and one more, n, stand for 300 * n times x. */
#include "system.h"

static char stream[1 << 18], replies[2][1 << 20];
static size_t stream_len, stream_at, replies_len[2];
static uint32_t cut; /* the state of a random sequence; 0: nothing is cut */
static int run, last_errno;

DRIVER static uint32_t draw(uint32_t below) {
    cut ^= cut << 13;
    cut ^= cut >> 17;
    cut ^= cut << 5;
    return cut % below;
}

static ssize_t fails(int error) {
    errno = error;
    return -1;
}

DRIVER static ssize_t from_client(char *to, size_t n, int flags) {
    size_t left = stream_len - stream_at, room = n;
    if (cut && draw(8) == 0) return fails(EINTR);
    if (cut && flags && draw(2)) return fails(EAGAIN);
    if (left == 0 && last_errno && !flags) return fails(last_errno);
    if (left == 0) return last_errno ? fails(EAGAIN) : 0;
    n = cut && draw(4) ? draw(left > 9000 ? 3000 : 9) + 1 : left;
    if (n > room) n = room;
    if (n > left) n = left;
    memcpy(to, stream + stream_at, n);
    stream_at += n;
    return (ssize_t)n;
}

DRIVER static ssize_t to_client(const char *p, size_t n) {
    if (cut && draw(8) == 0) return fails(EINTR);
    if (cut && draw(2)) n = draw((uint32_t)n) + 1;
    CLAIM(replies_len[run] + n <= sizeof replies[run]);
    memcpy(replies[run] + replies_len[run], p, n);
    replies_len[run] += n;
    return (ssize_t)n;
}

DRIVER static void expand(const uint8_t *data, size_t size) {
    stream_len = 0;
    for (size_t i = 0; i < size; i++) {
        size_t n = data[i] == 0xfe && i + 1 < size ? 300 * (size_t)data[++i] : 0;
        if (stream_len + n + 1 > sizeof stream) break;
        if (n > 0) memset(stream + stream_len, 'x', n);
        else stream[stream_len] = (char)data[i];
        stream_len += n > 0 ? n : 1;
    }
}

DRIVER int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 3) return 0;
    size_t failure = data[1] == '0' ? 0 : data[1];
    expand(data + 3, size - 3);
    for (run = 0; run < 2; run++) {
        if (run == 0 && failure) continue;
        cut = run ? data[0] | 256 : 0;
        last_errno = data[2] % 4 == 1 ? EAGAIN : data[2] % 4 == 2 ? ECONNRESET : 0;
        until_failure = failure;
        stream_at = replies_len[run] = 0;
        wall_ms = 1700000000000;
        wall_step = data[2] >> 6;
        strcpy(password, data[2] & 32 ? "p" : ""); /* then AUTH is needed */
        connected = 1;
        conn_main(NULL);
        until_failure = 0;
        for (long i = 0; i < opt.shards; i++) {
            check_table(&shards[i].table);
        }
        for (long i = 0; i < opt.shards; i++) table_free(&shards[i].table);
        CLAIM(block_count == 0); /* nothing is left */
        forget();
    }
    if (failure || last_errno == ECONNRESET) return 0;
    if (replies_len[0] && memmem(replies[0], replies_len[0], "total_commands", 14))
        return 0;
    CLAIM(replies_len[0] == replies_len[1]);
    CLAIM(!memcmp(replies[0], replies[1], replies_len[0]));
    return 0;
}
