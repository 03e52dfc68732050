/* kv: a key-value server in one file, made to be read from top to bottom.
 *
 * === 0 The map ======================================================================
 *
 * People talk to kv in lines of text over TCP (nc localhost 8080), client libraries in
 * RESP, the protocol of Redis. Keys and values are in memory, and with --aof also in a
 * file.
 *
 *      clients             threads                                memory
 *
 *     nc, telnet  ----->  main: accepts, starts a thread       +-- shard 0 ---------+
 *     a script            for each connection, and waits       | lock  table  heap  |
 *                         for SIGTERM                          +-- shard 1 ---------+
 *     one client  <---->  connection thread:            ---->  | lock  table  heap  |
 *     one client  <---->    read, split into words,     ---->  +-- ... -------------+
 *     one client  <---->    run the command, commit,    ---->  | lock  table  heap  |
 *                           reply                              +-- shard 255 -------+
 *                         expiry thread: removes what             ^    | what changed
 *                         has passed its deadline  ---------------+    v
 *                                                    file  <----  append-only log
 *
 * A key belongs to one shard, which its hash decides. A shard is a hash table (key to
 * value) and a heap (what expires next), and one mutex that guards both: two connections
 * wait for each other only when their keys are in the same shard.
 *
 * Lock order. A thread holds at most one shard lock (FLUSHALL takes all, in the order of
 * their numbers), and inside it, for a moment, the lock of the append-only file's buffer.
 * No thread reads, sends, writes or sleeps while it holds one of these. The log on stderr
 * has a lock of its own, which is held for one line. All else that threads share is
 * atomic, set before they start, or used by one thread at a time (see section 10).
 * pthread_mutex_lock fails only where it is misused, so its result is not checked.
 *
 * The sections build on each other. Each has a chapter of its number in doc/:
 *   1 Options and log   2 Buffers   3 Requests   4 Replies       5 Hashing   6 The table
 *   7 Expiry            8 Commands  9 Connections   10 Append-only file   11 The server
 */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libgen.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h> /* mallopt */
#endif

#define KV_VERSION "0.2.0"

/* The compiler checks argument f, a format, against the arguments behind it. */
#define PRINTF_LIKE(f) __attribute__((format(printf, f, (f) + 1)))

/* Some bytes that belong to somebody else: a word of a request, a key, a value. */
struct slice {
    char *p;
    size_t len;
};

/* A short string that a function can return. f(x).text can be an argument: C keeps the
   struct until the call is done. There is room for what show returns: 64 bytes of a word,
   each of which may become four, and some more. */
struct text {
    char text[272];
};

/* How far the shutdown has got. (Reads, =, ++ and -- of an _Atomic variable are
   atomic.) */
enum stage {
    SERVING,
    ANSWERING, /* a signal came: what has arrived is answered, see stop_connections */
    GIVING_UP, /* run nothing more, only send the replies to what was run */
};
static _Atomic enum stage stopping = SERVING;

static atomic_long clients;     /* connections that count for --max-clients */
static atomic_long threads;     /* threads of connections, also those in hang_up */
static atomic_long connections; /* all that there have been since the start */

/* === 1 Options and log ============================================================= */

static struct {
    long port;
    const char *bind;
    long max_clients;
    long timeout;     /* in s; 0: none */
    long max_request; /* in bytes */
    long shards;
    const char *aof; /* a file's name; NULL: none */
    const char *fsync;
    const char *password_file;
    long insecure, verbose, quiet, help, version; /* how often each was given */
} opt = {.port = 8080,
         .bind = "127.0.0.1",
         .max_clients = 10000,
         .shards = 256,
         .max_request = 4259840 /* 4 MiB + 64 KiB */,
         .fsync = "everysec"};

/* What --fsync says. */
static enum { FSYNC_ALWAYS, FSYNC_EVERYSEC, FSYNC_NO } fsync_policy;

/* A row says all about an option: the parser, its checks and --help use it. */
static const struct option {
    const char *letter, *name;
    const char *value; /* what --help calls its value; "": it is a switch */
    const char *help;
    void *to;      /* a long; if max is 0 and there is a value, a const char * */
    long min, max; /* of a number */
} options[] = {
    {"-p", "--port", "N", "8080; 0: any free port", &opt.port, 0, 65535},
    {"-b", "--bind", "ADDR", "127.0.0.1; IPv4, IPv6 or a host name", &opt.bind, 0, 0},
    {"-c", "--max-clients", "N", "10000", &opt.max_clients, 1, 1000000},
    {"-t", "--timeout", "SECONDS", "0 (never); close when idle", &opt.timeout, 0,
     1000000},
    {"", "--max-request", "BYTES", "4259840; the longest request, as it is sent",
     &opt.max_request, 1024, 1L << 29},
    {"-s", "--shards", "N", "256; a power of two", &opt.shards, 1, 4096},
    {"-a", "--aof", "FILE", "none; replayed at start, then appended to", &opt.aof, 0, 0},
    {"", "--fsync", "WHEN", "everysec; always, everysec or no", &opt.fsync, 0, 0},
    {"-P", "--password-file", "FILE", "none; clients must AUTH", &opt.password_file, 0,
     0},
    {"", "--insecure", "", "serve the network openly", &opt.insecure, 0, 0},
    {"-v", "--verbose", "", "log connections, -vv every command", &opt.verbose, 0, 0},
    {"-q", "--quiet", "", "log only trouble", &opt.quiet, 0, 0},
    {"-h", "--help", "", "print this", &opt.help, 0, 0},
    {"-V", "--version", "", "print the version", &opt.version, 0, 0},
    {NULL, NULL, NULL, NULL, NULL, 0, 0},
};

static int64_t read_clock_us(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

/* Microseconds on a clock that nobody sets, to measure how long something takes. */
static int64_t monotonic_us(void) { return read_clock_us(CLOCK_MONOTONIC); }

/* Milliseconds since 1970 on the wall clock, for deadlines. */
static int64_t now_ms(void) { return read_clock_us(CLOCK_REALTIME) / 1000; }

/* Sleeps for less than a second. A signal may end it early: no caller minds. */
static void sleep_ms(int ms) { nanosleep(&(struct timespec){0, ms * 1000000L}, NULL); }

/* What a line of the log is about. -q drops INFO; -v adds CLIENT, -vv also COMMAND. */
enum level { ERROR, WARN, INFO, CLIENT, COMMAND };

static bool is_logged(enum level level) {
    return (long)level <= (opt.quiet ? WARN : INFO + opt.verbose);
}

/* Writes one line to stderr in one call, so that the lines of several threads never mix.
   What does not fit is cut. If stderr is a full pipe that nobody reads, the line is
   dropped, and nobody waits. A pipe that can be written, as poll says, takes PIPE_BUF
   bytes (4096 on Linux), more than a line has. The lock keeps other threads from filling
   it between poll and write. (A terminal that is halted may still make this wait.) */
static PRINTF_LIKE(2) void say(enum level level, const char *fmt, ...) {
    static const char *tags[] = {"ERROR", "WARN", "INFO", "DEBUG", "DEBUG"};
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    char date[24], text[960], line[1024];
    if (!is_logged(level)) return;
    int64_t ms = now_ms();
    time_t seconds = (time_t)(ms / 1000);
    struct tm tm;
    gmtime_r(&seconds, &tm);
    strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S", &tm);
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    int len =
        sprintf(line, "%s.%03dZ %s %s\n", date, (int)(ms % 1000), tags[level], text);
    struct pollfd out = {.fd = STDERR_FILENO, .events = POLLOUT};
    pthread_mutex_lock(&lock);
    if (poll(&out, 1, 0) == 1) {
        ssize_t written = write(STDERR_FILENO, line, (size_t)len);
        (void)written; /* when that fails, nobody is left to tell */
    }
    pthread_mutex_unlock(&lock);
}

/* Logs an error and ends the program. */
#define die(status, ...) (say(ERROR, __VA_ARGS__), exit(status))

/* Whether this is the first call in this second of the clock; last remembers when the
   previous call was. It limits the log lines that strangers can provoke. */
static bool is_first_this_second(atomic_llong *last) {
    long long second = 1 + monotonic_us() / 1000000; /* *last starts with 0 */
    return atomic_exchange(last, second) != second;
}

static bool is_named(const struct option *o, const char *word) {
    bool is_letter = o->letter[0] != 0 && strcmp(word, o->letter) == 0;
    return is_letter || strcmp(word, o->name) == 0;
}

static long parse_number(const struct option *o, const char *value) {
    char *end;
    long number = strtol(value, &end, 10); /* LONG_MAX where it is too large */
    bool is_number = value[0] >= '0' && value[0] <= '9' && *end == 0;
    if (!is_number || number < o->min || number > o->max)
        die(2, "%s %s is not %ld to %ld", o->name, value, o->min, o->max);
    return number;
}

/* Sets opt and fsync_policy from the command line. What is wrong there ends the
   program. */
static void parse_options(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        const struct option *o = options;
        bool is_vv = strcmp(argv[i], "-vv") == 0;
        const char *word = is_vv ? "-v" : argv[i];
        while (o->name && !is_named(o, word)) o++;
        if (!o->name) die(2, "%s is no option: see kv --help", word);
        bool is_switch = o->value[0] == 0;
        if (!is_switch) i++;
        if (i == argc) die(2, "%s needs a value", o->name);
        if (is_switch) *(long *)o->to += is_vv ? 2 : 1;
        else if (o->max > 0) *(long *)o->to = parse_number(o, argv[i]);
        else *(const char **)o->to = argv[i];
    }
    if ((opt.shards & (opt.shards - 1)) != 0)
        die(2, "--shards %ld is not a power of two", opt.shards);
    if (strcmp(opt.fsync, "always") == 0) fsync_policy = FSYNC_ALWAYS;
    else if (strcmp(opt.fsync, "everysec") == 0) fsync_policy = FSYNC_EVERYSEC;
    else if (strcmp(opt.fsync, "no") == 0) fsync_policy = FSYNC_NO;
    else die(2, "--fsync %s is not always, everysec or no", opt.fsync);
}

/* --version prints the first line, --help all. */
static void print_help(void) {
    puts("kv " KV_VERSION ", a key-value server; talk to it with: nc localhost 8080");
    for (const struct option *o = options; opt.help && o->name; o++)
        printf("  %2s %-15s %-7s  %s\n", o->letter, o->name, o->value, o->help);
    if (fflush(stdout) != 0) die(1, "cannot print: %s", strerror(errno));
}

/* One end of a connection as text, 127.0.0.1:8080 or [::1]:8080. get is getpeername for
   the other end, getsockname for ours. */
static struct text address_of(int fd, int (*get)(int, struct sockaddr *, socklen_t *)) {
    struct text out = {"a client that is gone"};
    struct sockaddr_storage storage;
    struct sockaddr *address = (struct sockaddr *)&storage;
    socklen_t len = sizeof storage;
    char host[64], port[8];
    int numeric = NI_NUMERICHOST | NI_NUMERICSERV;
    if (get(fd, address, &len) < 0) return out;
    if (getnameinfo(address, len, host, sizeof host, port, sizeof port, numeric) != 0)
        return out;
    sprintf(out.text, strchr(host, ':') ? "[%s]:%s" : "%s:%s", host, port);
    return out;
}

/* === 2 Buffers ===================================================================== */

/* Bytes that grow at the end. Owns p. Once memory has run out, failed stays set and
   nothing more is added: code that fills a buffer checks once, at the end. */
struct buf {
    char *p;
    size_t len, cap;
    bool failed;
};

/* A buffer begins with SMALL_BUF bytes. A read has room for at least MIN_READ bytes.
   Replies are sent when IO_CHUNK bytes of them have gathered. */
enum { SMALL_BUF = 512, MIN_READ = 1024, IO_CHUNK = 65536 };

/* Makes room for n more bytes, n > 0, and returns where they go, or NULL when memory is
   out: then b keeps what it has. The capacity doubles, so that in the long run each byte
   is copied about once. */
static char *buf_reserve(struct buf *b, size_t n) {
    if (b->failed) return NULL;
    if (b->cap - b->len < n) {
        size_t cap = b->cap > 0 ? b->cap : SMALL_BUF;
        while (cap - b->len < n && cap <= SIZE_MAX / 2) cap *= 2;
        char *p = cap - b->len < n ? NULL : realloc(b->p, cap);
        if (!p) {
            b->failed = true;
            return NULL;
        }
        b->p = p;
        b->cap = cap;
    }
    return b->p + b->len;
}

static void buf_add(struct buf *b, const void *p, size_t n) {
    char *to = n > 0 ? buf_reserve(b, n) : NULL;
    if (!to) return;
    memcpy(to, p, n);
    b->len += n;
}

static void buf_add_text(struct buf *b, const char *text) {
    buf_add(b, text, strlen(text));
}

/* Adds a header of RESP: a type byte, a number, CRLF. The digits are found from the last
   to the first. (snprintf takes several times as long, and each reply has a header.) */
static void buf_add_header(struct buf *b, char type, size_t n) {
    char text[24];
    size_t at = sizeof text;
    text[--at] = '\n';
    text[--at] = '\r';
    do {
        text[--at] = (char)('0' + n % 10);
        n /= 10;
    } while (n > 0);
    text[--at] = type;
    buf_add(b, text + at, sizeof text - at);
}

/* Frees the memory of a buffer that is empty and has become large. */
static void buf_slim(struct buf *b) {
    if (b->len > 0 || b->cap <= IO_CHUNK) return;
    free(b->p);
    *b = (struct buf){.failed = b->failed};
}

/* === 3 Requests ==================================================================== */

enum { MAX_WORDS = 1024 };                            /* of a request */
enum { OPEN_MAX_WORDS = 10, OPEN_MAX_BYTES = 16384 }; /* of a request before AUTH */

/* One connection. It is on the stack of its thread, and no other thread sees it. */
struct conn {
    /* For as long as the connection lasts: */
    int fd;
    long id;     /* the first connection is 1 */
    bool authed; /* no password is needed, or it was given */
    bool resp3;  /* HELLO 3: RESP replies have the form of RESP3, not RESP2 */
    int wrong_passwords;
    size_t max_bytes, max_words; /* of a request */
    const char *closing;         /* why to close once the replies are sent; NULL: go on */
    bool in_transaction;         /* each request gets an error: see cmd_transaction */
    struct buf in;               /* what was read */
    size_t pos;                  /* offset in in.p of the next request */
    size_t scanned;              /* bytes from pos on in which no newline was found */
    struct buf out;              /* replies that are not sent yet */

    /* Since replies were last sent: */
    size_t replies;  /* so many are in out */
    bool writes;     /* one of the requests writes */
    size_t recorded; /* bytes of keys and values that were changed, see run_requests */
    uint64_t seen;   /* last change that a reply shows, see The store in section 8 */

    /* The request at hand: */
    bool resp;          /* it is RESP, and so is the reply; else both are text */
    bool crlf;          /* lines of the reply end in CRLF, else in LF */
    struct slice *argv; /* its words; they point into in */
    size_t argc, argv_room;
    const struct command *cmd;

    /* The key at hand, while its shard is locked: */
    struct slice key;
    uint32_t hash;
    struct shard *shard;
    struct entry *entry; /* NULL: there is no such key */
};

static bool fail(struct conn *, const char *, ...) PRINTF_LIKE(2);

/* The bytes of a string. Nobody will write to them. */
static struct slice str(const char *s) {
    struct slice all = {(char *)s, strlen(s)};
    return all;
}

static bool is_blank(char c) { return c == ' ' || c == '\t'; }

/* Whether a word is name, in upper or lower case. */
static bool word_is(struct slice word, const char *name) {
    return word.len == strlen(name) && strncasecmp(word.p, name, word.len) == 0;
}

/* Reads a number of 64 bits as strictly as Redis does: no blank, no plus sign, no leading
   zero, no overflow. INT64_MIN is one further from 0 than INT64_MAX. (Unsigned numbers
   wrap around, so 0 - sum has the bits of the negative number.) */
static bool parse_int(struct slice s, int64_t *n) {
    bool minus = s.len > 0 && s.p[0] == '-';
    size_t start = minus ? 1 : 0, digits = s.len - start;
    uint64_t limit = minus ? (uint64_t)INT64_MAX + 1 : INT64_MAX;
    uint64_t sum = 0; /* has room for 19 digits: 10^19 < 2^64 */
    if (digits < 1 || digits > 19) return false;
    if (s.p[start] == '0' && s.len > 1) return false;
    for (size_t i = start; i < s.len; i++) {
        if (s.p[i] < '0' || s.p[i] > '9') return false;
        sum = sum * 10 + (uint64_t)(s.p[i] - '0');
    }
    *n = (int64_t)(minus ? 0 - sum : sum);
    return sum <= limit;
}

/* Whether a request could be taken off the input. WRONG: it has been answered, and pos is
   behind it, or closing is set. */
enum outcome { COMPLETE, INCOMPLETE, WRONG };

/* Answers a line that is wrong. why begins with a code word. */
static enum outcome fail_line(struct conn *c, const char *why) {
    fail(c, "%s", why);
    c->replies++;
    return WRONG;
}

/* Answers a request that is too long, or so broken that the start of the next one cannot
   be found, and has the connection closed. */
static enum outcome refuse(struct conn *c, const char *why) {
    c->closing = why;
    return fail_line(c, why);
}

static enum outcome refuse_long(struct conn *c) {
    if (c->authed)
        return refuse(c, "ERR a request over --max-request or 1024 words is too long");
    return refuse(c, "ERR before AUTH a request over 16 KiB or 10 words is too long");
}

/* Adds a word to argv, if there may be one more. */
static enum outcome add_word(struct conn *c, char *p, size_t len) {
    if (c->argc == c->max_words) return refuse_long(c);
    if (c->argc == c->argv_room) {
        size_t room = 2 * c->argv_room + 8;
        struct slice *argv = realloc(c->argv, room * sizeof *argv);
        if (!argv) return refuse(c, "OOM out of memory");
        c->argv = argv;
        c->argv_room = room;
    }
    c->argv[c->argc++] = (struct slice){p, len};
    return COMPLETE;
}

/* --- Text: line = { blank word } blank ("\n" | "\r\n") ------------------------------ */

/* The escapes that are a letter, and the byte that each means. */
static const char escape_letters[] = {'\\', 'n', 'r', 't', '"'};
static const char escape_bytes[] = {'\\', '\n', '\r', '\t', '"'};

static bool is_hex(char c) { return isxdigit((unsigned char)c) != 0; }

/* escape = "\" ("\" | "n" | "r" | "t" | "\"" | "x" hex hex)
   Decodes the escape at from to *to. Returns where it ends, or NULL if there is none
   before end. */
static char *unescape(char *from, char *end, char *to) {
    if (end - from < 2) return NULL;
    const char *letter = memchr(escape_letters, from[1], sizeof escape_letters);
    if (letter) {
        *to = escape_bytes[letter - escape_letters];
        return from + 2;
    }
    if (end - from < 4 || from[1] != 'x') return NULL;
    if (!is_hex(from[2]) || !is_hex(from[3])) return NULL;
    char digits[] = {from[2], from[3], 0};
    *to = (char)strtol(digits, NULL, 16);
    return from + 4;
}

/* quoted = "'" { byte } "'" | '"' { byte | escape } '"'
   Adds the quoted word at *at to argv, and moves *at behind it. The word is decoded in
   place, which is possible because an escape is longer than its byte. */
static enum outcome take_quoted(struct conn *c, char **at, char *end) {
    char mark = **at, *start = *at + 1;
    char *from = start, *to = start;
    while (from < end && *from != mark) {
        bool is_escape = mark == '"' && *from == '\\';
        char *next = is_escape ? unescape(from, end, to) : from + 1;
        if (!next)
            return fail_line(
                c, "ERR bad escape: double quotes know \\\" \\\\ \\n \\r \\t and \\xHH");
        if (!is_escape) *to = *from;
        from = next;
        to++;
    }
    bool is_closed = from < end && (from + 1 == end || is_blank(from[1]));
    if (!is_closed)
        return fail_line(
            c, "ERR unbalanced quotes: a word that begins with a quote ends with one");
    *at = from + 1;
    return add_word(c, start, (size_t)(to - start));
}

static enum outcome take_plain(struct conn *c, char **at, char *end) {
    char *start = *at;
    while (*at < end && !is_blank(**at)) (*at)++;
    return add_word(c, start, (size_t)(*at - start));
}

/* Splits a line, which ends at end, into argv. A comment has no words. */
static enum outcome split_line(struct conn *c, char *at, char *end) {
    for (;;) {
        while (at < end && is_blank(*at)) at++;
        if (at == end || (c->argc == 0 && *at == '#')) return COMPLETE;
        bool quoted = *at == '"' || *at == '\'';
        enum outcome word = quoted ? take_quoted(c, &at, end) : take_plain(c, &at, end);
        if (word == WRONG) return WRONG;
    }
}

/* Takes a line off the input and splits it into argv. */
static enum outcome take_line(struct conn *c) {
    char *line = c->in.p + c->pos;
    size_t arrived = c->in.len - c->pos;
    char *newline = memchr(line + c->scanned, '\n', arrived - c->scanned);
    size_t len = newline ? (size_t)(newline - line) + 1 : arrived;
    c->crlf = newline && newline > line && newline[-1] == '\r';
    c->scanned = newline ? 0 : arrived;
    if (len > c->max_bytes) return refuse_long(c);
    if (!newline) return INCOMPLETE;
    c->pos += len;
    return split_line(c, line, c->crlf ? newline - 1 : newline);
}

/* --- RESP: array = "*" number "\r\n" { "$" number "\r\n" bytes "\r\n" } ------------- */

/* Reads the number of a header, which begins at *at with a type byte, and moves *at
   behind it. A header that still has no line end after LONGEST bytes is wrong. (If the
   line end has come, parse_int refuses a number that is too long.) */
static enum outcome read_header(char **at, char *end, int64_t *n) {
    enum { LONGEST = 32 };
    char *digits = *at + 1;
    char *newline = memchr(*at, '\n', (size_t)(end - *at));
    if (!newline) return end - *at < LONGEST ? INCOMPLETE : WRONG;
    if (newline[-1] != '\r') return WRONG; /* the type byte is there at least */
    *at = newline + 1;
    struct slice number = {digits, (size_t)(newline - 1 - digits)};
    return parse_int(number, n) ? COMPLETE : WRONG;
}

/* Adds the string at *at to argv, and moves *at behind it. room: the bytes that the
   request may still have, from *at on. A length that is too long is refused before its
   bytes arrive. */
static enum outcome take_string(struct conn *c, char **at, char *end, int64_t room) {
    char *start = *at;
    int64_t len;
    if (start == end) return INCOMPLETE;
    if (*start != '$') return refuse(c, "ERR Protocol error: expected '$'");
    enum outcome header = read_header(at, end, &len);
    if (header == INCOMPLETE) return INCOMPLETE;
    if (header == WRONG || len < 0)
        return refuse(c, "ERR Protocol error: invalid bulk length");
    int64_t header_len = *at - start;
    if (len > room - header_len - 2) return refuse_long(c); /* 2: CRLF */
    char *string = *at;
    if (end - string < len + 2) return INCOMPLETE;
    *at = string + len + 2;
    if (memcmp(string + len, "\r\n", 2) != 0)
        return refuse(c, "ERR Protocol error: expected CRLF after a string");
    return add_word(c, string, (size_t)len);
}

/* Takes an array off the input, its strings as argv. One that has arrived in part is read
   from its beginning each time, in at most MAX_WORDS short steps: take_string skips the
   bytes of a string. An empty array is taken, too; run_requests skips it. */
static enum outcome take_array(struct conn *c) {
    char *start = c->in.p + c->pos, *at = start;
    char *end = c->in.p + c->in.len;
    int64_t words;
    c->crlf = true;
    enum outcome header = read_header(&at, end, &words);
    if (header == INCOMPLETE) return INCOMPLETE;
    if (header == WRONG) return refuse(c, "ERR Protocol error: invalid multibulk length");
    if (words > (int64_t)c->max_words) return refuse_long(c);
    for (int64_t i = 0; i < words; i++) {
        enum outcome string =
            take_string(c, &at, end, (int64_t)c->max_bytes - (at - start));
        if (string != COMPLETE) return string;
    }
    c->pos += (size_t)(at - start);
    return COMPLETE;
}

/* Takes the next request off the input into argv. Returns false when none has arrived in
   full. argc is 0 if there is nothing to run: a line without words, or a request that was
   wrong and has been answered. The words are valid until more is read. */
static bool next_request(struct conn *c) {
    if (c->closing || c->pos == c->in.len) return false;
    if (c->in.p[c->pos] == '\xff') { /* Ctrl-C in telnet */
        c->closing = "interrupted by telnet";
        return false;
    }
    c->argc = 0;
    c->resp = c->in.p[c->pos] == '*';
    enum outcome request = c->resp ? take_array(c) : take_line(c);
    if (request == WRONG) c->argc = 0;
    return request != INCOMPLETE;
}

/* === 4 Replies ===================================================================== */

/* Each function that replies returns whether the request has succeeded: fail returns
   false, all others true. So a command can end with return reply_...(). */

/* Whether a reply must quote s. Without quotes it could be taken for an error, the end of
   a list, a quoted value or another line, or a blank at its end could be missed. With
   as_word, s must also be quoted if it would not be one word of a request. */
static bool needs_quotes(struct slice s, bool as_word) {
    if (s.len == 0) return true;
    char first = s.p[0], last = s.p[s.len - 1];
    if (first == ' ' || last == ' ' || first == '"' || first == '(') return true;
    if (as_word && (first == '\'' || memchr(s.p, ' ', s.len))) return true;
    for (size_t i = 0; i < s.len; i++) {
        unsigned char b = (unsigned char)s.p[i];
        if (b < 0x20 || b == 0x7f) return true;
    }
    return false;
}

/* Writes s as a double-quoted word. to has room for 4 * s.len + 2 bytes. Returns where
   the word ends. A double quote becomes \x22, so that printf %b of bash can decode the
   word. (This runs under a shard's lock, and sprintf would take many times as long.) */
static char *quote(char *to, struct slice s) {
    static const char hex[] = "0123456789abcdef";
    *to++ = '"';
    for (size_t i = 0; i < s.len; i++) {
        unsigned char b = (unsigned char)s.p[i];
        const char *letter = memchr(escape_bytes, b, 4); /* all but the quote */
        if (letter) {
            *to++ = '\\';
            *to++ = escape_letters[letter - escape_bytes];
        } else if (b < 0x20 || b == 0x7f || b == '"') {
            *to++ = '\\';
            *to++ = 'x';
            *to++ = hex[b / 16];
            *to++ = hex[b % 16];
        } else {
            *to++ = (char)b;
        }
    }
    *to++ = '"';
    return to;
}

/* What an error or the log repeats of a client's word: quoted where needed, and cut. */
static struct text show(struct slice word) {
    enum { MAX_SHOWN = 64 };
    struct text out = {""};
    struct slice cut = {word.p, word.len < MAX_SHOWN ? word.len : MAX_SHOWN};
    char *end = out.text;
    if (needs_quotes(cut, true)) end = quote(end, cut);
    else end = (char *)memcpy(end, cut.p, cut.len) + cut.len;
    strcpy(end, word.len > cut.len ? "..." : "");
    return out;
}

/* A line of a reply: prefix, then bytes. */
static bool reply_line(struct conn *c, const char *prefix, struct slice s) {
    buf_add_text(&c->out, prefix);
    buf_add(&c->out, s.p, s.len);
    buf_add_text(&c->out, c->crlf ? "\r\n" : "\n");
    return true;
}

static bool reply_status(struct conn *c, const char *status) {
    return reply_line(c, c->resp ? "+" : "", str(status));
}

/* An error. It begins with a code word, mostly ERR. */
static bool fail(struct conn *c, const char *fmt, ...) {
    char text[1024];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    reply_line(c, c->resp ? "-" : "(error) ", str(text));
    return false;
}

static bool reply_int(struct conn *c, int64_t n) {
    char text[24];
    snprintf(text, sizeof text, "%" PRId64, n);
    return reply_line(c, c->resp ? ":" : "", str(text));
}

static bool reply_nil(struct conn *c) {
    if (!c->resp) return reply_line(c, "", str("(nil)"));
    return reply_line(c, "", str(c->resp3 ? "_" : "$-1"));
}

static bool reply_string(struct conn *c, struct slice s, bool quoted) {
    if (c->resp) buf_add_header(&c->out, '$', s.len);
    if (c->resp || !quoted) return reply_line(c, "", s);
    char *to = buf_reserve(&c->out, 4 * s.len + 2);
    if (to) c->out.len += (size_t)(quote(to, s) - to);
    return reply_line(c, "", str(""));
}

/* A value. In text it has quotes only where it could be misread; blanks inside it need
   none. */
static bool reply_value(struct conn *c, struct slice s) {
    return reply_string(c, s, needs_quotes(s, false));
}

/* A value that in text can be sent back as one word: with blanks in it, it has quotes. */
static bool reply_word(struct conn *c, struct slice s) {
    return reply_string(c, s, needs_quotes(s, true));
}

/* A reply of n lines begins with list_start and ends with list_end: RESP puts the number
   first, text puts it last. noun is in the singular. */
static void list_start(struct conn *c, size_t n) {
    if (c->resp) buf_add_header(&c->out, '*', n);
}

static bool list_end(struct conn *c, size_t n, const char *noun) {
    char text[64];
    snprintf(text, sizeof text, "(%zu %s%s)", n, noun, n == 1 ? "" : "s");
    return c->resp || reply_line(c, "", str(text));
}

/* === 5 Hashing ===================================================================== */

/* The secret of the table's hash is drawn at random: a client cannot know it, and so
   cannot choose keys that collide. The append-only file's checksum is the same hash with
   zeros. */
static uint64_t table_key[2];
static const uint64_t checksum_key[2] = {0, 0};

static uint64_t rotate(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

/* Eight bytes as a number, the lowest byte first whatever the machine's own order: the
   checksum goes into a file, which another machine may read. The shifts are written out
   because compilers turn these lines into one load, but often not a loop. */
static uint64_t load_word(const unsigned char *p) {
    uint64_t word = p[0];
    word |= (uint64_t)p[1] << 8;
    word |= (uint64_t)p[2] << 16;
    word |= (uint64_t)p[3] << 24;
    word |= (uint64_t)p[4] << 32;
    word |= (uint64_t)p[5] << 40;
    word |= (uint64_t)p[6] << 48;
    word |= (uint64_t)p[7] << 56;
    return word;
}

static void sip_round(uint64_t v[4]) {
    v[0] += v[1];
    v[1] = rotate(v[1], 13) ^ v[0];
    v[0] = rotate(v[0], 32);
    v[2] += v[3];
    v[3] = rotate(v[3], 16) ^ v[2];
    v[0] += v[3];
    v[3] = rotate(v[3], 21) ^ v[0];
    v[2] += v[1];
    v[1] = rotate(v[1], 17) ^ v[2];
    v[2] = rotate(v[2], 32);
}

/* SipHash-1-3 (Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012): one
   round for each eight bytes and three at the end. The last word has the bytes that are
   left and, as its highest byte, the length. The numbers here and in sip_round are the
   paper's. What kv needs of it: the same key and bytes have the same hash, and nobody can
   foretell it without the key. */
static uint64_t siphash(const uint64_t key[2], struct slice s) {
    uint64_t v[4] = {
        key[0] ^ 0x736f6d6570736575,
        key[1] ^ 0x646f72616e646f6d,
        key[0] ^ 0x6c7967656e657261,
        key[1] ^ 0x7465646279746573,
    };
    const unsigned char *p = (const unsigned char *)s.p;
    unsigned char last[8] = {0};
    for (size_t words = s.len / 8; words > 0; words--) {
        uint64_t word = load_word(p);
        v[3] ^= word;
        sip_round(v);
        v[0] ^= word;
        p += 8;
    }
    if (s.len % 8 > 0) memcpy(last, p, s.len % 8);
    last[7] = (unsigned char)s.len;
    v[3] ^= load_word(last);
    sip_round(v);
    v[0] ^= load_word(last);
    v[2] ^= 0xff;
    for (int i = 0; i < 3; i++) sip_round(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* === 6 The table =================================================================== */

/* A key and its value in one allocation: 24 bytes, the key, the value. Its deadline,
   which few keys have, is in the heap of its table. */
struct entry {
    struct entry *next; /* in its bucket */
    uint32_t hash;
    uint32_t key_len, value_len;
    uint32_t slot; /* its deadline is heap[slot]; 0: it has none */
    char data[];   /* the key, then the value */
};

/* A moment to expire, in ms since 1970. */
struct deadline {
    int64_t when;
    struct entry *entry;
};
#define NEVER INT64_MAX

/* Chained hashing: an entry is in the list that begins at buckets[hash % size]. size is a
   power of two, or 0 as long as nothing was stored. heap is a binary heap, see section 7.
   All zero is an empty table. */
struct table {
    struct entry **buckets;
    size_t size, count;
    size_t bytes; /* of all entries */
    struct deadline *heap;
    size_t heap_len, heap_room;
};

/* lock guards the rest. To write one byte, a processor takes the whole cache line, 64
   bytes, from the other processors. So a shard begins on a cache line of its own: two
   processors that work on two shards do not take lines from each other. (_Alignas also
   makes the size of a shard a multiple of 64.) */
static struct shard {
    _Alignas(64) pthread_mutex_t lock;
    struct table table;
    uint64_t appended; /* the last record about this shard in the append-only file */
    uint64_t hits, misses, expired; /* for INFO */
} shards[4096]; /* as many as --shards allows; the system gives memory to those in use */

static void deadline_clear(struct table *t, struct entry *e);

static struct slice entry_value(struct entry *e) {
    return (struct slice){e->data + e->key_len, e->value_len};
}

/* Makes an entry that is in no table yet. Returns NULL when memory is out. */
static struct entry *entry_new(uint32_t hash, struct slice key, struct slice value) {
    struct entry *e = malloc(sizeof *e + key.len + value.len);
    if (!e) return NULL;
    e->next = NULL;
    e->hash = hash;
    e->key_len = (uint32_t)key.len;
    e->value_len = (uint32_t)value.len;
    e->slot = 0;
    memcpy(e->data, key.p, key.len);
    memcpy(e->data + key.len, value.p, value.len);
    return e;
}

static size_t entry_size(const struct entry *e) {
    return sizeof *e + e->key_len + e->value_len;
}

static struct entry **bucket_of(const struct table *t, uint32_t hash) {
    return &t->buckets[hash & (t->size - 1)];
}

/* Returns the entry of a key, also one that has expired, or NULL. */
static struct entry *table_find(const struct table *t, uint32_t hash, struct slice key) {
    if (t->size == 0) return NULL;
    for (struct entry *e = *bucket_of(t, hash); e; e = e->next) {
        if (e->hash != hash || e->key_len != key.len) continue;
        if (memcmp(e->data, key.p, key.len) == 0) return e;
    }
    return NULL;
}

/* Puts e first into its bucket. */
static void bucket_push(struct table *t, struct entry *e) {
    struct entry **bucket = bucket_of(t, e->hash);
    e->next = *bucket;
    *bucket = e;
}

/* Doubles the buckets, or makes the first. Without memory the table stays as it is. */
static void table_grow(struct table *t) {
    struct table old = *t;
    size_t size = t->size > 0 ? 2 * t->size : 16;
    struct entry **buckets = calloc(size, sizeof *buckets);
    if (!buckets) return;
    t->buckets = buckets;
    t->size = size;
    for (size_t i = 0; i < old.size; i++) {
        while (old.buckets[i]) {
            struct entry *e = old.buckets[i];
            old.buckets[i] = e->next;
            bucket_push(t, e);
        }
    }
    free(old.buckets);
}

/* Makes room for one entry more and its deadline. Returns false when memory is out. It is
   no failure that the buckets cannot be doubled: the chains get longer instead. */
static bool table_reserve(struct table *t) {
    if (t->count >= t->size) table_grow(t);
    if (t->heap_len == t->heap_room) {
        size_t room = t->heap_room > 0 ? 2 * t->heap_room : 16;
        /* One more, because heap[0] is not used. */
        struct deadline *heap = realloc(t->heap, (room + 1) * sizeof *heap);
        if (!heap) return false;
        t->heap = heap;
        t->heap_room = room;
    }
    return t->size > 0;
}

/* Puts in an entry whose key is not there. table_reserve comes first. */
static void table_insert(struct table *t, struct entry *e) {
    bucket_push(t, e);
    t->count++;
    t->bytes += entry_size(e);
}

/* Takes out an entry and frees it. The buckets stay: a table never shrinks. */
static void table_remove(struct table *t, struct entry *e) {
    struct entry **link = bucket_of(t, e->hash); /* moves on to the pointer to e */
    while (*link != e) link = &(*link)->next;
    *link = e->next;
    deadline_clear(t, e);
    t->count--;
    t->bytes -= entry_size(e);
    free(e);
}

/* Frees all that t owns. No other thread may know of it any more. */
static void table_free(struct table *t) {
    for (size_t i = 0; i < t->size; i++) {
        while (t->buckets[i]) {
            struct entry *e = t->buckets[i];
            t->buckets[i] = e->next;
            free(e);
        }
    }
    free(t->buckets);
    free(t->heap);
}

/* === 7 Expiry ====================================================================== */

/* The deadlines of a table are a binary heap in an array: heap[1] is the next to come,
   and the children of heap[i], heap[2 * i] and heap[2 * i + 1], are not before it. Each
   entry knows its slot, so that its deadline can be moved or taken away. (The heap is as
   in Sedgewick's "Algorithms", which also counts from 1.) */

static void heap_put(struct table *t, size_t slot, struct deadline d) {
    t->heap[slot] = d;
    d.entry->slot = (uint32_t)slot;
}

/* Puts d into slot, or higher: each parent that is later than d moves down. */
static void heap_up(struct table *t, size_t slot, struct deadline d) {
    while (slot > 1 && t->heap[slot / 2].when > d.when) {
        heap_put(t, slot, t->heap[slot / 2]);
        slot /= 2;
    }
    heap_put(t, slot, d);
}

/* Puts d into slot, or lower: each child that is sooner than d moves up. */
static void heap_down(struct table *t, size_t slot, struct deadline d) {
    while (2 * slot <= t->heap_len) {
        size_t child = 2 * slot;
        bool has_two = child < t->heap_len;
        if (has_two && t->heap[child + 1].when < t->heap[child].when) child++;
        if (t->heap[child].when >= d.when) break;
        heap_put(t, slot, t->heap[child]);
        slot = child;
    }
    heap_put(t, slot, d);
}

/* Takes e's deadline away, if it has one. The last deadline of the heap takes its slot.
   If that comes from another branch, it may be sooner than its new parent. Then it moves
   up, else down, as far as it has to. Here 11, in slot 4, goes. 3, the last, takes its
   slot, is sooner than 10, its parent there, and moves up:

              1                      1
           /     \                /     \
         10       2              3       2
        /  \     /              /  \
      11    12  3             10    12
   */
static void deadline_clear(struct table *t, struct entry *e) {
    size_t slot = e->slot;
    if (slot == 0) return;
    struct deadline last = t->heap[t->heap_len];
    t->heap_len--;
    e->slot = 0;
    if (last.entry == e) return;
    bool is_sooner = slot > 1 && last.when < t->heap[slot / 2].when;
    if (is_sooner) heap_up(t, slot, last);
    else heap_down(t, slot, last);
}

/* Gives e a deadline in place of the one it has, or none if it is NEVER. table_reserve
   comes first. */
static void deadline_set(struct table *t, struct entry *e, int64_t when) {
    deadline_clear(t, e);
    if (when == NEVER) return;
    t->heap_len++;
    heap_up(t, t->heap_len, (struct deadline){when, e});
}

static int64_t deadline_of(const struct table *t, const struct entry *e) {
    return e->slot > 0 ? t->heap[e->slot].when : NEVER;
}

static bool has_passed(int64_t when) { return when != NEVER && when <= now_ms(); }

static bool has_expired(const struct table *t, const struct entry *e) {
    return has_passed(deadline_of(t, e));
}

/* Removes what has expired in a shard, but at most MAX_AT_ONCE entries, so that others
   get its lock soon. Returns whether there may be more.

   The append-only file is not told. Each change of a key, also by EXPIRE, is recorded
   there as a SET of its value with its deadline (see log_set). When the next start runs
   that SET, store finds that the deadline has passed, and removes the key with its older
   value. (If the clock was set back before that start, the key is there again. To record
   each expiry would cost more than this is worth.) */
static bool expire_some(struct shard *s) {
    enum { MAX_AT_ONCE = 128 };
    struct table *t = &s->table;
    uint64_t n = 0;
    pthread_mutex_lock(&s->lock);
    while (n < MAX_AT_ONCE && t->heap_len > 0 && has_passed(t->heap[1].when)) {
        table_remove(t, t->heap[1].entry);
        n++;
    }
    s->expired += n;
    pthread_mutex_unlock(&s->lock);
    return n == MAX_AT_ONCE;
}

static void aof_tick(void);

/* The expiry thread: goes round the shards again and again. A round that finds nothing
   looks at one deadline in each shard. */
static void *expiry_main(void *unused) {
    int64_t last_tick = 0;
    while (stopping == SERVING) {
        int64_t second = monotonic_us() / 1000000;
        if (opt.aof && second != last_tick) aof_tick();
        last_tick = second;
        bool more = false;
        for (long i = 0; i < opt.shards; i++) {
            if (expire_some(&shards[i])) more = true;
        }
        /* Sleep even if there is more. Else, with one shard, this thread would lock it
           again before a thread that waits for the lock gets it: unlock wakes that
           thread, but does not hand it the lock. */
        sleep_ms(more ? 1 : 50);
    }
    return unused;
}

/* === 8 Commands ==================================================================== */

/* KEY: works on the key in argv[1]. WRITES: changes data. OPEN: allowed before AUTH. */
enum { KEY = 1, WRITES = 2, OPEN = 4 };

/* A row of the table of commands says all about one. min_words and max_words count the
   name, too. run replies once, and returns what the reply returned. If the row says KEY,
   run is called with the key at hand locked and looked up: c->entry is its entry, or
   NULL. run must not block. */
struct command {
    const char *name;
    const char *args; /* its syntax; NULL: HELP does not know it */
    size_t min_words, max_words;
    int flags;
    bool (*run)(struct conn *c);
    const char *what, *replies; /* for HELP */
};

/* --- The store ----------------------------------------------------------------------

   The order of a change: first allocate what it needs, then append its record to the
   append-only file's buffer, and only then change the table. That last step cannot fail.
   So when memory is out nothing has been changed, here or there. All this is done while
   the key's shard is locked: the file has the order in which things happened.

   Records are numbered 1, 2, 3 and so on. The numbers are not in the file: a start counts
   the records that it replays, and goes on from there. A record is safe when it is in the
   file, where a crash of kv does not undo it; with "--fsync always", when it is on the
   disk, too. Before a reply is sent, the records that it reveals must be safe, also when
   another client wrote them: if B reads what A has stored, and a crash then undoes it, B
   has seen what never was.

   A shard keeps the number of its last record. A connection keeps the highest number it
   has seen in any shard, also from its own changes. (Records become safe in order: with
   the highest, all others are safe.) Say A's SET becomes record 7: its shard's appended
   is 7. B gets the key: unlock_key sets B's seen to 7, and aof_commit delays B's reply
   until 7 is safe. It also waits if record 7 is about another key of this shard. That is
   more than is needed, but saves a number in each entry. And it works where A's command
   is DEL: then there is no entry, but there still is the shard. */

/* Appends a record of n words, and sets *number to its number; without --aof does
   nothing. Returns false when memory is out. */
static bool aof_append(const struct slice *words, size_t n, uint64_t *number);

static bool fail_oom(struct conn *c) { return fail(c, "OOM out of memory"); }

/* Appends a record of the new value and deadline of the key at hand. Returns false when
   memory is out. */
static bool log_set(struct conn *c, struct slice value, int64_t deadline) {
    char ms[24] = "";
    if (deadline != NEVER) snprintf(ms, sizeof ms, "%" PRId64, deadline);
    struct slice record[] = {
        str("SET"), c->key, value, str("PXAT"), str(ms), /* these two if not NEVER */
    };
    c->recorded += c->key.len + value.len;
    return aof_append(record, deadline == NEVER ? 3 : 5, &c->shard->appended);
}

/* Removes the key at hand, if it is there. When memory is out, it replies and returns
   false; so do store and move_deadline. */
static bool remove_key(struct conn *c) {
    struct slice record[] = {str("DEL"), c->key};
    if (!c->entry) return true;
    if (!aof_append(record, 2, &c->shard->appended)) return fail_oom(c);
    c->recorded += c->key.len;
    table_remove(&c->shard->table, c->entry);
    c->entry = NULL;
    return true;
}

/* Gives the key at hand a value and a deadline, which may be NEVER. If the deadline
   has passed, the key is removed. */
static bool store(struct conn *c, struct slice value, int64_t deadline) {
    struct table *t = &c->shard->table;
    if (has_passed(deadline)) return remove_key(c);
    struct entry *e = entry_new(c->hash, c->key, value);
    if (!e || !table_reserve(t) || !log_set(c, value, deadline)) {
        free(e);
        return fail_oom(c);
    }
    if (c->entry) table_remove(t, c->entry);
    table_insert(t, e);
    c->entry = e;
    deadline_set(t, e, deadline);
    return true;
}

/* Gives the key at hand, which is there, another deadline. */
static bool move_deadline(struct conn *c, int64_t deadline) {
    struct table *t = &c->shard->table;
    if (has_passed(deadline)) return remove_key(c);
    bool ok = table_reserve(t) && log_set(c, entry_value(c->entry), deadline);
    if (!ok) return fail_oom(c);
    deadline_set(t, c->entry, deadline);
    return true;
}

/* Notes the last record about a shard: the reply may depend on it. It may be about a
   change by this connection itself, which has just been appended. */
static void note_seen(struct conn *c, const struct shard *s) {
    if (c->seen < s->appended) c->seen = s->appended;
}

/* Makes key the key at hand: locks its shard and looks it up. What has expired is
   removed, and not found. */
static void lock_key(struct conn *c, struct slice key) {
    uint64_t hash = siphash(table_key, key);
    struct shard *s = &shards[(hash >> 32) & (uint64_t)(opt.shards - 1)];
    pthread_mutex_lock(&s->lock);
    c->key = key;
    c->hash = (uint32_t)hash; /* this half says the bucket, the other one the shard */
    c->shard = s;
    c->entry = table_find(&s->table, c->hash, key);
    if (c->entry && has_expired(&s->table, c->entry)) {
        table_remove(&s->table, c->entry);
        c->entry = NULL;
        s->expired++;
    }
    if (c->cmd->flags & WRITES) return;
    if (c->entry) s->hits++; /* INFO counts what is read, as Redis does */
    else s->misses++;
}

static void unlock_key(struct conn *c) {
    note_seen(c, c->shard);
    pthread_mutex_unlock(&c->shard->lock);
}

static int64_t key_deadline(const struct conn *c) {
    return c->entry ? deadline_of(&c->shard->table, c->entry) : NEVER;
}

/* --- Values and counters ------------------------------------------------------------ */

#define NOT_AN_INTEGER "ERR value is not an integer or out of range"

static bool cmd_get(struct conn *c) {
    if (!c->entry) return reply_nil(c);
    return reply_value(c, entry_value(c->entry));
}

/* A command's name as Redis's errors write it. */
static struct text lower_name(const struct command *cmd) {
    struct text out = {""};
    for (size_t i = 0; cmd->name[i]; i++)
        out.text[i] = (char)tolower((unsigned char)cmd->name[i]);
    return out;
}

/* Turns a word, a number n, into the moment n * unit + base. unit is in ms, base in ms
   since 1970, and not negative. Replies and returns false if n is no number, below min,
   or too large. */
static bool parse_deadline(struct conn *c, struct slice word, int64_t unit, int64_t base,
                           int64_t min, int64_t *deadline) {
    int64_t n;
    if (!parse_int(word, &n)) return fail(c, NOT_AN_INTEGER);
    /* n * unit must fit. base is not negative: it can only make the sum too large. */
    if (n < min || n < INT64_MIN / unit || n > (INT64_MAX - base) / unit)
        return fail(c, "ERR invalid expire time in '%s' command",
                    lower_name(c->cmd).text);
    *deadline = n * unit + base;
    if (*deadline == NEVER) *deadline = NEVER - 1; /* NEVER means none */
    return true;
}

/* What may follow SET key value. Some words exclude each other. EX, PX, EXAT and PXAT are
   followed by a number, in units of so many ms, from now or (AT) from 1970. */
enum { NX = 1, XX = 2, KEEPTTL = 4 };
enum { EX = 8, PX = 16, EXAT = 32, PXAT = 64 };
static const struct set_word {
    const char *name;
    int flag, excludes;
    int64_t unit; /* 0: no number follows */
} set_words[] = {
    {"NX", NX, XX, 0},
    {"XX", XX, NX, 0},
    {"KEEPTTL", KEEPTTL, EX | PX | EXAT | PXAT, 0},
    {"EX", EX, KEEPTTL | PX | EXAT | PXAT, 1000},
    {"PX", PX, KEEPTTL | EX | EXAT | PXAT, 1},
    {"EXAT", EXAT, KEEPTTL | EX | PX | PXAT, 1000},
    {"PXAT", PXAT, KEEPTTL | EX | PX | EXAT, 1},
    {NULL, 0, 0, 0},
};

static bool fail_set(struct conn *c, struct slice word) {
    if (c->resp) return fail(c, "ERR syntax error");
    return fail(c, "ERR syntax error at %s; blanks need quotes: %s", show(word).text,
                "SET greeting \"hello world\"");
}

static bool cmd_set(struct conn *c) {
    const struct set_word *time = NULL;
    struct slice number = {NULL, 0};
    int flags = 0;
    for (size_t i = 3; i < c->argc; i++) {
        const struct set_word *w = set_words;
        while (w->name && !word_is(c->argv[i], w->name)) w++;
        bool lacks_number = w->unit > 0 && i + 1 == c->argc;
        if (!w->name || (flags & w->excludes) || lacks_number)
            return fail_set(c, c->argv[i]);
        flags |= w->flag;
        if (w->unit == 0) continue;
        i++;
        number = c->argv[i];
        time = w;
    }
    int64_t deadline = flags & KEEPTTL ? key_deadline(c) : NEVER;
    int64_t base = flags & (EX | PX) ? now_ms() : 0;
    if (time && !parse_deadline(c, number, time->unit, base, 1, &deadline)) return false;
    bool unwanted = c->entry ? flags & NX : flags & XX;
    if (unwanted) return reply_nil(c);
    return store(c, c->argv[2], deadline) && reply_status(c, "OK");
}

/* DEL and EXISTS have no KEY in their rows: they lock their keys themselves, one
   after the other. If memory runs out for one, DEL has removed those before it. */
static bool cmd_del(struct conn *c) {
    int64_t n = 0;
    bool ok = true;
    for (size_t i = 1; i < c->argc && ok; i++) {
        lock_key(c, c->argv[i]);
        if (c->entry) n++;
        ok = remove_key(c);
        unlock_key(c);
    }
    return ok && reply_int(c, n);
}

static bool cmd_exists(struct conn *c) {
    int64_t n = 0;
    for (size_t i = 1; i < c->argc; i++) {
        lock_key(c, c->argv[i]);
        if (c->entry) n++;
        unlock_key(c);
    }
    return reply_int(c, n);
}

/* Adds to the number that is the key's value. The key keeps its deadline. */
static bool add_to_value(struct conn *c, int64_t by) {
    int64_t value = 0;
    char text[24];
    if (c->entry && !parse_int(entry_value(c->entry), &value))
        return fail(c, NOT_AN_INTEGER);
    bool overflows = by > 0 ? value > INT64_MAX - by : value < INT64_MIN - by;
    if (overflows) return fail(c, "ERR increment or decrement would overflow");
    value += by;
    snprintf(text, sizeof text, "%" PRId64, value);
    return store(c, str(text), key_deadline(c)) && reply_int(c, value);
}

static bool cmd_incr(struct conn *c) { return add_to_value(c, 1); }
static bool cmd_decr(struct conn *c) { return add_to_value(c, -1); }

static bool cmd_incrby(struct conn *c) {
    int64_t by;
    if (!parse_int(c->argv[2], &by)) return fail(c, NOT_AN_INTEGER);
    return add_to_value(c, by);
}

static bool cmd_decrby(struct conn *c) {
    int64_t by;
    if (!parse_int(c->argv[2], &by)) return fail(c, NOT_AN_INTEGER);
    if (by == INT64_MIN) return fail(c, "ERR decrement would overflow");
    return add_to_value(c, -by);
}

/* --- Deadlines ---------------------------------------------------------------------- */

static bool expire(struct conn *c, int64_t unit, int64_t base) {
    int64_t deadline = NEVER;
    if (c->argc > 3) return fail(c, "ERR Unsupported option %s", show(c->argv[3]).text);
    if (!parse_deadline(c, c->argv[2], unit, base, INT64_MIN, &deadline)) return false;
    if (!c->entry) return reply_int(c, 0);
    return move_deadline(c, deadline) && reply_int(c, 1);
}

static bool cmd_expire(struct conn *c) { return expire(c, 1000, now_ms()); }
static bool cmd_pexpire(struct conn *c) { return expire(c, 1, now_ms()); }
static bool cmd_expireat(struct conn *c) { return expire(c, 1000, 0); }
static bool cmd_pexpireat(struct conn *c) { return expire(c, 1, 0); }

static bool cmd_persist(struct conn *c) {
    if (key_deadline(c) == NEVER) return reply_int(c, 0);
    return move_deadline(c, NEVER) && reply_int(c, 1);
}

/* Replies with the time that the key has left, in units of so many ms, rounded as Redis
   does. */
static bool reply_ttl(struct conn *c, int64_t unit) {
    int64_t deadline = key_deadline(c);
    if (!c->entry) return reply_int(c, -2);
    if (deadline == NEVER) return reply_int(c, -1);
    int64_t left = deadline - now_ms();
    if (left < 0) left = 0; /* it has passed since lock_key looked */
    return reply_int(c, (left + unit / 2) / unit);
}

static bool cmd_ttl(struct conn *c) { return reply_ttl(c, 1000); }
static bool cmd_pttl(struct conn *c) { return reply_ttl(c, 1); }

/* --- All keys ----------------------------------------------------------------------- */

/* Whether b is in the class at *at. Moves *at behind the class. As in Redis:

        [a-cx]   a, b, c or x
        [^a-c]   any byte but a, b and c
        [c-a]    a, b or c: a range may be written either way round
        [\a-c]   a, - or c: an escaped byte begins no range, so - is a byte like others
        [X-]a]   X to ], or a: a ] at the end of a range does not end the class

   class = "[" ["^"] { byte | byte "-" byte | "\" byte } ("]" | end of the pattern) */
static bool match_class(const char **at, const char *end, unsigned char b) {
    const char *p = *at + 1;
    bool match = false, negate = p < end && *p == '^';
    if (negate) p++;
    while (p < end && *p != ']') {
        bool escaped = *p == '\\' && end - p > 1;
        if (escaped) p++;
        /* p[2] may be a ], which does not end the class then. */
        bool is_range = !escaped && end - p > 2 && p[1] == '-';
        unsigned char first = (unsigned char)p[0];
        unsigned char last = (unsigned char)p[is_range ? 2 : 0]; /* one byte: first */
        if (first <= b && b <= last) match = true;
        if (last <= b && b <= first) match = true; /* [c-a] */
        p += is_range ? 3 : 1;
    }
    *at = p < end ? p + 1 : p;
    return match != negate;
}

/* Whether byte b matches the item of a pattern at *at. Moves *at behind the item.
   item = "?" | class | "\" byte | byte */
static bool match_item(const char **at, const char *end, char b) {
    if (**at == '[') return match_class(at, end, (unsigned char)b);
    bool escaped = **at == '\\' && end - *at > 1;
    const char *p = escaped ? *at + 1 : *at;
    *at = p + 1;
    return *p == b || (*p == '?' && !escaped);
}

/* Whether s matches a glob pattern. After each item of the pattern, match[n] says whether
   the items so far match the first n bytes of s. Say "a*c" is matched with "abbc":

        items        matches "a*c" so far with   ""  a  ab  abb  abbc
        none                                     1   0  0   0    0
        a                                        0   1  0   0    0
        a*                                       0   1  1   1    1
        a*c                                      0   0  0   0    1

   There is one row, which each item overwrites. A star takes any number of bytes: all
   values after the first 1 become 1. Any other item takes one byte: match[n] becomes 1 if
   match[n - 1] was 1 before this item, and the item matches byte n. When no 1 is left, no
   more can come. (This is dynamic programming. Its time is at most the bytes of the
   pattern times the bytes of s.)

   match is in row, whose len stays 0: the next key uses the same memory. The result is
   wrong if memory is out (row has failed), or once the server gives up: a pattern and a
   key of a megabyte each take long, and this stops then. */
static bool glob_match(struct slice pattern, struct slice s, struct buf *row) {
    const char *item = pattern.p, *end = pattern.p + pattern.len;
    char *match = buf_reserve(row, s.len + 1);
    if (!match) return false;
    memset(match, 0, s.len + 1);
    match[0] = 1;
    while (item < end) {
        const char *next = item;
        if (*item == '*') {
            while (next < end && *next == '*') next++;
            for (size_t n = 1; n <= s.len; n++)
                if (match[n - 1]) match[n] = 1; /* also if it has just become 1 */
        } else {
            bool any = false;
            match_item(&next, end, 0); /* only moves next behind the item */
            /* Backwards, because match[n - 1] must be as it was before this item. */
            for (size_t n = s.len; n > 0 && stopping != GIVING_UP; n--) {
                const char *at = item;
                bool matches = match[n - 1] && match_item(&at, end, s.p[n - 1]);
                match[n] = matches ? 1 : 0;
                if (matches) any = true;
            }
            match[0] = 0; /* an item takes a byte */
            if (!any) return false;
        }
        item = next;
    }
    return match[s.len];
}

/* Adds the keys of a shard to keys: of each its length, then its bytes. The shard is
   locked only while they are copied, because to match and quote them takes longer. */
static void copy_keys(struct conn *c, struct shard *s, struct buf *keys) {
    const struct table *t = &s->table;
    pthread_mutex_lock(&s->lock);
    for (size_t i = 0; i < t->size && stopping != GIVING_UP; i++) {
        for (const struct entry *e = t->buckets[i]; e; e = e->next) {
            if (has_expired(t, e)) continue;
            buf_add(keys, &e->key_len, sizeof e->key_len);
            buf_add(keys, e->data, e->key_len);
        }
    }
    note_seen(c, s);
    pthread_mutex_unlock(&s->lock);
}

/* Takes the key at *at out of what copy_keys has copied. */
static struct slice next_key(const struct buf *keys, size_t *at) {
    uint32_t len;
    memcpy(&len, keys->p + *at, sizeof len);
    struct slice key = {keys->p + *at + sizeof len, len};
    *at += sizeof len + len;
    return key;
}

/* A list that is cut short because the server gives up is not sent. */
static bool cmd_keys(struct conn *c) {
    struct slice pattern = c->argc > 1 ? c->argv[1] : str("*");
    struct buf keys = {0}, found = {0}, row = {0};
    size_t n = 0;
    for (long i = 0; i < opt.shards; i++) {
        keys.len = 0;
        copy_keys(c, &shards[i], &keys);
        if (keys.failed) break;
        for (size_t at = 0; at < keys.len && stopping != GIVING_UP;) {
            size_t start = at;
            if (!glob_match(pattern, next_key(&keys, &at), &row)) continue;
            buf_add(&found, keys.p + start, at - start);
            n++;
        }
    }
    bool gave_up = stopping == GIVING_UP;
    bool ok = !keys.failed && !found.failed && !row.failed && !gave_up;
    if (ok) {
        size_t at = 0;
        list_start(c, n);
        while (at < found.len) reply_word(c, next_key(&found, &at));
        list_end(c, n, "key");
    }
    free(keys.p);
    free(found.p);
    free(row.p);
    if (gave_up) return fail(c, "ERR the server stops");
    return ok || fail_oom(c);
}

static bool cmd_dbsize(struct conn *c) {
    size_t n = 0;
    for (long i = 0; i < opt.shards; i++) {
        pthread_mutex_lock(&shards[i].lock);
        n += shards[i].table.count;
        note_seen(c, &shards[i]);
        pthread_mutex_unlock(&shards[i].lock);
    }
    return reply_int(c, (int64_t)n);
}

/* FLUSHALL and FLUSHDB: all keys go at one moment. No shard is unlocked before all are
   locked, and each is empty when it is unlocked. So nobody who has seen an empty shard
   finds an old key in another. The memory is freed last, because that takes long. */
static bool cmd_flush(struct conn *c) {
    struct slice record[] = {str("FLUSHALL")};
    if (c->argc > 1) return fail(c, "ERR syntax error");
    struct table *old = calloc((size_t)opt.shards, sizeof *old);
    if (!old) return fail_oom(c);
    for (long i = 0; i < opt.shards; i++) pthread_mutex_lock(&shards[i].lock);
    uint64_t number = 0;
    bool ok = aof_append(record, 1, &number);
    for (long i = 0; i < opt.shards; i++) {
        if (ok) {
            old[i] = shards[i].table;
            shards[i].table = (struct table){0};
            shards[i].appended = number;
            note_seen(c, &shards[i]);
        }
        pthread_mutex_unlock(&shards[i].lock);
    }
    for (long i = 0; i < opt.shards; i++) table_free(&old[i]);
    free(old);
    return ok ? reply_status(c, "OK") : fail_oom(c);
}

/* --- The connection ----------------------------------------------------------------- */

static bool cmd_ping(struct conn *c) {
    return c->argc > 1 ? reply_value(c, c->argv[1]) : reply_status(c, "PONG");
}

static bool cmd_echo(struct conn *c) { return reply_value(c, c->argv[1]); }

static bool cmd_select(struct conn *c) {
    int64_t n;
    if (!parse_int(c->argv[1], &n)) return fail(c, NOT_AN_INTEGER);
    if (n != 0) return fail(c, "ERR DB index is out of range");
    return reply_status(c, "OK");
}

static bool cmd_quit(struct conn *c) {
    c->closing = "QUIT";
    return reply_status(c, "OK");
}

/* Lines that begin with "POST" or "Host:" come from a web browser that somebody has
   tricked into talking to kv. The next lines may be commands, so none of them is run. (A
   line GET / HTTP/1.1 just gets an error, and its Host: follows.) */
static bool cmd_http(struct conn *c) {
    static atomic_llong logged;
    c->closing = "it speaks HTTP";
    if (is_first_this_second(&logged))
        say(WARN, "%s speaks HTTP, closed", address_of(c->fd, getpeername).text);
    return fail(c, "ERR this is not a web server");
}

#define NO_TRANSACTIONS "ERR kv has no transactions"

/* MULTI, EXEC, WATCH and DISCARD. In Redis, MULTI begins a transaction: what follows is
   only queued, and EXEC runs it. kv has none. If the connection went on, the requests in
   between would be run one by one, while the client believes that none was run. So
   nothing more is run, and the connection is closed. With RESP, each request that
   follows without a pause of 50 ms gets the error, too, and then conn_main closes: a
   client library sends its whole transaction before it reads, and tells its user why it
   failed only if each request has got a reply. */
static bool cmd_transaction(struct conn *c) {
    if (c->resp) c->in_transaction = true;
    else c->closing = "it wants a transaction";
    return fail(c, NO_TRANSACTIONS);
}

/* The first line of --password-file; empty: nobody needs one. */
static char password[1024];

/* Compares the hashes, which takes the same time whichever byte of the word is wrong. So
   nobody learns a byte of the password from the time. (A wrong word has the right
   hash once in 2^64 times.) */
static bool is_password(struct slice word) {
    return siphash(table_key, word) == siphash(table_key, str(password));
}

static void set_timeouts(int fd, long seconds);

/* Lets the client do what it may do after its login. */
static void log_in(struct conn *c) {
    c->authed = true;
    c->max_bytes = (size_t)opt.max_request;
    c->max_words = MAX_WORDS;
    set_timeouts(c->fd, opt.timeout);
}

/* Logs the client in if user and password are right. Closes after ten wrong ones. */
static bool authenticate(struct conn *c, struct slice user, struct slice word) {
    bool is_user = user.len == 7 && memcmp(user.p, "default", 7) == 0;
    if (is_user && (password[0] == 0 || is_password(word))) {
        log_in(c);
        return true;
    }
    c->wrong_passwords++;
    if (c->wrong_passwords == 10) c->closing = "ten wrong passwords";
    return fail(c, "WRONGPASS invalid username-password pair or user is disabled.");
}

/* AUTH password, or AUTH default password. */
static bool cmd_auth(struct conn *c) {
    struct slice user = c->argc == 3 ? c->argv[1] : str("default");
    if (c->argc > 3) return fail(c, "ERR syntax error");
    if (password[0] == 0 && c->argc == 2)
        return fail(c,
                    "ERR AUTH <password> called without any password configured for the "
                    "default user. Are you sure your configuration is correct?");
    return authenticate(c, user, c->argv[c->argc - 1]) && reply_status(c, "OK");
}

/* Begins an item of HELLO's reply, which has a name and a value. In text it is a line,
   name:value. */
static void reply_name(struct conn *c, const char *name) {
    if (c->resp) {
        reply_value(c, str(name));
    } else {
        buf_add_text(&c->out, name);
        buf_add_text(&c->out, ":");
    }
}

/* HELLO [2|3 [AUTH default password] [SETNAME name]]: what client libraries begin with.
   Nobody asks for the name, so it is not kept. */
static bool cmd_hello(struct conn *c) {
    int64_t version = c->resp3 ? 3 : 2;
    size_t auth = 0; /* where in argv AUTH is */
    if (c->argc > 1 && !parse_int(c->argv[1], &version))
        return fail(c, "ERR Protocol version is not an integer or out of range");
    if (version != 2 && version != 3)
        return fail(c, "NOPROTO unsupported protocol version");
    for (size_t i = 2; i < c->argc;) {
        bool is_auth = word_is(c->argv[i], "AUTH") && i + 2 < c->argc;
        bool is_name = word_is(c->argv[i], "SETNAME") && i + 1 < c->argc;
        if (!is_auth && !is_name)
            return fail(c, "ERR Syntax error in HELLO option '%s'",
                        show(c->argv[i]).text);
        if (is_auth) auth = i;
        i += is_auth ? 3 : 2;
    }
    if (auth > 0) {
        struct slice user = c->argv[auth + 1], word = c->argv[auth + 2];
        if (!authenticate(c, user, word)) return false;
    }
    if (!c->authed)
        return fail(
            c, "NOAUTH HELLO must be called with the client already authenticated, "
               "otherwise the HELLO <proto> AUTH <user> <pass> option can be used to "
               "authenticate the client and select the RESP protocol version at the "
               "same time");
    c->resp3 = version == 3;
    /* RESP3 has a map of six pairs, RESP2 a list of twelve items. */
    if (c->resp && c->resp3) buf_add_header(&c->out, '%', 6);
    else list_start(c, 12);
    reply_name(c, "server");
    reply_value(c, str("kv"));
    reply_name(c, "version");
    reply_value(c, str(KV_VERSION));
    reply_name(c, "proto");
    reply_int(c, version);
    reply_name(c, "id");
    reply_int(c, c->id);
    reply_name(c, "mode");
    reply_value(c, str("standalone"));
    reply_name(c, "role");
    reply_value(c, str("master"));
    return list_end(c, 6, "item");
}

/* --- INFO --------------------------------------------------------------------------- */

/* How many commands have been run. Each connection counts in one of many counters: with
   one for all, every request would wait for its cache line. */
static struct { _Alignas(64) atomic_ullong commands; } counters[64];

static int64_t started_us; /* on the monotonic clock */

static int64_t aof_size(void);

/* Adds up what the shards count. */
static void add_up(struct conn *c, struct table *table, struct shard *sum) {
    for (long i = 0; i < opt.shards; i++) {
        struct shard *s = &shards[i];
        pthread_mutex_lock(&s->lock);
        table->count += s->table.count;
        table->heap_len += s->table.heap_len;
        table->bytes += s->table.bytes;
        sum->hits += s->hits;
        sum->misses += s->misses;
        sum->expired += s->expired;
        note_seen(c, s);
        pthread_mutex_unlock(&s->lock);
    }
}

/* Whether INFO is to show a section: all if none is named. */
static bool shows_section(const struct conn *c, const char *section) {
    bool shows = c->argc == 1;
    for (size_t i = 1; i < c->argc; i++) {
        struct slice word = c->argv[i];
        if (word_is(word, section) || word_is(word, "all")) shows = true;
        if (word_is(word, "default") || word_is(word, "everything")) shows = true;
    }
    return shows;
}

/* A field is a line name:value. RESP has them in one string, a heading before each
   section; text has only the lines. */
static bool cmd_info(struct conn *c) {
    struct table table = {0};
    struct shard sum = {.hits = 0};
    unsigned long long run = 0;
    char keyspace[64];
    add_up(c, &table, &sum);
    for (int i = 0; i < 64; i++) run += counters[i].commands;
    snprintf(keyspace, sizeof keyspace, "keys=%zu,expires=%zu", table.count,
             table.heap_len);
    const struct {
        const char *section, *name, *text; /* text NULL: it is a number */
        int64_t number;
    } fields[] = {
        {"Server", "kv_version", KV_VERSION, 0},
        {"Server", "uptime_in_seconds", NULL, (monotonic_us() - started_us) / 1000000},
        {"Clients", "connected_clients", NULL, clients},
        {"Clients", "maxclients", NULL, opt.max_clients},
        {"Clients", "blocked_clients", NULL, 0}, /* redis-cli --stat wants it */
        {"Memory", "used_memory", NULL, (int64_t)table.bytes},
        {"Persistence", "loading", NULL, 0},
        {"Persistence", "aof_enabled", NULL, opt.aof ? 1 : 0},
        {"Persistence", "aof_current_size", NULL, aof_size()},
        {"Stats", "total_connections_received", NULL, connections},
        {"Stats", "total_commands_processed", NULL, (int64_t)run},
        {"Stats", "expired_keys", NULL, (int64_t)sum.expired},
        {"Stats", "keyspace_hits", NULL, (int64_t)sum.hits},
        {"Stats", "keyspace_misses", NULL, (int64_t)sum.misses},
        {"Replication", "role", "master", 0},
        {"Keyspace", "db0", keyspace, 0},
    };
    struct buf all = {0};
    const char *section = "";
    size_t n = 0;
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        char line[128], number[24];
        if (!shows_section(c, fields[i].section)) continue;
        if (c->resp && strcmp(section, fields[i].section) != 0) {
            section = fields[i].section;
            snprintf(line, sizeof line, "%s# %s\r\n", n > 0 ? "\r\n" : "", section);
            buf_add_text(&all, line);
        }
        snprintf(number, sizeof number, "%" PRId64, fields[i].number);
        const char *value = fields[i].text ? fields[i].text : number;
        const char *line_end = c->crlf ? "\r\n" : "\n";
        snprintf(line, sizeof line, "%s:%s%s", fields[i].name, value, line_end);
        buf_add_text(&all, line);
        n++;
    }
    if (all.failed) c->out.failed = true;
    if (c->resp) reply_value(c, (struct slice){all.p, all.len});
    else buf_add(&c->out, all.p, all.len);
    free(all.p);
    return list_end(c, n, "field");
}

/* --- The table of commands, and running one ----------------------------------------- */

static bool cmd_help(struct conn *c);

enum { ANY = MAX_WORDS }; /* as many words as a request may have */

/* The most used come first, because a lookup goes from the top. Those without syntax come
   last; they take any number of words, so no error shows their syntax. */
static const struct command commands[] = {
    {"GET", "key", 2, 2, KEY, cmd_get, "the value of a key", "it, or (nil)"},
    {"SET", "key value [NX|XX] [EX s|PX ms|EXAT s|PXAT ms|KEEPTTL]", 3, ANY, KEY | WRITES,
     cmd_set, "store a value", "OK, or (nil) if NX finds a key or XX finds none"},
    {"PING", "[message]", 1, 2, OPEN, cmd_ping, "are you there?", "PONG, or the message"},
    {"INCR", "key", 2, 2, KEY | WRITES, cmd_incr, "add 1; no key is 0", "the sum"},
    {"DEL", "key...", 2, ANY, WRITES, cmd_del, "remove keys", "how many there were"},
    {"UNLINK", "key...", 2, ANY, WRITES, cmd_del, "remove keys", "how many there were"},
    {"DECR", "key", 2, 2, KEY | WRITES, cmd_decr, "subtract 1", "the difference"},
    {"INCRBY", "key n", 3, 3, KEY | WRITES, cmd_incrby, "add n", "the sum"},
    {"DECRBY", "key n", 3, 3, KEY | WRITES, cmd_decrby, "subtract n", "the difference"},
    {"EXISTS", "key...", 2, ANY, 0, cmd_exists, "do keys exist?", "how many do"},
    {"KEYS", "[pattern]", 1, 2, 0, cmd_keys, "which match * ? [a-z] [^a] \\x", "these"},
    {"EXPIRE", "key n", 3, ANY, KEY | WRITES, cmd_expire, "remove it in n s", "1, or 0"},
    {"PEXPIRE", "key n", 3, ANY, KEY | WRITES, cmd_pexpire, "remove it in n ms",
     "1, or 0"},
    {"EXPIREAT", "key n", 3, ANY, KEY | WRITES, cmd_expireat, "... n s after 1970 began",
     "1, or 0"},
    {"PEXPIREAT", "key n", 3, ANY, KEY | WRITES, cmd_pexpireat,
     "... n ms after 1970 began", "1, or 0"},
    {"TTL", "key", 2, 2, KEY, cmd_ttl, "how many s it has left",
     "it; -1: for ever, -2: no key"},
    {"PTTL", "key", 2, 2, KEY, cmd_pttl, "how many ms it has left",
     "it; -1: for ever, -2: no key"},
    {"PERSIST", "key", 2, 2, KEY | WRITES, cmd_persist, "let it not expire", "1, or 0"},
    {"DBSIZE", "", 1, 1, 0, cmd_dbsize, "count all keys", "how many there are"},
    {"FLUSHDB", "", 1, ANY, WRITES, cmd_flush, "remove all keys", "OK"},
    {"FLUSHALL", "", 1, ANY, WRITES, cmd_flush, "remove all keys", "OK"},
    {"ECHO", "message", 2, 2, 0, cmd_echo, "repeat the message", "the message"},
    {"HELP", "[command]", 1, 2, OPEN, cmd_help, "this list, or one command", "lines"},
    {"INFO", "[section]", 1, ANY, 0, cmd_info, "how the server is", "name:value, ..."},
    {"AUTH", "[default] password", 2, ANY, OPEN, cmd_auth, "log in", "OK"},
    {"HELLO", "[2|3 [AUTH default password] [SETNAME name]]", 1, ANY, OPEN, cmd_hello,
     "choose RESP2 or RESP3", "name:value, ..."},
    {"QUIT", "", 1, ANY, OPEN, cmd_quit, "close the connection", "OK"},
    {"SELECT", "0", 2, 2, 0, cmd_select, "there is one database", "OK"},
    {"POST", NULL, 1, ANY, OPEN, cmd_http, NULL, NULL},
    {"Host:", NULL, 1, ANY, OPEN, cmd_http, NULL, NULL},
    {"MULTI", NULL, 1, ANY, OPEN, cmd_transaction, NULL, NULL},
    {"WATCH", NULL, 1, ANY, OPEN, cmd_transaction, NULL, NULL},
    {"EXEC", NULL, 1, ANY, OPEN, cmd_transaction, NULL, NULL},
    {"DISCARD", NULL, 1, ANY, OPEN, cmd_transaction, NULL, NULL},
    {NULL, NULL, 0, 0, 0, NULL, NULL, NULL},
};

static const struct command *find_command(struct slice word) {
    for (const struct command *cmd = commands; cmd->name; cmd++)
        if (word_is(word, cmd->name)) return cmd;
    return NULL;
}

static bool fail_unknown(struct conn *c, struct slice word) {
    return fail(c, "ERR unknown command '%s', see HELP", show(word).text);
}

/* HELP command: what its row says. */
static bool help_one(struct conn *c, struct slice word) {
    const struct command *cmd = find_command(word);
    if (!cmd || !cmd->args) return fail_unknown(c, word);
    struct text syntax;
    snprintf(syntax.text, sizeof syntax, "%s %s", cmd->name, cmd->args);
    list_start(c, 3);
    reply_status(c, syntax.text);
    reply_status(c, cmd->what);
    reply_status(c, cmd->replies);
    return list_end(c, 3, "line");
}

static bool cmd_help(struct conn *c) {
    if (c->argc > 1) return help_one(c, c->argv[1]);
    size_t n = 0;
    while (commands[n].args) n++;
    list_start(c, n);
    for (size_t i = 0; i < n; i++) {
        const struct command *cmd = &commands[i];
        struct text line;
        int width = 23 - (int)strlen(cmd->name);
        snprintf(line.text, sizeof line, "%s %-*s %s", cmd->name, width, cmd->args,
                 cmd->what);
        reply_status(c, line.text);
    }
    return list_end(c, n, "command");
}

/* Whether the append-only file cannot be written: then nothing may be changed. */
static bool aof_is_broken(void);
#define MISCONF "MISCONF the append-only file cannot be written"

/* Runs the request in argv. Returns what the reply returned. */
static bool run_request(struct conn *c) {
    const struct command *cmd = c->cmd = find_command(c->argv[0]);
    if (c->in_transaction) return fail(c, NO_TRANSACTIONS);
    if (!cmd) return fail_unknown(c, c->argv[0]);
    if (c->argc < cmd->min_words || c->argc > cmd->max_words)
        return fail(c, "ERR wrong number of arguments for '%s' command: %s %s",
                    lower_name(cmd).text, cmd->name, cmd->args);
    if (!c->authed && !(cmd->flags & OPEN))
        return fail(c, "NOAUTH Authentication required.");
    bool writes = cmd->flags & WRITES;
    if (writes && aof_is_broken()) return fail(c, MISCONF);
    if (writes) c->writes = true;
    if (!(cmd->flags & KEY)) return cmd->run(c);
    lock_key(c, c->argv[1]);
    bool ok = cmd->run(c);
    unlock_key(c);
    return ok;
}

/* Logs a request, its client and how long it took. Where a word may be a password, only
   the first word is shown. If AUTH was mistyped, the word after it may be one, too. */
static void log_request(const struct conn *c, const char *client, int64_t us) {
    char line[512], *end = line;
    char *last = line + sizeof line - sizeof(struct text); /* one word more fits here */
    bool is_auth = c->cmd && (c->cmd->run == cmd_auth || c->cmd->run == cmd_hello);
    bool is_secret = is_auth || !c->authed || (!c->cmd && password[0] != 0);
    size_t shown = is_secret ? 1 : c->argc;
    for (size_t i = 0; i < shown && end < last; i++) {
        *end++ = ' ';
        end = stpcpy(end, show(c->argv[i]).text);
    }
    *end = 0;
    say(COMMAND, "%s%s (%ld us)", client, line, (long)us);
}

/* === 9 Connections ================================================================= */

/* Waits until what the replies of c reveal is safe. Returns false if the append-only file
   cannot be written. Without --aof returns true at once. */
static bool aof_commit(struct conn *c);

/* Replaces all replies by MISCONF, in the form of the request that came last. (Where a
   client mixes both forms, some have the wrong one.) */
static void replace_replies(struct conn *c) {
    c->out.len = 0;
    for (size_t i = 0; i < c->replies; i++) fail(c, MISCONF ", the outcome is unknown");
}

/* Sends all replies, once the records that they reveal are safe. Blocks until the client
   has taken them, up to --timeout. Sets closing on failure.

   Where the file cannot be written there are two cases. If one of the requests writes,
   all replies become MISCONF, because nobody knows which bytes of c->out are its reply.
   (The change stays, others can see it, and its record will be tried again, see section
   10. So the reply says neither OK nor that it has failed.) If all requests only read,
   the replies are sent as they are, although they may reveal a change that a crash now
   would undo: a full disk is no reason to stop reading. */
static void send_replies(struct conn *c) {
    if (!aof_commit(c) && c->writes) replace_replies(c);
    if (c->out.failed) c->closing = "out of memory"; /* half a reply is worse than none */
    size_t sent = 0, len = c->out.failed ? 0 : c->out.len;
    while (sent < len) {
        ssize_t n = send(c->fd, c->out.p + sent, len - sent, 0);
        if (n >= 0) {
            sent += (size_t)n;
        } else if (errno != EINTR) {
            /* EAGAIN: it took longer than set_timeouts allows. */
            c->closing = errno == EAGAIN ? "timeout" : strerror(errno);
            break;
        }
    }
    c->out.len = c->replies = c->recorded = 0;
    c->writes = false;
    c->seen = 0;
}

/* There is no more input. All requests that had arrived in full were run before this
   read. If it was the client that ended the input, not our own shutdown, the client is
   told about a line that has no end. */
static void end_input(struct conn *c) {
    c->closing = "end of input";
    bool is_half_line = c->in.len > 0 && c->in.p[0] != '*';
    if (!is_half_line || stopping != SERVING) return;
    c->resp = c->crlf = false;
    fail_line(c, "ERR the last line has no newline: it may be cut short and is not run");
}

/* Waits for input, up to --timeout, and appends it to what there is of a request. If
   there will be no more, says in closing why. */
static void read_more(struct conn *c) {
    struct buf *in = &c->in;
    in->len -= c->pos;
    if (in->len > 0) memmove(in->p, in->p + c->pos, in->len);
    c->pos = 0;
    buf_slim(in);
    buf_slim(&c->out);
    char *to = buf_reserve(in, MIN_READ);
    if (!to) {
        c->closing = "out of memory";
        return;
    }
    ssize_t n;
    do n = recv(c->fd, to, in->cap - in->len, 0);
    while (n < 0 && errno == EINTR);
    if (n > 0) in->len += (size_t)n;
    if (n == 0) end_input(c);
    if (n < 0) c->closing = errno == EAGAIN ? "timeout" : strerror(errno);
    /* A read that fills the buffer has probably left more. So the buffer is doubled for
       the next read, up to IO_CHUNK. (It grows further, above, for a long request. If
       there is no memory here, the next call sees that, and closes the connection.) */
    if (in->len == in->cap && in->cap < IO_CHUNK) buf_reserve(in, in->cap);
}

/* Runs all requests that have arrived in full. Sends replies in between: whenever the
   replies and what was recorded for the append-only file add up to IO_CHUNK bytes, so
   that both are bounded. */
static void run_requests(struct conn *c, const char *client) {
    while (stopping != GIVING_UP && next_request(c)) {
        if (c->argc > 0) {
            int64_t start = is_logged(COMMAND) ? monotonic_us() : 0;
            run_request(c);
            if (is_logged(COMMAND)) log_request(c, client, monotonic_us() - start);
            c->replies++;
            counters[c->fd % 64].commands++;
        }
        if (c->out.len + c->recorded >= IO_CHUNK) send_replies(c);
    }
}

/* Closes fd so that the client gets the last replies. If input is unread at close, or
   comes later, the system resets the connection, and the client's system may throw away
   replies that the client has not read yet. So this ends only our side first, and reads
   until the client closes its side or is silent for a second. A client that sends on and
   on is cut off after one or two seconds. */
static void hang_up(int fd) {
    char unread[1024];
    int64_t end = monotonic_us() + 1000000;
    set_timeouts(fd, 1);
    shutdown(fd, SHUT_WR);
    while (recv(fd, unread, sizeof unread, 0) > 0 && monotonic_us() < end) continue;
    close(fd);
}

/* Whether there is more input, or comes within 50 ms. (Its end counts, too.) */
static bool has_input(int fd) {
    struct pollfd input = {.fd = fd, .events = POLLIN};
    return poll(&input, 1, 50) > 0;
}

/* A connection's thread: reads, runs all that has arrived, sends all replies at once. */
static void *conn_main(void *arg) {
    struct conn c = {.fd = (int)(intptr_t)arg, .id = ++connections};
    struct text client = {""};
    if (is_logged(CLIENT)) client = address_of(c.fd, getpeername);
    say(CLIENT, "%s connected", client.text);
    c.max_bytes =
        (size_t)(opt.max_request < OPEN_MAX_BYTES ? opt.max_request : OPEN_MAX_BYTES);
    c.max_words = OPEN_MAX_WORDS;
    if (password[0] == 0) log_in(&c);
    while (!c.closing && stopping != GIVING_UP) {
        read_more(&c);
        run_requests(&c, client.text);
        if (c.in_transaction && !c.closing && !has_input(c.fd))
            c.closing = "it wants a transaction";
        send_replies(&c);
    }
    say(CLIENT, "%s closed: %s", client.text, c.closing ? c.closing : "the server stops");
    free(c.in.p);
    free(c.argv);
    free(c.out.p);
    clients--; /* before the client sees the end: the next one may come at once */
    hang_up(c.fd);
    threads--; /* the last thing: main ends the program at 0 */
    return NULL;
}

/* === 10 Append-only file =========================================================== */

/* The file is a sequence of batches. A batch is records, each a RESP array, and a line
   with the checksum of their bytes. The first batch has no records: its line says that
   the file is kv's. All this can be sent to another kv as it is, because a record is a
   request, and a checksum line is a comment of the text protocol: tail -c +1 -F FILE | nc
   keeps a copy.

   Threads append records to gathered while they hold a shard's lock, and write what has
   gathered before they reply. Records are counted from 1. One thread at a time is the
   writer. It takes all that has gathered as its batch, by a swap of two buffers, and
   writes that without the lock:

        gathered  ---swap--->  batch  ---write--->  file
        up to end              up to batch_end      up to safe

   This is group commit: while A writes, B and C append their records, and wait. When A is
   done, both are woken. B is first: it becomes the writer, and writes for C, too. So many
   records share a write and an fsync.

   Say the disk becomes full while the writer writes a batch, records 5 to 7, and record 8
   has gathered meanwhile. The writer sets broken, and is done. The threads that wait for
   one of the records 5 to 8 wait no longer. Those with a request that writes answer
   MISCONF, the others as usual (send_replies). While broken is set, requests that would
   write are refused (run_request). Only the expiry thread still tries to write the rest
   of the batch, once a second (retry_batch). Once that is in the file, safe is 7 and
   broken is cleared. Then the expiry thread, or a connection that is faster, writes
   record 8 as the next batch. */
static struct {
    int fd; /* -1: there is no file, or it is still being replayed */

    pthread_mutex_t lock; /* guards gathered, end and has_writer */
    struct buf gathered;  /* records, and room for a checksum line */
    uint64_t end;         /* the last record */
    bool has_writer;      /* a thread writes; no other does meanwhile */
    pthread_cond_t done;  /* signals that the writer is done */

    /* One thread at a time may use batch, and does so without the lock:

         has_writer  broken   batch
         false       false    is empty
         true        false    belongs to the writer
         false       true     could not be written in full; belongs to the expiry thread
                              or, when that has ended, to main (retry_batch)

       (What a thread does to batch before it unlocks the mutex is seen by the next thread
       that locks it.) */
    struct buf batch;   /* what is being written, or could not be written in full */
    size_t written;     /* so many of its bytes are in the file */
    uint64_t batch_end; /* its last record; when batch is empty, all up to it are safe */

    /* Read at any time, changed only with the lock: */
    atomic_uint_fast64_t safe; /* the last record that is safe, see section 8 */
    atomic_bool broken;        /* batch could not be written in full */
} aof = {
    .fd = -1,
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .done = PTHREAD_COND_INITIALIZER,
};

static bool aof_is_broken(void) { return aof.broken; }

enum { SUM_LINE = 23 }; /* the length of a checksum line */

/* Makes the checksum line of some bytes. to has room for it and a final 0. */
static void format_sum_line(char *to, struct slice bytes) {
    snprintf(to, SUM_LINE + 1, "#SUM:%016" PRIx64 "\r\n", siphash(checksum_key, bytes));
}

/* Adds a record of n words to b. Makes room for all of it first, and for a checksum line
   behind it. Returns false when memory is out, and leaves b as it was. */
static bool add_record(struct buf *b, const struct slice *words, size_t n) {
    enum { MAX_HEADER = 24 };
    size_t room = MAX_HEADER + SUM_LINE + 1;
    for (size_t i = 0; i < n; i++) room += MAX_HEADER + words[i].len + 2;
    if (!buf_reserve(b, room)) {
        b->failed = false;
        return false;
    }
    buf_add_header(b, '*', n);
    for (size_t i = 0; i < n; i++) {
        buf_add_header(b, '$', words[i].len);
        buf_add(b, words[i].p, words[i].len);
        buf_add_text(b, "\r\n");
    }
    return true;
}

/* Ends the batch in b with its checksum line, for which add_record has made room. */
static void end_batch(struct buf *b) {
    struct slice records = {b->p, b->len};
    format_sum_line(b->p + b->len, records);
    b->len += SUM_LINE;
}

/* Called with the lock of the record's shard, or of all shards. If memory is out,
   nothing is appended. (A request that run_request has let through may call this just
   after broken was set. Its record is written later, and its reply may be MISCONF.) */
static bool aof_append(const struct slice *words, size_t n, uint64_t *number) {
    if (aof.fd < 0) return true;
    pthread_mutex_lock(&aof.lock);
    bool ok = add_record(&aof.gathered, words, n);
    if (ok) *number = ++aof.end;
    pthread_mutex_unlock(&aof.lock);
    return ok;
}

/* Ends the program because a call about the file has failed; errno says why. */
static void die_of_aof(const char *what) {
    die(1, "%s: %s: %s", opt.aof, what, strerror(errno));
}

/* Flushes what was written to fd to the disk. Returns false on failure. */
static bool sync_file(int fd) {
#ifdef F_FULLFSYNC
    if (fcntl(fd, F_FULLFSYNC) == 0) return true; /* fsync does less on macOS */
#endif
    while (fsync(fd) < 0)
        if (errno != EINTR) return false;
    return true;
}

/* Makes the gathered records the next batch. Called with the lock. */
static void take_batch(void) {
    struct buf empty = aof.batch; /* it has no bytes, but perhaps memory */
    aof.batch = aof.gathered;
    aof.batch_end = aof.end;
    aof.written = 0;
    aof.gathered = empty;
}

/* Writes the rest of b to fd: *written bytes of it were written before. Adds to *written
   what it writes. Returns false on failure. */
static bool write_rest(int fd, const struct buf *b, size_t *written) {
    while (*written < b->len) {
        ssize_t n = write(fd, b->p + *written, b->len - *written);
        if (n < 0 && errno != EINTR) return false;
        if (n > 0) *written += (size_t)n;
    }
    return true;
}

/* Writes what is left of the batch. With "--fsync always" waits for the disk. Returns
   false when writing fails; the next call goes on where it stopped. A failed fsync ends
   the program: the system may have dropped what it could not write, and then the next
   fsync would succeed without it. */
static bool write_batch(void) {
    if (!write_rest(aof.fd, &aof.batch, &aof.written)) return false;
    if (fsync_policy == FSYNC_ALWAYS && !sync_file(aof.fd)) die_of_aof("fsync");
    aof.batch.len = 0;
    buf_slim(&aof.batch);
    return true;
}

/* Makes this thread the writer: it writes all that has gathered, as a batch. The caller
   has the lock, and has seen that there is no writer, that broken is not set, and that a
   record is not safe. (Then batch is empty, as in the first row of the table, and the
   record is in gathered.) While this thread writes, the lock is released. */
static void be_writer(void) {
    take_batch();
    aof.has_writer = true;
    pthread_mutex_unlock(&aof.lock);
    end_batch(&aof.batch);
    bool ok = write_batch();
    if (!ok) say(ERROR, "%s: %s", opt.aof, strerror(errno));
    pthread_mutex_lock(&aof.lock);
    if (ok) aof.safe = aof.batch_end;
    else aof.broken = true;
    aof.has_writer = false;
    pthread_cond_broadcast(&aof.done);
}

/* Waits until a record is safe: while another thread is the writer, this one waits; if
   none is, it becomes the writer. Returns false when writing fails. */
static bool wait_until_safe(uint64_t record) {
    pthread_mutex_lock(&aof.lock);
    while (aof.safe < record && !aof.broken) {
        if (aof.has_writer) pthread_cond_wait(&aof.done, &aof.lock);
        else be_writer();
    }
    pthread_mutex_unlock(&aof.lock);
    return aof.safe >= record;
}

/* Tries again to write the batch that failed. When be_writer set broken, it woke all that
   waited. While broken is set, no thread begins to wait or becomes the writer: only the
   expiry thread uses batch, or main when that thread has ended. Returns false when
   writing fails again. */
static bool retry_batch(void) {
    if (!write_batch()) return false;
    say(WARN, "%s: works again", opt.aof);
    pthread_mutex_lock(&aof.lock);
    aof.safe = aof.batch_end;
    aof.broken = false;
    pthread_mutex_unlock(&aof.lock);
    return true;
}

/* Before it waits, it yields: other threads that are ready to run append their records
   now, and more records share a write. */
static bool aof_commit(struct conn *c) {
    if (aof.safe >= c->seen) return true;
    if (aof.broken) return false;
    sched_yield();
    return wait_until_safe(c->seen);
}

/* Writes all records that there are now, also if writing has failed before. Returns false
   when it fails. */
static bool aof_write_all(void) {
    pthread_mutex_lock(&aof.lock);
    uint64_t end = aof.end;
    bool has_failed = aof.broken;
    pthread_mutex_unlock(&aof.lock);
    if (has_failed && !retry_batch()) return false;
    return wait_until_safe(end);
}

/* The expiry thread calls this each second. Tries again what could not be written, and
   with --fsync everysec flushes what was written to the disk. */
static void aof_tick(void) {
    static uint64_t synced;
    aof_write_all();
    uint64_t safe = aof.safe;
    if (fsync_policy != FSYNC_EVERYSEC || safe == synced) return;
    if (!sync_file(aof.fd)) die_of_aof("fsync");
    synced = safe;
}

/* --- At the start: replay ----------------------------------------------------------- */

/* Whether a checksum line begins at p. */
static bool is_sum_line(const char *p, const char *end) {
    if (end - p < SUM_LINE || memcmp(p, "#SUM:", 5) != 0) return false;
    for (int i = 5; i < 21; i++)
        if (!is_hex(p[i])) return false;
    return memcmp(p + 21, "\r\n", 2) == 0;
}

/* The batch at start is not whole, or its checksum is wrong. Two things can have
   happened:

     ... batch #SUM batch #SUM records rec|          a crash has cut the end off: torn
     ... batch #SUM ba?ch #SUM records #SUM          a byte has changed: damaged

   The last thing of a batch is its checksum line. So if a crash has cut a batch off,
   there is no such line behind start: kv looks for one at each byte. If it finds none, it
   says torn, else damaged. This is a guess, and may be wrong:

   1. The batch is torn, but a value in it contains a checksum line. kv says damaged.
   2. The power failed. The system had written the end of the batch to the disk, but not
      yet the part before: ... batch #SUM 000000000 #SUM. kv says damaged, not torn.
   3. Only the last checksum line has changed, and looks like none any more:
      ... batch #SUM batch #S?M. kv says torn.

   Where it says damaged, kv changes nothing, and a person decides. Where it says torn, kv
   cuts the batch off with a warning; in case 3 its records were good. */
static bool is_torn(struct slice file, size_t start) {
    const char *end = file.p + file.len;
    for (const char *p = file.p + start; p < end; p++)
        if (is_sum_line(p, end)) return false;
    return true;
}

/* Returns the checksum line that ends the batch at start. Returns NULL if it is not
   right, or if there is none. c->in is the file itself, mapped read-only: take_array
   only reads it. If that refuses a record, its reply and c->closing are ignored. */
static const char *check_batch(struct conn *c, size_t start) {
    const char *end = c->in.p + c->in.len, *at = c->in.p + start;
    c->pos = start;
    while (at < end && !is_sum_line(at, end)) {
        c->argc = 0;
        if (*at != '*' || take_array(c) != COMPLETE) return NULL;
        at = c->in.p + c->pos;
    }
    if (at == end) return NULL;
    char right[SUM_LINE + 1];
    format_sum_line(right, (struct slice){c->in.p + start, c->pos - start});
    return memcmp(at, right, SUM_LINE) == 0 ? at : NULL;
}

/* Runs the record at c->pos. What cannot be run ends the program, and so does a
   signal. */
static void replay_record(struct conn *c) {
    size_t at = c->pos;
    c->argc = c->out.len = 0;
    bool ok = take_array(c) == COMPLETE && c->argc > 0 && run_request(c);
    aof.end++; /* compact wants to know how many there are */
    if (c->out.failed) die(1, "%s: at byte %zu: out of memory", opt.aof, at);
    if (!ok) {
        struct slice reply = {c->out.p, c->out.len};
        die(1, "%s: at byte %zu: %s", opt.aof, at,
            reply.len ? show(reply).text : "no record");
    }
    if (stopping == SERVING) return;
    say(INFO, "stopped before all of %s was loaded", opt.aof);
    exit(0);
}

/* Runs the file, which is mapped into memory, batch by batch, each after its checksum was
   found to be right. c is a connection without a client. aof.fd is still -1, so that its
   commands append nothing. Returns how many bytes are good: the rest is torn. Damage ends
   the program. */
static size_t replay(struct slice file) {
    struct conn c = {.resp = true, .authed = true};
    c.in = (struct buf){file.p, file.len, file.len, false};
    c.max_bytes = SIZE_MAX / 2; /* --max-request may have been larger once */
    c.max_words = MAX_WORDS;
    int64_t next_report = monotonic_us() + 1000000;
    size_t good = 0;
    /* Room for all words. Else take_array could refuse a record only because memory is
       out, and that would pass for damage. */
    c.argv = malloc(MAX_WORDS * sizeof *c.argv);
    c.argv_room = MAX_WORDS;
    if (!c.argv) die_of_aof("replay");
    while (good < file.len) {
        const char *sum_line = check_batch(&c, good);
        if (!sum_line && is_torn(file, good)) break;
        if (!sum_line)
            die(1,
                "%s: wrong checksum or record behind byte %zu; to cut that off, and lose "
                "%zu bytes: truncate -s %zu %s",
                opt.aof, good, file.len - good, good, opt.aof);
        size_t end = (size_t)(sum_line - file.p);
        c.pos = good;
        while (c.pos < end) replay_record(&c);
        good = end + SUM_LINE;
        if (monotonic_us() < next_report) continue;
        say(INFO, "%s: %.0f %% loaded", opt.aof, 100.0 * (double)good / (double)file.len);
        next_report += 1000000;
    }
    free(c.argv);
    free(c.out.p);
    return good;
}

/* Replays the file that is open as fd, and returns how many of its size bytes are
   good. */
static size_t replay_file(int fd, size_t size, const char *header) {
    /* One byte more, because mmap refuses 0. Nobody reads that byte. */
    char *p = mmap(NULL, size + 1, PROT_READ, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED) die_of_aof("read");
    if (memcmp(p, header, size < SUM_LINE ? size : SUM_LINE) != 0)
        die(1,
            "%s is not a file of kv; a file of commands, such as Redis's own without "
            "preamble and transactions, can be sent to kv with nc",
            opt.aof);
    size_t good = size < SUM_LINE ? 0 : replay((struct slice){p, size});
    munmap(p, size + 1);
    return good;
}

/* Flushes the name of the file at path to the disk, too. Some file systems cannot
   (EINVAL), and some directories may not be opened. */
static void sync_directory(char *path) {
    int fd = open(dirname(path), O_RDONLY);
    if (fd >= 0 && !sync_file(fd) && errno != EINVAL)
        die_of_aof("fsync of its directory");
    if (fd >= 0) close(fd);
}

/* --- At the start: compaction ------------------------------------------------------- */

/* Ends and writes the batch in b, and empties b. */
static bool write_batch_to(int fd, struct buf *b) {
    size_t written = 0;
    end_batch(b);
    bool ok = write_rest(fd, b, &written);
    b->len = 0;
    return ok;
}

/* Adds the record that makes the entry. */
static bool add_entry(struct buf *b, const struct table *t, struct entry *e) {
    char ms[24];
    int64_t deadline = deadline_of(t, e);
    struct slice key = {e->data, e->key_len};
    snprintf(ms, sizeof ms, "%" PRId64, deadline);
    struct slice record[] = {
        str("SET"), key, entry_value(e), str("PXAT"), str(ms),
    };
    return add_record(b, record, deadline == NEVER ? 3 : 5);
}

/* Writes a file whose replay gives the present tables: an empty batch as the header, then
   FLUSHALL, then a SET for each key, in batches. (FLUSHALL is for a copy that
   tail -F feeds: tail goes on with the new file, and the copy must be emptied first.) No
   other thread runs yet. Returns false on failure, and when a signal asks for the end. */
static bool write_tables(int fd) {
    struct slice flush[] = {str("FLUSHALL")};
    struct buf b = {0};
    bool ok = buf_reserve(&b, SUM_LINE + 1) && write_batch_to(fd, &b);
    ok = ok && add_record(&b, flush, 1);
    for (long i = 0; i < opt.shards; i++) {
        const struct table *t = &shards[i].table;
        for (size_t bucket = 0; bucket < t->size; bucket++) {
            for (struct entry *e = t->buckets[bucket]; e && ok; e = e->next)
                ok = add_entry(&b, t, e);
            if (b.len < IO_CHUNK) continue;
            ok = ok && stopping == SERVING && write_batch_to(fd, &b);
        }
    }
    /* A batch without records is allowed, and even if b is empty now, it has room for the
       checksum line. */
    ok = ok && write_batch_to(fd, &b) && sync_file(fd);
    free(b.p);
    return ok;
}

/* Returns false, and does not wait, if another process has the lock. The lock belongs to
   the file, not to its name. It ends when this process closes the file, or ends. */
static bool lock_file(int fd) {
    struct flock whole_file = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    return fcntl(fd, F_SETLK, &whole_file) == 0;
}

/* Writes a shorter file, called name, and lets it replace the file at path, whose status
   is *old. Returns the descriptor of the new file, or -1. It is locked before it gets
   that path, so that no other kv can be first. */
static int write_compact(const char *name, const char *path, const struct stat *old) {
    int fd = open(name, O_RDWR | O_CREAT | O_EXCL | O_APPEND, 0600);
    if (fd < 0) return -1;
    bool ok = fchown(fd, old->st_uid, old->st_gid) == 0;
    ok = ok && fchmod(fd, old->st_mode & 07777) == 0;
    if (ok && write_tables(fd) && lock_file(fd) && rename(name, path) == 0) return fd;
    int error = errno;
    unlink(name);
    close(fd);
    errno = error;
    return -1;
}

/* Compacts the file at path, open as fd, if it holds more than two records for each key.
   path has no symbolic links, so the rename replaces the file, not a link. Returns the
   descriptor of the file that serves. If the old one cannot be replaced, it serves, and
   kv starts all the same. A crash leaves the old file or the new one, whole. */
static int compact(const char *path, int fd) {
    char name[PATH_MAX + 16];
    struct stat st;
    uint64_t keys = 0;
    snprintf(name, sizeof name, "%s.kv-compact", path);
    unlink(name); /* a leftover of a crash, if any: nobody else has files of this name */
    for (long i = 0; i < opt.shards; i++) keys += shards[i].table.count;
    /* aof.end: so many records were replayed. 1: FLUSHALL. */
    if (aof.end <= 2 * keys + 1) return fd;
    /* A file of several names is left alone: a rename would change only one. */
    if (fstat(fd, &st) < 0 || st.st_nlink != 1) return fd;
    int compacted = write_compact(name, path, &st);
    if (compacted < 0) {
        if (stopping == SERVING)
            say(WARN, "%s is not compacted: %s", opt.aof, strerror(errno));
        return fd;
    }
    close(fd);
    return compacted;
}

/* Opens and locks the file. Sets path, which has PATH_MAX bytes, to its real path.
   Returns its descriptor. */
static int open_and_lock(char *path) {
    struct stat opened, named;
    int fd = open(opt.aof, O_RDWR | O_CREAT | O_APPEND, 0600);
    if (fd < 0 || !realpath(opt.aof, path)) die_of_aof("open");
    if (!lock_file(fd)) die_of_aof("in use by another kv");
    /* Another kv may have compacted the file after this open and before this lock. Then
       the name leads to its new file, and the one that is locked here has no name. (From
       now on no other kv can compact the file: for that it needs the lock.) */
    bool ok = fstat(fd, &opened) == 0 && stat(path, &named) == 0;
    if (!ok || opened.st_ino != named.st_ino || opened.st_dev != named.st_dev)
        die(1, "%s: in use by another kv", opt.aof);
    return fd;
}

/* Opens, locks, replays and compacts the file. It may be a new one. */
static void aof_open(void) {
    char header[SUM_LINE + 1], path[PATH_MAX];
    format_sum_line(header, str(""));
    int fd = open_and_lock(path);
    off_t size = lseek(fd, 0, SEEK_END);
    if (size < 0) die_of_aof("read");
    if ((uintmax_t)size >= PTRDIFF_MAX)
        die(1, "%s is too large for this machine", opt.aof);
    off_t good = (off_t)replay_file(fd, (size_t)size, header);
    if (good < size)
        say(WARN, "%s: torn at byte %jd, %jd bytes cut off", opt.aof, (intmax_t)good,
            (intmax_t)(size - good));
    if (ftruncate(fd, good) < 0) die_of_aof("truncate");
    /* A new file, or one whose first line was torn, gets its header. */
    if (good == 0 && write(fd, header, SUM_LINE) != SUM_LINE) die_of_aof("write");
    if (!sync_file(fd)) die_of_aof("fsync");
    aof.safe = aof.end; /* what was replayed is in the file */
    aof.fd = compact(path, fd);
    sync_directory(path);
}

/* The size of the file in bytes, for INFO. */
static int64_t aof_size(void) {
    struct stat st;
    return aof.fd >= 0 && fstat(aof.fd, &st) == 0 ? st.st_size : 0;
}

/* Writes and syncs what is left. Returns whether all is safe, in a file that nobody has
   deleted. */
static bool aof_close(void) {
    struct stat st;
    bool ok = aof_write_all();
    if (!ok) say(ERROR, "%s: not all was written", opt.aof);
    if (!sync_file(aof.fd) || fstat(aof.fd, &st) < 0) die_of_aof("fsync");
    if (st.st_nlink == 0) say(ERROR, "%s was deleted while kv ran", opt.aof);
    return ok && st.st_nlink > 0;
}

/* === 11 The server ================================================================= */

/* This may fail, for example where the client is gone already. A connection works without
   the option, only less well. */
static void set_option_of(int fd, int level, int name, int value) {
    (void)setsockopt(fd, level, name, &value, sizeof value);
}

/* Sets how long a read and a send may take; 0: for ever. */
static void set_timeouts(int fd, long seconds) {
    const struct timeval timeout = {.tv_sec = seconds};
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    (void)setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
}

static void prepare_connection(int fd) {
    enum { OPEN_TIMEOUT = 10 }; /* s, before AUTH */
    bool is_short = opt.timeout > 0 && opt.timeout < OPEN_TIMEOUT;
    set_timeouts(fd, is_short ? opt.timeout : OPEN_TIMEOUT);
    fcntl(fd, F_SETFD, FD_CLOEXEC); /* the mark by which shut_down_all knows it */
    fcntl(fd, F_SETFL, 0); /* on BSD the socket has O_NONBLOCK, as the listener has */
    set_option_of(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    set_option_of(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
#ifdef TCP_KEEPIDLE /* else a client that has vanished is found after hours */
    set_option_of(fd, IPPROTO_TCP, TCP_KEEPIDLE, 240); /* s, then 3 times 20 s */
    set_option_of(fd, IPPROTO_TCP, TCP_KEEPINTVL, 20);
    set_option_of(fd, IPPROTO_TCP, TCP_KEEPCNT, 3);
#endif
}

/* Turns a client away, in RESP's form, and logs why, once a second. */
static void refuse_client(int fd, const char *why) {
    static atomic_llong logged;
    static const char text[] = "-ERR max number of clients reached\r\n";
    if (is_first_this_second(&logged)) say(WARN, "client refused: %s", why);
    char unread[1024];
    /* As in hang_up, but main does not wait: the client may miss the text. */
    (void)send(fd, text, sizeof text - 1, MSG_DONTWAIT);
    (void)recv(fd, unread, sizeof unread, MSG_DONTWAIT);
    close(fd);
}

/* Accepts a client and starts its thread. Where the system has no descriptor or no memory
   the client waits, and this function sleeps 10 ms, because poll would return at once. */
static void accept_client(int listener, const pthread_attr_t *attributes) {
    static atomic_llong logged;
    pthread_t id;
    int fd = accept(listener, NULL, NULL);
    if (fd < 0) {
        if (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED) return;
        if (is_first_this_second(&logged)) say(WARN, "accept: %s", strerror(errno));
        sleep_ms(10);
        return;
    }
    /* A client may be back before the thread of its old connection has noticed. */
    if (clients >= opt.max_clients) sleep_ms(1);
    if (clients >= opt.max_clients) {
        refuse_client(fd, "too many clients");
        return;
    }
    prepare_connection(fd);
    clients++;
    threads++;
    int error = pthread_create(&id, attributes, conn_main, (void *)(intptr_t)fd);
    if (error) {
        clients--;
        threads--;
        refuse_client(fd, strerror(error));
    }
}

/* Returns a socket that listens, and does not block, at the first address that --bind
   names, IPv4 before IPv6. */
static int listen_on(void) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *all;
    char port[8];
    snprintf(port, sizeof port, "%ld", opt.port);
    int error = getaddrinfo(opt.bind, port, &hints, &all);
    if (error) die(2, "--bind %s: %s", opt.bind, gai_strerror(error));
    const struct addrinfo *a = all;
    while (a->ai_next && a->ai_family != AF_INET) a = a->ai_next;
    if (a->ai_family != AF_INET) a = all;
    int fd = socket(a->ai_family, a->ai_socktype, a->ai_protocol);
    if (fd < 0) die(1, "socket: %s", strerror(errno));
    set_option_of(fd, SOL_SOCKET, SO_REUSEADDR, 1);
    bool bound =
        fcntl(fd, F_SETFL, O_NONBLOCK) == 0 && bind(fd, a->ai_addr, a->ai_addrlen) == 0;
    int bind_error = errno;
    freeaddrinfo(all);
    const char *hint = bind_error == EADDRINUSE ? "; -p 0 takes any free port" : "";
    if (!bound) die(1, "%s port %s: %s%s", opt.bind, port, strerror(bind_error), hint);
    struct text here = address_of(fd, getsockname);
    bool local =
        strncmp(here.text, "127.", 4) == 0 || strncmp(here.text, "[::1]", 5) == 0;
    if (!local && !opt.insecure && password[0] == 0)
        die(2, "--bind %s needs --password-file or --insecure", opt.bind);
    if (listen(fd, SOMAXCONN) < 0) die(1, "listen: %s", strerror(errno));
    return fd;
}

/* Reads the first line of --password-file into password. Ends the program if that is not
   possible, or not wise. */
static void read_password(void) {
    struct stat st = {0};
    FILE *f = fopen(opt.password_file, "r");
    size_t n = f ? fread(password, 1, sizeof password - 1, f) : 0;
    size_t len = strcspn(password, "\r\n");
    bool has_zero = len < n && password[len] == 0; /* strcspn stops there, too */
    const char *wrong = NULL;
    if (!f || fstat(fileno(f), &st) < 0) wrong = strerror(errno);
    else if (st.st_mode & 022) wrong = "others may write it: chmod 600 helps";
    else if (strncmp(password, "\xef\xbb\xbf", 3) == 0)
        wrong = "it has a byte order mark";
    else if (len == 0 || len == sizeof password - 1 || has_zero)
        wrong = "its first line is empty, too long, or no text";
    if (wrong) die(2, "--password-file %s: %s", opt.password_file, wrong);
    if (st.st_mode & 044) say(WARN, "--password-file: others may read it");
    password[len] = 0;
    fclose(f);
}

/* Runs in any thread. The first signal asks for the end. One that comes more than half a
   second later ends the program at once. (timeout(1) and make send two together.) */
static void on_signal(int number) {
    static atomic_llong first;
    long long now = monotonic_us(), none = 0;
    (void)number;
    /* If first is still 0, sets it to now, and returns true. */
    if (atomic_compare_exchange_strong(&first, &none, now)) stopping = ANSWERING;
    else if (now - first > 500000) _exit(1);
}

static void catch_signals(void) {
    struct sigaction action = {.sa_handler = on_signal}, hangup;
    signal(SIGPIPE, SIG_IGN); /* so that send fails instead */
    signal(SIGXFSZ, SIG_IGN); /* so that write fails instead */
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGHUP, NULL, &hangup);
    if (hangup.sa_handler != SIG_IGN) sigaction(SIGHUP, &action, NULL); /* else: nohup */
}

static int max_descriptors; /* each is below this number */

/* Sets the limit of descriptors, up or down, to what --max-clients needs and SPARE more:
   for the listener, the file, and connections that hang_up is closing. Where there is
   none left, accept fails, and new clients wait until others leave. */
static void reserve_descriptors(void) {
    enum { SPARE = 100 };
    struct rlimit limit = {0, 0};
    getrlimit(RLIMIT_NOFILE, &limit);
    rlim_t want = (rlim_t)opt.max_clients + SPARE;
    limit.rlim_cur = limit.rlim_max < want ? limit.rlim_max : want;
    max_descriptors = (int)limit.rlim_cur;
    if (setrlimit(RLIMIT_NOFILE, &limit) < 0 || limit.rlim_cur < want)
        say(WARN, "only %ju descriptors for --max-clients", (uintmax_t)limit.rlim_cur);
}

/* Opens descriptors 0 to 2 where they are closed, so that no client's socket becomes
   stderr. */
static void open_standard_descriptors(void) {
    int fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd <= 2) fd = open("/dev/null", O_RDWR);
    if (fd >= 0) close(fd);
}

static void draw_table_key(void) {
    int fd = open("/dev/urandom", O_RDONLY);
    if (fd < 0 || read(fd, table_key, sizeof table_key) != sizeof table_key)
        die(1, "cannot read /dev/urandom: %s", strerror(errno));
    close(fd);
}

/* Sets up attributes for the threads of connections. They are detached: nobody joins
   them. A stack is small: 64 KiB, or as much as the system asks for. */
static void prepare_threads(pthread_attr_t *attributes) {
    long stack = sysconf(_SC_THREAD_STACK_MIN);
    if (stack < 65536) stack = 65536;
    if (pthread_attr_init(attributes) != 0 ||
        pthread_attr_setstacksize(attributes, (size_t)stack) != 0 ||
        pthread_attr_setdetachstate(attributes, PTHREAD_CREATE_DETACHED) != 0)
        die(1, "cannot set up threads");
}

/* Shuts all connections down, in one direction or in both. It tries all descriptors that
   there can be, so kv needs no list of its connections. A descriptor without the mark
   may be a socket that kv has inherited, which its parent still uses. (One with the mark
   would have been closed by exec.) None belongs to a new client now: main accepts no
   more. */
static void shut_down_all(int how) {
    for (int fd = 3; fd < max_descriptors; fd++) {
        bool is_marked = fcntl(fd, F_GETFD) == FD_CLOEXEC;
        if (is_marked) (void)shutdown(fd, how);
    }
}

static void wait_for_threads(int64_t ms) {
    int64_t end = monotonic_us() + ms * 1000;
    while (threads > 0 && monotonic_us() < end) sleep_ms(10);
}

/* Makes the threads of all connections end, in three steps:

     SHUT_RD, 2 s      From now on, recv does not block: where it would, it returns 0, as
                       at the end of the input. (What has arrived, and on Linux also what
                       still arrives, comes first.) So a thread answers what there is, and
                       then end_input ends it.
     GIVING_UP, 0.5 s  A client that sends without a pause still has a thread. It runs
                       nothing more, and only sends the replies to what was run.
     SHUT_RDWR, 1 s    A client that takes no replies still has a thread. Its send fails
                       now.

   The price: in hang_up, too, recv returns 0 now, as if the client had closed, so hang_up
   closes without waiting. A client that still sends may then miss its last replies. */
static void stop_connections(void) {
    shut_down_all(SHUT_RD);
    wait_for_threads(2000);
    stopping = GIVING_UP;
    wait_for_threads(500);
    shut_down_all(SHUT_RDWR);
    wait_for_threads(1000);
}

/* Accepts clients until a signal asks for the end, and then, for a second at most,
   those that had connected before. */
static void accept_clients(int listener) {
    pthread_attr_t attributes;
    struct pollfd input = {.fd = listener, .events = POLLIN};
    prepare_threads(&attributes);
    while (stopping == SERVING) {
        /* A signal may come just before poll begins, so poll does not wait long. */
        if (poll(&input, 1, 50) > 0) accept_client(listener, &attributes);
    }
    int64_t end = monotonic_us() + 1000000;
    while (poll(&input, 1, 0) > 0 && monotonic_us() < end)
        accept_client(listener, &attributes);
    close(listener);
}

int main(int argc, char **argv) {
    pthread_t expiry;
    started_us = monotonic_us();
    parse_options(argc, argv);
    if (opt.help || opt.version) {
        print_help();
        return 0;
    }
    open_standard_descriptors();
    draw_table_key();
    catch_signals();
    if (opt.password_file) read_password();
    reserve_descriptors();
    for (long i = 0; i < opt.shards; i++) {
        pthread_mutex_init(&shards[i].lock, NULL);
    }
#ifdef M_ARENA_MAX
    /* malloc of glibc has several arenas, heaps with a lock each, so that threads seldom
       wait for each other. But what is freed in one cannot be used by another. With two,
       little memory is lost that way. And threads still seldom wait, because each thread
       keeps some freed blocks for itself (./bench.sh measure arenas). */
    mallopt(M_ARENA_MAX, 2);
#endif
    if (opt.aof) aof_open();
    int listener = listen_on();
    int error = pthread_create(&expiry, NULL, expiry_main, NULL);
    if (error) die(1, "cannot start a thread: %s", strerror(error));
    say(INFO, "listening on %s", address_of(listener, getsockname).text);
    accept_clients(listener);
    say(INFO, "stopping with %ld clients", (long)clients);
    stop_connections();
    pthread_join(expiry, NULL);
    bool ok = !opt.aof || aof_close();
    say(INFO, "stopped");
    return ok ? 0 : 1; /* the system frees all memory; a thread that is left ends here */
}
