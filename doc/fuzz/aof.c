/* An append-only file. The input's first byte says which:

   '=': the rest is the file; where it says #CRC32C:xxxxxxxx the right sum is put in. kv
   loads it or ends. What it has loaded, it loads again, and also when it logs it itself.
   Else: the rest is requests, from behind byte 3; what they log is the file. byte 1 says
   how many are run together and how time moves. Then one thing happens, by byte 0: the
   file is cut, or a byte of it changed (bytes 2 and 3 say where), or memory runs out or
   the disk fails earlier. What is loaded from it must be what was there at the end of the
   last batch before that, unless the file is refused; and a change must not pass for a
   file cut short. */
#include "system.h"

enum { NOTHING, CUT, FLIP, CHANGE, NO_MEMORY_READING, NO_MEMORY_WRITING, DISK_FAILS };

static const char *requests;
static size_t requests_len, requests_at, together;

static size_t ends[1 << 12]; /* of batches; the state and the time there */
static uint64_t states[1 << 12];
static int64_t times[1 << 12];
static size_t batches;

/* A sum over what lives at a moment, which does not depend on the order. */
DRIVER static uint64_t state(int64_t at_ms) {
    uint64_t sum = 0;
    for (struct shard *s = shards; s < shards + opt.shards; s++) {
        struct table *t = &s->table;
        check_table(t);
        for (size_t i = 0; i < t->size; i++)
            for (struct entry *e = t->buckets[i]; e; e = e->next) {
                if (e->slot && t->heap[e->slot].when <= at_ms) continue;
                uint64_t h = hash_bytes((struct slice){e->data, e->klen + e->vlen});
                h ^= e->slot ? (uint64_t)t->heap[e->slot].when * 1000003 : 0;
                sum += (h ^ (uint64_t)e->klen << 48) * 0x9e3779b97f4a7c15;
            }
    }
    return sum;
}

/* All that was logged is in the file. */
DRIVER static void end_batch(void) {
    CLAIM(batches < sizeof ends / sizeof *ends);
    CLAIM(atomic_load(&aof.safe) == aof.end && aof.gathered.len + aof.batch.len == 0);
    ends[batches] = file_len;
    times[batches] = wall_ms;
    states[batches++] = state(wall_ms);
}

/* Gives some lines at a time. Meanwhile the expiry thread may try a bad disk again. */
DRIVER static ssize_t from_client(char *to, size_t room, int flags) {
    const char *from = requests + requests_at, *p = from;
    size_t left = requests_len - requests_at, n = 0;
    (void)flags;
    CLAIM(locks == 0);
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
    CLAIM(locks == 0);
    if (!atomic_load(&disk_bad)) end_batch();
    return (ssize_t)n;
}

/* Writes what is left, as main does at the end. */
DRIVER static void close_log(void) {
    atomic_store(&disk_bad, false);
    CLAIM(aof_commit(aof.end));
    must(fsync(aof_fd) == 0, "fsync");
}

/* Runs the requests from an empty file on and leaves in file what kv writes. Returns
   false if kv ends. */
DRIVER static bool write_file(void) {
    forget();
    batches = 0;
    file_len = 18;
    memcpy(file, "#CRC32C:00000000\r\n", 18);
    if (setjmp(at_exit)) return false;
    aof_fd = 1000;
    end_batch();
    connected = 1;
    conn_main(NULL);
    chance = 0;
    close_log();
    end_batch();
    free_tables();
    return true;
}

/* Loads the file into empty tables. Returns how much of it was good, or -1 if kv ends. */
DRIVER static long load(void) {
    forget();
    if (setjmp(at_exit)) return -1;
    aof_open();
    CLAIM(locks == 0);
    return (long)good_len;
}

/* Loads a file that must be good from end to end and leave this state. */
DRIVER static void load_good(uint64_t expected) {
    bool sealed;
    forget();
    if (setjmp(at_exit)) CLAIM(!"it is good");
    aof_fd = -2;
    opt.max_value = 1 << 29;
    char *map = sys_mmap(file_len);
    CLAIM(replay(map, file_len, &sealed) == file_len && sealed);
    CLAIM(state(0) == expected && locks == 0);
    sys_free(map);
    aof_fd = 1000;
}

/* Runs a request as if it had come in RESP. */
DRIVER static void run_words(struct conn *c, size_t n, const struct slice *words) {
    c->argc = c->bytes = c->words.len = c->in.len = c->pos = c->out.len = 0;
    buf_header(&c->in, 0, '*', n);
    for (size_t i = 0; i < n; i++) {
        buf_header(&c->in, c->in.len, '$', words[i].len);
        buf_add(&c->in, words[i].p, words[i].len);
        buf_add(&c->in, "\r\n", 2);
    }
    CLAIM(take_array(c) && run_request(c));
}

/* What is loaded is loaded again, as the file is now, and as kv logs it itself. */
DRIVER static void log_again(void) {
    uint64_t was = state(0);
    struct slice words[5];
    struct conn c = {.resp = true, .authed = true};
    struct table old[2];
    char ms[24] = "";
    load_good(was);
    wall_ms = wall_step = 0;
    for (int i = 0; i < 2; i++) {
        old[i] = shards[i].table;
        shards[i].table = (struct table){0};
    }
    run_words(&c, 1, (struct slice[]){str("FLUSHALL")});
    for (struct table *t = old; t < old + 2; t++)
        for (size_t i = 0; i < t->size; i++)
            for (struct entry *e = t->buckets[i]; e; e = e->next) {
                words[0] = str("SET");
                words[1] = (struct slice){e->data, e->klen};
                words[2] = entry_value(e);
                words[3] = str("PXAT");
                if (e->slot) sprintf(ms, "%" PRId64, t->heap[e->slot].when);
                words[4] = str(ms);
                run_words(&c, e->slot ? 5 : 3, words);
            }
    CLAIM(state(0) == was);
    close_log();
    sys_free(c.in.p);
    sys_free(c.words.p);
    sys_free(c.out.p);
    for (int i = 0; i < 2; i++) table_free(&old[i]);
    free_tables();
    load_good(was);
    free_tables();
}

/* Puts the right sums into lines that ask for one. */
DRIVER static void fill_in_sums(void) {
    char sum[9];
    size_t start = 0;
    for (size_t i = 0; i + 18 <= file_len; i++) {
        if (file[i] != '#' || memcmp(file + i, "#CRC32C:", 8)) continue;
        if (memcmp(file + i + 16, "\r\n", 2)) continue;
        sprintf(sum, "%08x", crc32c(file + start, i - start));
        if (!memcmp(file + i + 8, "xxxxxxxx", 8)) memcpy(file + i + 8, sum, 8);
        start = i + 18;
        i += 17;
    }
}

/* Any file. What is cut off once is cut off for good. */
DRIVER static void read_any(const uint8_t *data, size_t size) {
    memcpy(file, data, size);
    file_len = size;
    fill_in_sums();
    if (load() >= 0) log_again();
}

/* A file that kv wrote, and what happens to it. */
DRIVER static void read_own(int what, int how, size_t at, bool mimics) {
    size_t last_line = file_len - 18, good_batches = 0;
    if (what == NO_MEMORY_READING) until_failure = at % 64 + 1;
    at = what == CUT || what == FLIP || what == CHANGE ? at % file_len : file_len;
    char was = file[at];
    if (what == CUT) file_len = at;
    if (what == FLIP) file[at] ^= (char)(1 << how % 8);
    if (what == CHANGE) file[at] = "*$#\r\n09f"[how % 8];
    if (at < file_len && file[at] == was) at = file_len;
    while (good_batches < batches && ends[good_batches] <= at) good_batches++;
    size_t expected = good_batches ? ends[good_batches - 1] : 0;
    bool changed = at < file_len;
    long good = load();
    if (what == NO_MEMORY_READING) {
        until_failure = 0;
        if (good < 0) return;
    }
    /* Before the last line a change must be found. A value can look like such a line;
       the file that is cut behind it is refused. */
    if (changed && at < last_line) CLAIM(good < 0);
    if (good < 0) CLAIM(changed || (what == CUT && mimics));
    else CLAIM(good == (long)expected);
    if (good < 0) return; /* kv has ended, with part of the bad batch in memory */
    CLAIM(state(good_batches ? times[good_batches - 1] : 0) ==
          (good_batches ? states[good_batches - 1] : 0));
    log_again();
}

DRIVER int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!crc_table[1]) load(); /* an empty file: this makes the table of sums */
    if (size < 4) return 0;
    int what = data[0] & 7, how = data[0] >> 3;
    size_t at = data[2] + 256u * data[3];
    wall_ms = 1700000000000;
    wall_step = data[1] >> 6;
    opt.fsync = data[1] & 16 ? "always" : data[1] & 8 ? "no" : "everysec";
    together = (data[1] & 7) + 1;
    if (data[0] == '=') read_any(data + 1, size - 1);
    else {
        requests = (const char *)data + 4;
        requests_len = size - 4;
        requests_at = 0;
        until_failure = what == NO_MEMORY_WRITING ? at % 256 + 1 : 0;
        chance = what == DISK_FAILS ? (uint32_t)at | 65536 : 0;
        bool written = write_file();
        until_failure = chance = 0;
        CLAIM(written || what == NO_MEMORY_WRITING);
        bool mimics = memmem(data, size, "#CRC32C:", 8) || memmem(data, size, "\\x", 2);
        if (written) read_own(what, how, at, mimics);
    }
    forget();
    return 0;
}
