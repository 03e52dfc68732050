/* A word of text, quoted and read back: what kv replies is what it reads. And numbers and
   globs, beside a second way to do the same. */
#include "system.h"

static ssize_t from_client(char *to, size_t n, int flags) {
    (void)to, (void)n, (void)flags;
    return 0;
}

static ssize_t to_client(const char *p, size_t n) {
    (void)p;
    return (ssize_t)n;
}

/* Splits a line, in a block of its size: behind its newline nothing may be read. Returns
   the block, and whether the line is right; one that is wrong has been answered. */
DRIVER static char *split(struct conn *c, const char *p, size_t n, bool *right) {
    char *line = sys_malloc(n + 1);
    memcpy(line, p, n);
    line[n] = '\n';
    *c = (struct conn){.authed = true, .max_bytes = SIZE_MAX, .max_words = MAX_WORDS};
    *right = split_line(c, line, line + n) == COMPLETE;
    CLAIM(!c->closing && (c->out.len == 0) == *right && c->replies == !*right);
    sys_free(c->out.p);
    return line;
}

/* Reads text as the second word of a line and checks that it stands for expected. The
   first one may not begin with a #. */
DRIVER static void reads_as(const char *text, size_t n, struct slice expected) {
    struct conn c;
    bool right;
    char *both = sys_malloc(n + 2);
    both[0] = 'a';
    both[1] = ' ';
    memcpy(both + 2, text, n);
    char *line = split(&c, both, n + 2, &right);
    CLAIM(right && c.argc == 2 && c.argv[1].len == expected.len);
    CLAIM(!memcmp(c.argv[1].p, expected.p, expected.len));
    sys_free(c.argv);
    sys_free(line);
    sys_free(both);
}

/* A word quoted, as reply, key, error and log show it. */
DRIVER static void check_quoting(struct slice word) {
    char *quoted = sys_malloc(4 * word.len + 3);
    size_t n = (size_t)(quote(quoted, word) - quoted);
    CLAIM(n <= 4 * word.len + 2);
    for (size_t i = 0; i < n; i++)
        CLAIM((unsigned char)quoted[i] >= 0x20 && quoted[i] != 0x7f);
    reads_as(quoted, n, word);
    CLAIM(needs_quotes(word, true) || !needs_quotes(word, false));
    if (!needs_quotes(word, true)) reads_as(word.p, word.len, word);
    if (!needs_quotes(word, false)) CLAIM(word.len && !memchr("\"( ", word.p[0], 3));
    struct text shown = show(word);
    size_t len = strlen(shown.text), cut = word.len > 64 ? 3 : 0;
    CLAIM(len < sizeof shown.text && strcspn(shown.text, "\n\r") == len);
    if (!memchr(word.p, 0, word.len) || *shown.text == '"')
        reads_as(shown.text, len - cut, (struct slice){word.p, cut ? 64 : word.len});
    sys_free(quoted);
}

/* Reads raw bytes as a line. Its words lie in it, one behind the other, and quoted they
   read as the same words. */
DRIVER static void check_line(struct slice raw) {
    struct conn c;
    bool right;
    char *line = split(&c, raw.p, raw.len, &right), *at = line;
    for (size_t i = 0; right && i < c.argc; i++) {
        CLAIM(c.argv[i].p >= at && c.argv[i].p + c.argv[i].len <= line + raw.len);
        check_quoting(c.argv[i]);
        at = c.argv[i].p + c.argv[i].len;
    }
    sys_free(c.argv);
    sys_free(line);
}

DRIVER static void check_number(struct slice word) {
    int64_t n;
    char text[24];
    if (!parse_int(word, &n)) return;
    CLAIM((size_t)sprintf(text, "%" PRId64, n) == word.len);
    CLAIM(!memcmp(text, word.p, word.len));
}

/* The way to match that everybody understands; exponential. fuel bounds it. */
DRIVER static bool matches(const char *p, const char *end, const char *s,
                           const char *s_end, int *fuel) {
    if (--*fuel < 0) return false;
    if (p == end) return s == s_end;
    if (*p == '*')
        return matches(p + 1, end, s, s_end, fuel) ||
               (s < s_end && matches(p, end, s + 1, s_end, fuel));
    return s < s_end && match_item(&p, end, *s) && matches(p, end, s + 1, s_end, fuel);
}

static void check_glob(struct slice both) {
    char *bar = memchr(both.p, '|', both.len);
    if (!bar) return;
    struct slice p = {both.p, (size_t)(bar - both.p)};
    struct slice s = {bar + 1, both.len - p.len - 1};
    int fuel = 2000;
    struct buf row = {0};
    bool slow = matches(p.p, p.p + p.len, s.p, s.p + s.len, &fuel),
         fast = glob_match(p, s, &row);
    sys_free(row.p);
    CLAIM(fuel < 0 || slow == fast);
}

DRIVER int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char *p = sys_malloc(size); /* of this size: no byte behind */
    memcpy(p, data, size);
    struct slice word = {p, size};
    check_quoting(word);
    check_line(word);
    check_number(word);
    check_glob(word);
    sys_free(p);
    CLAIM(block_count == 0);
    return 0;
}
