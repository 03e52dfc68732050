/* kv: a key-value server in one file, made to be read from top to bottom.
 *
 * === 0 The map ======================================================================
 *
 * People talk to kv in lines of text over TCP; it keeps keys and values in memory:
 *
 *     $ nc localhost 8080
 *     SET greeting "hello world"
 *     OK
 *     GET greeting
 *     hello world
 *
 *      clients             threads                                memory
 *
 *     nc, telnet  ----->  main: accepts, starts a thread       +-- shard 0 ---------+
 *     a script            for each connection, and waits       | lock  table  heap  |
 *                         for SIGTERM                          +-- shard 1 ---------+
 *     one client  <---->  connection thread:            ---->  | lock  table  heap  |
 *     one client  <---->    read, split into words,     ---->  +-- ... -------------+
 *     one client  <---->    run the command, reply      ---->  | lock  table  heap  |
 *                                                              +-- shard 255 -------+
 *                         expiry thread: removes what             ^
 *                         has passed its deadline  ---------------+
 *
 * A key belongs to the shard that its hash names. A shard is a hash table (key to value)
 * and a heap (what expires next), and one mutex that guards both: two connections wait
 * for each other only when their keys share a shard.
 *
 * Lock order. A thread holds at most one shard lock; FLUSHALL is the exception and takes
 * all of them in the order of their numbers. The lock of the list of clients is never
 * held together with a shard lock. Nothing that may block (a read, a send, a sleep) is
 * done under a lock. A lock or unlock of a healthy mutex cannot fail, so these calls
 * alone go unchecked.
 *
 * The sections build on each other and each has a chapter of its number in doc/:
 *   1 Options and log   2 Buffers    3 Requests   4 Replies       5 Hashing
 *   6 The table         7 Expiry     8 Commands   9 Connections   11 The server
 */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdalign.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define KV_VERSION "0.1.0"

/* The compiler checks the f-th argument, a format, against those behind it. */
#define PRINTF_LIKE(f) __attribute__((format(printf, f, (f) + 1)))

/* Sizes in bytes, but for MAX_WORDS. MAX_SHOWN is how much of a client's word an error or
   the log repeats; SMALL_BUF what a connection's buffers begin with and shrink back to;
   replies are sent when IO_CHUNK of them have gathered. Of a stack, memory is only what a
   thread has touched. */
enum {
    MAX_WORDS = 1024,
    MAX_SHOWN = 64,
    SMALL_BUF = 1024,
    IO_CHUNK = 65536,
    STACK_SIZE = 65536
};

/* The expiry thread looks every EXPIRY_TICK and removes up to EXPIRY_BATCH entries per lock;
   KEYS looks at WALK_BUCKETS per lock. After SIGTERM clients have STOP_GRACE to take their
   replies, and LINGER to read why they are closed. Times are in ms. */
enum {
    EXPIRY_TICK = 100,
    EXPIRY_BATCH = 128,
    WALK_BUCKETS = 64,
    STOP_GRACE = 2000,
    LINGER = 1000
};

/* Some bytes that belong to somebody else: a word of a request, a key, a value. */
struct slice {
    char *p;
    size_t len;
};

/* Bytes that grow at the end. Owns p. Once memory was out, failed stays set and nothing is
   added any more, so who fills a buffer need check only once, at the end. */
struct buf {
    char *p;
    size_t len, cap;
    bool failed;
};

/* One connection; it lives on the stack of its thread and no other thread sees it. */
struct conn {
    int fd;
    bool crlf;           /* the request ended in CRLF, so its reply does */
    bool skipping;       /* inside a line that is too long, up to its newline */
    bool broken;         /* nothing more can be sent */
    const char *closing; /* why to close as soon as the replies are out, or NULL */
    struct buf in, out;  /* what was read and not yet run, replies not yet sent */
    size_t pos, scanned; /* in: where the next request starts; how far it was searched */
    const struct command *cmd; /* the command that runs, and, where it works on a key: */
    struct slice key;
    struct shard *shard; /* the key's shard, locked */
    struct entry **link; /* the link that holds its entry, or the NULL where it belongs */
    uint32_t hash;       /* what the table knows of its hash */
    size_t argc;
    struct slice argv[MAX_WORDS]; /* the request's words; they point into in */
};

/* A string to return by value. */
struct text {
    char text[4 * MAX_SHOWN + 8];
};

/* Counts the commands of one connection after the other, by its descriptor. Only one
   thread writes it at a time; the padding keeps others off its cache line. */
struct counter {
    atomic_ulong n;
    char padding[56];
};

static struct counter *commands_by_fd;
static long max_fds;
static atomic_long connected, connections; /* now, and ever */
static int64_t started_ns;
static atomic_int stopping; /* 0: serving; 1: answering what has arrived; 2: giving up */

/* ==================================================================================== */
/* 1 Options and log                                                                    */
/* ==================================================================================== */

static struct {
    const char *bind;
    long port, max_clients, timeout, max_memory, max_value, shards;
    long insecure, verbose, quiet, help, version;
} opt = {"127.0.0.1", 8080, 10000, 0, 0, 1 << 20, 256, 0, 0, 0, 0, 0};

/* A row says all about an option: parsing, checks and --help use it. */
static const struct option {
    char letter;
    const char *name, *arg;
    void *to; /* without arg a long that counts; with a max a long; else a const char * */
    long min, max;
    const char *help;
} options[] = {
    {'p', "port", "N", &opt.port, 0, 65535, "8080; 0: any free port"},
    {'b', "bind", "ADDR", &opt.bind, 0, 0, "127.0.0.1; IPv4, IPv6 or a host name"},
    {'c', "max-clients", "N", &opt.max_clients, 1, 1000000, "10000"},
    {'t', "timeout", "SECONDS", &opt.timeout, 0, 1000000,
     "0: never; else close the stuck"},
    {'m', "max-memory", "MB", &opt.max_memory, 0, 1 << 30,
     "0: no limit; else refuse writes"},
    {0, "max-value", "BYTES", &opt.max_value, 1, 1 << 29, "1048576; the longest word"},
    {'s', "shards", "N", &opt.shards, 1, 4096, "256; a power of two"},
    {0, "insecure", NULL, &opt.insecure, 0, 0, "serve the network openly"},
    {'v', "verbose", NULL, &opt.verbose, 0, 0, "log connections, -vv every command"},
    {'q', "quiet", NULL, &opt.quiet, 0, 0, "log only trouble"},
    {'h', "help", NULL, &opt.help, 0, 0, "print this"},
    {'V', "version", NULL, &opt.version, 0, 0, "print the version"},
    {0, NULL, NULL, NULL, 0, 0, NULL},
};

/* What a line of the log is about; -q keeps the first two, -v and -vv add the last two. */
enum level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_CLIENT, LOG_COMMAND };

static void log_line(enum level level, const char *fmt, ...) PRINTF_LIKE(2);
static _Noreturn void die(int status, const char *fmt, ...) PRINTF_LIKE(2);

static int64_t clock_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Milliseconds since 1970, for deadlines, which are moments of the wall clock. */
static int64_t now_ms(void) { return clock_ns(CLOCK_REALTIME) / 1000000; }

static bool logs(enum level level) {
    return (int)level <= (opt.quiet ? LOG_WARN : LOG_INFO + (int)opt.verbose);
}

/* Writes one line to stderr in one call, so that lines of several threads never mix. What
   does not fit is cut. */
static void log_args(enum level level, const char *fmt, va_list args) {
    static const char *const names[] = {"ERROR", "WARN", "INFO", "DEBUG", "DEBUG"};
    char line[1024];
    int64_t now = now_ms();
    struct tm tm;
    size_t n = strftime(line, sizeof line, "%Y-%m-%dT%H:%M:%S",
                        gmtime_r(&(time_t){now / 1000}, &tm));
    n += (size_t)snprintf(line + n, sizeof line - n, ".%03dZ %s ", (int)(now % 1000),
                          names[level]);
    n += (size_t)vsnprintf(line + n, sizeof line - n, fmt, args);
    if (n > sizeof line - 1) n = sizeof line - 1;
    line[n++] = '\n';
    if (write(STDERR_FILENO, line, n) < 0) return; /* nobody is left to tell */
}

static void log_line(enum level level, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    if (logs(level)) log_args(level, fmt, args);
    va_end(args);
}

/* Ends the program: status 2 for a wrong command line, 1 when something failed. */
static _Noreturn void die(int status, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    log_args(LOG_ERROR, fmt, args);
    va_end(args);
    exit(status);
}

static long parse_number(const struct option *o, const char *value) {
    char *end;
    long n = strtol(value, &end, 10);
    if (!isdigit((unsigned char)*value) || *end || n < o->min || n > o->max)
        die(2, "--%s %s: use a number from %ld to %ld", o->name, value, o->min, o->max);
    return n;
}

/* Accepts -n value, -nvalue, switches run together (-vv), --name value and --name=value. To
   getopt a word that begins with -- is the option '-' with the rest as its value. */
static void parse_options(int argc, char **argv) {
    opterr = 0;
    for (int letter; (letter = getopt(argc, argv, "p:b:c:t:m:s:vqhV-:")) != -1;) {
        const struct option *o = options;
        char *name = letter == '-' ? optarg : NULL, *value = optarg;
        size_t n = name ? strcspn(name, "=") : 0;
        while (o->name &&
               (name ? strncmp(o->name, name, n) || o->name[n] : o->letter != letter))
            o++;
        if (!o->name || (name && name[n] && !o->arg))
            die(2, "%s: no such option, or no value for it; see kv --help",
                argv[optind - 1]);
        if (name) value = name[n] ? name + n + 1 : o->arg ? argv[optind++] : NULL;
        if (o->arg && !value)
            die(2, "--%s needs a value: --%s %s", o->name, o->name, o->arg);
        if (!o->arg) ++*(long *)o->to;
        else if (o->max) *(long *)o->to = parse_number(o, value);
        else *(const char **)o->to = value;
    }
    if (argv[optind]) die(2, "%s is not an option; see kv --help", argv[optind]);
    if (opt.shards & (opt.shards - 1))
        die(2, "--shards %ld: use a power of two", opt.shards);
}

/* Returns the exit status. */
static int print_help(void) {
    puts("kv " KV_VERSION ": a key-value server; talk to it with: nc localhost 8080");
    for (const struct option *o = options; opt.help && o->name; o++)
        printf("  %c%c --%-11s %-8s %s\n", o->letter ? '-' : ' ',
               o->letter ? o->letter : ' ', o->name, o->arg ? o->arg : "", o->help);
    return fflush(stdout) != 0;
}

/* One end of a connection as text: 127.0.0.1:8080 or [::1]:8080. get is getpeername for
   the other end, getsockname for ours. */
typedef int get_name(int, struct sockaddr *, socklen_t *);
static struct text address_of(int fd, get_name *get) {
    struct text out = {"a client that is gone"};
    struct sockaddr_storage sa;
    socklen_t len = sizeof sa;
    char host[64], port[8];
    if (get(fd, (struct sockaddr *)&sa, &len) == 0 &&
        getnameinfo((struct sockaddr *)&sa, len, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV) == 0)
        snprintf(out.text, sizeof out.text, strchr(host, ':') ? "[%s]:%s" : "%s:%s", host,
                 port);
    return out;
}

/* ==================================================================================== */
/* 2 Buffers                                                                            */
/* ==================================================================================== */

/* Makes room for n more bytes and returns where they go, or NULL when memory is out.
   Doubling makes growth cost the same for each byte, however many there will be. */
static char *buf_reserve(struct buf *b, size_t n) {
    size_t cap = b->cap ? b->cap : SMALL_BUF;
    while (cap - b->len < n) cap *= 2; /* our limits keep this far from overflow */
    if (cap != b->cap && !b->failed) {
        char *p = realloc(b->p, cap);
        b->failed = !p;
        if (p) b->p = p, b->cap = cap;
    }
    return b->failed ? NULL : b->p + b->len;
}

static void buf_add(struct buf *b, const void *p, size_t n) {
    char *to = buf_reserve(b, n);
    if (!to || n == 0) return;
    memcpy(to, p, n);
    b->len += n;
}

/* Gives the memory of an empty buffer back that has grown beyond SMALL_BUF. */
static void buf_slim(struct buf *b) {
    if (b->len > 0 || b->cap <= SMALL_BUF) return;
    free(b->p);
    *b = (struct buf){.failed = b->failed};
}

/* ==================================================================================== */
/* 3 Requests                                                                           */
/* ==================================================================================== */

static bool reply_error(struct conn *c, const char *fmt, ...) PRINTF_LIKE(2);

static bool is_blank(char c) { return c == ' ' || c == '\t'; }

/* Whether a word is name, in upper or lower case. */
static bool word_is(struct slice word, const char *name) {
    return strncasecmp(word.p, name, word.len) == 0 && !name[word.len];
}

/* Reads a number of 64 bits as strictly as Redis does: it must look as we would print it,
   so no blank, plus sign or leading zero, and no overflow. */
static bool parse_int(struct slice s, int64_t *n) {
    char text[24] = "", canonical[24];
    if (s.len >= sizeof text) return false;
    memcpy(text, s.p, s.len);
    *n = strtoll(text, NULL, 10);
    int len = snprintf(canonical, sizeof canonical, "%" PRId64, *n);
    return (size_t)len == s.len && memcmp(text, canonical, s.len) == 0;
}

/* The escapes that are a letter, and what they stand for. */
static const char escape_names[] = "\"\\nrt", escape_bytes[] = "\"\\\n\r\t";

/* Decodes the escape at from to *to. Returns where it ends, or NULL if there is none. */
static char *unescape(char *from, const char *end, char *to) {
    const char *hit = end - from > 1 ? memchr(escape_names, from[1], 5) : NULL;
    if (hit) {
        *to = escape_bytes[hit - escape_names];
        return from + 2;
    }
    if (end - from < 4 || from[1] != 'x' || !isxdigit((unsigned char)from[2]) ||
        !isxdigit((unsigned char)from[3]))
        return NULL;
    *to = (char)strtol((char[]){from[2], from[3], 0}, NULL, 16);
    return from + 4;
}

/* Takes the word at *at off a line and moves *at behind it. It is decoded in place, which
   works because an escape is longer than what it stands for. Returns NULL, or what is
   wrong with the word. */
static const char *take_word(char **at, char *end, struct slice *word) {
    char *from = *at, mark = *from == '"' || *from == '\'' ? *from : 0;
    char *to = from += mark != 0;
    word->p = to;
    while (from < end && (mark ? *from != mark : !is_blank(*from))) {
        if (mark != '"' || *from != '\\') *to++ = *from++;
        else if (!(from = unescape(from, end, to++)))
            return "bad escape: in double quotes there are \\\" \\\\ \\n \\r \\t and \\xHH";
    }
    if (mark && (from == end || (++from < end && !is_blank(*from))))
        return "unbalanced quotes: a word that begins with a quote ends with one";
    word->len = (size_t)(to - word->p);
    *at = from;
    return NULL;
}

/* Splits a line into argv. Returns NULL, or what is wrong with the line. */
static const char *split_line(struct conn *c, char *at, char *end) {
    size_t total = 0, max = (size_t)opt.max_value;
    for (;; c->argc++) {
        while (at < end && is_blank(*at)) at++;
        if (at == end || (c->argc == 0 && *at == '#')) return NULL;
        if (c->argc == MAX_WORDS) return "a request of more than 1024 words is too long";
        struct slice *word = &c->argv[c->argc];
        const char *wrong = take_word(&at, end, word);
        if (wrong) return wrong;
        if (word->len > max) return "a word over --max-value is too long";
        total += word->len;
        if (total > 2 * max + IO_CHUNK)
            return "a request over 2 x --max-value + 64 KiB is too long";
    }
}

/* Takes the next request off the input; its words stay valid until the next read. Returns
   false when it has not arrived in full. True with argc 0: there is nothing to run, for the
   line was empty, or it was wrong and has been answered. */
static bool next_request(struct conn *c) {
    size_t limit = 4 * (size_t)opt.max_value + IO_CHUNK, n = c->in.len - c->pos;
    char *line = c->in.p + c->pos;
    c->argc = 0;
    if (n > 0 && !c->skipping && *line == '\xff') c->closing = "interrupted by telnet";
    if (n == 0 || c->closing) return false;
    char *newline = memchr(line + c->scanned, '\n', n - c->scanned);
    if (!newline &&
        n > limit + 1) { /* too long, even if the last byte is the CR of a CRLF */
        c->skipping = true;
        c->pos = c->in.len - 1; /* keep that byte */
        n = 1;
    }
    c->scanned = newline ? 0 : n;
    if (!newline) return false;
    c->pos += (size_t)(newline - line) + 1;
    c->crlf = newline > line && newline[-1] == '\r';
    newline -= c->crlf;
    const char *wrong = c->skipping || (size_t)(newline - line) > limit
                            ? "a line over 4 x --max-value + 64 KiB is too long"
                            : split_line(c, line, newline);
    c->skipping = false;
    if (wrong) c->argc = 0, reply_error(c, "ERR %s", wrong);
    return true;
}

/* ==================================================================================== */
/* 4 Replies                                                                            */
/* ==================================================================================== */

/* Whether s can stand in a reply as it is, so that nobody takes it for an error, the end of
   a list, a quoted value or more than one line. As a word it must also come back from
   take_word unchanged. */
static bool is_bare(struct slice s, bool as_word) {
    if (s.len == 0 || strchr("\"( ", s.p[0]) || s.p[s.len - 1] == ' ') return false;
    if (as_word && (s.p[0] == '\'' || memchr(s.p, ' ', s.len))) return false;
    for (size_t i = 0; i < s.len; i++)
        if ((unsigned char)s.p[i] < 0x20 || s.p[i] == 0x7f) return false;
    return true;
}

/* Writes s as a double-quoted word to to, which has room for 4 * s.len + 3 bytes. Returns
   how many it wrote. A double quote becomes \x22, which bash's printf %b knows. */
static size_t quote(char *to, struct slice s) {
    char *start = to;
    *to++ = '"';
    for (size_t i = 0; i < s.len; i++) {
        unsigned char b = (unsigned char)s.p[i];
        const char *hit = memchr(escape_bytes + 1, b, 4);
        if (hit) to += sprintf(to, "\\%c", escape_names[hit - escape_bytes]);
        else if (b < 0x20 || b == 0x7f || b == '"') to += sprintf(to, "\\x%02x", b);
        else *to++ = (char)b;
    }
    *to++ = '"';
    return (size_t)(to - start);
}

/* What an error or the log repeats of a client's word: quoted where needed, and cut. */
static struct text show(struct slice word) {
    struct text out;
    struct slice cut = {word.p, word.len < MAX_SHOWN ? word.len : MAX_SHOWN};
    if (!is_bare(cut, true)) cut.len = quote(out.text, cut);
    else memcpy(out.text, cut.p, cut.len);
    strcpy(out.text + cut.len, word.len > MAX_SHOWN ? "..." : "");
    return out;
}

static bool reply_line(struct conn *c, const char *prefix, const void *p, size_t n) {
    buf_add(&c->out, prefix, strlen(prefix));
    buf_add(&c->out, p, n);
    buf_add(&c->out, c->crlf ? "\r\n" : "\n", c->crlf ? 2 : 1);
    return true;
}

/* Replies return true, but for errors, so that a command can end with return reply_x(). */
static bool reply_status(struct conn *c, const char *s) {
    return reply_line(c, s, NULL, 0);
}

static bool reply_nil(struct conn *c) { return reply_line(c, "(nil)", NULL, 0); }

/* The message begins with a code word, mostly ERR. Returns false. */
static bool reply_error(struct conn *c, const char *fmt, ...) {
    char text[1024];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    return !reply_line(c, "(error) ", text, strlen(text));
}

static bool reply_int(struct conn *c, int64_t n) {
    char text[24];
    return reply_line(c, "", text, (size_t)snprintf(text, sizeof text, "%" PRId64, n));
}

/* A value: bare, or quoted where that could be misread. */
static bool reply_bytes(struct conn *c, struct slice s, bool as_word) {
    if (is_bare(s, as_word)) return reply_line(c, "", s.p, s.len);
    char *to = buf_reserve(&c->out, 4 * s.len + 3);
    if (to) c->out.len += quote(to, s);
    return reply_line(c, "", NULL, 0);
}

static bool reply_value(struct conn *c, struct slice s) {
    return reply_bytes(c, s, false);
}

/* Ends a reply of n values. */
static bool reply_list(struct conn *c, size_t n, const char *noun) {
    char text[64];
    snprintf(text, sizeof text, "(%zu %s%s)", n, noun, n == 1 ? "" : "s");
    return reply_status(c, text);
}

/* ==================================================================================== */
/* 5 Hashing                                                                            */
/* ==================================================================================== */

static uint64_t hash_seed[2];

/* Draws the seed. Who does not know it cannot choose keys that collide. */
static void hash_init(void) {
    int fd = open("/dev/urandom", O_RDONLY);
    if (fd < 0 || read(fd, hash_seed, sizeof hash_seed) != sizeof hash_seed)
        die(1, "cannot read a hash seed from /dev/urandom: %s", strerror(errno));
    close(fd);
}

static uint64_t rotate(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

static void sip_round(uint64_t v[4]) {
    v[0] += v[1];
    v[2] += v[3];
    v[1] = rotate(v[1], 13) ^ v[0];
    v[3] = rotate(v[3], 16) ^ v[2];
    v[0] = rotate(v[0], 32) + v[3];
    v[2] += v[1];
    v[3] = rotate(v[3], 21) ^ v[0];
    v[1] = rotate(v[1], 17) ^ v[2];
    v[2] = rotate(v[2], 32);
}

/* SipHash-1-3 (Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012): one
   round per eight bytes and three at the end. Words are loaded in the machine's own byte
   order; the result never leaves the process. */
static uint64_t hash_bytes(struct slice s) {
    uint64_t v[4] = {hash_seed[0] ^ 0x736f6d6570736575, hash_seed[1] ^ 0x646f72616e646f6d,
                     hash_seed[0] ^ 0x6c7967656e657261,
                     hash_seed[1] ^ 0x7465646279746573};
    for (size_t at = 0; at <= s.len; at += 8) { /* the last word is short or empty */
        uint64_t word = 0;
        size_t n = s.len - at < 8 ? s.len - at : 8;
        if (n > 0) memcpy(&word, s.p + at, n);
        if (n < 8) word |= (uint64_t)s.len << 56;
        v[3] ^= word;
        sip_round(v);
        v[0] ^= word;
    }
    v[2] ^= 0xff;
    for (int i = 0; i < 3; i++) sip_round(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* ==================================================================================== */
/* 6 The table                                                                          */
/* ==================================================================================== */

enum { MIN_BITS = 4, NO_SLOT = -1 };

/* A key and its value in one allocation, 24 bytes before the data. Its deadline, which
   few keys have, stands in the heap. */
struct entry {
    struct entry *next; /* in the same bucket */
    uint32_t hash;
    int32_t slot; /* where in the heap its deadline is, or NO_SLOT */
    uint32_t klen, vlen;
    char data[]; /* the key, then the value */
};

/* Buckets stand in the order of the hash: bucket i of 2^bits holds the hashes whose upper
   bits are i. So a walk by ascending hash can pause, and a table that doubles or halves
   meanwhile makes it neither miss an entry nor see one twice. All zero is an empty table. */
struct table {
    struct entry **buckets;
    int bits;
    size_t count;
    struct deadline {
        int64_t when; /* ms since 1970 */
        struct entry *entry;
    } * heap; /* heap[0] expires next */
    size_t heap_len, heap_cap;
    size_t bytes; /* in entries, buckets and heap, before malloc's own overhead */
};

/* A request counts what it does under the lock that it holds anyway: that costs nothing. */
static struct shard {
    alignas(64) pthread_mutex_t lock; /* a cache line of its own */
    struct table table;
    uint64_t hits, misses, expired;
} * shards;
static atomic_size_t used_memory; /* the sum of bytes; stays 0 without --max-memory */

static void deadline_clear(struct table *t, struct entry *e);
static bool has_expired(const struct table *t, const struct entry *e);

static struct slice entry_value(struct entry *e) {
    return (struct slice){e->data + e->klen, e->vlen};
}

/* Keeps the books: what took was bytes takes now bytes. The difference may wrap around;
   so does the sum, back again. */
static void account(struct table *t, size_t was, size_t now) {
    t->bytes += now - was;
    if (opt.max_memory) atomic_fetch_add(&used_memory, now - was);
}

static struct entry **bucket_of(const struct table *t, uint32_t hash) {
    return &t->buckets[hash >> (32 - t->bits)];
}

/* Moves the entries to 2^bits buckets. Without memory the table stays as it is, which
   costs speed and nothing else. */
static void table_resize(struct table *t, int bits) {
    struct table to = *t;
    to.bits = bits;
    to.buckets = calloc((size_t)1 << bits, sizeof *to.buckets);
    if (!to.buckets) return;
    for (size_t i = 0; t->buckets && i < (size_t)1 << t->bits; i++)
        for (struct entry *e = t->buckets[i], *next; e; e = next) {
            struct entry **link = bucket_of(&to, e->hash);
            next = e->next;
            e->next = *link;
            *link = e;
        }
    account(&to, t->buckets ? sizeof *to.buckets << t->bits : 0,
            sizeof *to.buckets << bits);
    free(t->buckets);
    *t = to;
}

/* Takes the entry at *link out and frees it. The table may shrink: links into it are stale
   then. */
static void table_remove(struct table *t, struct entry **link) {
    struct entry *e = *link;
    deadline_clear(t, e);
    *link = e->next;
    account(t, sizeof *e + e->klen + e->vlen, 0);
    free(e);
    if (--t->count < (size_t)1 << t->bits >> 3 && t->bits > MIN_BITS)
        table_resize(t, t->bits - 1);
}

/* Returns the link that points to the live entry of key, or the NULL at the end of its
   bucket; NULL itself when memory is out. What is past its deadline is removed. */
static struct entry **table_find(struct shard *s, uint32_t hash, struct slice key) {
    if (!s->table.buckets) table_resize(&s->table, MIN_BITS);
    if (!s->table.buckets) return NULL;
    struct entry **link = bucket_of(&s->table, hash), *e;
    while ((e = *link) && (e->hash != hash || e->klen != key.len ||
                           memcmp(e->data, key.p, key.len) != 0))
        link = &e->next;
    if (!e || !has_expired(&s->table, e)) return link;
    table_remove(&s->table, link);
    s->expired++;
    return table_find(s, hash, key);
}

/* Stores value under key at the link that table_find returned. An entry that was there
   keeps its deadline. Returns the entry, or NULL when memory is out: then nothing has
   changed. Links into the table are stale afterwards. */
static struct entry *table_store(struct table *t, struct entry **link, uint32_t hash,
                                 struct slice key, struct slice value) {
    struct entry *old = *link, *e = old;
    size_t was = old ? sizeof *e + e->klen + e->vlen : 0,
           now = sizeof *e + key.len + value.len;
    if (was != now && !(e = realloc(old, now))) return NULL;
    if (!old) {
        *e = (struct entry){NULL, hash, NO_SLOT, (uint32_t)key.len, 0};
        memcpy(e->data, key.p, key.len);
        t->count++;
    }
    if (e->slot != NO_SLOT) t->heap[e->slot].entry = e;
    *link = e;
    e->vlen = (uint32_t)value.len;
    memmove(e->data + e->klen, value.p, value.len); /* may be the value it has */
    account(t, was, now);
    if (t->count > (size_t)2 << t->bits && t->bits < 32) table_resize(t, t->bits + 1);
    return e;
}

/* Frees all that t owns. Nobody else may know of it any more. */
static void table_free(struct table *t) {
    for (size_t i = 0; t->buckets && i < (size_t)1 << t->bits; i++)
        for (struct entry *e; (e = t->buckets[i]); free(e)) t->buckets[i] = e->next;
    account(t, t->bytes, 0);
    free(t->buckets);
    free(t->heap);
}

/* Appends the keys of the next few buckets to out, each behind its length, and moves *hash
   on. Locks the shard for WALK_BUCKETS buckets or IO_CHUNK bytes. Returns false when there
   was nothing left to see. */
static bool walk(struct shard *s, uint64_t *hash, struct buf *out) {
    if (*hash > UINT32_MAX) return false;
    pthread_mutex_lock(&s->lock);
    struct table *t = &s->table;
    if (!t->buckets) *hash = UINT64_MAX;
    for (int i = 0; i < WALK_BUCKETS && *hash <= UINT32_MAX && out->len < IO_CHUNK; i++) {
        for (struct entry *e = *bucket_of(t, (uint32_t)*hash); e; e = e->next) {
            if (e->hash < *hash || has_expired(t, e)) continue;
            buf_add(out, &e->klen, sizeof e->klen);
            buf_add(out, e->data, e->klen);
        }
        *hash = ((*hash >> (32 - t->bits)) + 1) << (32 - t->bits);
    }
    pthread_mutex_unlock(&s->lock);
    return true;
}

/* ==================================================================================== */
/* 7 Expiry                                                                             */
/* ==================================================================================== */

/* What may stand for a deadline: the one that an entry has, or none. */
enum { KEEP = -1, NEVER = -2 };

static int64_t deadline_of(const struct table *t, const struct entry *e) {
    return e->slot == NO_SLOT ? NEVER : t->heap[e->slot].when;
}

static bool has_expired(const struct table *t, const struct entry *e) {
    return e->slot != NO_SLOT && deadline_of(t, e) <= now_ms();
}

/* Puts d where it belongs in the heap, from the free place i on: parents that expire later
   move down, or else children that expire sooner move up. */
static void heap_sift(struct table *t, size_t i, struct deadline d) {
    struct deadline *heap = t->heap;
    for (size_t up; i > 0 && heap[up = (i - 1) / 2].when > d.when; i = up) {
        heap[i] = heap[up];
        heap[i].entry->slot = (int32_t)i;
    }
    for (size_t down; (down = 2 * i + 1) < t->heap_len; i = down) {
        if (down + 1 < t->heap_len && heap[down + 1].when < heap[down].when) down++;
        if (heap[down].when >= d.when) break;
        heap[i] = heap[down];
        heap[i].entry->slot = (int32_t)i;
    }
    heap[i] = d;
    d.entry->slot = (int32_t)i;
}

/* Makes the heap's capacity cap. Returns false when memory is out. */
static bool heap_resize(struct table *t, size_t cap) {
    struct deadline *heap = realloc(t->heap, cap * sizeof *heap);
    if (!heap) return false;
    account(t, t->heap_cap * sizeof *heap, cap * sizeof *heap);
    t->heap = heap;
    t->heap_cap = cap;
    return true;
}

/* Makes room for one more deadline. A quarter more at a time wastes little. */
static bool heap_reserve(struct table *t) {
    return t->heap_len < t->heap_cap || heap_resize(t, t->heap_cap + t->heap_cap / 4 + 4);
}

/* Sets or changes e's deadline; a new one needs heap_reserve before. */
static void deadline_set(struct table *t, struct entry *e, int64_t when) {
    size_t i = e->slot == NO_SLOT ? t->heap_len++ : (size_t)e->slot;
    heap_sift(t, i, (struct deadline){when, e});
}

/* Takes e's deadline away, if it has one. */
static void deadline_clear(struct table *t, struct entry *e) {
    if (e->slot == NO_SLOT) return;
    struct deadline last = t->heap[--t->heap_len];
    if (last.entry != e) heap_sift(t, (size_t)e->slot, last);
    e->slot = NO_SLOT;
    if (t->heap_len < t->heap_cap / 4) heap_resize(t, t->heap_cap / 2);
}

/* Removes up to EXPIRY_BATCH entries past their deadline. Returns whether there are more. */
static bool expire_some(struct shard *s, int64_t now) {
    struct table *t = &s->table;
    int n = 0;
    pthread_mutex_lock(&s->lock);
    for (; n < EXPIRY_BATCH && t->heap_len > 0 && t->heap[0].when <= now; n++) {
        struct entry **link = bucket_of(t, t->heap[0].entry->hash);
        while (*link != t->heap[0].entry) link = &(*link)->next;
        table_remove(t, link);
    }
    s->expired += (uint64_t)n;
    pthread_mutex_unlock(&s->lock);
    return n == EXPIRY_BATCH;
}

/* The expiry thread: goes round the shards until nothing is left to expire, then sleeps.
   A round that finds nothing looks at one deadline per shard. */
static void *expiry_main(void *unused) {
    while (!atomic_load(&stopping)) {
        bool more = false;
        for (struct shard *s = shards; s < shards + opt.shards; s++)
            more |= expire_some(s, now_ms());
        /* Even with more to do, give way to who waits for a lock: there may be one shard. */
        nanosleep(&(struct timespec){0, more ? 1000 : EXPIRY_TICK * 1000000L}, NULL);
    }
    return unused;
}

/* ==================================================================================== */
/* 8 Commands                                                                           */
/* ==================================================================================== */

enum {
    WRITES = 1,  /* changes data */
    GROWS = 2,   /* may need more memory: refused above --max-memory */
    ONE_KEY = 4, /* works on the key in argv[1] */
    EACH_KEY =
        8,      /* works on each word from argv[1] on; replies for how many it was true */
    HIDDEN = 16 /* not in HELP */
};
enum { ANY = MAX_WORDS, WRITE1 = WRITES | ONE_KEY, GROW1 = GROWS | WRITE1 };

/* A row says all about a command: dispatch, arity, error messages and HELP come from it.
   Where it works on keys, run is called with the key's shard locked and its entry found;
   it must not block. run replies, and returns false if that was an error. */
struct command {
    const char *name, *args;
    size_t min, max; /* words, the name among them */
    unsigned flags;
    bool (*run)(struct conn *c);
    int number; /* what tells a command from the others of its family */
    const char *does, *replies;
};

static bool cmd_help(struct conn *c);

/* Turns a word into a deadline in ms since 1970. unit is in ms, and negative if the word
   says a moment rather than a time from now. Replies and returns false if it is not a
   number, less than least, or out of range. */
static bool parse_deadline(struct conn *c, struct slice word, int unit, int64_t least,
                           int64_t *when) {
    int64_t scale = unit < 0 ? -unit : unit, base = unit < 0 ? 0 : now_ms();
    if (!parse_int(word, when))
        return reply_error(c, "ERR value is not an integer or out of range");
    if (*when < least || *when > INT64_MAX / scale || *when < INT64_MIN / scale ||
        *when * scale > INT64_MAX - base)
        return reply_error(c, "ERR invalid expire time in '%s' command", c->cmd->name);
    *when = *when * scale + base < 0 ? 0 : *when * scale + base; /* 1970 is past enough */
    return true;
}

/* Stores value under the request's key. when is a deadline in ms since 1970, KEEP for the
   one it has, or NEVER; one in the past removes the key. All that changes an entry goes
   through here. Replies and returns false when memory is out. */
static bool store(struct conn *c, struct slice value, int64_t when) {
    struct table *t = &c->shard->table;
    if (when >= 0 && when <= now_ms()) {
        if (*c->link) table_remove(t, c->link);
        return true;
    }
    struct entry *e = NULL;
    if (heap_reserve(t)) e = table_store(t, c->link, c->hash, c->key, value);
    if (!e) return reply_error(c, "OOM out of memory");
    if (when == NEVER) deadline_clear(t, e);
    else if (when >= 0) deadline_set(t, e, when);
    return true;
}

static bool cmd_get(struct conn *c) {
    return *c->link ? reply_value(c, entry_value(*c->link)) : reply_nil(c);
}

/* What may stand behind SET key value: of each group one, a time with its number. */
static const struct set_word {
    const char *name;
    enum { CONDITION, TIME } group;
    int unit; /* as in parse_deadline; 0: no number follows */
} set_words[] = {{"NX", CONDITION, 0}, {"XX", CONDITION, 0}, {"KEEPTTL", TIME, 0},
                 {"EX", TIME, 1000},   {"PX", TIME, 1},      {"EXAT", TIME, -1000},
                 {"PXAT", TIME, -1},   {NULL, TIME, 0}};

static bool cmd_set(struct conn *c) {
    const struct set_word *chosen[] = {NULL, NULL}, *time, *word;
    struct slice number = {NULL, 0};
    for (size_t i = 3; i < c->argc; i++) {
        for (word = set_words; word->name && !word_is(c->argv[i], word->name);) word++;
        const struct set_word **other = &chosen[word->group];
        if (!word->name || (*other && *other != word) || (word->unit && i + 1 == c->argc))
            return reply_error(c,
                               "ERR syntax error at %s; quote a value that holds blanks: "
                               "SET greeting \"hello world\"",
                               show(c->argv[i]).text);
        *other = word;
        if (word->unit) number = c->argv[++i];
    }
    time = chosen[TIME];
    int64_t when = time ? KEEP : NEVER;
    if (number.p && !parse_deadline(c, number, time->unit, 1, &when)) return false;
    if (chosen[CONDITION] && (chosen[CONDITION] == set_words) == (*c->link != NULL))
        return reply_nil(c);
    return store(c, c->argv[2], when) && reply_status(c, "OK");
}

static bool cmd_del(struct conn *c) {
    bool found = *c->link;
    if (found) table_remove(&c->shard->table, c->link);
    return found;
}

static bool cmd_exists(struct conn *c) { return *c->link; }

/* INCR, DECR, INCRBY, DECRBY: number is the sign. */
static bool cmd_incr(struct conn *c) {
    int64_t value = 0, by = 1, sign = c->cmd->number;
    char text[24];
    if ((c->argc > 2 && !parse_int(c->argv[2], &by)) ||
        (*c->link && !parse_int(entry_value(*c->link), &value)))
        return reply_error(c, "ERR value is not an integer or out of range");
    if (sign < 0 && by == INT64_MIN)
        return reply_error(c, "ERR decrement would overflow");
    by *= sign;
    if (by > 0 ? value > INT64_MAX - by : value < INT64_MIN - by)
        return reply_error(c, "ERR increment or decrement would overflow");
    size_t len = (size_t)snprintf(text, sizeof text, "%" PRId64, value += by);
    return store(c, (struct slice){text, len}, KEEP) && reply_int(c, value);
}

/* EXPIRE, PEXPIRE, EXPIREAT, PEXPIREAT: number is the unit, as in parse_deadline. */
static bool cmd_expire(struct conn *c) {
    int64_t when;
    if (c->argc > 3)
        return reply_error(c, "ERR Unsupported option %s", show(c->argv[3]).text);
    if (!parse_deadline(c, c->argv[2], c->cmd->number, INT64_MIN, &when)) return false;
    if (!*c->link) return reply_int(c, 0);
    return store(c, entry_value(*c->link), when) && reply_int(c, 1);
}

/* TTL, PTTL: number is the unit in ms. Rounded as Redis does. */
static bool cmd_ttl(struct conn *c) {
    if (!*c->link) return reply_int(c, -2);
    int64_t when = deadline_of(&c->shard->table, *c->link), left = when - now_ms();
    if (when == NEVER) return reply_int(c, -1);
    return reply_int(c, left < 0 ? 0 : (left + c->cmd->number / 2) / c->cmd->number);
}

static bool cmd_persist(struct conn *c) {
    bool had = *c->link && deadline_of(&c->shard->table, *c->link) != NEVER;
    return had ? store(c, entry_value(*c->link), NEVER) && reply_int(c, 1)
               : reply_int(c, 0);
}

/* Whether byte b matches the item of a pattern at *p: ? [a-z] [^a] \x or a byte that stands
   for itself. Moves *p behind the item. A class that is not closed ends with the pattern. */
static bool glob_item(const char **p, const char *end, unsigned char b) {
    const char *at = *p;
    bool escaped = *at == '\\' && end - at > 1;
    if (*at != '[') {
        *p = at + 1 + escaped;
        return (unsigned char)at[escaped] == b || *at == '?';
    }
    bool match = false, negate = end - at > 1 && at[1] == '^';
    for (at += 1 + negate; at < end && *at != ']'; at++) {
        escaped = *at == '\\' && end - at > 1;
        unsigned char low = (unsigned char)*(at += escaped), high = low;
        if (!escaped && end - at > 2 && at[1] == '-') high = (unsigned char)*(at += 2);
        match |= low < high ? low <= b && b <= high : high <= b && b <= low;
    }
    *p = at + (at < end);
    return match != negate;
}

/* Whether s matches a glob pattern. After a mismatch only the last star is tried again with
   one byte more: what an earlier star could take instead, this one can take as well. So
   the time is at most the product of both lengths, never exponential. */
static bool glob_match(struct slice pattern, struct slice s) {
    const char *p = pattern.p, *end = p + pattern.len, *star = NULL;
    size_t i = 0, retry = 0;
    while (i < s.len) {
        const char *next = p;
        if (p < end && *p == '*') {
            star = ++p;
            retry = i;
        } else if (p < end && glob_item(&next, end, (unsigned char)s.p[i])) {
            p = next;
            i++;
        } else if (star) {
            p = star;
            i = ++retry;
        } else {
            return false;
        }
    }
    while (p < end && *p == '*') p++;
    return p == end;
}

/* Keys are copied under the lock, matched and quoted without it. */
static bool cmd_keys(struct conn *c) {
    struct slice key,
        pattern = c->argc > 1 ? c->argv[1] : (struct slice){(char[]){'*'}, 1};
    struct buf found = {0};
    uint32_t len;
    size_t n = 0;
    for (struct shard *s = shards; s < shards + opt.shards; s++)
        for (uint64_t hash = 0; walk(s, &hash, &found); found.len = 0)
            for (size_t at = 0; at < found.len; at += key.len) {
                memcpy(&len, found.p + at, sizeof len);
                key = (struct slice){found.p + (at += sizeof len), len};
                if (glob_match(pattern, key)) n += reply_bytes(c, key, true);
            }
    c->out.failed |= found.failed;
    free(found.p);
    return reply_list(c, n, "key");
}

static bool cmd_ping(struct conn *c) {
    return c->argc > 1 ? reply_value(c, c->argv[1]) : reply_status(c, "PONG");
}

static bool cmd_echo(struct conn *c) { return reply_value(c, c->argv[1]); }

static bool cmd_quit(struct conn *c) {
    c->closing = "QUIT";
    return reply_status(c, "OK");
}

/* Somebody's browser was made to send a form to us; its body may hold commands. */
static bool cmd_http(struct conn *c) {
    log_line(LOG_WARN, "%s speaks HTTP, closed", address_of(c->fd, getpeername).text);
    c->closing = "it speaks HTTP";
    return reply_error(c, "ERR this is not a web server");
}

/* FLUSHALL, FLUSHDB: all keys go at one moment, so all locks are held; the memory is freed
   after that. */
static bool cmd_flush(struct conn *c) {
    if (c->argc > 1) return reply_error(c, "ERR syntax error");
    struct table *old = calloc((size_t)opt.shards, sizeof *old);
    if (!old) return reply_error(c, "OOM out of memory");
    for (long i = 0; i < opt.shards; i++) pthread_mutex_lock(&shards[i].lock);
    for (long i = 0; i < opt.shards; i++) {
        old[i] = shards[i].table;
        shards[i].table = (struct table){0};
    }
    for (long i = 0; i < opt.shards; i++) pthread_mutex_unlock(&shards[i].lock);
    for (long i = 0; i < opt.shards; i++) table_free(&old[i]);
    free(old);
    return reply_status(c, "OK");
}

/* What all shards count, added up in the order of their locks. */
static struct shard sum_shards(void) {
    struct shard sum = {.hits = 0};
    for (struct shard *s = shards; s < shards + opt.shards; s++) {
        pthread_mutex_lock(&s->lock);
        sum.table.count += s->table.count;
        sum.table.heap_len += s->table.heap_len;
        sum.table.bytes += s->table.bytes;
        sum.hits += s->hits;
        sum.misses += s->misses;
        sum.expired += s->expired;
        pthread_mutex_unlock(&s->lock);
    }
    return sum;
}

static bool cmd_dbsize(struct conn *c) {
    return reply_int(c, (int64_t)sum_shards().table.count);
}

static bool info(struct conn *c, const char *name, uint64_t value) {
    char line[64];
    snprintf(line, sizeof line, "%s:%" PRIu64, name, value);
    return reply_status(c, line);
}

static bool cmd_info(struct conn *c) {
    struct shard sum = sum_shards();
    size_t n = 1;
    uint64_t commands = 0, ns = (uint64_t)(clock_ns(CLOCK_MONOTONIC) - started_ns);
    for (long i = 0; i < max_fds; i++) commands += atomic_load(&commands_by_fd[i].n);
    reply_status(c, "kv_version:" KV_VERSION);
    n += info(c, "process_id", (uint64_t)getpid());
    n += info(c, "uptime_in_seconds", ns / 1000000000);
    n += info(c, "connected_clients", (uint64_t)atomic_load(&connected));
    n += info(c, "maxclients", (uint64_t)opt.max_clients);
    n += info(c, "used_memory", sum.table.bytes);
    n += info(c, "maxmemory", (uint64_t)opt.max_memory << 20);
    n += info(c, "loading", 0);
    n += info(c, "total_connections_received", (uint64_t)atomic_load(&connections));
    n += info(c, "total_commands_processed", commands);
    n += info(c, "keyspace_hits", sum.hits);
    n += info(c, "keyspace_misses", sum.misses);
    n += info(c, "expired_keys", sum.expired);
    n += info(c, "shards", (uint64_t)opt.shards);
    n += info(c, "keys", sum.table.count);
    n += info(c, "expires", sum.table.heap_len);
    return reply_list(c, n, "field");
}

/* The basic five first; lookups meet them first, too. A family stands together, and what
   its first row says of it holds for all. */
static const struct command commands[] = {
    {"PING", "[message]", 1, 2, 0, cmd_ping, 0, "ask whether the server is there",
     "PONG, or the message"},
    {"SET", "key value [NX|XX] [EX s|PX ms|EXAT s|PXAT ms|KEEPTTL]", 3, ANY, GROW1,
     cmd_set, 0, "store a value",
     "OK, or (nil) if NX (only when new) or XX (only when there) forbids it"},
    {"GET", "key", 2, 2, ONE_KEY, cmd_get, 0, "look a value up", "the value, or (nil)"},
    {"INCR", "key", 2, 2, GROW1, cmd_incr, 1, "count by one, up or down",
     "the new number; no value counts as 0"},
    {"DECR", "key", 2, 2, GROW1, cmd_incr, -1, NULL, NULL},
    {"DEL", "key...", 2, ANY, WRITES | EACH_KEY, cmd_del, 0, "remove keys",
     "how many there were"},
    {"INCRBY", "key n", 3, 3, GROW1, cmd_incr, 1, "count by n, up or down",
     "the new number; no value counts as 0"},
    {"DECRBY", "key n", 3, 3, GROW1, cmd_incr, -1, NULL, NULL},
    {"EXISTS", "key...", 2, ANY, EACH_KEY, cmd_exists, 0, "ask which keys there are",
     "how many of them"},
    {"KEYS", "[pattern]", 1, 2, 0, cmd_keys, 0, "list keys that match * ? [a-z] [^a] \\x",
     "the keys, each as a word that can be sent back, and how many"},
    {"EXPIRE", "key n", 3, ANY, WRITE1, cmd_expire, 1000,
     "expire in, or AT Unix time, n s or Pms",
     "1, or 0 where there is no such key; a moment in the past removes the key"},
    {"PEXPIRE", "key n", 3, ANY, WRITE1, cmd_expire, 1, NULL, NULL},
    {"EXPIREAT", "key n", 3, ANY, WRITE1, cmd_expire, -1000, NULL, NULL},
    {"PEXPIREAT", "key n", 3, ANY, WRITE1, cmd_expire, -1, NULL, NULL},
    {"TTL", "key", 2, 2, ONE_KEY, cmd_ttl, 1000, "time left in s, or with P in ms",
     "a number; -1 where the key never expires, -2 where there is no such key"},
    {"PTTL", "key", 2, 2, ONE_KEY, cmd_ttl, 1, NULL, NULL},
    {"PERSIST", "key", 2, 2, WRITE1, cmd_persist, 0, "never expire",
     "1, or 0 where there is no such key or it never expires"},
    {"DBSIZE", "", 1, 1, 0, cmd_dbsize, 0, "the number of keys", "a number"},
    {"FLUSHDB", "", 1, ANY, WRITES, cmd_flush, 0, "remove all keys", "OK"},
    {"FLUSHALL", "", 1, ANY, WRITES, cmd_flush, 0, NULL, NULL},
    {"ECHO", "message", 2, 2, 0, cmd_echo, 0, "repeat a message", "the message"},
    {"INFO", "", 1, ANY, 0, cmd_info, 0, "the state of the server", "name:value"},
    {"HELP", "[command]", 1, 2, 0, cmd_help, 0, "this list, or more on a command",
     "text"},
    {"QUIT", "", 1, ANY, 0, cmd_quit, 0, "close the connection", "OK"},
    {"POST", "", 1, ANY, HIDDEN, cmd_http, 0, NULL, NULL},
    {"Host:", "", 1, ANY, HIDDEN, cmd_http, 0, NULL, NULL},
    {NULL, NULL, 0, 0, HIDDEN, NULL, 0, NULL, NULL},
};

static const struct command *find_command(struct slice word) {
    const struct command *cmd = commands;
    while (cmd->name && !word_is(word, cmd->name)) cmd++;
    return cmd->name ? cmd : NULL;
}

static bool unknown_command(struct conn *c, struct slice name) {
    return reply_error(c, "ERR unknown command %s, HELP lists those there are",
                       show(name).text);
}

/* The row that describes cmd: the first of its family. */
static const struct command *first_of_family(const struct command *cmd) {
    while (!cmd->does) cmd--;
    return cmd;
}

/* HELP: a line for each family. HELP command: three lines. */
static bool cmd_help(struct conn *c) {
    const struct command *cmd = c->argc > 1 ? find_command(c->argv[1]) : NULL;
    char left[128], line[256];
    int n = 0, len = 0;
    if (c->argc > 1 && (!cmd || cmd->flags & HIDDEN))
        return unknown_command(c, c->argv[1]);
    if (cmd) {
        snprintf(line, sizeof line, "%s %s", cmd->name, cmd->args);
        reply_status(c, line);
        snprintf(line, sizeof line, "does: %s", first_of_family(cmd)->does);
        reply_status(c, line);
        snprintf(line, sizeof line, "replies: %s", first_of_family(cmd)->replies);
        return reply_status(c, line) && reply_list(c, 3, "line");
    }
    for (cmd = commands; !(cmd->flags & HIDDEN); cmd++, n++) {
        len += snprintf(left + len, sizeof left - (size_t)len, "%s ", cmd->name);
        if (!cmd[1].does && !(cmd[1].flags & HIDDEN)) continue;
        snprintf(left + len, sizeof left - (size_t)len, "%s", cmd->args);
        snprintf(line, sizeof line, "%-39s  %s", left, first_of_family(cmd)->does);
        reply_status(c, line);
        len = 0;
    }
    return reply_list(c, (size_t)n, "command");
}

/* Runs the command on one key, with the key's shard locked. Returns what run returned. */
static bool run_on_key(struct conn *c, struct slice key) {
    uint64_t hash = hash_bytes(key);
    struct shard *s = c->shard = &shards[hash >> 32 & (uint64_t)(opt.shards - 1)];
    c->key = key;
    c->hash = (uint32_t)hash;
    pthread_mutex_lock(&s->lock);
    c->link = table_find(s, c->hash, key);
    if (c->link && !(c->cmd->flags & WRITES)) ++*(*c->link ? &s->hits : &s->misses);
    bool result = c->link ? c->cmd->run(c) : reply_error(c, "OOM out of memory");
    pthread_mutex_unlock(&s->lock);
    return result;
}

/* Runs the request in argv and replies. */
static bool run_request(struct conn *c) {
    const struct command *cmd = c->cmd = find_command(c->argv[0]);
    size_t max_memory = (size_t)opt.max_memory << 20;
    int64_t n = 0;
    if (!cmd) return unknown_command(c, c->argv[0]);
    if (c->argc < cmd->min || c->argc > cmd->max)
        return reply_error(c, "ERR wrong number of arguments for '%s' command: %s %s",
                           cmd->name, cmd->name, cmd->args);
    if (cmd->flags & GROWS && atomic_load(&used_memory) > max_memory)
        return reply_error(c, "OOM command not allowed when used memory > 'maxmemory'.");
    if (cmd->flags & ONE_KEY) return run_on_key(c, c->argv[1]);
    if (!(cmd->flags & EACH_KEY)) return cmd->run(c);
    for (size_t i = 1; i < c->argc; i++) n += run_on_key(c, c->argv[i]);
    return reply_int(c, n);
}

/* ==================================================================================== */
/* 9 Connections                                                                        */
/* ==================================================================================== */

/* Sends all replies. Blocks as long as the client does not take them. */
static void flush(struct conn *c) {
    ssize_t n = 0;
    if (c->out.failed) errno = ENOMEM; /* half a reply would be worse than none */
    for (size_t sent = 0; !c->broken && sent<c->out.len; sent += n> 0 ? (size_t)n : 0) {
        n = c->out.failed ? -1 : send(c->fd, c->out.p + sent, c->out.len - sent, 0);
        if (n >= 0 || errno == EINTR) continue;
        c->closing = errno == EAGAIN ? "it does not take its replies" : strerror(errno);
        c->broken = true;
    }
    c->out.len = 0;
}

/* Waits for input, until --timeout if there is one. Looks once without waiting: before a
   thread goes to sleep it gives back what its buffers have grown by, so that an idle
   connection costs little. Returns what recv does. */
static ssize_t receive(struct conn *c) {
    ssize_t n = -1;
    for (int flags = MSG_DONTWAIT; buf_reserve(&c->in, 1); flags = 0) {
        do n = recv(c->fd, c->in.p + c->in.len, c->in.cap - c->in.len, flags);
        while (n < 0 && errno == EINTR);
        if (n >= 0 || errno != EAGAIN || !flags) break;
        buf_slim(&c->in);
        buf_slim(&c->out);
    }
    return n;
}

/* Reads more input behind what there is of a request. Where the input ends or fails, says
   so in closing. */
static void fill(struct conn *c) {
    struct buf *in = &c->in;
    bool full =
        in->len == in->cap; /* then more is waiting: make room for more at a time */
    in->len -= c->pos;
    memmove(in->p, in->p + c->pos, in->len);
    c->pos = 0;
    if (full && in->cap < IO_CHUNK) buf_reserve(in, in->cap - in->len + 1);
    ssize_t n = receive(c);
    if (n > 0) {
        in->len += (size_t)n;
    } else if (n < 0) {
        c->broken = errno != EAGAIN;
        c->closing = c->broken ? strerror(errno) : "timeout";
    } else {
        c->closing = "end of input";
        if (in->len > 0 && !atomic_load(&stopping))
            reply_error(
                c,
                "ERR the last line was not run: it has no newline and may be cut short");
    }
}

/* Closes the connection so that the client sees the last replies: it is told first, and
   what it still sends is read for a moment, for TCP forgets what is under way when a
   socket with unread input is closed. */
static void hang_up(struct conn *c) {
    struct timeval second = {LINGER / 1000, 0};
    char unread[1024];
    int64_t end = clock_ns(CLOCK_MONOTONIC) + LINGER * 1000000;
    if (!c->broken && shutdown(c->fd, SHUT_WR) == 0 &&
        setsockopt(c->fd, SOL_SOCKET, SO_RCVTIMEO, &second, sizeof second) == 0)
        while (recv(c->fd, unread, sizeof unread, 0) > 0 &&
               clock_ns(CLOCK_MONOTONIC) < end) {}
    close(c->fd);
}

/* Runs the request, counts it and, with -vv, logs it with the time it took. */
static void run_counted(struct conn *c, const char *client) {
    struct counter *count = &commands_by_fd[c->fd];
    int64_t start = logs(LOG_COMMAND) ? clock_ns(CLOCK_MONOTONIC) : 0;
    run_request(c);
    atomic_store_explicit(&count->n, count->n + 1, memory_order_relaxed);
    if (!start) return;
    char line[700];
    size_t len = 0;
    for (size_t i = 0; i < c->argc && len < sizeof line - sizeof(struct text); i++)
        len += (size_t)sprintf(line + len, " %s", show(c->argv[i]).text);
    log_line(LOG_COMMAND, "%s%s (%ld us)", client, line,
             (long)(clock_ns(CLOCK_MONOTONIC) - start) / 1000);
}

/* A connection's thread: reads, runs all requests that have arrived, sends their replies
   together, reads again. */
static void *conn_main(void *arg) {
    struct conn c;
    memset(&c, 0, offsetof(struct conn, argv)); /* touching argv would cost memory */
    c.fd = (int)(intptr_t)arg;
    struct text client = {""};
    if (logs(LOG_CLIENT)) client = address_of(c.fd, getpeername);
    log_line(LOG_CLIENT, "%s connected", client.text);
    while (!c.closing && atomic_load(&stopping) < 2) {
        fill(&c);
        while (!c.closing && next_request(&c)) {
            if (c.argc > 0) run_counted(&c, client.text);
            if (c.out.len >= IO_CHUNK) flush(&c);
        }
        flush(&c);
    }
    log_line(LOG_CLIENT, "%s closed: %s", client.text,
             c.closing ? c.closing : "the server stops");
    hang_up(&c);
    free(c.in.p);
    free(c.out.p);
    atomic_fetch_sub(&connected, 1); /* the last thing: main ends the program at 0 */
    return NULL;
}

/* ==================================================================================== */
/* 11 The server                                                                        */
/* ==================================================================================== */

/* Tells a client that it cannot be served, without waiting for it, and the log why, once a
   second at most. */
static void refuse(int fd, const char *why) {
    static const char reply[] = "-ERR max number of clients reached\r\n";
    static time_t logged; /* only main is ever here */
    if (time(NULL) != logged) log_line(LOG_WARN, "client refused: %s", why);
    logged = time(NULL);
    if (fd < 0) return;
    if (send(fd, reply, sizeof reply - 1, MSG_DONTWAIT) > 0) shutdown(fd, SHUT_WR);
    while (recv(fd, (char[1024]){0}, 1024, MSG_DONTWAIT) > 0) {}
    close(fd);
}

/* Starts a thread for the client at fd, or turns it away. */
static void start_client(int fd, const pthread_attr_t *attr) {
    const struct timeval timeout = {.tv_sec = opt.timeout};
    pthread_t thread;
    int on = 1, error = 0;
    bool full = atomic_load(&connected) >= opt.max_clients || fd >= max_fds;
    /* Without these options a connection works, only less well. */
    (void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    (void)setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
    if (!full) {
        atomic_fetch_add(&connected, 1);
        error = pthread_create(&thread, attr, conn_main, (void *)(intptr_t)fd);
        if (error) atomic_fetch_sub(&connected, 1);
    }
    if (full || error)
        refuse(fd, full ? "max number of clients reached" : strerror(error));
    else connections++;
}

/* Accepts who is waiting, within bounds, so that signals get their turn. */
static void accept_clients(int listener, const pthread_attr_t *attr) {
    static int spare = -1; /* a descriptor to give up when there is no other */
    for (int i = 0; i < SOMAXCONN; i++) {
        if (spare < 0) spare = open("/dev/null", O_RDONLY);
        int fd = accept(listener, NULL, NULL);
        if (fd >= 0) {
            start_client(fd, attr);
        } else if (errno == EMFILE || errno == ENFILE || errno == ENOMEM ||
                   errno == ENOBUFS) {
            /* Unaccepted, the client would keep the listener readable and us awake. */
            const char *why = strerror(errno);
            close(spare);
            spare = -1;
            refuse(accept(listener, NULL, NULL), why);
            nanosleep(&(struct timespec){0, 1000000}, NULL);
        } else if (errno == EAGAIN) {
            return;
        }
    }
}

static bool is_loopback(const struct addrinfo *a) {
    const void *sa = a->ai_addr;
    const struct sockaddr_in *four = sa;
    const struct sockaddr_in6 *six = sa;
    return a->ai_family == AF_INET ? ntohl(four->sin_addr.s_addr) >> 24 == 127
                                   : IN6_IS_ADDR_LOOPBACK(&six->sin6_addr);
}

/* Binds the first address that --bind names and that is free. Returns the listener. */
static int listen_on(void) {
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE};
    struct addrinfo *all;
    char port[8];
    int fd = -1, on = 1;
    snprintf(port, sizeof port, "%ld", opt.port);
    int error = getaddrinfo(opt.bind, port, &hints, &all);
    if (error)
        die(2, "--bind %s: no address of this machine: %s", opt.bind,
            gai_strerror(error));
    for (struct addrinfo *a = all; a; a = a->ai_next) {
        if (!is_loopback(a) && !opt.insecure)
            die(2, "--bind %s: only loopback is allowed without --insecure", opt.bind);
        fd = socket(a->ai_family, a->ai_socktype, a->ai_protocol);
        if (fd >= 0 && !setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) &&
            !bind(fd, a->ai_addr, a->ai_addrlen) && !listen(fd, SOMAXCONN) &&
            !fcntl(fd, F_SETFL, O_NONBLOCK))
            break;
        error = errno;
        if (fd >= 0) close(fd);
        fd = -1;
    }
    freeaddrinfo(all);
    if (fd < 0)
        die(1, "cannot listen on %s port %ld: %s%s", opt.bind, opt.port, strerror(error),
            error == EADDRINUSE ? "; -p 0 takes any free port" : "");
    return fd;
}

/* Allows as many descriptors as --max-clients needs, or as many as we may have, and makes a
   counter for each. */
static void raise_limits(void) {
    rlim_t want = (rlim_t)opt.max_clients + 32;
    struct rlimit r;
    if (getrlimit(RLIMIT_NOFILE, &r) < 0)
        die(1, "cannot ask for limits: %s", strerror(errno));
    if (r.rlim_cur < want) r.rlim_cur = r.rlim_max < want ? r.rlim_max : want;
    if (setrlimit(RLIMIT_NOFILE, &r) < 0 || r.rlim_cur < want)
        log_line(LOG_WARN, "%ld descriptors are too few for --max-clients",
                 (long)r.rlim_cur);
    max_fds = (long)(r.rlim_cur < want ? r.rlim_cur : want);
    commands_by_fd = calloc((size_t)max_fds, sizeof *commands_by_fd);
}

static volatile sig_atomic_t signals;

static void on_signal(int number) { signals += number != 0; }

/* SIGINT and SIGTERM are only counted, and arrive only while main waits in pselect, with
   the mask *waiting: so none can come between the look at signals and the wait. */
static void catch_signals(sigset_t *waiting) {
    static const struct sigaction count = {.sa_handler = on_signal},
                                  ignore = {.sa_handler = SIG_IGN};
    sigset_t ours;
    sigemptyset(&ours);
    sigaddset(&ours, SIGINT);
    sigaddset(&ours, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &ours, waiting);
    sigdelset(waiting, SIGINT);
    sigdelset(waiting, SIGTERM);
    sigaction(SIGINT, &count, NULL);
    sigaction(SIGTERM, &count, NULL);
    sigaction(SIGPIPE, &ignore, NULL);
}

/* Accepts clients until a signal arrives, then once more who came before it. */
static void serve(int listener, const sigset_t *waiting) {
    pthread_attr_t attr;
    if (pthread_attr_init(&attr) || pthread_attr_setstacksize(&attr, STACK_SIZE) ||
        pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED))
        die(1, "cannot set up threads");
    log_line(LOG_INFO, "listening on %s", address_of(listener, getsockname).text);
    while (!signals) {
        fd_set ready;
        FD_ZERO(&ready);
        FD_SET((size_t)listener, &ready);
        pselect(listener + 1, &ready, NULL, NULL, NULL, waiting);
        accept_clients(listener, &attr);
    }
    close(listener);
    pthread_attr_destroy(&attr);
}

/* Ends the connections. After SHUT_RD a thread still reads what has arrived (on Linux),
   answers it, and then sees the end of the input. Who has not taken the replies in time is
   dropped. Returns whether all threads have ended. */
static bool stop_clients(const sigset_t *waiting) {
    int64_t waited = 0, start = clock_ns(CLOCK_MONOTONIC);
    log_line(LOG_INFO, "stopping with %ld clients", atomic_load(&connected));
    for (int stage = 1; atomic_load(&connected) > 0 && waited < 2 * STOP_GRACE;) {
        if (stage > atomic_load(&stopping)) {
            atomic_store(&stopping, stage);
            for (int fd = 0; fd < max_fds; fd++)
                shutdown(fd, stage == 1 ? SHUT_RD : SHUT_RDWR);
        }
        pselect(0, NULL, NULL, NULL, &(struct timespec){0, 5000000}, waiting);
        if (signals > 1) die(1, "second signal: stopped at once");
        waited = (clock_ns(CLOCK_MONOTONIC) - start) / 1000000;
        stage = waited < STOP_GRACE ? 1 : 2;
    }
    return atomic_load(&connected) == 0;
}

int main(int argc, char **argv) {
    pthread_t expiry;
    sigset_t waiting;
    started_ns = clock_ns(CLOCK_MONOTONIC);
    parse_options(argc, argv);
    if (opt.help || opt.version) return print_help();
    hash_init();
    raise_limits();
    catch_signals(&waiting);
    shards = aligned_alloc(alignof(struct shard), sizeof *shards * (size_t)opt.shards);
    if (!shards || !commands_by_fd) die(1, "out of memory");
    for (long i = 0; i < opt.shards; i++) {
        shards[i] = (struct shard){.hits = 0};
        pthread_mutex_init(&shards[i].lock, NULL);
    }
    int listener = listen_on();
    int error = pthread_create(&expiry, NULL, expiry_main, NULL);
    if (error) die(1, "cannot start the expiry thread: %s", strerror(error));
    serve(listener, &waiting);
    if (!stop_clients(&waiting)) return 0; /* a thread is busy: leave all as it is */
    atomic_store(&stopping, 2);
    pthread_join(expiry, NULL);
    for (long i = 0; i < opt.shards; i++) table_free(&shards[i].table);
    free(shards);
    free(commands_by_fd);
    log_line(LOG_INFO, "stopped");
    return 0;
}
