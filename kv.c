/* kv: a key-value server in one file, made to be read from top to bottom.
 *
 * === 0 The map ======================================================================
 *
 * People talk to kv in lines of text over TCP (nc localhost 8080), client libraries in
 * RESP; it keeps keys and values in memory.
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
 * all of them in the order of their numbers. There is no other lock: what else threads
 * share is atomic, or set before they start. Nothing that may block (a read, a send, a
 * sleep) is done under a lock. Locking a healthy mutex cannot fail, so it goes unchecked.
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
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h> /* malloc_trim: else glibc keeps what was freed in mid-heap */
#else
#define malloc_trim(unused) ((void)(unused))
#endif
#define KV_VERSION "0.1.0"

/* The compiler checks the f-th argument, a format, against those behind it. */
#define PRINTF_LIKE(f) __attribute__((format(printf, f, (f) + 1)))

/* MAX_SHOWN bytes of a client's word are repeated by an error or the log; a connection's
   buffers begin with SMALL_BUF bytes and shrink back to that; replies are sent when
   IO_CHUNK bytes have gathered; a STACK costs only the pages that were touched. */
enum { MAX_WORDS = 1024, MAX_SHOWN = 64, OPEN_WORDS = 10, OPEN_BYTES = 16384 };
/* With up to FEW_CLIENTS a thread looks LOOKS times for input before it sleeps. */
enum { FEW_CLIENTS = 100, LOOKS = 10 };
enum { SMALL_BUF = 1024, IO_CHUNK = 65536, STACK = 65536 };

/* The expiry thread looks every TICK and removes up to BATCH entries per lock; KEYS looks
   at WALK_BUCKETS per lock. After SIGTERM clients have STOP_GRACE to take their replies,
   and LINGER to read why they are closed. Times are in ms. */
enum { TICK = 100, BATCH = 128, WALK_BUCKETS = 64, STOP_GRACE = 2000, LINGER = 1000 };

/* Some bytes that belong to somebody else: a word of a request, a key, a value. */
struct slice {
    char *p;
    size_t len;
};

/* Bytes that grow at the end. Owns p. Once memory has run out, failed stays set and
   nothing more is added, so who fills a buffer need check only once, at the end. */
struct buf {
    char *p;
    size_t len, cap;
    bool failed;
};

/* One connection, on the stack of its thread; no other thread sees it. in: what was read;
   the next request starts at pos; of a line, the scanned bytes from there hold no
   newline. out: replies not yet sent. resp: the form of request and reply, 0: text, 2 or
   3: RESP. version: of RESP, chosen by HELLO. crlf: lines of the reply end in CRLF.
   skipping: inside a line that is too long. authed: no password is needed, or it was
   given; tries: how often a wrong one was. closing: why to close as soon as the replies
   are out, or NULL. broken: then without lingering. argv: the argc words of the request,
   which point into in. bytes: the sum of their lengths. ran: commands not yet counted.
   While cmd works on a key: key; shard: the key's, locked; hash: its part for the table;
   link: points at the key's entry, or is where the pointer to a new one goes. */
struct conn {
    int fd, resp, version, tries;
    bool crlf, skipping, broken, authed;
    const char *closing;
    struct buf in, out;
    size_t pos, scanned, argc, bytes, ran;
    const struct command *cmd;
    struct shard *shard;
    struct entry **link;
    uint32_t hash;
    struct slice key, *argv;
};

/* A string to return by value. */
struct text {
    char text[4 * MAX_SHOWN + 8];
};

static int max_fds;                        /* a client's descriptor is below this */
static atomic_long connected, connections; /* now, and ever */
static atomic_size_t commands_run;
static int64_t started;     /* in ticks() */
static atomic_int stopping; /* 0: serving; 1: answering what has arrived; 2: giving up */

/* === 1 Options and log ============================================================= */
static struct {
    const char *bind, *password_file;
    long port, max_clients, timeout, max_value, shards;
    long insecure, verbose, quiet, help, version;
} opt = {"127.0.0.1", NULL, 8080, 10000, 0, 1 << 20, 256, 0, 0, 0, 0, 0};

/* A row says all about an option: parsing, checks and --help use it. No arg: a switch, a
   long that counts. With a max: a number, a long. Else a string. */
static const struct option {
    char letter[4]; /* as in --help */
    const char *name, *arg;
    void *to;
    long min, max;
    const char *help;
} options[] = {
    {"-p,", "port", "N", &opt.port, 0, 65535, "8080; 0: any free port"},
    {"-b,", "bind", "ADDR", &opt.bind, 0, 0, "127.0.0.1; IPv4, IPv6 or a host name"},
    {"-c,", "max-clients", "N", &opt.max_clients, 1, 1000000, "10000"},
    {"-t,", "timeout", "SECONDS", &opt.timeout, 0, 1000000, "0: never; close when idle"},
    {"", "max-value", "BYTES", &opt.max_value, 1, 1 << 29, "1048576; the longest word"},
    {"-s,", "shards", "N", &opt.shards, 1, 4096, "256; a power of two"},
    {"-P,", "password-file", "FILE", &opt.password_file, 0, 0, "none; clients must AUTH"},
    {"", "insecure", "", &opt.insecure, 0, 0, "serve the network openly"},
    {"-v,", "verbose", "", &opt.verbose, 0, 0, "log connections, -vv every command"},
    {"-q,", "quiet", "", &opt.quiet, 0, 0, "log only trouble"},
    {"-h,", "help", "", &opt.help, 0, 0, "print this"},
    {"-V,", "version", "", &opt.version, 0, 0, "print the version"},
    {"", NULL, "", NULL, 0, 0, NULL},
};

/* What a line of the log is about: -q keeps what comes before INFO, -v and -vv add what
   comes behind. USAGE is about the command line. */
enum level { USAGE, ERROR, WARN, INFO, CLIENT, COMMAND };

#define SECOND INT64_C(1000000000) /* in ns */
static int64_t clock_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * SECOND + t.tv_nsec;
}

/* Nanoseconds on a clock that nobody sets, to measure how long something takes. */
static int64_t ticks(void) { return clock_ns(CLOCK_MONOTONIC); }

/* Milliseconds since 1970, for deadlines, which are moments of the wall clock. */
static int64_t now_ms(void) { return clock_ns(CLOCK_REALTIME) / 1000000; }

static bool logs(enum level level) {
    return (int)level <= (opt.quiet ? WARN : INFO + (int)opt.verbose);
}

/* Writes one line to stderr in one call, so that lines of several threads never mix; what
   does not fit is cut. Returns the exit status for who wants to end with exit(say()). */
static PRINTF_LIKE(2) int say(enum level level, const char *fmt, ...) {
    static const char names[][6] = {"ERROR", "ERROR", "WARN", "INFO", "DEBUG", "DEBUG"};
    char line[1024];
    int64_t ms = now_ms();
    time_t seconds = ms / 1000;
    struct tm tm;
    va_list args;
    if (!logs(level)) return 0;
    size_t n = strftime(line, sizeof line, "%FT%T", gmtime_r(&seconds, &tm));
    n += (size_t)snprintf(line + n, 16, ".%03dZ %s ", (int)(ms % 1000), names[level]);
    va_start(args, fmt);
    n += (size_t)vsnprintf(line + n, sizeof line - n, fmt, args);
    va_end(args);
    if (n > sizeof line - 1) n = sizeof line - 1;
    line[n++] = '\n';
    if (write(STDERR_FILENO, line, n) < 0) return 1; /* nobody is left to tell */
    return level == USAGE ? 2 : 1;
}

/* Accepts -n value, -nvalue, --name value, --name=value and -vv. To getopt a word that
   begins with -- is option '-' with the rest as value; ':' lacks its value. */
static void parse_options(int argc, char **argv) {
    for (int letter; (letter = getopt(argc, argv, ":p:b:c:t:s:P:vqhV-:")) != -1;) {
        const struct option *o = options;
        char *name = letter == '-' ? optarg : NULL, *end;
        char *value = letter == ':' ? NULL : optarg;
        size_t n = name ? strcspn(name, "=") : 0;
        if (letter == ':') letter = optopt;
        for (; o->name; o++)
            if (n ? !strncmp(o->name, name, n) && !o->name[n] : o->letter[1] == letter)
                break;
        if (!o->name) exit(say(USAGE, "%s: see kv --help", argv[optind - 1]));
        if (n) value = name[n] ? name + n + 1 : *o->arg ? argv[optind++] : NULL;
        if (!value != !*o->arg)
            exit(say(USAGE, "--%s %s value", o->name, *o->arg ? "needs a" : "takes no"));
        const char *digits = value && o->max ? value : "0";
        long number = strtol(digits, &end, 10);
        if (*end || number < o->min || number > o->max || *digits < '0')
            exit(say(USAGE, "--%s %s is not %ld to %ld", o->name, value, o->min, o->max));
        if (o->max) *(long *)o->to = number;
        else if (value) *(const char **)o->to = value;
        else ++*(long *)o->to;
    }
    if (argv[optind]) exit(say(USAGE, "%s: see kv --help", argv[optind]));
    if (opt.shards & (opt.shards - 1))
        exit(say(USAGE, "--shards %ld is not a power of two", opt.shards));
}

/* --help, or --version, which is its first line. Returns the exit status. */
static int print_help(void) {
    puts("kv " KV_VERSION ", a key-value server; talk to it with: nc localhost 8080");
    for (const struct option *o = options; opt.help && o->name; o++)
        printf("  %3s --%-13s %-7s  %s\n", o->letter, o->name, o->arg, o->help);
    return fflush(stdout) ? say(ERROR, "cannot print: %s", strerror(errno)) : 0;
}

/* One end of a connection as text, 127.0.0.1:8080 or [::1]:8080. get is getpeername for
   the other end, getsockname for ours. */
static struct text address_of(int fd, int get(int, struct sockaddr *, socklen_t *)) {
    struct text out = {"a client that is gone"};
    struct sockaddr_storage sa;
    socklen_t len = sizeof sa;
    char host[64], port[8];
    if (!get(fd, (struct sockaddr *)&sa, &len) &&
        !getnameinfo((struct sockaddr *)&sa, len, host, 64, port, 8,
                     NI_NUMERICHOST | NI_NUMERICSERV))
        sprintf(out.text, strchr(host, ':') ? "[%s]:%s" : "%s:%s", host, port);
    return out;
}

/* === 2 Buffers ===================================================================== */
/* Makes room for n more bytes and returns where they go, or NULL when memory is out.
   Doubling makes growth cost the same for each byte, however many there will be. */
static char *buf_reserve(struct buf *b, size_t n) {
    size_t cap = b->cap ? b->cap : SMALL_BUF;
    while (cap - b->len < n) cap *= 2; /* our limits keep this far from overflow */
    if (cap != b->cap && !b->failed) {
        char *p = realloc(b->p, cap);
        if (p) *b = (struct buf){p, b->len, cap, false};
        else b->failed = true;
    }
    return b->failed ? NULL : b->p + b->len;
}

static void buf_add(struct buf *b, const void *p, size_t n) {
    char *to = buf_reserve(b, n);
    if (!to || n == 0) return;
    memcpy(to, p, n);
    b->len += n;
}

/* Puts a type byte, n and CRLF, as RESP has them, in front of what b holds from start. */
static void buf_header(struct buf *b, size_t start, char type, size_t n) {
    char text[24] = "", *p = text + 22;
    memcpy(p, "\r\n", 2);
    do *--p = (char)('0' + n % 10);
    while (n /= 10);
    *--p = type;
    size_t len = (size_t)(text + 24 - p);
    if (!buf_reserve(b, len)) return;
    memmove(b->p + start + len, b->p + start, b->len - start);
    memcpy(b->p + start, p, len);
    b->len += len;
}

/* Gives back the memory of an empty buffer that has grown beyond SMALL_BUF. */
static void buf_slim(struct buf *b) {
    if (b->len > 0 || b->cap <= SMALL_BUF) return;
    free(b->p);
    *b = (struct buf){.failed = b->failed};
}

/* === 3 Requests ==================================================================== */
static bool reply_format(struct conn *, const char *, const char *, ...) PRINTF_LIKE(3);

/* An error reply: a message that begins with a code word, mostly ERR. It is false, so
   that a command can end with return fail(). */
#define fail(c, ...) reply_format(c, "-", __VA_ARGS__)

static bool is_blank(char c) { return c == ' ' || c == '\t'; }

/* Whether a word is name, in upper or lower case. */
static bool word_is(struct slice word, const char *name) {
    return word.len == strlen(name) && strncasecmp(word.p, name, word.len) == 0;
}

/* Reads a number of 64 bits as strictly as Redis does: no blank, plus sign or leading
   zero, and no overflow. Counts downwards, for INT64_MIN has no positive counterpart. */
static bool parse_int(struct slice s, int64_t *n) {
    bool minus = s.len > 0 && s.p[0] == '-';
    if (s.len == minus || (s.p[minus] == '0' && s.len > 1)) return false;
    *n = 0;
    for (size_t i = minus; i < s.len; i++) {
        int digit = s.p[i] - '0';
        if (digit < 0 || digit > 9 || *n < (INT64_MIN + digit) / 10) return false;
        *n = *n * 10 - digit;
    }
    if (!minus && *n == INT64_MIN) return false;
    *n = minus ? *n : -*n;
    return true;
}

/* The escapes that are a letter, and what they stand for. */
static const char escape_names[] = "\"\\nrt", escape_bytes[] = "\"\\\n\r\t";

/* Decodes the escape at from to *to. Returns where it ends, or NULL if there is none. */
static char *unescape(char *from, const char *end, char *to) {
    const char *hit =
        end - from > 1 ? memchr(escape_names, from[1], sizeof escape_names - 1) : NULL;
    if (hit) *to = escape_bytes[hit - escape_names];
    else if (end - from > 3 && from[1] == 'x' && isxdigit((unsigned char)from[2]) &&
             isxdigit((unsigned char)from[3]))
        *to = (char)strtol((char[]){from[2], from[3], 0}, NULL, 16);
    else return NULL;
    return from + (hit ? 2 : 4);
}

/* Takes the word at *at off a line and moves *at behind it. It is decoded in place: an
   escape is longer than what it stands for. Returns NULL, or what is wrong. */
static const char *take_word(char **at, char *end, struct slice *word) {
    int mark = **at == '"' || **at == '\'' ? **at : 0;
    char *from = *at + (mark != 0), *to = from;
    word->p = to;
    while (from < end && (mark ? *from != mark : !is_blank(*from))) {
        if (mark != '"' || *from != '\\') *to++ = *from++;
        else if (!(from = unescape(from, end, to++)))
            return "bad escape: double quotes know \\\" \\\\ \\n \\r \\t and \\xHH";
    }
    if (mark && (from == end || (++from < end && !is_blank(*from))))
        return "unbalanced quotes: a word that begins with a quote ends with one";
    word->len = (size_t)(to - word->p);
    *at = from;
    return NULL;
}

/* Adds a word to argv. Returns NULL, or what is wrong. */
static const char *add_word(struct conn *c, struct slice word) {
    size_t max = (size_t)opt.max_value;
    c->bytes += word.len;
    if (!c->authed && (c->argc == OPEN_WORDS || c->bytes > OPEN_BYTES))
        return "before AUTH a request over 10 words or 16 KiB is too long";
    if (c->argc == MAX_WORDS) return "a request of more than 1024 words is too long";
    if (word.len > max) return "a word over --max-value is too long";
    if (c->bytes > 2 * max + IO_CHUNK)
        return "a request over 2 x --max-value + 64 KiB is too long";
    c->argv[c->argc++] = word;
    return NULL;
}

/* Splits a line into argv. Returns NULL, or what is wrong with the line. */
static const char *split_line(struct conn *c, char *at, char *end) {
    const char *wrong = NULL;
    for (struct slice word; !wrong;) {
        while (at < end && is_blank(*at)) at++;
        if (at == end || (c->argc == 0 && *at == '#')) break;
        wrong = take_word(&at, end, &word);
        if (!wrong) wrong = add_word(c, word);
    }
    return wrong;
}

/* RESP is what client libraries speak: an array of strings, *2 $3 GET $1 a, each number
   and string ended by CRLF. After an error nobody knows where the next request begins. */
static bool protocol_error(struct conn *c, const char *what) {
    c->closing = "protocol error";
    return fail(c, "ERR Protocol error: %s", what);
}

/* Takes a type byte, a number up to max (for '*' also below 0: no words) and CRLF off the
   input at *at. Returns false when they have not arrived in full, or after an error. */
static bool take_length(struct conn *c, size_t *at, char type, int64_t max, int64_t *n) {
    char *p = c->in.p + *at;
    size_t left = c->in.len - *at;
    if (left > 0 && *p != type) return protocol_error(c, "expected '$'");
    char *end = left > 0 ? memchr(p, '\n', left) : NULL;
    if (!end && left < 32) return false; /* no length is that long */
    struct slice digits = {p + 1, end && end[-1] == '\r' ? (size_t)(end - p) - 2 : 0};
    if (!parse_int(digits, n) || *n > max || (*n < 0 && type == '$'))
        return protocol_error(c, type == '*' ? "invalid multibulk length"
                                             : "invalid bulk length");
    *at += digits.len + 3;
    return true;
}

/* Takes a RESP request off the input, as next_request does. One that has arrived in part
   is parsed from its beginning each time: at most MAX_WORDS short steps per read. */
static bool take_array(struct conn *c) {
    size_t at = c->pos;
    int64_t words = 0, len = 0;
    if (!take_length(c, &at, '*', c->authed ? MAX_WORDS : OPEN_WORDS, &words))
        return false;
    while (words-- > 0) {
        if (!take_length(c, &at, '$', c->authed ? opt.max_value : OPEN_BYTES, &len))
            return false;
        struct slice word = {c->in.p + at, (size_t)len};
        if (c->in.len - at < word.len + 2) return false;
        at += word.len + 2;
        const char *wrong = add_word(c, word);
        if (memcmp(word.p + len, "\r\n", 2) != 0) wrong = "expected CRLF after a string";
        if (wrong) return protocol_error(c, wrong);
    }
    c->pos = at;
    return true;
}

/* Takes the next request off the input; its words stay valid until the next read. Returns
   false when it has not arrived in full, or c is closing. True with argc 0: there is
   nothing to run, for the line was empty, or it was wrong and has been answered. */
static bool next_request(struct conn *c) {
    size_t limit = c->authed ? 4 * (size_t)opt.max_value + IO_CHUNK : OPEN_BYTES,
           n = c->in.len - c->pos;
    char *line = c->in.p + c->pos;
    c->argc = c->bytes = 0;
    if (n > 0 && !c->skipping && *line == '\xff') c->closing = "interrupted by telnet";
    if (n == 0 || c->closing) return false;
    c->resp = *line == '*' && !c->skipping ? c->version : 0;
    c->crlf = c->resp;
    if (c->resp) return take_array(c);
    char *newline = memchr(line + c->scanned, '\n', n - c->scanned);
    c->scanned = newline ? 0 : n;
    if (!newline && n > limit + 1) {
        /* Drop it, but for the last byte: that may be a CR. */
        c->skipping = true;
        c->pos = c->in.len - 1;
        c->scanned = 1;
    }
    if (!newline) return false;
    c->pos += (size_t)(newline - line) + 1;
    c->crlf = newline > line && newline[-1] == '\r';
    newline -= c->crlf;
    const char *wrong = c->skipping || (size_t)(newline - line) > limit
                            ? "a line over 4 x --max-value + 64 KiB is too long"
                            : split_line(c, line, newline);
    c->skipping = false;
    if (wrong) c->argc = 0; /* what was split is not run */
    return !wrong || !fail(c, "ERR %s", wrong);
}

/* === 4 Replies ===================================================================== */
/* Whether s can stand in a reply as it is, so that nobody takes it for an error, the end
   of a list, a quoted value or more than one line. As a word it also passes take_word
   unchanged. */
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

/* The bytes of a string. Nobody will write to them. */
static struct slice str(const char *s) { return (struct slice){(char *)s, strlen(s)}; }

/* A line of a reply, in RESP behind its type. Replies return true, but for errors, so
   that a command can end with return reply_x(). */
static bool reply(struct conn *c, const char *type, struct slice s) {
    const char *first = c->resp ? type : *type == '-' ? "(error) " : "";
    buf_add(&c->out, first, strlen(first));
    buf_add(&c->out, s.p, s.len);
    buf_add(&c->out, c->crlf ? "\r\n" : "\n", c->crlf ? 2 : 1);
    return *type != '-';
}

static bool reply_format(struct conn *c, const char *type, const char *fmt, ...) {
    char text[1024];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    return reply(c, type, str(text));
}

static bool reply_status(struct conn *c, const char *s) { return reply(c, "+", str(s)); }

static bool reply_int(struct conn *c, int64_t n) {
    return reply_format(c, ":", "%" PRId64, n);
}

static bool reply_nil(struct conn *c) {
    return reply(c, c->resp == 3 ? "_" : "$-1", str(c->resp ? "" : "(nil)"));
}

/* A value: in text bare, or quoted where that could be misread. */
static bool reply_str(struct conn *c, struct slice s, bool as_word) {
    if (c->resp) buf_header(&c->out, c->out.len, '$', s.len);
    if (c->resp || is_bare(s, as_word)) return reply(c, "", s);
    char *to = buf_reserve(&c->out, 4 * s.len + 3);
    if (to) c->out.len += quote(to, s);
    return reply(c, "", str(""));
}

static bool reply_value(struct conn *c, struct slice s) { return reply_str(c, s, false); }

/* Ends a reply of n lines that stands in c->out from start on. */
static bool reply_list(struct conn *c, size_t start, size_t n, const char *noun) {
    if (c->resp) buf_header(&c->out, start, '*', n);
    return c->resp || reply_format(c, "", "(%zu %s%s)", n, noun, n == 1 ? "" : "s");
}

/* === 5 Hashing ===================================================================== */
/* Drawn at random: who does not know it cannot choose keys that collide. */
static uint64_t seed[2];

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
    uint64_t v[4] = {seed[0] ^ 0x736f6d6570736575, seed[1] ^ 0x646f72616e646f6d,
                     seed[0] ^ 0x6c7967656e657261, seed[1] ^ 0x7465646279746573};
    for (size_t at = 0; at <= s.len; at += 8) { /* the last word is short or empty */
        uint64_t word = 0;
        size_t n = s.len - at < 8 ? s.len - at : 8;
        memcpy(&word, s.p + at, n);
        if (n < 8) word |= (uint64_t)s.len << 56;
        v[3] ^= word;
        sip_round(v);
        v[0] ^= word;
    }
    v[2] ^= 0xff;
    for (int i = 0; i < 3; i++) sip_round(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* === 6 The table =================================================================== */
enum { MIN_BITS = 4, NO_SLOT = -1 };

/* A key and its value in one allocation: 24 bytes, the key, the value. Its deadline,
   which few keys have, stands in the heap at slot, or slot is NO_SLOT. */
struct entry {
    struct entry *next;
    uint32_t hash, klen, vlen;
    int32_t slot;
    char data[];
};

/* A moment to expire, in ms since 1970. */
struct deadline {
    int64_t when;
    struct entry *entry;
};

/* Buckets stand in the order of the hash: bucket i of 2^bits holds the hashes whose upper
   bits are i. So a walk by ascending hash can pause, and a table that doubles
   meanwhile makes it neither miss an entry nor see one twice. heap[0] expires next; bytes
   count the entries, without malloc's overhead. All zero is empty. */
struct table {
    struct entry **buckets;
    struct deadline *heap;
    size_t count, heap_len, heap_cap, bytes;
    int bits;
};

/* Whoever works on a shard holds its lock; only walk, expiry_main and sum_at take it
   themselves. No two shards share a cache line. */
static struct shard {
    _Alignas(64) pthread_mutex_t lock;
    struct table table;
    size_t hits, misses, expired;
} * shards;

static void deadline_clear(struct table *t, struct entry *e);

static bool has_expired(const struct table *t, const struct entry *e) {
    return e->slot != NO_SLOT && t->heap[e->slot].when <= now_ms();
}

static struct slice entry_value(struct entry *e) {
    return (struct slice){e->data + e->klen, e->vlen};
}

static struct entry **bucket_of(const struct table *t, uint32_t hash) {
    return &t->buckets[hash >> (32 - t->bits)];
}

/* Moves the entries to 2^bits buckets. Without memory the table stays as it is:
   slower. */
static void table_resize(struct table *t, int bits) {
    struct table to = *t;
    to.bits = bits;
    to.buckets = calloc((size_t)1 << bits, sizeof *to.buckets);
    if (!to.buckets) return;
    for (size_t i = 0; t->buckets && i < (size_t)1 << t->bits; i++)
        for (struct entry *e, **link; (e = t->buckets[i]); *link = e) {
            link = bucket_of(&to, e->hash);
            t->buckets[i] = e->next;
            e->next = *link;
        }
    free(t->buckets);
    *t = to;
}

/* Takes out and frees the entry at *link. The buckets stay: a table never shrinks. */
static void table_remove(struct table *t, struct entry **link) {
    struct entry *e = *link;
    deadline_clear(t, e);
    *link = e->next;
    t->bytes -= sizeof *e + e->klen + e->vlen;
    free(e);
    t->count--;
}

/* Returns a link, where *link is the live entry of key, or NULL if it has none. Returns
   NULL only when memory is out. What is past its deadline is removed. */
static struct entry **table_find(struct shard *s, uint32_t hash, struct slice key) {
    if (!s->table.buckets) table_resize(&s->table, MIN_BITS);
    if (!s->table.buckets) return NULL;
    struct entry **link = bucket_of(&s->table, hash), *e;
    /* cppcheck-suppress uninitvar ; bucket_of returns a link that is set */
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
    size_t was = old ? sizeof *e + e->klen + e->vlen : 0;
    size_t now = sizeof *e + key.len + value.len;
    if ((!old || was != now) && !(e = realloc(old, now))) return NULL;
    if (!old) {
        *e = (struct entry){NULL, hash, (uint32_t)key.len, 0, NO_SLOT};
        memcpy(e->data, key.p, key.len);
        t->count++;
    }
    if (e->slot != NO_SLOT) t->heap[e->slot].entry = e;
    *link = e;
    e->vlen = (uint32_t)value.len;
    memmove(e->data + e->klen, value.p, value.len); /* its own value: not moved */
    t->bytes += now - was; /* a difference below 0 wraps, and so does the sum */
    if (t->count * 2 >> t->bits >= 3 && t->bits < 32) table_resize(t, t->bits + 1);
    return e;
}

/* Frees all that t owns. Nobody else may know of it any more. */
static void table_free(struct table *t) {
    for (size_t i = 0; t->buckets && i < (size_t)1 << t->bits; i++)
        for (struct entry *e; (e = t->buckets[i]); free(e)) t->buckets[i] = e->next;
    free(t->buckets);
    free(t->heap);
}

/* Appends the keys of the next few buckets to out, each behind its length, and moves
   *hash on. Locks the shard for WALK_BUCKETS buckets or IO_CHUNK bytes. Returns false
   when there was nothing left to see. */
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

/* === 7 Expiry ====================================================================== */
/* What may stand for a deadline: the one that an entry has, or none. */
enum { KEEP = -1, NEVER = -2 };

static void heap_put(struct table *t, size_t i, struct deadline d) {
    t->heap[i] = d;
    d.entry->slot = (int32_t)i;
}

/* Puts d where it belongs in the heap, from the free place i on: parents that expire
   later move down, or else children that expire sooner move up. */
static void heap_sift(struct table *t, size_t i, struct deadline d) {
    struct deadline *heap = t->heap;
    for (; i > 0 && heap[(i - 1) / 2].when > d.when; i = (i - 1) / 2)
        heap_put(t, i, heap[(i - 1) / 2]);
    for (size_t child; (child = 2 * i + 1) < t->heap_len; i = child) {
        if (child + 1 < t->heap_len && heap[child + 1].when < heap[child].when) child++;
        if (heap[child].when >= d.when) break;
        heap_put(t, i, heap[child]);
    }
    heap_put(t, i, d);
}

/* Makes the heap's capacity cap. Returns false when memory is out. */
static bool heap_resize(struct table *t, size_t cap) {
    struct deadline *heap = realloc(t->heap, cap * sizeof *heap);
    if (!heap) return false;
    t->heap = heap;
    t->heap_cap = cap;
    return true;
}

/* Sets or changes e's deadline; for a new one, store has made room. */
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
}

/* The expiry thread: goes round the shards and removes what is past its deadline, up to
   BATCH entries under one lock; again at once if there may be more, else after TICK. A
   round that finds nothing looks at one deadline per shard. */
static void *expiry_main(void *unused) {
    for (bool more = false, was = false; !atomic_load(&stopping); was = more) {
        int64_t now = now_ms();
        more = false;
        for (struct shard *s = shards; s < shards + opt.shards; s++) {
            int n = 0;
            pthread_mutex_lock(&s->lock);
            while (n < BATCH && s->table.heap_len > 0 && s->table.heap[0].when <= now) {
                struct entry *due = s->table.heap[0].entry, **link;
                for (link = bucket_of(&s->table, due->hash); *link != due;)
                    link = &(*link)->next;
                table_remove(&s->table, link);
                n++;
            }
            s->expired += (size_t)n;
            pthread_mutex_unlock(&s->lock);
            more |= n == BATCH;
        }
        if (was && !more) malloc_trim(0); /* after many, give memory back */
        /* Even then let others have the lock: with --shards 1 there is only one. */
        nanosleep(&(struct timespec){0, more ? 1000 : TICK * 1000000L}, NULL);
    }
    return unused;
}

/* === 8 Commands ==================================================================== */
/* WRITES: changes data. ONE_KEY: works on the key in argv[1]; EACH_KEY: on each word from
   argv[1] on, and the reply is for how many of them run returned true. HIDDEN: not in
   HELP. OPEN: also before AUTH. */
enum { WRITES = 1, ONE_KEY = 2, EACH_KEY = 4, HIDDEN = 8, OPEN = 16 };
enum { ANY = MAX_WORDS, WRITE1 = WRITES | ONE_KEY };

/* A row says all about a command. min and max count words, the name among them. Where it
   works on keys, run is called with the key's shard locked and its entry found; it must
   not block. run replies and returns false after an error; with EACH_KEY it only says yes
   or no. number tells it from its family. help: what it does, then behind a ';', which
   HELP alone omits, what it replies; NULL: as the row above. */
struct command {
    const char *name, *args;
    unsigned min, max, flags;
    bool (*run)(struct conn *c);
    int number;
    const char *help;
};

static bool cmd_help(struct conn *c);

/* A command's name as errors write it. */
static struct text lower(const struct command *cmd) {
    struct text out = {""};
    for (int i = 0; cmd->name[i]; i++) out.text[i] = (char)tolower(cmd->name[i]);
    return out;
}

#define NOT_INT "ERR value is not an integer or out of range"
/* Turns a word into a deadline in ms since 1970. unit is in ms, and negative if the word
   says a moment rather than a time from now. Replies and returns false if it is not a
   number, less than min, or out of range. */
static bool parse_deadline(struct conn *c, struct slice word, int unit, int64_t min,
                           int64_t *when) {
    int64_t scale = unit < 0 ? -unit : unit, base = unit < 0 ? 0 : now_ms();
    if (!parse_int(word, when)) return fail(c, NOT_INT);
    if (*when < min || *when < INT64_MIN / scale || *when > (INT64_MAX - base) / scale)
        return fail(c, "ERR invalid expire time in '%s' command", lower(c->cmd).text);
    *when =
        *when * scale + base < 0 ? 0 : *when * scale + base; /* below 0: KEEP, NEVER */
    return true;
}

/* Stores value under the request's key. when is a deadline in ms since 1970, KEEP for the
   one it has, or NEVER; one in the past removes the key. All that changes an entry goes
   through here. Replies and returns false when memory is out. */
static bool store(struct conn *c, struct slice value, int64_t when) {
    struct table *t = &c->shard->table;
    bool past = when >= 0 && when <= now_ms();
    if (past && *c->link) table_remove(t, c->link);
    if (past) return true;
    struct entry *e = NULL; /* room for a deadline first: nothing fails halfway */
    if (t->heap_len < t->heap_cap || heap_resize(t, t->heap_cap + t->heap_cap / 4 + 4))
        e = table_store(t, c->link, c->hash, c->key, value);
    if (!e) return fail(c, "OOM out of memory");
    if (when == NEVER) deadline_clear(t, e);
    else if (when >= 0) deadline_set(t, e, when);
    return true;
}

static bool cmd_get(struct conn *c) {
    return *c->link ? reply_value(c, entry_value(*c->link)) : reply_nil(c);
}

/* What may stand behind SET key value: one condition and one word for the time. Those
   behind KEEPTTL take a number; its unit is as in parse_deadline. */
enum { NX, XX, KEEPTTL, SET_WORDS = 7, NONE = -1 };
static const char set_words[][8] = {"NX", "XX", "KEEPTTL", "EX", "PX", "EXAT", "PXAT"};
static const int set_units[] = {0, 0, 0, 1000, 1, -1000, -1};

static bool cmd_set(struct conn *c) {
    int condition = NONE, time = NONE;
    struct slice number = {NULL, 0};
    for (size_t i = 3; i < c->argc; i++) {
        struct slice word = c->argv[i];
        int w = 0;
        while (w < SET_WORDS && !word_is(word, set_words[w])) w++;
        int *at = w < KEEPTTL ? &condition : &time;
        if (w == SET_WORDS || (w > KEEPTTL && i + 1 == c->argc) ||
            (*at != NONE && *at != w))
            return c->resp ? fail(c, "ERR syntax error")
                           : fail(c, "ERR syntax error at %s; blanks need quotes: %s",
                                  show(word).text, "SET greeting \"hello world\"");
        *at = w;
        if (w > KEEPTTL) number = c->argv[++i];
    }
    int64_t when = time == NONE ? NEVER : KEEP;
    if (number.p && !parse_deadline(c, number, set_units[time], 1, &when)) return false;
    if (condition != NONE && (condition == NX) == (*c->link != NULL)) return reply_nil(c);
    return store(c, c->argv[2], when) && reply_status(c, "OK");
}

/* DEL and EXISTS, for one of their keys. */
static bool cmd_del(struct conn *c) {
    bool found = *c->link;
    if (found && c->cmd->flags & WRITES) table_remove(&c->shard->table, c->link);
    return found;
}

/* INCR, DECR, INCRBY, DECRBY: number is the sign. */
static bool cmd_incr(struct conn *c) {
    int64_t value = 0, by = 1, sign = c->cmd->number;
    char text[24];
    if (c->argc > 2 && !parse_int(c->argv[2], &by)) return fail(c, NOT_INT);
    if (sign < 0 && by == INT64_MIN) return fail(c, "ERR decrement would overflow");
    if (*c->link && !parse_int(entry_value(*c->link), &value)) return fail(c, NOT_INT);
    by *= sign;
    if (by > 0 ? value > INT64_MAX - by : value < INT64_MIN - by)
        return fail(c, "ERR increment or decrement would overflow");
    size_t len = (size_t)snprintf(text, sizeof text, "%" PRId64, value += by);
    return store(c, (struct slice){text, len}, KEEP) && reply_int(c, value);
}

/* EXPIRE, PEXPIRE, EXPIREAT, PEXPIREAT: number is the unit, as in parse_deadline. */
static bool cmd_expire(struct conn *c) {
    int64_t when;
    if (c->argc > 3) return fail(c, "ERR Unsupported option %s", show(c->argv[3]).text);
    if (!parse_deadline(c, c->argv[2], c->cmd->number, INT64_MIN, &when)) return false;
    if (!*c->link) return reply_int(c, 0);
    return store(c, entry_value(*c->link), when) && reply_int(c, 1);
}

/* TTL, PTTL: number is the unit in ms. Rounded to the nearest unit, as in Redis. */
static bool cmd_ttl(struct conn *c) {
    struct entry *e = *c->link;
    if (!e || e->slot == NO_SLOT) return reply_int(c, e ? -1 : -2);
    int64_t left = c->shard->table.heap[e->slot].when - now_ms(), unit = c->cmd->number;
    return reply_int(c, left < 0 ? 0 : (left + unit / 2) / unit);
}

static bool cmd_persist(struct conn *c) {
    if (!*c->link || (*c->link)->slot == NO_SLOT) return reply_int(c, 0);
    return store(c, entry_value(*c->link), NEVER) && reply_int(c, 1);
}

/* Takes the item of a pattern at p: ? [a-z] [^a] \x or a byte that stands for itself.
   Returns where it ends if byte b matches it, else NULL. The pattern's end ends a class
   too. */
static const char *glob_item(const char *p, const char *end, unsigned char b) {
    bool escaped = *p == '\\' && end - p > 1, match = false;
    if (*p != '[')
        return (unsigned char)p[escaped] == b || *p == '?' ? p + 1 + escaped : NULL;
    bool negate = end - p > 1 && p[1] == '^';
    for (p += 1 + negate; p < end && *p != ']'; p++) {
        escaped = *p == '\\' && end - p > 1;
        unsigned char low = (unsigned char)*(p += escaped), high = low;
        if (!escaped && end - p > 2 && p[1] == '-') high = (unsigned char)*(p += 2);
        match |= low < high ? low <= b && b <= high : high <= b && b <= low;
    }
    return match != negate ? p + (p < end) : NULL;
}

/* Whether s matches a glob pattern. After a mismatch only the last star takes one byte
   more: whatever an earlier one could take, it can take too. So the time is at most the
   product of both lengths, never exponential. */
static bool glob_match(struct slice pattern, struct slice s) {
    const char *p = pattern.p, *end = p + pattern.len, *star = NULL, *next;
    for (size_t i = 0, retry = 0; i < s.len || p < end;) {
        if (p < end && *p == '*') {
            star = ++p;
            retry = i;
        } else if (p < end && i < s.len &&
                   (next = glob_item(p, end, (unsigned char)s.p[i]))) {
            p = next;
            i++;
        } else {
            if (!star || retry++ == s.len) return false;
            p = star;
            i = retry;
        }
    }
    return true;
}

/* Keys are copied under the lock, matched and quoted without it. */
static bool cmd_keys(struct conn *c) {
    struct slice key, pattern = c->argc > 1 ? c->argv[1] : str("*");
    struct buf found = {0};
    uint32_t len;
    size_t n = 0, start = c->out.len;
    for (struct shard *s = shards; s < shards + opt.shards; s++)
        for (uint64_t hash = 0; walk(s, &hash, &found); found.len = 0)
            for (size_t at = 0; at < found.len && !found.failed; at += key.len) {
                memcpy(&len, found.p + at, sizeof len);
                key = (struct slice){found.p + (at += sizeof len), len};
                if (glob_match(pattern, key)) n += reply_str(c, key, true);
            }
    c->out.failed |= found.failed;
    free(found.p);
    return reply_list(c, start, n, "key");
}

/* PING and ECHO. */
static bool cmd_ping(struct conn *c) {
    return c->argc > 1 ? reply_value(c, c->argv[1]) : reply_status(c, "PONG");
}

/* QUIT; with a number: a browser sends us a form, which may hold commands. */
static bool cmd_quit(struct conn *c) {
    c->closing = c->cmd->number ? "it speaks HTTP" : "QUIT";
    if (!c->cmd->number) return reply_status(c, "OK");
    say(WARN, "%s speaks HTTP, closed", address_of(c->fd, getpeername).text);
    return fail(c, "ERR this is not a web server");
}

/* FLUSHALL, FLUSHDB: all keys go at one moment, under all locks; memory is freed after
   it. */
static bool cmd_flush(struct conn *c) {
    if (c->argc > 1) return fail(c, "ERR syntax error");
    struct table *old = calloc((size_t)opt.shards, sizeof *old);
    if (!old) return fail(c, "OOM out of memory");
    for (long i = 0; i < opt.shards; i++) pthread_mutex_lock(&shards[i].lock);
    for (long i = 0; i < opt.shards; i++) {
        old[i] = shards[i].table;
        shards[i].table = (struct table){0};
        pthread_mutex_unlock(&shards[i].lock);
    }
    for (long i = 0; i < opt.shards; i++) table_free(&old[i]);
    free(old);
    malloc_trim(0);
    return reply_status(c, "OK");
}

/* Adds up one of the numbers of all shards, each read under its lock. */
static size_t sum_at(size_t offset) {
    size_t n = 0;
    for (struct shard *s = shards; s < shards + opt.shards; s++) {
        pthread_mutex_lock(&s->lock);
        n += *(size_t *)(void *)((char *)s + offset);
        pthread_mutex_unlock(&s->lock);
    }
    return n;
}
#define SUM(field) sum_at(offsetof(struct shard, field))

static bool cmd_dbsize(struct conn *c) { return reply_int(c, (int64_t)SUM(table.count)); }

/* In RESP a section's head goes where the type would: in front of its first line. */
static bool cmd_info(struct conn *c) {
    size_t n = 0, start = c->out.len;
    n += reply_format(c, "# Server\r\n", "kv_version:%s", KV_VERSION);
    n += reply_format(c, "", "uptime_in_seconds:%d", (int)((ticks() - started) / SECOND));
    n += reply_format(c, "", "shards:%ld", opt.shards);
    n += reply_format(c, "# Clients\r\n", "connected_clients:%ld", connected);
    n += reply_format(c, "", "maxclients:%ld", opt.max_clients);
    n += reply_format(c, "# Memory\r\n", "used_memory:%zu", SUM(table.bytes));
    n += reply_format(c, "# Stats\r\n", "total_connections_received:%ld", connections);
    n += reply_format(c, "", "total_commands_processed:%zu", commands_run + c->ran);
    n += reply_format(c, "", "keyspace_hits:%zu", SUM(hits));
    n += reply_format(c, "", "keyspace_misses:%zu", SUM(misses));
    n += reply_format(c, "", "expired_keys:%zu", SUM(expired));
    n += reply_format(c, "# Keyspace\r\n", "keys:%zu", SUM(table.count));
    n += reply_format(c, "", "expires:%zu", SUM(table.heap_len));
    if (!c->resp) return reply_list(c, start, n, "field");
    buf_header(&c->out, start, '$', c->out.len - start);
    return reply(c, "", str(""));
}

static char password[1024]; /* empty: none is needed */

/* Reads the first line of --password-file, which nobody else may read. Exits without. */
static void read_password(void) {
    struct stat st;
    FILE *f = fopen(opt.password_file, "r");
    const char *wrong = NULL;
    if (!f || fstat(fileno(f), &st) < 0) wrong = strerror(errno);
    else if (st.st_mode & 077) wrong = "others may read it: chmod 600 helps";
    else if (!fgets(password, sizeof password, f) || *password == '\n')
        wrong = "is empty";
    if (wrong) exit(say(USAGE, "--password-file %s: %s", opt.password_file, wrong));
    password[strcspn(password, "\n")] = 0;
    fclose(f);
}

/* Compares all of word, wherever it differs: the time tells nothing about the password.
   Replies and returns false if it is wrong; closes after ten. */
static bool log_in(struct conn *c, struct slice user, struct slice word) {
    size_t n = strlen(password);
    int differ =
        user.len != 7 || memcmp(user.p, "default", 7) != 0 || (n > 0 && n != word.len);
    for (size_t i = 0; n > 0 && i < word.len; i++) differ |= word.p[i] ^ password[i % n];
    if (!differ) return c->authed = true;
    if (++c->tries == 10) c->closing = "ten wrong passwords";
    return fail(c, "WRONGPASS invalid username-password pair or user is disabled.");
}

static bool cmd_auth(struct conn *c) {
    if (c->argc > 3) return fail(c, "ERR syntax error");
    if (!*password && c->argc == 2)
        return fail(c,
                    "ERR AUTH <password> called without any password configured for the "
                    "default user. Are you sure your configuration is correct?");
    struct slice user = c->argc == 3 ? c->argv[1] : str("default");
    return log_in(c, user, c->argv[c->argc - 1]) && reply_status(c, "OK");
}

static const char no_hello[] =
    "NOAUTH HELLO must be called with the client already authenticated, otherwise the "
    "HELLO <proto> AUTH <user> <pass> option can be used to authenticate the client and "
    "select the RESP protocol version at the same time";

/* Names of clients are not kept, so SETNAME goes unread. Replies a map: in RESP2 and text
   that is a list. */
static bool cmd_hello(struct conn *c) {
    int64_t v = c->version;
    if (c->argc > 1 && !parse_int(c->argv[1], &v))
        return fail(c, "ERR Protocol version is not an integer or out of range");
    if (v != 2 && v != 3) return fail(c, "NOPROTO unsupported protocol version");
    for (size_t i = 2, takes; i < c->argc; i += takes + 1) {
        struct slice word = c->argv[i];
        takes = word_is(word, "AUTH") ? 2 : word_is(word, "SETNAME") ? 1 : c->argc;
        if (i + takes >= c->argc)
            return fail(c, "ERR Syntax error in HELLO option '%s'", show(word).text);
        if (takes == 2 && !log_in(c, c->argv[i + 1], c->argv[i + 2])) return false;
    }
    if (!c->authed) return fail(c, "%s", no_hello);
    c->version = (int)v;
    if (c->resp) c->resp = c->version;
    const char *const info[] = {
        "server",           "kv",   "version",    KV_VERSION, "proto",
        v == 3 ? "3" : "2", "mode", "standalone", "role",     "master"};
    size_t start = c->out.len;
    for (int i = 0; i < 10; i++)
        if (c->resp && i == 5) reply_int(c, v);
        else if (c->resp) reply_value(c, str(info[i]));
        else if (i % 2) reply_format(c, "", "%s:%s", info[i - 1], info[i]);
    if (c->resp < 3) return reply_list(c, start, c->resp ? 10 : 5, "item");
    buf_header(&c->out, start, '%', 5);
    return true;
}

/* Just enough for client libraries that ask on connecting. COMMAND, number 0: an empty
   list says that there is nothing special to know. CONFIG, 1: each setting is empty.
   CLIENT, 2: names are not kept, so a client may say of itself what it likes. SELECT, 3:
   there is one database. */
static bool cmd_ask(struct conn *c) {
    size_t start = c->out.len, number = (size_t)c->cmd->number;
    int64_t n = 0;
    if (number == 1 && !c->resp) reply_format(c, "", "%s:", show(c->argv[2]).text);
    else if (number == 1 && reply_value(c, c->argv[2])) reply_value(c, str(""));
    if (number < 2) return reply_list(c, start, c->resp ? 2 * number : number, "item");
    if (number == 2 && word_is(c->argv[1], "ID")) return reply_int(c, c->fd);
    if (number == 3 && !parse_int(c->argv[1], &n)) return fail(c, NOT_INT);
    return n == 0 ? reply_status(c, "OK") : fail(c, "ERR DB index is out of range");
}

/* The most used first, for a lookup goes from the top. A family stands together. */
static const struct command commands[] = {
    {"PING", "[message]", 1, 2, OPEN, cmd_ping, 0, "PONG, or the message"},
    {"SET", "key value [NX|XX] [EX s|PX ms|EXAT s|PXAT ms|KEEPTTL]", 3, ANY, WRITE1,
     cmd_set, 0, "store a value; replies OK, or (nil) if NX finds a key or XX none"},
    {"GET", "key", 2, 2, ONE_KEY, cmd_get, 0, "the value of a key; (nil) if it has none"},
    {"INCR", "key", 2, 2, WRITE1, cmd_incr, 1,
     "count; replies the new number, from 0 on"},
    {"DECR", "key", 2, 2, WRITE1, cmd_incr, -1, NULL},
    {"DEL", "key...", 2, ANY, WRITES | EACH_KEY, cmd_del, 0, "remove; replies how many"},
    {"EXISTS", "key...", 2, ANY, EACH_KEY, cmd_del, 0, "how many of these exist"},
    {"KEYS", "[pattern]", 1, 2, 0, cmd_keys, 0, "which keys match * ? [a-z] [^a] \\x"},
    {"INCRBY", "key n", 3, 3, WRITE1, cmd_incr, 1, "count by n; replies the new number"},
    {"DECRBY", "key n", 3, 3, WRITE1, cmd_incr, -1, NULL},
    {"EXPIRE", "key n", 3, ANY, WRITE1, cmd_expire, 1000,
     "expire in n s, P: ms, AT: at Unix time; replies 1, or 0 if there is no such key"},
    {"PEXPIRE", "key n", 3, ANY, WRITE1, cmd_expire, 1, NULL},
    {"EXPIREAT", "key n", 3, ANY, WRITE1, cmd_expire, -1000, NULL},
    {"PEXPIREAT", "key n", 3, ANY, WRITE1, cmd_expire, -1, NULL},
    {"TTL", "key", 2, 2, ONE_KEY, cmd_ttl, 1000, "s left, P: ms; -1: no end, -2: no key"},
    {"PTTL", "key", 2, 2, ONE_KEY, cmd_ttl, 1, NULL},
    {"PERSIST", "key", 2, 2, WRITE1, cmd_persist, 0,
     "do not expire; 1, or 0 if it did not"},
    {"DBSIZE", "", 1, 1, 0, cmd_dbsize, 0, "how many keys there are"},
    {"FLUSHDB", "", 1, ANY, WRITES, cmd_flush, 0, "remove all keys; replies OK"},
    {"FLUSHALL", "", 1, ANY, WRITES, cmd_flush, 0, NULL},
    {"ECHO", "message", 2, 2, 0, cmd_ping, 0, "the message"},
    {"INFO", "", 1, ANY, 0, cmd_info, 0, "the state of the server, name:value"},
    {"HELP", "[command]", 1, 2, OPEN, cmd_help, 0, "this list, or more on one command"},
    {"QUIT", "", 1, ANY, OPEN, cmd_quit, 0, "close the connection; replies OK"},
    {"AUTH", "[default] password", 2, ANY, OPEN, cmd_auth, 1, "log in; replies OK"},
    {"HELLO", "[2|3 [AUTH default password] [SETNAME name]]", 1, ANY, HIDDEN | OPEN,
     cmd_hello, 1, "choose the version of RESP; replies what the server is"},
    {"COMMAND", "[DOCS]", 1, ANY, HIDDEN, cmd_ask, 0, "an empty list"},
    {"CONFIG", "GET name", 3, 3, HIDDEN, cmd_ask, 1, "the name, and an empty setting"},
    {"CLIENT", "ID|SETNAME name|SETINFO...", 2, ANY, HIDDEN, cmd_ask, 2, "OK"},
    {"SELECT", "0", 2, 2, HIDDEN, cmd_ask, 3, "there is one database; replies OK"},
    {"POST", NULL, 1, ANY, HIDDEN | OPEN, cmd_quit, 1, ""},
    {"Host:", NULL, 1, ANY, HIDDEN | OPEN, cmd_quit, 1, ""},
    {NULL, NULL, 0, 0, HIDDEN, NULL, 0, ""},
};

static const struct command *find_command(struct slice word) {
    for (const struct command *cmd = commands; cmd->name; cmd++)
        if (word_is(word, cmd->name)) return cmd;
    return NULL;
}

#define UNKNOWN "ERR unknown command '%s', see HELP"
/* HELP: a line for each family. HELP command: all that its row says. */
static bool cmd_help(struct conn *c) {
    const struct command *cmd = c->argc > 1 ? find_command(c->argv[1]) : commands,
                         *row = cmd;
    char left[128] = "";
    size_t n = 0, lines = 0, start = c->out.len;
    if (!cmd || !cmd->args) return fail(c, UNKNOWN, show(c->argv[1]).text);
    while (!row->help) row--;
    if (c->argc > 1)
        return reply_format(c, "+", "%s %s", cmd->name, cmd->args) &&
               reply_format(c, "+", "%s", row->help) && reply_list(c, start, 2, "line");
    for (; !(cmd->flags & HIDDEN); cmd++, n++) {
        if (cmd->help) row = cmd;
        strcat(strcat(left, cmd->name), " ");
        if (!cmd[1].help) continue;
        lines += reply_format(c, "+", "%-40s %.*s", strcat(left, cmd->args),
                              (int)strcspn(row->help, ";"), row->help);
        *left = 0;
    }
    return reply_list(c, start, c->resp ? lines : n, "command");
}

/* Runs the command on one key, with the key's shard locked. Returns what run returned. */
static bool run_on_key(struct conn *c, struct slice key) {
    uint64_t hash = hash_bytes(key);
    struct shard *s = c->shard = &shards[hash >> 32 & (uint64_t)(opt.shards - 1)];
    c->key = key;
    c->hash = (uint32_t)hash;
    pthread_mutex_lock(&s->lock);
    c->link = table_find(s, c->hash, key);
    if (c->link && !(c->cmd->flags & WRITES)) *c->link ? s->hits++ : s->misses++;
    c->out.failed |= !c->link; /* then the connection ends */
    bool result = c->link && c->cmd->run(c);
    pthread_mutex_unlock(&s->lock);
    return result;
}

/* Runs the request in argv and replies. */
static bool run_request(struct conn *c) {
    const struct command *cmd = c->cmd = find_command(c->argv[0]);
    int64_t n = 0;
    if (!cmd) return fail(c, UNKNOWN, show(c->argv[0]).text);
    c->ran++;
    if (c->argc < cmd->min || c->argc > cmd->max)
        return fail(c, "ERR wrong number of arguments for '%s' command: %s %s",
                    lower(cmd).text, cmd->name, cmd->args);
    if (!c->authed && !(cmd->flags & OPEN))
        return fail(c, "NOAUTH Authentication required.");
    if (cmd->flags & ONE_KEY) return run_on_key(c, c->argv[1]);
    if (!(cmd->flags & EACH_KEY)) return cmd->run(c);
    for (size_t i = 1; i < c->argc; i++) n += run_on_key(c, c->argv[i]);
    return reply_int(c, n);
}

/* === 9 Connections ================================================================= */
/* Sends all replies; waits for the client, up to --timeout. Sets closing on failure. */
static void flush(struct conn *c) {
    const char *why = c->out.failed ? "out of memory" : NULL; /* no half replies */
    for (size_t sent = 0; !why && sent < c->out.len;) {
        ssize_t n = send(c->fd, c->out.p + sent, c->out.len - sent, 0);
        if (n >= 0) sent += (size_t)n;
        else if (errno != EINTR) why = errno == EAGAIN ? "timeout" : strerror(errno);
    }
    c->broken |= why != NULL;
    if (why) c->closing = why;
    atomic_fetch_add(&commands_run, c->ran);
    c->out.len = c->ran = 0;
}

/* Reads more input behind what there is of a request, and waits for it, until --timeout
   if there is one. Looks without waiting first, more than once where clients are few, for
   to sleep and to be woken costs more than that; before a thread goes to sleep it gives
   back what its buffers have grown by, so that an idle connection costs little. Where the
   input ends or fails, says so in closing. */
static void fill(struct conn *c) {
    struct buf *in = &c->in;
    bool full = in->len == in->cap; /* then more is waiting: take more at a time */
    ssize_t n = -1;
    in->len -= c->pos;
    if (in->len > 0) memmove(in->p, in->p + c->pos, in->len);
    c->pos = 0;
    if (full && in->cap < IO_CHUNK) buf_reserve(in, in->cap - in->len + 1);
    int looks = atomic_load(&connected) <= FEW_CLIENTS ? LOOKS : 1;
    for (int flags = MSG_DONTWAIT; buf_reserve(in, 1); flags = looks > 0 ? flags : 0) {
        do n = recv(c->fd, in->p + in->len, in->cap - in->len, flags);
        while (n < 0 && errno == EINTR);
        if (n >= 0 || errno != EAGAIN || !flags) break;
        if (--looks > 0 && sched_yield() == 0) continue;
        buf_slim(in);
        buf_slim(&c->out);
    }
    if (n > 0) in->len += (size_t)n;
    else if (n == 0) c->closing = "end of input";
    else if (in->failed) c->closing = "out of memory";
    else c->closing = errno == EAGAIN ? "timeout" : strerror(errno);
    c->broken = n < 0 && (in->failed || errno != EAGAIN);
    if (n == 0 && in->len > 0 && !c->resp && !atomic_load(&stopping))
        fail(c, "ERR the last line has no newline: it may be cut short and is not run");
}

/* Closes fd so that the client sees the last replies: it is told first, then what it
   still sends is read, for 2 x ms at most: closing with unread input makes TCP forget
   what is under way. */
static void hang_up(int fd, int ms) {
    char unread[1024];
    struct timeval wait = {ms / 1000, 1}; /* 0, 0 would mean for ever */
    int64_t end = ticks() + ms * SECOND / 1000;
    bool go = setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait) == 0 &&
              shutdown(fd, SHUT_WR) == 0;
    while (go) go = recv(fd, unread, 1024, ms ? 0 : MSG_DONTWAIT) > 0 && ticks() < end;
    close(fd);
}

/* Runs the request; -vv logs it, with its client and the time it took. */
static void run_logged(struct conn *c, const char *who) {
    int64_t start = logs(COMMAND) ? ticks() : 0;
    char line[512] = "";
    run_request(c);
    size_t shown = c->cmd && c->cmd->flags & OPEN && c->cmd->number
                       ? 1
                       : c->argc; /* not a password */
    for (size_t i = 0; start && i < shown && strlen(line) < sizeof line / 3; i++)
        strcat(strcat(line, " "), show(c->argv[i]).text);
    if (start) say(COMMAND, "%s%s (%ld us)", who, line, (long)(ticks() - start) / 1000);
}

/* A connection's thread: reads, runs all requests that have arrived, sends all replies at
   once. */
static void *conn_main(void *arg) {
    struct slice words[MAX_WORDS];
    struct conn c = {
        .fd = (int)(intptr_t)arg, .version = 2, .authed = !*password, .argv = words};
    atomic_fetch_add(&connections, 1);
    struct text client = logs(CLIENT) ? address_of(c.fd, getpeername) : (struct text){""};
    say(CLIENT, "%s connected", client.text);
    while (!c.closing && atomic_load(&stopping) < 2) {
        fill(&c);
        while (!c.closing && next_request(&c)) {
            if (c.argc > 0) run_logged(&c, client.text);
            if (c.out.len >= IO_CHUNK) flush(&c);
        }
        flush(&c);
    }
    say(CLIENT, "%s closed: %s", client.text, c.closing ? c.closing : "the server stops");
    hang_up(c.fd, c.broken ? 0 : LINGER);
    free(c.in.p);
    free(c.out.p);
    atomic_fetch_sub(&connected, 1); /* the last thing: main ends the program at 0 */
    return NULL;
}

/* === 11 The server ================================================================= */
static pthread_attr_t detached; /* of the connections' threads: nobody waits for them */

/* Accepts a client and starts its thread, or turns it away in RESP's form and logs why,
   once a second. Returns false when no client is waiting. */
static bool accept_client(int listener) {
    static const char full[] = "-ERR max number of clients reached\r\n";
    static time_t logged;
    static int spare = -1; /* a descriptor to give up when there is no other */
    const struct timeval timeout = {.tv_sec = opt.timeout};
    pthread_t id;
    if (spare < 0) spare = open("/dev/null", O_RDONLY);
    int on = 1, fd = accept(listener, NULL, NULL), error = fd < 0 ? errno : 0;
    if (error == EAGAIN || error == EINTR || error == ECONNABORTED) return false;
    if (error) { /* Left alone, the client would keep the listener readable. */
        close(spare);
        spare = -1;
        fd = accept(listener, NULL, NULL);
    }
    /* Without these options a connection works, only less well. */
    (void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    (void)setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
    bool many = atomic_fetch_add(&connected, 1) >= opt.max_clients || fd >= max_fds;
    if (!error && !many)
        error = pthread_create(&id, &detached, conn_main, (void *)(intptr_t)fd);
    if (!error && !many) return true;
    atomic_fetch_sub(&connected, 1);
    if (time(NULL) != logged)
        say(WARN, "client refused: %s", many ? "too many clients" : strerror(error));
    logged = time(NULL);
    if (fd < 0) nanosleep(&(struct timespec){0, 1000000}, NULL); /* it will be back */
    else if (send(fd, full, sizeof full - 1, MSG_DONTWAIT) >= 0) hang_up(fd, 0);
    else close(fd);
    return fd >= 0;
}

/* Binds the first address that --bind names and that is free. Returns it, or exits. */
static int listen_on(void) {
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE};
    struct addrinfo *all, *a;
    char port[8];
    int fd = -1, on = 1;
    snprintf(port, sizeof port, "%ld", opt.port);
    int error = getaddrinfo(opt.bind, port, &hints, &all);
    if (error) exit(say(USAGE, "--bind %s: %s", opt.bind, gai_strerror(error)));
    for (a = all; a; a = a->ai_next) {
        fd = socket(a->ai_family, a->ai_socktype, a->ai_protocol);
        if (fd >= 0 && !setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) &&
            !fcntl(fd, F_SETFL, O_NONBLOCK) && !bind(fd, a->ai_addr, a->ai_addrlen))
            break;
        if (fd >= 0) close(fd);
    }
    struct text bound = a ? address_of(fd, getsockname) : (struct text){"127."};
    if (!opt.insecure && !*password && strncmp(bound.text, "127.", 4) != 0 &&
        strncmp(bound.text, "[::1]", 5) != 0)
        exit(say(USAGE,
                 "--bind %s: not loopback, which needs --password-file or --insecure",
                 opt.bind));
    if (!a || listen(fd, SOMAXCONN) < 0)
        exit(say(ERROR, "%s port %s: %s%s", opt.bind, port, strerror(errno),
                 errno == EADDRINUSE ? "; -p 0 takes any free port" : ""));
    freeaddrinfo(all);
    return fd;
}

static atomic_int signals; /* that came; any thread may be the one that takes it */

static void on_signal(int number) { signals += number != 0; }

/* Ends the connections. After SHUT_RD a thread still reads what has arrived (on Linux),
   answers it, and then sees the end of the input. Who has not taken the replies in time
   is dropped. Returns whether all threads have ended. */
static bool stop_clients(void) {
    int64_t end = ticks();
    say(INFO, "stopping with %ld clients", atomic_load(&connected));
    for (int n = 1; n <= 2; n++) {
        end += STOP_GRACE * SECOND / 1000;
        atomic_store(&stopping, n);
        for (int fd = 3; fd < max_fds; fd++) shutdown(fd, n == 1 ? SHUT_RD : SHUT_RDWR);
        while (atomic_load(&connected) > 0 && ticks() < end) {
            nanosleep(&(struct timespec){0, 5000000}, NULL);
            if (signals > 1) exit(say(ERROR, "second signal: stopped at once"));
        }
    }
    return atomic_load(&connected) == 0;
}

/* What must be there before the first thread: descriptors for --max-clients, or as many
   as we may have, and some to spare; how threads are made; the seed. */
static void prepare(void) {
    struct rlimit r = {0, 0};
    getrlimit(RLIMIT_NOFILE, &r);
    rlim_t want = (rlim_t)opt.max_clients + 32;
    r.rlim_cur = r.rlim_max < want ? r.rlim_max : want;
    if (setrlimit(RLIMIT_NOFILE, &r) < 0 || r.rlim_cur < want)
        say(WARN, "only %ld descriptors for --max-clients", (long)r.rlim_cur);
    max_fds = (int)r.rlim_cur - 8; /* so that we can always accept, and then refuse */
    if (pthread_attr_init(&detached) || pthread_attr_setstacksize(&detached, STACK) ||
        pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED))
        exit(say(ERROR, "cannot set up threads"));
    int fd = open("/dev/urandom", O_RDONLY);
    if (fd < 0 || read(fd, seed, sizeof seed) != sizeof seed)
        exit(say(ERROR, "cannot read /dev/urandom: %s", strerror(errno)));
    close(fd);
    size_t size = sizeof *shards * (size_t)opt.shards;
    shards = aligned_alloc(_Alignof(struct shard), size);
    if (!shards) exit(say(ERROR, "out of memory"));
    memset(shards, 0, size);
    for (long i = 0; i < opt.shards; i++) pthread_mutex_init(&shards[i].lock, NULL);
}

int main(int argc, char **argv) {
    pthread_t expiry;
    started = ticks();
    parse_options(argc, argv);
    if (opt.help || opt.version) return print_help();
    if (opt.password_file) read_password();
    prepare();
    signal(SIGPIPE, SIG_IGN);
    sigaction(SIGINT, &(struct sigaction){.sa_handler = on_signal}, NULL);
    sigaction(SIGTERM, &(struct sigaction){.sa_handler = on_signal}, NULL);
    struct pollfd listener = {.fd = listen_on(), .events = POLLIN};
    int error = pthread_create(&expiry, NULL, expiry_main, NULL);
    if (error) exit(say(ERROR, "cannot start a thread: %s", strerror(error)));
    say(INFO, "listening on %s", address_of(listener.fd, getsockname).text);
    while (!signals) { /* a signal may come just before poll: hence its time limit */
        poll(&listener, 1, TICK);
        for (int i = 0; i < 256 && accept_client(listener.fd); i++) continue;
    }
    close(listener.fd);
    if (!stop_clients()) return 0; /* a thread is busy: leave all as it is */
    pthread_join(expiry, NULL);
    for (long i = 0; i < opt.shards; i++) table_free(&shards[i].table);
    free(shards);
    say(INFO, "stopped");
    return 0;
}
