/* An append-only file. The input's first byte says which:

   '=': the rest is the file; where it says #SUM:xxxxxxxxxxxxxxxx the right sum is put in.
   kv loads it or ends. What it has loaded, it loads again, and also when it logs it
   itself.
   Else: the rest is requests, from behind byte 3; what they log is the file. byte 1 says
   how many are run together and how time moves. Then one thing happens, by byte 0: the
   file is cut, or a byte of it changed (bytes 2 and 3 say where), or memory runs out or
   the disk fails earlier. What is loaded from it must be what was there at the end of the
   last batch before that, unless the file is refused; and a change must not pass for a
   file cut short.

   A file that is refused is not touched. Where kv says how to cut it, it loads after that;
   it does not say so of a file that is not kv's, or where only memory is out. */
#include "system.h"

enum {
    NOTHING,
    CUT,
    FLIP,
    CHANGE,
    NO_MEMORY_READING,
    NO_MEMORY_WRITING,
    DISK_FAILS,
    NO_COMPACTION
};

static const char *requests;
static size_t requests_len, requests_at, together;

/* What was there at the end of each batch: of what lived then, and of what lives later,
   which a load at any time up to then must leave. */
static struct batch {
    size_t end;
    int64_t time;
    uint64_t state, state_later;
} batches[1 << 12];
static size_t batch_count;

static const int64_t start_ms = 1700000000000, later_ms = 1700000005000;

/* A sum over what lives at a moment, which does not depend on the order. */
DRIVER static uint64_t state(int64_t at_ms) {
    uint64_t sum = 0;
    check_tables();
    for (struct shard *s = shards; s < shards + opt.shards; s++) {
        struct table *t = &s->table;
        for (size_t i = 0; i < t->size; i++)
            for (struct entry *e = t->buckets[i]; e; e = e->next) {
                int64_t when = deadline_of(t, e);
                struct slice both = {e->data, e->key_len + e->value_len};
                uint64_t h = siphash(table_key, both) ^ (uint64_t)e->key_len << 48;
                h ^= (uint64_t)when * 1000003;
                if (when > at_ms) sum += h * 0x9e3779b97f4a7c15;
            }
    }
    return sum;
}

/* All that was logged is in the file. */
DRIVER static void batch_is_written(void) {
    CLAIM(batch_count < sizeof batches / sizeof *batches);
    CLAIM(aof.safe == aof.end && aof.gathered.len + aof.batch.len == 0);
    batches[batch_count++] =
        (struct batch){file->len, wall_ms, state(wall_ms), state(later_ms)};
}

/* Gives some lines at a time. Meanwhile the expiry thread may try a bad disk again. */
DRIVER static ssize_t from_client(char *to, size_t room, int flags) {
    const char *from = requests + requests_at, *p = from;
    size_t left = requests_len - requests_at, n = 0;
    (void)flags;
    check_no_locks();
    if (chance && draw(2)) aof_tick();
    for (size_t i = 0; i < together && p; i++) {
        p = memchr(from + n, '\n', left - n);
        n = p ? (size_t)(p - from) + 1 : left;
    }
    if (n > room) n = room;
    memcpy(to, from, n);
    requests_at += n;
    return (ssize_t)n;
}

/* Who is answered can rely on it. */
DRIVER static ssize_t to_client(const char *p, size_t n) {
    (void)p;
    check_no_locks();
    if (aof.broken) return (ssize_t)n;
    batch_is_written();
    if (fsync_policy == FSYNC_ALWAYS) CLAIM(file->synced == file->len);
    return (ssize_t)n;
}

/* Runs the requests from an empty file on and leaves in file what kv writes. Whatever
   fails, kv lives. */
DRIVER static void write_file(void) {
    forget();
    if (setjmp(at_exit)) CLAIM(!"kv lives");
    batch_count = 0;
    file->len = file->synced = SUM_LINE;
    format_sum_line(file->p, str(""));
    aof.fd = fd_of_file();
    batch_is_written();
    clients = threads = 1;
    conn_main(NULL);
    until_failure = chance = 0;
    CLAIM(aof_write_all());
    batch_is_written();
    CLAIM(aof_close() && file->synced == file->len);
    free_tables();
}

/* Loads the file into empty tables. Returns false if kv ends: then nothing has changed,
   unless that is by a crash behind a compaction. */
DRIVER static bool load(size_t crash) {
    static struct file was;
    const struct file *the_same = file;
    was.len = file->len;
    memcpy(was.p, file->p, file->len);
    forget();
    name_synced = false;
    until_crash = crash;
    if (setjmp(at_exit)) {
        if (file != the_same) CLAIM(crash > 0);
        else CLAIM(file->len == was.len && !memcmp(file->p, was.p, was.len));
        return false;
    }
    aof_open();
    until_crash = 0;
    CLAIM(held_count == 0 && name_synced && file->synced == file->len);
    return true;
}

/* Where kv says that the file is to be cut; -1: it does not say so. */
DRIVER static long advice(void) {
    const char *p = strstr(logged, "truncate -s ");
    return p ? atol(p + strlen("truncate -s ")) : -1;
}

/* Loads a file that must be good from end to end and leave this state. */
DRIVER static void load_good(uint64_t expected) {
    size_t len = file->len;
    CLAIM(load(0) && good_len == len);
    CLAIM(state(0) == expected);
}

/* Runs a request as if it had come in RESP. */
DRIVER static void run_words(struct conn *c, size_t n, const struct slice *words) {
    c->argc = c->in.len = c->pos = c->out.len = 0;
    buf_add_header(&c->in, '*', n);
    for (size_t i = 0; i < n; i++) {
        buf_add_header(&c->in, '$', words[i].len);
        buf_add(&c->in, words[i].p, words[i].len);
        buf_add_text(&c->in, "\r\n");
    }
    CLAIM(take_array(c) == COMPLETE && run_request(c));
}

/* What is loaded is loaded again, as the file is now, and as kv logs it itself. */
DRIVER static void log_again(void) {
    struct conn c = {.resp = true, .max_bytes = SIZE_MAX / 2, .max_words = MAX_WORDS};
    struct slice flush = str("FLUSHALL");
    struct table old[2];
    char ms[24];
    wall_step = 0;
    uint64_t was = state(wall_ms);
    load_good(was);
    const struct file *compact = file;
    load_good(was);
    CLAIM(file == compact); /* once was enough */
    for (int i = 0; i < 2; i++) {
        old[i] = shards[i].table;
        shards[i].table = (struct table){0};
    }
    c.authed = true;
    run_words(&c, 1, &flush);
    for (struct table *t = old; t < old + 2; t++)
        for (size_t i = 0; i < t->size; i++)
            for (struct entry *e = t->buckets[i]; e; e = e->next) {
                sprintf(ms, "%" PRId64, deadline_of(t, e));
                struct slice words[] = {str("SET"),
                                        {e->data, e->key_len},
                                        entry_value(e),
                                        str("PXAT"),
                                        str(ms)};
                run_words(&c, e->slot ? 5 : 3, words);
            }
    CLAIM(state(0) == was && aof_close());
    sys_free(c.in.p);
    sys_free(c.argv);
    sys_free(c.out.p);
    for (int i = 0; i < 2; i++) table_free(&old[i]);
    free_tables();
    load_good(was);
    free_tables();
}

/* Puts the right sums into lines that ask for one. */
DRIVER static void fill_in_sums(void) {
    char line[SUM_LINE + 1];
    size_t start = 0;
    for (size_t i = 0; i + SUM_LINE <= file->len; i++) {
        char *p = file->p + i;
        if (memcmp(p, "#SUM:", 5) || memcmp(p + 21, "\r\n", 2)) continue;
        format_sum_line(line, (struct slice){file->p + start, i - start});
        if (!memcmp(p + 5, "xxxxxxxxxxxxxxxx", 16)) memcpy(p, line, SUM_LINE);
        i += SUM_LINE - 1;
        start = i + 1;
    }
}

/* Any file. Redis's own, which does not begin with a checksum, is refused. */
DRIVER static void read_any(const uint8_t *data, size_t size) {
    char header[SUM_LINE + 1];
    memcpy(file->p, data, size);
    file->len = size;
    fill_in_sums();
    format_sum_line(header, str(""));
    bool is_kvs = !memcmp(file->p, header, size < SUM_LINE ? size : SUM_LINE);
    bool ok = load(0);
    CLAIM(is_kvs || (!ok && advice() < 0));
    if (!ok && advice() >= 0) {
        file->len = (size_t)advice();
        ok = load(0);
        CLAIM(ok);
    }
    if (ok) log_again();
}

/* Loads the file at the time of its last good batch, where the clock stands or moves, or
   later. */
DRIVER static bool load_at(const struct batch *b, bool late, size_t crash) {
    if (!late) wall_step = 0;
    wall_ms = late && wall_step == 0 ? later_ms : b->time;
    good_len = 0;
    return load(crash);
}

/* A file that kv wrote, and what happens to it. */
DRIVER static void read_own(int what, int how, size_t at, bool late, bool mimics) {
    static const struct batch nothing = {.time = start_ms};
    const struct batch *b = &nothing;
    size_t last_line = file->len - SUM_LINE, crash = 0;
    if (what == NO_MEMORY_READING) until_failure = at % 64 + 1;
    if (what == NO_COMPACTION && how & 1) chance = (uint32_t)at | 65536;
    else if (what == NO_COMPACTION) crash = at % 8 + 1;
    at = what == CUT || what == FLIP || what == CHANGE ? at % file->len : file->len;
    char was = file->p[at];
    if (what == CUT) file->len = at;
    if (what == FLIP) file->p[at] ^= (char)(1 << how % 8);
    if (what == CHANGE) file->p[at] = "*$#\r\n09f"[how % 8];
    if (at < file->len && file->p[at] == was) at = file->len;
    bool changed = at < file->len;
    for (size_t i = 0; i < batch_count; i++)
        if (batches[i].end <= at) b = &batches[i];
    bool ok = load_at(b, late, crash);
    until_failure = chance = 0;
    if (!ok && what == NO_MEMORY_READING) {
        CLAIM(strcasestr(logged, "memory") && advice() < 0);
        return;
    }
    if (!ok && crash > 0) ok = load_at(b, late, 0);
    else CLAIM(!ok || good_len == b->end);
    /* Before the last line a change must be found. A value can look like such a line;
       the file that is cut behind it is refused. */
    if (changed && at < last_line) CLAIM(!ok);
    if (!ok) {
        CLAIM(changed || (what == CUT && mimics));
        CLAIM(advice() == (b->end ? (long)b->end : -1));
        if (b->end == 0) return;
        file->len = b->end;
        ok = load_at(b, late, 0);
        CLAIM(ok);
    }
    if (!late) CLAIM(state(0) == b->state);
    if (wall_ms <= later_ms) CLAIM(state(later_ms) == b->state_later);
    log_again();
}

DRIVER int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 4) return 0;
    int what = data[0] & 7, how = data[0] >> 3;
    size_t at = data[2] + 256u * data[3];
    wall_ms = start_ms;
    wall_step = data[0] == '=' ? 0 : data[1] >> 6;
    stays_out = how & 1;
    fsync_policy = data[1] & 16 ? FSYNC_ALWAYS : data[1] & 8 ? FSYNC_NO : FSYNC_EVERYSEC;
    opt.max_request = 4000;
    together = (size_t)1 << (data[1] & 7);
    if (data[0] == '=') read_any(data + 1, size - 1);
    else {
        requests = (const char *)data + 4;
        requests_len = size - 4;
        requests_at = 0;
        until_failure = what == NO_MEMORY_WRITING ? at % 64 + 1 : 0;
        chance = what == DISK_FAILS ? (uint32_t)at | 65536 : 0;
        write_file();
        opt.max_request = 64; /* what was logged loads all the same */
        bool mimics = memmem(data, size, "#SUM:", 5) || memmem(data, size, "\\x", 2);
        read_own(what, how, at, data[1] & 32, mimics);
    }
    forget();
    return 0;
}
