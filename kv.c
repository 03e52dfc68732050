/* kv: a key-value server in one file, made to be read from top to bottom.
 *
 * === 0 The map ======================================================================
 *
 * People talk to kv in lines of text over TCP (nc localhost 8080), client libraries in
 * RESP; it keeps keys and values in memory, and with --aof also in a file.
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
 * A key belongs to the shard that its hash names. A shard is a hash table (key to value)
 * and a heap (what expires next), and one mutex that guards both: two connections wait
 * for each other only when their keys share a shard.
 *
 * Lock order. A thread holds at most one shard lock (FLUSHALL takes all, in the order of
 * their numbers), and inside it for a moment the log's lock. There is no other: what else
 * threads share is atomic, or set before they start. Nothing that may block (a read, a
 * send, a write, a sleep) is done under a lock. Locking a healthy mutex cannot fail.
 *
 * The sections build on each other and each has a chapter of its number in doc/:
 *   1 Options and log   2 Buffers   3 Requests   4 Replies       5 Hashing   6 The table
 *   7 Expiry            8 Commands  9 Connections   10 Append-only file   11 The server
 */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libgen.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h> /* with it come sched.h and time.h */
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
#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h> /* malloc_trim: else glibc keeps what was freed in mid-heap */
#else
#define malloc_trim(unused) ((void)(unused))
#endif
#define KV_VERSION "0.1.0"

/* The compiler checks the f-th argument, a format, against those behind it. */
#define PRINTF_LIKE(f) __attribute__((format(printf, f, (f) + 1)))

/* MAX_SHOWN bytes of a client's word are repeated by an error or the log. OPEN_WORDS and
   OPEN_BYTES are as much as a request may have before AUTH. */
enum { MAX_WORDS = 1024, MAX_SHOWN = 64, OPEN_WORDS = 10, OPEN_BYTES = 16384 };
/* With up to FEW_CLIENTS each thread looks LOOKS times for input before it sleeps, beyond
   that LOOKERS at a time; who commits lets others JOIN its fsync. Buffers begin with
   SMALL_BUF bytes; IO_CHUNK of replies are sent; a STACK costs the pages it touches. */
enum { FEW_CLIENTS = 256, LOOKERS = 4, LOOKS = 20, SMALL_BUF = 512 };
enum { IO_CHUNK = 65536, STACK = 65536, JOIN = 10 };

/* The expiry thread looks every TICK and removes up to BATCH entries per lock; KEYS looks
   at WALK_BUCKETS per lock. After SIGTERM clients have STOP_GRACE to take their replies,
   and LINGER to read why they are closed. Times are in ms. */
enum { TICK = 50, BATCH = 128, WALK_BUCKETS = 64, STOP_GRACE = 2000, LINGER = 1000 };

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

/* One connection, on the stack of its thread; no other thread sees it. resp: the form of
   request and reply, else text; crlf: lines of the reply end in CRLF. authed: no password
   is needed, or it was given; tries: wrong ones. closing: why to close as soon as the
   replies are out, or NULL. in: what was read; a RESP request starts at start, the next
   request at pos; of a line, the scanned bytes from there hold no newline. argv: the argc
   words of the request, which stand in words and point into in; bytes: the sum of their
   lengths. out: replies not yet sent, to asked requests; they reveal the log as far as
   seen, and have changed about wrote bytes, 0: none. While cmd works on a key: key; hash:
   the key's; shard: its shard, locked; *link: its entry, or NULL where a new one goes.
   ahead: where the next request's key is, or 0; ahead_hash: its hash. */
struct conn {
    int fd, tries;
    bool resp, crlf, authed;
    const char *closing;
    struct buf in, words, out;
    size_t start, pos, ahead, scanned, argc, bytes, asked, wrote;
    uint64_t seen, hash, ahead_hash;
    const struct command *cmd;
    struct shard *shard;
    struct entry **link;
    struct slice key, *argv;
};

/* A string to return by value. */
struct text {
    char text[4 * MAX_SHOWN + 8];
};

static char password[1024]; /* empty: none is needed */
static int max_fds, spare;  /* a client's descriptor is below it; see accept_client */
static atomic_long connected, looking; /* clients; of many, those who look */
static int aof_fd = -1;      /* append-only file; -1: none, -2: it is being replayed */
static atomic_bool disk_bad; /* it could not be written: writes are refused */
static atomic_int stopping;  /* 0: serving; 1: answering what has arrived; 2: giving up */

/* === 1 Options and log ============================================================= */
static struct {
    const char *bind, *fsync, *aof, *password_file;
    long port, max_clients, timeout, max_value, shards;
    long insecure, verbose, quiet, help, version;
} opt = {"127.0.0.1", "everysec", 0, 0, 8080, 10000, 0, 1 << 20, 256, 0, 0, 0, 0, 0};

/* A row says all about an option: parsing, checks and --help use it. No arg: a switch, a
   long that counts. With a max: a number, a long. Else a string. */
static const struct option {
    const char *letter, *name, *arg, *help; /* as --help prints them */
    void *to;
    long min, max;
} options[] = {
    {"-p,", "port", "N", "8080; 0: any free port", &opt.port, 0, 65535},
    {"-b,", "bind", "ADDR", "127.0.0.1; IPv4, IPv6 or a host name", &opt.bind, 0, 0},
    {"-c,", "max-clients", "N", "10000", &opt.max_clients, 1, 1000000},
    {"-t,", "timeout", "SECONDS", "0: never; close when idle", &opt.timeout, 0, 1000000},
    {"  ", "max-value", "BYTES", "1048576; the longest word", &opt.max_value, 1, 1 << 29},
    {"-s,", "shards", "N", "256; a power of two", &opt.shards, 1, 4096},
    {"-a,", "aof", "FILE", "none; replayed at start, then appended to", &opt.aof, 0, 0},
    {"  ", "fsync", "WHEN", "everysec; always, everysec or no", &opt.fsync, 0, 0},
    {"-P,", "password-file", "FILE", "none; clients must AUTH", &opt.password_file, 0, 0},
    {"  ", "insecure", "", "serve the network openly", &opt.insecure, 0, 0},
    {"-v,", "verbose", "", "log connections, -vv every command", &opt.verbose, 0, 0},
    {"-q,", "quiet", "", "log only trouble", &opt.quiet, 0, 0},
    {"-h,", "help", "", "print this", &opt.help, 0, 0},
    {"-V,", "version", "", "print the version", &opt.version, 0, 0},
    {"", NULL, "", "", NULL, 0, 0},
};

/* What a line of the log is about: -q keeps what comes before INFO, -v and -vv add what
   comes behind. USAGE is about the command line. */
enum level { USAGE, ERROR, WARN, INFO, CLIENT, COMMAND };

#define SECOND INT64_C(1000000000) /* in ns */
static int64_t ns_on(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * SECOND + t.tv_nsec;
}

/* Nanoseconds on a clock that nobody sets, to measure how long something takes. */
static int64_t ticks(void) { return ns_on(CLOCK_MONOTONIC); }

/* Milliseconds since 1970, for deadlines, which are moments of the wall clock. 0 while
   the append-only file is replayed: nothing has passed then. */
static int64_t now_ms(void) { return aof_fd < -1 ? 0 : ns_on(CLOCK_REALTIME) / 1000000; }

static bool logs(enum level at) { return at <= (opt.quiet ? WARN : INFO + opt.verbose); }

/* Writes one line to stderr in one call, so that lines of several threads never mix; what
   does not fit is cut. Returns the exit status for who wants to end with exit(say()). */
static PRINTF_LIKE(2) int say(enum level at, const char *fmt, ...) {
    static const char tags[][6] = {"ERROR", "ERROR", "WARN", "INFO", "DEBUG", "DEBUG"};
    char now[24], text[993], line[1040];
    va_list args;
    if (!logs(at)) return 0;
    int64_t ms = ns_on(CLOCK_REALTIME) / 1000000;
    strftime(now, sizeof now, "%FT%T", gmtime_r(&(time_t){ms / 1000}, &(struct tm){0}));
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    int n = sprintf(line, "%s.%03dZ %s %s\n", now, (int)(ms % 1000), tags[at], text);
    /* When the write fails nobody is left to tell. */
    return write(STDERR_FILENO, line, (size_t)n) < 0 || at != USAGE ? 1 : 2;
}

/* Accepts -n value, -nvalue, --name value, --name=value and -vv. To getopt a word that
   begins with -- is option '-' with the rest as value; ':' lacks its value. */
static void parse_options(int argc, char **argv) {
    for (int letter; (letter = getopt(argc, argv, ":p:b:c:t:s:a:P:vqhV-:")) != -1;
         optarg = NULL) {
        const struct option *o = options;
        char *value = optarg, *end;
        size_t n = letter == '-' && value ? strcspn(value, "=") : 0; /* of a long name */
        if (letter == ':') letter = optopt;
        for (; o->name; o++)
            if (n ? !strncmp(o->name, optarg, n) && !o->name[n] : o->letter[1] == letter)
                break;
        if (!o->name) exit(say(USAGE, "%s: see kv --help", argv[optind - 1]));
        if (n) value = optarg[n] ? optarg + n + 1 : *o->arg ? argv[optind++] : NULL;
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
    bool syncs = !strcmp(opt.fsync, "always") || !strcmp(opt.fsync, "everysec");
    if (!syncs && strcmp(opt.fsync, "no") != 0)
        exit(say(USAGE, "--fsync %s is not always, everysec or no", opt.fsync));
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
    struct sockaddr *sa = (struct sockaddr *)&(struct sockaddr_storage){0};
    socklen_t len = sizeof(struct sockaddr_storage);
    char host[64], port[8];
    if (!get(fd, sa, &len) &&
        !getnameinfo(sa, len, host, 64, port, 8, NI_NUMERICHOST | NI_NUMERICSERV))
        sprintf(out.text, strchr(host, ':') ? "[%s]:%s" : "%s:%s", host, port);
    return out;
}

/* === 2 Buffers ===================================================================== */
/* Makes room for n more bytes and returns where they go, or NULL when memory is out.
   Doubling makes growth cost the same for each byte, however many there will be. */
static char *buf_reserve(struct buf *b, size_t n) {
    size_t cap = b->cap ? b->cap : SMALL_BUF;
    while (cap - b->len < n) cap *= 2; /* our limits keep this far from overflow */
    char *p = b->failed ? NULL : cap == b->cap ? b->p : realloc(b->p, cap);
    if (p) *b = (struct buf){p, b->len, cap, false};
    b->failed = !p;
    return p ? p + b->len : NULL;
}

static void buf_add(struct buf *b, const void *p, size_t n) {
    char *to = buf_reserve(b, n);
    if (!to || n == 0) return;
    memcpy(to, p, n);
    b->len += n;
}

/* Puts a type byte, n and CRLF, as RESP has them, in front of what b holds from start. */
static void buf_header(struct buf *b, size_t start, char type, size_t n) {
    char s[] = "type, 20 digits, then\r\n", *end = s + sizeof s - 1, *p = end - 2;
    do *--p = (char)('0' + n % 10);
    while (n /= 10);
    *--p = type;
    size_t len = (size_t)(end - p);
    if (!buf_reserve(b, len)) return;
    memmove(b->p + start + len, b->p + start, b->len - start);
    memcpy(b->p + start, p, len);
    b->len += len;
}

/* Gives back the memory of an empty buffer that has doubled more than once. */
static void buf_slim(struct buf *b) {
    if (b->len > 0 || b->cap <= 2UL * SMALL_BUF) return;
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
   zero, and no overflow. INT64_MIN is one further from 0 than INT64_MAX. */
static bool parse_int(struct slice s, int64_t *n) {
    bool minus = s.len > 0 && s.p[0] == '-';
    uint64_t sum = 0; /* has room for the 1 to 19 digits */
    if (s.len - minus - 1 > 18 || (s.p[minus] == '0' && s.len > 1)) return false;
    for (size_t i = minus; i < s.len; i++) {
        if (s.p[i] < '0' || s.p[i] > '9') return false;
        sum = sum * 10 + (uint64_t)(s.p[i] - '0');
    }
    *n = (int64_t)(minus ? 0 - sum : sum);
    return sum <= (uint64_t)INT64_MAX + minus;
}

/* The escapes that are a letter, and what they stand for. */
static const char escape_names[] = "\"\\nrt", escape_bytes[] = "\"\\\n\r\t";

/* Decodes the escape at from to *to. Returns where it ends, or NULL if there is none. It
   looks no further than the line's CR or LF, which no escape contains. */
static char *unescape(char *from, char *to) {
    const char *hit = memchr(escape_names, from[1], sizeof escape_names - 1);
    if (hit) *to = escape_bytes[hit - escape_names];
    else if (from[1] == 'x' && isxdigit(from[2] & 0xff) && isxdigit(from[3] & 0xff))
        *to = (char)strtol((char[]){from[2], from[3], 0}, NULL, 16);
    else return NULL;
    return from + (hit ? 2 : 4);
}

/* Adds a word to argv. Returns NULL, or what is wrong. */
static const char *add_word(struct conn *c, struct slice word) {
    c->bytes += word.len;
    if (!c->authed && (c->argc == OPEN_WORDS || c->bytes > OPEN_BYTES))
        return "before AUTH a request over 10 words or 16 KiB is too long";
    if (c->argc == MAX_WORDS) return "a request of more than 1024 words is too long";
    if (word.len > (size_t)opt.max_value) return "a word over --max-value is too long";
    if (c->bytes > 2 * (size_t)opt.max_value + IO_CHUNK)
        return "a request over 2 x --max-value + 64 KiB is too long";
    buf_add(&c->words, &word, sizeof word);
    c->argv = (struct slice *)(void *)c->words.p;
    c->argc++;
    return c->words.failed ? "out of memory" : NULL;
}

/* Splits a line, which ends at end, into argv. Words are decoded in place: an escape is
   longer than what it stands for. Returns NULL, or what is wrong with the line. */
static const char *split_line(struct conn *c, char *from, char *end) {
    for (;;) {
        while (from < end && is_blank(*from)) from++;
        if (from == end || (c->argc == 0 && *from == '#')) return NULL;
        int mark = *from == '"' || *from == '\'' ? *from++ : 0;
        char *start = from, *to = from;
        while (from < end && (mark ? *from != mark : !is_blank(*from))) {
            if (mark != '"' || *from != '\\') *to++ = *from++;
            else if (!(from = unescape(from, to++)))
                return "bad escape: double quotes know \\\" \\\\ \\n \\r \\t and \\xHH";
        }
        if (mark && (from == end || (++from < end && !is_blank(*from))))
            return "unbalanced quotes: a word that begins with a quote ends with one";
        const char *wrong = add_word(c, (struct slice){start, (size_t)(to - start)});
        if (wrong) return wrong;
    }
}

/* RESP is what client libraries speak: an array of strings, *2 $3 GET $1 a, each number
   and string ended by CRLF. After an error nobody knows where the next request begins. */
static bool protocol_error(struct conn *c, const char *what) {
    c->closing = "protocol error";
    return fail(c, "ERR Protocol error: %s", what);
}

/* Takes a RESP request off the input, as next_request does. One that has arrived in part
   is parsed from its beginning each time: at most MAX_WORDS short steps per read. The
   first step takes the number of words, which may be below 0: none. */
static bool take_array(struct conn *c) {
    char *at = c->in.p + c->pos, *end = c->in.p + c->in.len;
    int64_t words = 0, n = 0, max = c->authed ? MAX_WORDS : OPEN_WORDS;
    c->start = c->pos;
    for (int64_t i = -1; i < words; i++) {
        size_t left = (size_t)(end - at);
        if (left && *at != (i < 0 ? '*' : '$')) return protocol_error(c, "expected '$'");
        char *lf = memchr(at, '\n', left);
        if (!lf && left < 32) return false; /* no number is that long */
        struct slice num = {at + 1, lf && lf[-1] == '\r' ? (size_t)(lf - at) - 2 : 0};
        const char *wrong = i < 0 ? "invalid multibulk length" : "invalid bulk length";
        if (!lf || !parse_int(num, &n) || n > max || (n < 0 && i >= 0))
            return protocol_error(c, wrong);
        at = lf + 1;
        max = c->authed ? opt.max_value : OPEN_BYTES;
        if (i < 0) words = n;
        if (i < 0) continue;
        if (end - at < n + 2) return false;
        wrong = add_word(c, (struct slice){at, (size_t)n});
        at += n + 2;
        if (memcmp(at - 2, "\r\n", 2) != 0) wrong = "expected CRLF after a string";
        if (wrong) return protocol_error(c, wrong);
    }
    c->pos = (size_t)(at - c->in.p);
    return true;
}

/* Takes the next request off the input; its words stay valid until the next read. Returns
   false when it has not arrived in full, or c is closing. True with argc 0: there is
   nothing to run, for the line was empty, or it was wrong and has been answered. */
static bool next_request(struct conn *c) {
    size_t limit = c->authed ? 4 * (size_t)opt.max_value + IO_CHUNK : OPEN_BYTES;
    size_t n = c->in.len - c->pos;
    char *line = c->in.p + c->pos;
    c->argc = c->bytes = c->words.len = c->words.failed = 0;
    if (n > 0 && *line == '\xff') c->closing = "interrupted by telnet";
    if (n == 0 || c->closing) return false;
    c->resp = c->crlf = *line == '*';
    if (c->resp) return take_array(c);
    char *newline = memchr(line + c->scanned, '\n', n - c->scanned);
    /* Of a line that is too long keep only so much that it stays too long, and the last
       byte, which may be a CR. */
    size_t keep = newline || n < limit + 2 ? n : limit + 2;
    line[keep - 1] = line[n - 1];
    c->in.len -= n - keep;
    c->scanned = newline ? 0 : keep;
    if (!newline) return false;
    c->pos += (size_t)(newline - line) + 1;
    c->crlf = newline > line && newline[-1] == '\r';
    const char *wrong = "a line over 4 x --max-value + 64 KiB is too long";
    if ((size_t)(newline - line) <= limit + c->crlf)
        wrong = split_line(c, line, newline - c->crlf);
    if (wrong) c->argc = fail(c, "ERR %s", wrong); /* 0: what was split is not run */
    return true;
}

/* === 4 Replies ===================================================================== */
/* Whether s can stand in a reply as it is: nobody takes it for an error, the end of a
   list or a quoted value; as_word: a request can hold it as it is, too. */
static bool is_bare(struct slice s, bool as_word) {
    bool ok = s.len && !strchr(as_word ? "\"('" : "\"( ", *s.p) && s.p[s.len - 1] != ' ';
    for (size_t i = 0; ok && i < s.len; i++)
        ok = (unsigned char)s.p[i] >= ' ' + as_word && s.p[i] != 0x7f;
    return ok;
}

/* Writes s as a double-quoted word to to, which has room for 4 * s.len + 3 bytes. Returns
   where it ends. A double quote becomes \x22, which bash's printf %b knows. */
static char *quote(char *to, struct slice s) {
    *to++ = '"';
    for (size_t i = 0; i < s.len; i++) {
        unsigned char b = (unsigned char)s.p[i];
        const char *hit = memchr(escape_bytes + 1, b, 4);
        if (hit) to += sprintf(to, "\\%c", escape_names[hit - escape_bytes]);
        else if (b < 0x20 || b == 0x7f || b == '"') to += sprintf(to, "\\x%02x", b);
        else *to++ = (char)b;
    }
    *to++ = '"';
    return to;
}

/* What an error or the log repeats of a client's word: quoted where needed, and cut. */
static struct text show(struct slice word) {
    struct text out;
    struct slice cut = {word.p, word.len < MAX_SHOWN ? word.len : MAX_SHOWN};
    if (!is_bare(cut, true)) cut.len = (size_t)(quote(out.text, cut) - out.text);
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

#define reply_int(c, n) reply_format(c, ":", "%" PRId64, (int64_t)(n))
#define reply_nil(c) reply(c, "$-1", str((c)->resp ? "" : "(nil)"))

/* A value: in text bare, or quoted where that could be misread. */
static bool reply_str(struct conn *c, struct slice s, bool as_word) {
    if (c->resp) buf_header(&c->out, c->out.len, '$', s.len);
    if (c->resp || is_bare(s, as_word)) return reply(c, "", s);
    char *to = buf_reserve(&c->out, 4 * s.len + 3);
    if (to) c->out.len = (size_t)(quote(to, s) - c->out.p);
    return reply(c, "", str(""));
}

/* Ends a reply of n lines that stands in c->out from start on. */
static bool reply_list(struct conn *c, size_t start, size_t n, const char *noun) {
    if (c->resp) buf_header(&c->out, start, '*', n);
    return c->resp || reply_format(c, "", "(%zu %s%s)", n, noun, n == 1 ? "" : "s");
}

/* === 5 Hashing ===================================================================== */
/* Drawn at random: who does not know it cannot choose keys that collide. */
static uint64_t seed[2];

static uint64_t rotate(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

/* The second half of a round is the first with v[0] and v[2] swapped. */
static void sip_round(uint64_t v[4]) {
    for (int i = 0, j = 2; i <= 2; i += 2, j -= 2) {
        v[i] += v[1];
        v[j] += v[3];
        v[1] = rotate(v[1], i ? 17 : 13) ^ v[i];
        v[3] = rotate(v[3], i ? 21 : 16) ^ v[j];
        v[i] = rotate(v[i], 32);
    }
}

/* SipHash-1-3 (Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012): one
   round per eight bytes and three at the end. Words are loaded in the machine's own byte
   order; the result never leaves the process. The length is where the last word, which is
   short or empty, leaves room: in its last byte. */
static uint64_t hash_bytes(struct slice s) {
    uint64_t v[4] = {seed[0] ^ 0x736f6d6570736575, seed[1] ^ 0x646f72616e646f6d,
                     seed[0] ^ 0x6c7967656e657261, seed[1] ^ 0x7465646279746573};
    for (size_t at = 0; at <= s.len; at += 8) {
        uint64_t word = (uint64_t)s.len << 56;
        memcpy(&word, s.p + at, s.len - at < 8 ? s.len - at : 8);
        v[3] ^= word;
        sip_round(v);
        v[0] ^= word;
    }
    v[2] ^= 0xff;
    for (int i = 0; i < 3; i++) sip_round(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* === 6 The table =================================================================== */
/* A key and its value in one allocation: 24 bytes, the key, the value. Its deadline,
   which few keys have, stands in the heap at slot; slot 0 is none. */
struct entry {
    struct entry *next;
    uint32_t hash, klen, vlen, slot;
    char data[];
};

/* A moment to expire, in ms since 1970. */
struct deadline {
    int64_t when;
    struct entry *entry;
};

/* Bucket hash * size >> 32 holds a hash, so buckets stand in the order of their hashes: a
   walk by ascending hash can pause, and a table that doubles meanwhile makes it neither
   miss an entry nor see one twice. heap[1] expires next, heap[heap_len] is the last, with
   room for more up to the next power of two. All zero is empty. */
struct table {
    struct entry **buckets;
    uint64_t size, count, heap_len;
    struct deadline *heap;
};

/* Whoever works on a shard holds its lock: run_on_key takes it for a command; cmd_keys,
   cmd_flush and expiry_main for themselves. No two shards share a cache line. */
static struct shard {
    _Alignas(64) pthread_mutex_t lock;
    uint64_t appended; /* where its last record ends in the append-only log */
    struct table table;
} shards[4096]; /* as many as --shards allows; what is not used costs nothing */

static void deadline_clear(struct table *t, struct entry *e);
static void aof_tick(void);

static bool has_expired(const struct table *t, const struct entry *e) {
    return e->slot && t->heap[e->slot].when <= now_ms();
}

static struct slice entry_value(struct entry *e) {
    return (struct slice){e->data + e->klen, e->vlen};
}

/* Doubles the buckets, or makes the first. Without memory the table stays as it is. */
static void table_grow(struct table *t) {
    struct table to = *t;
    to.size = t->size ? t->size * 2 : 16;
    to.buckets = calloc(to.size, sizeof *to.buckets);
    if (!to.buckets) return;
    for (size_t i = 0; i < t->size; i++)
        for (struct entry *e, **link; (e = t->buckets[i]); *link = e) {
            link = &to.buckets[e->hash * to.size >> 32];
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
    free(e);
    t->count--;
}

/* Returns a link: *link is the live entry of key, or the NULL at the end of a chain.
   Returns NULL only when memory is out. What is past its deadline is removed. */
static struct entry **table_find(struct table *t, uint32_t hash, struct slice key) {
    if (!t->size) table_grow(t);
    if (!t->size) return NULL;
    struct entry **link = &t->buckets[hash * t->size >> 32], *e;
    while ((e = *link) && (e->hash != hash || e->klen != key.len ||
                           memcmp(e->data, key.p, key.len) != 0))
        link = &e->next;
    if (!e || !has_expired(t, e)) return link;
    table_remove(t, link);
    while (*link) link = &(*link)->next;
    return link;
}

/* Frees all that t owns. Nobody else may know of it any more. */
static void table_free(struct table *t) {
    for (size_t i = 0; i < t->size; i++)
        for (struct entry *e; (e = t->buckets[i]); free(e)) t->buckets[i] = e->next;
    free(t->buckets);
    free(t->heap);
}

/* === 7 Expiry ====================================================================== */
/* What may stand for a deadline: the one that an entry has, or none. */
enum { KEEP = -1, NEVER = -2 };

static void heap_put(struct table *t, size_t i, struct deadline d) {
    t->heap[i] = d;
    d.entry->slot = (uint32_t)i;
}

/* Puts d where it belongs in the heap, from the free place i on: parents that expire
   later move down, or else children that expire sooner move up. */
static void heap_sift(struct table *t, size_t i, struct deadline d) {
    for (; i > 1 && t->heap[i / 2].when > d.when; i /= 2) heap_put(t, i, t->heap[i / 2]);
    for (size_t child; (child = 2 * i) <= t->heap_len; i = child) {
        if (child < t->heap_len && t->heap[child + 1].when < t->heap[child].when) child++;
        if (t->heap[child].when >= d.when) break;
        heap_put(t, i, t->heap[child]);
    }
    heap_put(t, i, d);
}

/* Takes e's deadline away, if it has one: the last one of the heap goes to its place. */
static void deadline_clear(struct table *t, struct entry *e) {
    if (!e->slot) return;
    if (e->slot <= --t->heap_len) heap_sift(t, e->slot, t->heap[t->heap_len + 1]);
    e->slot = 0;
}

/* The expiry thread: goes round the shards and removes what is past its deadline, up to
   BATCH entries under one lock; again at once if there may be more, else after TICK. A
   round that finds nothing looks at one deadline per shard. */
static void *expiry_main(void *unused) {
    int64_t second = 0;
    for (bool more = false, was = false; !atomic_load(&stopping); was = more) {
        if (now_ms() / 1000 != second) aof_tick();
        second = now_ms() / 1000;
        more = false;
        for (struct shard *s = shards; s < shards + opt.shards; s++) {
            struct table *t = &s->table;
            int n = 0;
            pthread_mutex_lock(&s->lock);
            for (; n < BATCH && t->heap_len && has_expired(t, t->heap[1].entry); n++) {
                struct entry *due = t->heap[1].entry; /* to find it removes it */
                table_find(t, due->hash, (struct slice){due->data, due->klen});
            }
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
   argv[1] on, and the reply is for how many of them run returned true. */
enum { WRITES = 1, ONE_KEY = 2, WRITE1 = 3, EACH_KEY = 4, OPEN = 8, ANY = MAX_WORDS };

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
static uint64_t aof_append(size_t n, const struct slice *words);

/* A command's name as errors write it. */
static struct text lower(const struct command *cmd) {
    struct text out = {""};
    for (int i = 0; cmd->name[i]; i++) out.text[i] = (char)tolower(cmd->name[i]);
    return out;
}

#define NOT_INT "ERR value is not an integer or out of range"
/* Turns a word into *ms, a deadline in ms since 1970. unit is in ms, and negative if it
   says a moment rather than a time from now. Replies and returns false if it is not a
   number, less than min, or out of range. */
static bool parse_ms(struct conn *c, struct slice s, int unit, int64_t min, int64_t *ms) {
    int64_t scale = unit < 0 ? -unit : unit, base = unit < 0 ? 0 : now_ms();
    if (!parse_int(s, ms)) return fail(c, NOT_INT);
    if (*ms < min || *ms < INT64_MIN / scale || *ms > (INT64_MAX - base) / scale)
        return fail(c, "ERR invalid expire time in '%s' command", lower(c->cmd).text);
    *ms = *ms * scale + base < 0 ? 0 : *ms * scale + base; /* negative is KEEP or NEVER */
    return true;
}

/* Stores value under the request's key. when is a deadline in ms since 1970, KEEP for the
   one it has, or NEVER; one in the past removes the key. All that changes an entry goes
   through here. Replies and returns false when memory is out. */
static bool store(struct conn *c, struct slice value, int64_t when) {
    struct table *t = &c->shard->table;
    struct entry *e = *c->link;
    bool fresh = !e;
    char ms[24];
    struct slice record[] = {str("SET"), c->key, value, str("PXAT"), {ms, 0}};
    if (when == KEEP) when = e && e->slot ? t->heap[e->slot].when : NEVER;
    bool has = when != NEVER;
    if (has && when <= now_ms()) {
        record[0] = str("DEL");
        if (fresh) return true;
        table_remove(t, c->link);
        c->shard->appended = aof_append(2, record);
        return true;
    }
    if (has && (t->heap_len & (t->heap_len - 1)) == 0) { /* a power of two, or 0 */
        /* Room for a deadline first: nothing fails halfway. */
        struct deadline *heap = realloc(t->heap, (2 * t->heap_len + 2) * sizeof *heap);
        if (!heap) return fail(c, "OOM out of memory");
        t->heap = heap;
    }
    if (fresh || e->vlen != value.len) /* else value may be the entry's own */
        e = realloc(e, sizeof *e + c->key.len + value.len);
    if (!e) return fail(c, "OOM out of memory");
    if (fresh) {
        *e = (struct entry){NULL, (uint32_t)c->hash, (uint32_t)c->key.len, 0, 0};
        memcpy(e->data, c->key.p, c->key.len);
        t->count++;
    }
    *c->link = e;
    c->wrote += e->vlen = (uint32_t)value.len;
    memmove(e->data + e->klen, value.p, value.len);
    if (has) heap_sift(t, e->slot ? e->slot : ++t->heap_len, (struct deadline){when, e});
    else deadline_clear(t, e);
    if (has) record[4].len = (size_t)sprintf(ms, "%" PRId64, when);
    record[2] = entry_value(e);
    c->shard->appended = aof_append(has ? 5 : 3, record);
    if (t->count * 4 >= t->size * 5 && t->size < INT32_MAX) table_grow(t);
    return true;
}

static bool cmd_get(struct conn *c) {
    return *c->link ? reply_str(c, entry_value(*c->link), false) : reply_nil(c);
}

/* What may stand behind SET key value: one condition and one word for the time. Those
   behind KEEPTTL take a number; its unit is as in parse_ms. */
enum { NX = 1, XX, KEEPTTL, EX, PX, EXAT, PXAT };
static const char set_word[][8] = {"", "NX", "XX", "KEEPTTL", "EX", "PX", "EXAT", "PXAT"};
static const int set_units[] = {0, 0, 0, 0, 1000, 1, -1000, -1};

static bool cmd_set(struct conn *c) {
    int condition = 0, time = 0;
    struct slice number = {NULL, 0};
    for (size_t i = 3; i < c->argc; i++) {
        int w = PXAT;
        while (w > 0 && !word_is(c->argv[i], set_word[w])) w--;
        int *at = w < KEEPTTL ? &condition : &time;
        if (!w || (w > KEEPTTL && i + 1 == c->argc) || (*at && *at != w))
            return c->resp ? fail(c, "ERR syntax error")
                           : fail(c, "ERR syntax error at %s; blanks need quotes: %s",
                                  show(c->argv[i]).text, "SET greeting \"hello world\"");
        *at = w;
        if (w > KEEPTTL) number = c->argv[++i];
    }
    int64_t when = time ? KEEP : NEVER;
    if (number.p && !parse_ms(c, number, set_units[time], 1, &when)) return false;
    if (condition && (condition == NX) == (*c->link != NULL)) return reply_nil(c);
    return store(c, c->argv[2], when) && reply_status(c, "OK");
}

/* DEL and EXISTS, for one of their keys. DEL stores what expired in 1970. */
static bool cmd_del(struct conn *c) {
    return *c->link && (!(c->cmd->flags & WRITES) || store(c, str(""), 0));
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

/* EXPIRE and its family: number is the unit, as in parse_ms. PERSIST: 0. */
static bool cmd_expire(struct conn *c) {
    int64_t when = NEVER, unit = c->cmd->number;
    if (c->argc > 3) return fail(c, "ERR Unsupported option %s", show(c->argv[3]).text);
    if (unit && !parse_ms(c, c->argv[2], (int)unit, INT64_MIN, &when)) return false;
    if (!*c->link || (!unit && !(*c->link)->slot)) return reply_int(c, 0);
    return store(c, entry_value(*c->link), when) && reply_int(c, 1);
}

/* TTL, PTTL: number is the unit in ms. Rounded to the nearest unit, as in Redis. */
static bool cmd_ttl(struct conn *c) {
    struct entry *e = *c->link;
    if (!e || !e->slot) return reply_int(c, e ? -1 : -2);
    int64_t left = c->shard->table.heap[e->slot].when - now_ms(), unit = c->cmd->number;
    return reply_int(c, left < 0 ? 0 : left / unit + (left % unit * 2 >= unit));
}

/* Takes the item of a pattern at p: ? [a-z] [^a] \x or a byte that stands for itself.
   Returns where it ends if byte b matches it, else NULL. Without a ] the end ends [. */
static const char *glob_item(const char *p, const char *end, unsigned char b) {
    bool escaped = *p == '\\' && end - p > 1, match = false;
    if (*p != '[') return p[escaped] == (char)b || *p == '?' ? p + 1 + escaped : NULL;
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
        next = p < end && i < s.len ? glob_item(p, end, (unsigned char)s.p[i]) : NULL;
        if (p < end && *p == '*') {
            star = ++p;
            retry = i;
        } else if (next) {
            p = next;
            i++;
        } else if (star && retry++ < s.len) {
            p = star;
            i = retry;
        } else return false;
    }
    return true;
}

/* KEYS; with a number DBSIZE, which only counts. Locks a shard for WALK_BUCKETS buckets
   or IO_CHUNK bytes. Entries are copied up to the end of their keys under the lock,
   matched and quoted without it. */
static bool cmd_keys(struct conn *c) {
    struct slice pattern = c->argc > 1 ? c->argv[1] : str("*");
    struct buf found = {0};
    struct entry e;
    bool count = c->cmd->number;
    size_t n = 0, start = c->out.len;
    for (struct shard *s = shards; s < shards + opt.shards; s++)
        for (uint64_t hash = 0; hash <= UINT32_MAX; found.len = 0) {
            pthread_mutex_lock(&s->lock);
            const struct table *t = &s->table;
            if (count) n += t->count;
            uint64_t i = count ? t->size : hash * t->size >> 32, stop = i + WALK_BUCKETS;
            for (; i < t->size && i < stop && found.len < IO_CHUNK; i++)
                for (struct entry *at = t->buckets[i]; at; at = at->next)
                    if (at->hash >= hash && !has_expired(t, at))
                        buf_add(&found, at, sizeof e + at->klen);
            hash = t->size ? (i << 32) / t->size : UINT64_MAX;
            pthread_mutex_unlock(&s->lock);
            for (size_t at = 0; at < found.len; at += sizeof e + e.klen) {
                memcpy(&e, found.p + at, sizeof e);
                struct slice key = {found.p + at + sizeof e, e.klen};
                if (glob_match(pattern, key)) n += reply_str(c, key, true);
            }
        }
    c->out.failed |= found.failed;
    free(found.p);
    c->seen = aof_append(0, NULL); /* the reply may reveal any key */
    return count ? reply_int(c, (int64_t)n) : reply_list(c, start, n, "key");
}

/* PING and ECHO. */
static bool cmd_ping(struct conn *c) {
    return c->argc > 1 ? reply_str(c, c->argv[1], false) : reply_status(c, "PONG");
}

/* QUIT; with a number: a browser sends us a form, which may hold commands. */
static bool cmd_quit(struct conn *c) {
    c->closing = c->cmd->number ? "it speaks HTTP" : "QUIT";
    if (!c->cmd->number) return reply_status(c, "OK");
    say(WARN, "%s speaks HTTP, closed", address_of(c->fd, getpeername).text);
    return fail(c, "ERR this is not a web server");
}

/* FLUSHALL, FLUSHDB: all keys go at one moment, under all locks; then memory is freed. */
static bool cmd_flush(struct conn *c) {
    if (c->argc > 1) return fail(c, "ERR syntax error");
    struct table *old = calloc((size_t)opt.shards, sizeof *old);
    if (!old) return fail(c, "OOM out of memory");
    for (long i = 0; i < opt.shards; i++) pthread_mutex_lock(&shards[i].lock);
    uint64_t end = c->seen = aof_append(1, (struct slice[]){str("FLUSHALL")});
    for (long i = 0; i < opt.shards; i++) {
        old[i] = shards[i].table;
        shards[i].table = (struct table){0};
        shards[i].appended = end;
        pthread_mutex_unlock(&shards[i].lock);
    }
    for (long i = 0; i < opt.shards; i++) table_free(&old[i]);
    free(old);
    malloc_trim(0);
    return reply_status(c, "OK");
}

/* Reads the first line of --password-file, which nobody else may read. Exits without. */
static void read_password(void) {
    struct stat st;
    FILE *f = fopen(opt.password_file, "r");
    size_t n = f ? fread(password, 1, sizeof password - 1, f) : 0;
    size_t end = strcspn(password, "\r\n");
    const char *wrong = NULL;
    if (!f || fstat(fileno(f), &st) < 0) wrong = strerror(errno);
    else if (st.st_mode & 077) wrong = "others may read it: chmod 600 helps";
    else if (!end || end == sizeof password - 1 || (!password[end] && end < n))
        wrong = "its first line is empty, too long, or no text";
    if (wrong) exit(say(USAGE, "--password-file %s: %s", opt.password_file, wrong));
    password[end] = 0;
    fclose(f);
}

/* Compares all of the word, wherever it differs: the time tells nothing about the
   password. Closes after ten wrong ones. */
static bool cmd_auth(struct conn *c) {
    struct slice word = c->argv[c->argc - 1],
                 user = c->argc > 2 ? c->argv[1] : str("default");
    size_t n = strlen(password);
    if (c->argc > 3) return fail(c, "ERR syntax error");
    if (!n && c->argc == 2)
        return fail(c, "ERR AUTH <password> called without any password configured for "
                       "the default user. Are you sure your configuration is correct?");
    int bad = user.len != 7 || memcmp(user.p, "default", 7) != 0 || (n && n != word.len);
    for (size_t i = 0; n && i < word.len; i++) bad |= word.p[i] ^ password[i % n];
    if (!bad) return c->authed = reply_status(c, "OK");
    if (++c->tries == 10) c->closing = "ten wrong passwords";
    return fail(c, "WRONGPASS invalid username-password pair or user is disabled.");
}

static bool cmd_select(struct conn *c) {
    if (!word_is(c->argv[1], "0")) return fail(c, "ERR DB index is out of range");
    return reply_status(c, "OK");
}

/* The most used first, for a lookup goes from the top. A family stands together. */
static const struct command commands[] = {
    {"GET", "key", 2, 2, ONE_KEY, cmd_get, 0, "the value of a key; (nil) if it has none"},
    {"SET", "key value [NX|XX] [EX s|PX ms|EXAT s|PXAT ms|KEEPTTL]", 3, ANY, WRITE1,
     cmd_set, 0, "store a value; replies OK, or (nil) if NX finds a key or XX none"},
    {"PING", "[message]", 1, 2, OPEN, cmd_ping, 0, "PONG, or the message"},
    {"INCR", "key", 2, 2, WRITE1, cmd_incr, 1, "count; replies the new number, from 0"},
    {"DECR", "key", 2, 2, WRITE1, cmd_incr, -1, NULL},
    {"DEL", "key...", 2, ANY, WRITES | EACH_KEY, cmd_del, 0, "remove; replies how many"},
    {"EXISTS", "key...", 2, ANY, EACH_KEY, cmd_del, 0, "how many of these exist"},
    {"KEYS", "[pattern]", 1, 2, 0, cmd_keys, 0, "which match * ? [a-z] [^a] \\x"},
    {"INCRBY", "key n", 3, 3, WRITE1, cmd_incr, 1, "count by n; replies the new number"},
    {"DECRBY", "key n", 3, 3, WRITE1, cmd_incr, -1, NULL},
    {"EXPIRE", "key n", 3, ANY, WRITE1, cmd_expire, 1000,
     "expire in n s, P: ms, AT: at Unix time; replies 1, or 0 if there is no such key"},
    {"PEXPIRE", "key n", 3, ANY, WRITE1, cmd_expire, 1, NULL},
    {"EXPIREAT", "key n", 3, ANY, WRITE1, cmd_expire, -1000, NULL},
    {"PEXPIREAT", "key n", 3, ANY, WRITE1, cmd_expire, -1, NULL},
    {"TTL", "key", 2, 2, ONE_KEY, cmd_ttl, 1000, "s left, P: ms; -1: no end, -2: no key"},
    {"PTTL", "key", 2, 2, ONE_KEY, cmd_ttl, 1, NULL},
    {"PERSIST", "key", 2, 2, WRITE1, cmd_expire, 0, "do not expire; 1, or 0 if no end"},
    {"DBSIZE", "", 1, 1, 0, cmd_keys, 1, "how many keys there are"},
    {"FLUSHDB", "", 1, ANY, WRITES, cmd_flush, 0, "remove all keys; replies OK"},
    {"FLUSHALL", "", 1, ANY, WRITES, cmd_flush, 0, NULL},
    {"ECHO", "message", 2, 2, 0, cmd_ping, 0, "the message"},
    {"HELP", "[command]", 1, 2, OPEN, cmd_help, 0, "this list, or more on one command"},
    {"AUTH", "[default] password", 2, ANY, OPEN, cmd_auth, 0, "log in; replies OK"},
    {"QUIT", "", 1, ANY, OPEN, cmd_quit, 0, "close the connection; replies OK"},
    {"POST", NULL, 1, ANY, OPEN, cmd_quit, 1, ""},
    {"Host:", NULL, 1, ANY, OPEN, cmd_quit, 1, ""},
    {"SELECT", "0", 2, 2, 0, cmd_select, 0, "there is one database; replies OK"},
    {NULL, NULL, 0, 0, 0, NULL, 0, ""},
};

static const struct command *find_command(struct slice word) {
    for (const struct command *cmd = commands; cmd->name; cmd++)
        if (word_is(word, cmd->name)) return cmd;
    return NULL;
}

#define UNKNOWN "ERR unknown command '%s', see HELP"
/* HELP: a line for each family. HELP command: all that its row says. */
static bool cmd_help(struct conn *c) {
    const struct command *row, *cmd = c->argc > 1 ? find_command(c->argv[1]) : commands;
    size_t lines = 0, start = c->out.len;
    if (!cmd || !cmd->args) return fail(c, UNKNOWN, show(c->argv[1]).text);
    if (c->argc > 1) {
        for (row = cmd; !row->help;) row--;
        return reply_format(c, "+", "%s %s", cmd->name, cmd->args) &&
               reply_status(c, row->help) && reply_list(c, start, 2, "line");
    }
    while (cmd->args) {
        char left[128] = "";
        for (row = cmd; cmd == row || !cmd->help; cmd++)
            strcat(strcat(left, cmd->name), " ");
        lines += reply_format(c, "+", "%-40s %.*s", strcat(left, row->args),
                              (int)strcspn(row->help, ";"), row->help);
    }
    return reply_list(c, start, c->resp ? lines : (size_t)(cmd - commands), "command");
}

/* Runs the command on one key, with the key's shard locked. Returns what run returned.
   A lookup mostly waits for memory. In a pipeline of RESP the next request often begins
   as this one does, up to its key, which then is as long: have memory bring its entry. */
static bool run_on_key(struct conn *c, struct slice key) {
    c->hash = key.p == c->in.p + c->ahead ? c->ahead_hash : hash_bytes(key);
    size_t ahead = c->pos + (size_t)(key.p - c->in.p) - c->start; /* the next one's key */
    if (c->resp && key.p == c->argv[1].p && ahead + key.len <= c->in.len &&
        memcmp(c->in.p + c->start, c->in.p + c->pos, ahead - c->pos) == 0) {
        c->ahead = ahead;
        c->ahead_hash = hash_bytes((struct slice){c->in.p + ahead, key.len});
        struct shard *other = &shards[c->ahead_hash >> 32 & (uint64_t)(opt.shards - 1)];
        pthread_mutex_lock(&other->lock);
        struct entry **b = other->table.buckets;
        if (b) __builtin_prefetch(b[(uint32_t)c->ahead_hash * other->table.size >> 32]);
        pthread_mutex_unlock(&other->lock);
    }
    struct shard *s = c->shard = &shards[c->hash >> 32 & (uint64_t)(opt.shards - 1)];
    c->key = key;
    pthread_mutex_lock(&s->lock);
    c->link = table_find(&s->table, (uint32_t)c->hash, key);
    c->out.failed |= !c->link; /* then the connection ends */
    bool result = c->link && c->cmd->run(c);
    if (c->seen < s->appended) c->seen = s->appended; /* the reply waits for that */
    pthread_mutex_unlock(&s->lock);
    return result;
}

#define MISCONF "MISCONF the append-only file cannot be written"
/* Runs the request in argv and replies. */
static bool run_request(struct conn *c) {
    const struct command *cmd = c->cmd = find_command(c->argv[0]);
    int64_t n = 0;
    if (!cmd) return fail(c, UNKNOWN, show(c->argv[0]).text);
    if (c->argc < cmd->min || c->argc > cmd->max)
        return fail(c, "ERR wrong number of arguments for '%s' command: %s %s",
                    lower(cmd).text, cmd->name, cmd->args);
    if (!c->authed && !(cmd->flags & OPEN))
        return fail(c, "NOAUTH Authentication required.");
    if (cmd->flags & WRITES && atomic_load(&disk_bad)) return fail(c, MISCONF);
    c->wrote += cmd->flags & WRITES;
    if (cmd->flags & ONE_KEY) return run_on_key(c, c->argv[1]);
    if (!(cmd->flags & EACH_KEY)) return cmd->run(c);
    for (size_t i = 1; i < c->argc; i++) n += run_on_key(c, c->argv[i]);
    return reply_int(c, n);
}

/* === 9 Connections ================================================================= */
static bool aof_commit(uint64_t upto);

/* Sends all replies, once what they reveal is safe in the append-only file; if it cannot
   be, they go out if none of the requests writes, else all become MISCONF, in the form of
   the last. Waits for the client, up to --timeout. Sets closing on failure. */
static void flush(struct conn *c) {
    if (!aof_commit(c->seen) && c->wrote)
        for (c->out.len = 0; c->asked > 0; c->asked--)
            fail(c, MISCONF ", the outcome is unknown");
    const char *why = c->out.failed ? "out of memory" : NULL; /* no half replies */
    for (size_t sent = 0; !why && sent < c->out.len;) {
        ssize_t n = send(c->fd, c->out.p + sent, c->out.len - sent, 0);
        if (n >= 0) sent += (size_t)n;
        else if (errno != EINTR) why = errno == EAGAIN ? "timeout" : strerror(errno);
    }
    if (why) c->closing = why;
    c->out.len = c->asked = c->seen = c->wrote = 0;
}

/* Waits for more input, until --timeout if there is one, and reads it behind what there
   is of a request. Looks without waiting first, for to be woken costs more; where clients
   are many, a few threads that look keep a processor awake for all. Who goes to sleep
   gives back what its buffers have grown by. Where the input ends, says so in closing. */
static void fill(struct conn *c) {
    struct buf *in = &c->in;
    bool many = atomic_load(&connected) > FEW_CLIENTS; /* else nobody need count */
    int looks = many && atomic_fetch_add(&looking, 1) >= LOOKERS ? 1 : LOOKS;
    ssize_t n = -1;
    in->len -= c->pos;
    if (in->len > 0) memmove(in->p, in->p + c->pos, in->len);
    c->pos = c->ahead = 0; /* what stood there has moved */
    for (char *to; (to = buf_reserve(in, 2UL * SMALL_BUF)); looks--) {
        if (looks > 1) sched_yield(); /* maybe the client is next, and asks */
        n = recv(c->fd, to, in->cap - in->len, looks > 0 ? MSG_DONTWAIT : 0);
        if (n >= 0 || (errno != EINTR && (errno != EAGAIN || looks < 1))) break;
        if (looks > 1) continue;
        if (many && looks == 1) atomic_fetch_sub(&looking, 1); /* it goes to sleep */
        buf_slim(in);
        buf_slim(&c->words);
        buf_slim(&c->out);
    }
    if (many && looks > 0) atomic_fetch_sub(&looking, 1); /* it need not sleep */
    if (n > 0) in->len += (size_t)n;
    else if (n == 0) c->closing = "end of input";
    else if (in->failed) c->closing = "out of memory";
    else c->closing = errno == EAGAIN ? "timeout" : strerror(errno);
    /* Full: more is waiting, so take more at a time. */
    if (in->len == in->cap && in->cap < IO_CHUNK) buf_reserve(in, 1);
    if (n == 0 && in->len > 0 && !c->resp && !atomic_load(&stopping))
        fail(c, "ERR the last line has no newline: it may be cut short and is not run");
}

/* Closes fd so that the client, if it is there, sees the last replies: it is told, then
   what it still sends is read for 2 x ms at most: unread input makes TCP forget them. */
static void hang_up(int fd, int ms) {
    char unread[1024];
    struct pollfd input = {.fd = fd, .events = POLLIN};
    int64_t end = ticks() + ms * SECOND / 1000;
    for (bool go = shutdown(fd, SHUT_WR) == 0; go && poll(&input, 1, ms) > 0;)
        go = recv(fd, unread, sizeof unread, 0) > 0 && ticks() < end;
    close(fd);
}

/* Runs the request; -vv logs it, its client and its time, not what may be a password. */
static void run_logged(struct conn *c, const char *who) {
    int64_t start = logs(COMMAND) ? ticks() : 0;
    char line[512], *end = line;
    run_request(c);
    size_t shown = !c->authed || !c->cmd || c->cmd->run == cmd_auth ? 1 : c->argc;
    for (size_t i = 0; start && i < shown && end < line + sizeof line / 3; i++)
        end = stpcpy(stpcpy(end, " "), show(c->argv[i]).text);
    if (start) say(COMMAND, "%s%s (%ld us)", who, line, (long)(ticks() - start) / 1000);
}

/* A connection's thread: reads, runs all that has arrived, sends all replies at once. */
static void *conn_main(void *arg) {
    struct conn c = {.fd = (int)(intptr_t)arg, .authed = !*password};
    struct text client = logs(CLIENT) ? address_of(c.fd, getpeername) : (struct text){""};
    say(CLIENT, "%s connected", client.text);
    while (!c.closing && atomic_load(&stopping) < 2) {
        fill(&c);
        for (size_t was = 0; !c.closing && next_request(&c); was = c.out.len) {
            if (c.argc > 0) run_logged(&c, client.text);
            c.asked += c.out.len > was;
            if (c.out.len + c.wrote >= IO_CHUNK) flush(&c);
        }
        flush(&c);
    }
    say(CLIENT, "%s closed: %s", client.text, c.closing ? c.closing : "the server stops");
    free(c.in.p);
    free(c.words.p);
    free(c.out.p);
    hang_up(c.fd, LINGER);
    atomic_fetch_sub(&connected, 1); /* the last thing: main ends the program at 0 */
    return NULL;
}

/* === 10 Append-only file =========================================================== */
/* Records gather in memory; one thread at a time writes what has gathered, as a batch,
   for all that wait. Positions count records. lock guards all but safe, and is taken
   inside a shard's lock or alone. batch is on its way to the file, and only who has set
   writing may touch it. */
static struct {
    pthread_mutex_t lock;
    pthread_cond_t written;
    struct buf gathered, batch;
    uint64_t end, taken; /* where gathered and batch end */
    bool writing;
    atomic_uint_fast64_t safe; /* up to here replies may go out */
} aof = {.lock = PTHREAD_MUTEX_INITIALIZER, .written = PTHREAD_COND_INITIALIZER};

/* crc_table[256 * k + b]: what byte b amounts to with k bytes behind it. */
static uint32_t crc_table[8 * 256];

/* CRC-32C (Castagnoli et al., 1993), eight bytes at a time, each with a table of its own
   (Kounavis and Berry, 2005): 1792 is 256 * 7. The last few go one at a time. */
static uint32_t crc32c(const char *bytes, size_t n) {
    const unsigned char *p = (const unsigned char *)bytes, *end = p + n;
    uint32_t crc = UINT32_MAX, *t = crc_table;
    for (; end - p >= 8; p += 8)
        crc = t[1792 + (p[0] ^ (crc & 255))] ^ t[1536 + (p[1] ^ (crc >> 8 & 255))] ^
              t[1280 + (p[2] ^ (crc >> 16 & 255))] ^ t[1024 + (p[3] ^ crc >> 24)] ^
              t[768 + p[4]] ^ t[512 + p[5]] ^ t[256 + p[6]] ^ t[p[7]];
    while (p < end) crc = t[(crc ^ *p++) & 255] ^ crc >> 8;
    return ~crc;
}

/* Appends a record, an array of n words as in RESP; then the lock of the key's shard, or
   of all, is held, so that the log has the order of what happened. n 0: only tells the
   end. Returns the log's end, 0 without --aof. */
static uint64_t aof_append(size_t n, const struct slice *words) {
    if (aof_fd < 0) return 0;
    pthread_mutex_lock(&aof.lock);
    struct buf *b = &aof.gathered;
    if (n > 0) buf_header(b, b->len, '*', n);
    for (size_t i = 0; i < n; i++) {
        buf_header(b, b->len, '$', words[i].len);
        buf_add(b, words[i].p, words[i].len);
        buf_add(b, "\r\n", 2);
    }
    /* Memory has what the log will not: nobody has been answered, nobody will be. */
    if (b->failed) exit(say(ERROR, "out of memory for the append-only file"));
    uint64_t end = aof.end += n > 0;
    pthread_mutex_unlock(&aof.lock);
    return end;
}

/* Ends the program where ok is false: errno says why. */
static void must(bool ok, const char *what) {
    if (!ok) exit(say(ERROR, "--aof %s: %s: %s", opt.aof, what, strerror(errno)));
}

/* Writes what has gathered, behind it the line with its checksum, and with --fsync always
   waits for the disk. What is left after a failure goes first the next time. Called with
   aof.lock, which is released meanwhile. */
static void write_batch(void) {
    struct buf *b = &aof.batch, empty = *b;
    char line[24];
    bool fresh = b->len == 0, bad = false;
    aof.writing = true;
    if (fresh) {
        *b = aof.gathered;
        aof.gathered = empty;
        aof.taken = aof.end;
    }
    pthread_mutex_unlock(&aof.lock);
    if (fresh) sprintf(line, "#CRC32C:%08x\r\n", crc32c(b->p, b->len));
    if (fresh) buf_add(b, line, 18);
    if (b->failed) exit(say(ERROR, "out of memory for the append-only file"));
    while (b->len > 0 && !bad) {
        ssize_t n = write(aof_fd, b->p, b->len);
        bad = n < 0 && errno != EINTR;
        if (n > 0) memmove(b->p, b->p + n, b->len -= (size_t)n);
    }
    if (bad != atomic_load(&disk_bad))
        say(bad ? ERROR : WARN, "%s: %s", opt.aof, bad ? strerror(errno) : "works again");
    if (!bad && *opt.fsync == 'a') must(fsync(aof_fd) == 0, "fsync");
    if (b->cap > IO_CHUNK) buf_slim(b);
    pthread_mutex_lock(&aof.lock);
    atomic_store(&disk_bad, bad);
    if (!bad) atomic_store(&aof.safe, aof.taken);
    aof.writing = false;
    pthread_cond_broadcast(&aof.written);
}

/* Waits until the log is as safe up to upto as --fsync asks. Group commit: the first who
   comes writes for all who have come, the others wait for the next turn. Where that takes
   an fsync, who comes lets others come first. Returns false when writing fails. */
static bool aof_commit(uint64_t upto) {
    for (int i = 0; i < JOIN && *opt.fsync == 'a' && atomic_load(&aof.safe) < upto; i++)
        sched_yield();
    if (atomic_load(&aof.safe) >= upto) return true;
    pthread_mutex_lock(&aof.lock);
    while (atomic_load(&aof.safe) < upto && !atomic_load(&disk_bad))
        if (aof.writing) pthread_cond_wait(&aof.written, &aof.lock);
        else write_batch();
    pthread_mutex_unlock(&aof.lock);
    return atomic_load(&aof.safe) >= upto;
}

/* Done each second by the expiry thread, which a slow disk holds up: tries again what
   could not be written, and with --fsync everysec has the disk keep what was. */
static void aof_tick(void) {
    static uint64_t kept;
    pthread_mutex_lock(&aof.lock);
    for (int i = 0; i < 2 && !aof.writing && aof.safe < aof.end; i++) write_batch();
    pthread_mutex_unlock(&aof.lock);
    uint64_t safe = atomic_load(&aof.safe);
    if (*opt.fsync == 'e' && safe != kept) must(fsync(aof_fd) == 0, "fsync");
    kept = safe;
}

/* Whether a line with a checksum begins at p. */
static bool is_checksum(const char *p, const char *end) {
    return end - p >= 18 && !memcmp(p, "#CRC32C:", 8) && !memcmp(p + 16, "\r\n", 2) &&
           strspn(p + 8, "0123456789abcdef") == 8;
}

/* Runs the file, which stands at map, and returns how much of it is good; *sealed: its
   end is a checksum. start is where a batch begins, last where the last line of checksum
   form does: what follows that one was cut short by a crash, and is left out. What cannot
   be run or does not fit its checksum is damage: exits. A file of Redis is one batch. */
static size_t replay(char *map, size_t size, bool *sealed) {
    struct conn c = {.in = {map, size, size, 0}, .resp = 1, .authed = 1};
    const char *wrong = NULL, *p = map, *end = map + size;
    int64_t next = ticks() + SECOND;
    size_t start = 0, last = size;
    if (size < 18 && !memcmp(map, "#CRC32C:00000000\r\n", size)) return 0;
    while (last > 0 && !is_checksum(map + last, end)) last--;
    while (p < end && !wrong) {
        c.argc = c.bytes = c.words.len = c.out.len = 0;
        *sealed = is_checksum(p, end);
        if (*sealed && crc32c(map + start, c.pos - start) != strtoul(p + 8, NULL, 16))
            wrong = "wrong checksum";
        else if (*sealed) start = c.pos += 18;
        else if (start > last) break;
        else if (!take_array(&c) || c.argc == 0 || !run_request(&c))
            wrong = "half or bad record";
        if (!wrong) p = map + c.pos;
        if (c.pos % 251 || ticks() < next) continue; /* look now and then */
        say(INFO, "%s: %d %% loaded", opt.aof, (int)(100 * c.pos / size));
        next += SECOND;
    }
    if (!wrong && start > 0 && p > map + start) wrong = "half a batch";
    if (start == 0 && !*sealed) start = (size_t)(p - map);
    must(!wrong || errno != ENOMEM, "run");
    struct slice why = {c.out.p, c.out.len};
    if (wrong)
        exit(say(ERROR, "%s: %s at byte %zu %s; to cut: truncate -s %zu %s", opt.aof,
                 wrong, start, c.out.len ? show(why).text : "", start, opt.aof));
    free(c.words.p);
    free(c.out.p);
    return start;
}

/* Opens, locks and replays the file. */
static void aof_open(void) {
    struct flock all = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    char *path = strdup(opt.aof);
    bool sealed = false;
    long max_value = opt.max_value;
    int fd = open(opt.aof, O_RDWR | O_CREAT | O_APPEND, 0600);
    must(path && fd >= 0, "open");
    must(fcntl(fd, F_SETLK, &all) == 0, "in use by another kv");
    size_t size = (size_t)lseek(fd, 0, SEEK_END);
    char *map = mmap(NULL, size + 1, PROT_READ, MAP_PRIVATE, fd, 0); /* 0 is refused */
    must(map != MAP_FAILED, "read");
    for (uint32_t i = 0; i < 8 * 256; i++) {
        crc_table[i] = i < 256 ? i : crc_table[i - 256];
        for (int bit = 0; bit < 8; bit++)
            crc_table[i] = crc_table[i] >> 1 ^ (crc_table[i] & 1 ? 0x82f63b78 : 0);
    }
    aof_fd = -2;
    opt.max_value = 1 << 29; /* it may have been larger when the file was written */
    size_t good = replay(map, size, &sealed);
    opt.max_value = max_value;
    if (good < size)
        say(WARN, "%s: torn at byte %zu, %zu bytes cut off", opt.aof, good, size - good);
    must(ftruncate(fd, (off_t)good) == 0, "truncate");
    if (good == 0 || (good == size && !sealed))
        must(dprintf(fd, "#CRC32C:%08x\r\n", crc32c(map, good)) > 0, "write");
    munmap(map, size + 1);
    aof_fd = fd;
    int dir = open(dirname(path), O_RDONLY);
    must(fsync(fd) == 0 && (dir < 0 || fsync(dir) == 0), "fsync");
    close(dir);
    free(path);
}

/* === 11 The server ================================================================= */
static pthread_attr_t detached; /* of the connections' threads: nobody waits for them */

/* Accepts a client and starts its thread, or turns it away in RESP's form and logs why,
   once a second; the spare descriptor makes room for that where the system has no other.
   Returns false when no client is waiting, or after 1 ms if none can be accepted now. */
static bool accept_client(int listener) {
    static time_t logged;
    const struct timeval timeout = {.tv_sec = opt.timeout};
    pthread_t id;
    int on = 1, fd = accept(listener, NULL, NULL), error = fd < 0 ? errno : 0;
    if (error == EAGAIN || error == EINTR || error == ECONNABORTED) return false;
    if (fd < 0 && close(spare) == 0) fd = accept(listener, NULL, NULL); /* to refuse it */
    /* Without these options a connection works, only less well. */
    (void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    (void)setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
    if (atomic_fetch_add(&connected, 1) >= opt.max_clients || fd >= max_fds) error = -1;
    if (!error) error = pthread_create(&id, &detached, conn_main, (void *)(intptr_t)fd);
    if (!error) return true;
    atomic_fetch_sub(&connected, 1);
    if (time(NULL) != logged)
        say(WARN, "client refused: %s", error < 0 ? "too many clients" : strerror(error));
    logged = time(NULL);
    if (dprintf(fd, "-ERR max number of clients reached\r\n") < 0) poll(NULL, 0, 1);
    hang_up(fd, 0);
    if (fcntl(spare, F_GETFD) < 0) spare = open("/dev/urandom", O_RDONLY);
    return fd >= 0;
}

/* Binds the first address that --bind names and that is free. Returns it, or exits. */
static int listen_on(void) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *all, *a;
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
    struct text here = a ? address_of(fd, getsockname) : (struct text){"127."};
    bool local = !strncmp(here.text, "127.", 4) || !strncmp(here.text, "[::1]", 5);
    if (!local && !opt.insecure && !*password)
        exit(say(USAGE, "--bind %s needs --password-file or --insecure", opt.bind));
    if (!a || listen(fd, SOMAXCONN) < 0)
        exit(say(ERROR, "%s port %s: %s%s", opt.bind, port, strerror(errno),
                 errno == EADDRINUSE ? "; -p 0 takes any free port" : ""));
    freeaddrinfo(all);
    return fd;
}

/* Runs in any thread. The second signal ends it all with status 1: none is number 0. */
static void on_signal(int number) {
    if (atomic_fetch_add(&stopping, 1) > 0) _exit(number != 0);
}

/* What must be there before the first thread, the seed too: descriptors for --max-clients
   or as many as we may have. 0 to 2 are taken first, lest a client gets the log. */
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
    while ((spare = open("/dev/urandom", O_RDONLY)) >= 0 && spare < 3) continue;
    if (spare < 0 || read(spare, seed, sizeof seed) != sizeof seed)
        exit(say(ERROR, "cannot read /dev/urandom: %s", strerror(errno)));
    for (long i = 0; i < opt.shards; i++) pthread_mutex_init(&shards[i].lock, NULL);
}

int main(int argc, char **argv) {
    pthread_t expiry;
    parse_options(argc, argv);
    if (opt.help || opt.version) return print_help();
    if (opt.password_file) read_password();
    prepare();
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    if (opt.aof) aof_open();
    sigaction(SIGINT, &(struct sigaction){.sa_handler = on_signal}, NULL);
    sigaction(SIGTERM, &(struct sigaction){.sa_handler = on_signal}, NULL);
    struct pollfd listener = {.fd = listen_on(), .events = POLLIN};
    int error = pthread_create(&expiry, NULL, expiry_main, NULL);
    if (error) exit(say(ERROR, "cannot start a thread: %s", strerror(error)));
    say(INFO, "listening on %s", address_of(listener.fd, getsockname).text);
    while (!atomic_load(&stopping)) /* a signal may come just before poll: hence TICK */
        if (poll(&listener, 1, TICK) > 0) accept_client(listener.fd);
    /* Who connected before the signal is served too; a failure counts for 64 of them. */
    for (int i = 0; i < SOMAXCONN; i += accept_client(listener.fd) ? 1 : 64) continue;
    close(listener.fd);
    say(INFO, "stopping with %ld clients", atomic_load(&connected));
    /* After SHUT_RD a thread still reads what has arrived (on Linux), answers it and then
       sees the end of the input. Who has not taken the replies in time is dropped. */
    for (int ms = 0; atomic_load(&connected) > 0 && ms < 2 * STOP_GRACE; ms += 20) {
        if (ms == STOP_GRACE) atomic_fetch_add(&stopping, 1);
        for (int fd = 3; ms % STOP_GRACE == 0 && fd < max_fds; fd++)
            shutdown(fd, ms == 0 ? SHUT_RD : SHUT_RDWR);
        nanosleep(&(struct timespec){0, 20000000}, NULL);
    }
    pthread_join(expiry, NULL);
    atomic_store(&disk_bad, false); /* one last try */
    int failed = !aof_commit(aof.end);
    must(aof_fd < 0 || fsync(aof_fd) == 0, "fsync");
    if (atomic_load(&connected) > 0) return failed; /* a thread is busy: leave it all */
    for (long i = 0; i < opt.shards; i++) table_free(&shards[i].table);
    free(aof.gathered.p);
    free(aof.batch.p);
    say(INFO, "stopped");
    return failed;
}
