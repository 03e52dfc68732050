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

/* Reads the word at the start of line, which is no longer than n, and checks that nothing
   is left and that it is the bytes of expected. */
DRIVER static void reads_as(const char *line, size_t n, struct slice expected) {
    struct slice word;
    char *copy = sys_realloc(NULL, n + 1), *at = copy; /* of this size: no byte behind */
    memcpy(copy, line, n);
    CLAIM(!take_word(&at, copy + n, &word) && at == copy + n);
    CLAIM(word.len == expected.len && !memcmp(word.p, expected.p, word.len));
    sys_free(copy);
}

/* A word quoted, as reply, key, error and log show it. */
DRIVER static void check_quoting(struct slice word) {
    char *quoted = sys_realloc(NULL, 4 * word.len + 3);
    size_t n = quote(quoted, word);
    CLAIM(n <= 4 * word.len + 2);
    for (size_t i = 0; i < n; i++)
        CLAIM((unsigned char)quoted[i] >= 0x20 && quoted[i] != 0x7f);
    reads_as(quoted, n, word);
    CLAIM(!is_bare(word, true) || is_bare(word, false));
    if (is_bare(word, true)) reads_as(word.p, word.len, word);
    if (is_bare(word, false)) CLAIM(word.len && !memchr("\"( ", word.p[0], 3));
    struct text shown = show(word);
    size_t len = strlen(shown.text), cut = word.len > MAX_SHOWN ? 3 : 0;
    CLAIM(len < sizeof shown.text && strcspn(shown.text, "\n\r") == len);
    if (!memchr(word.p, 0, word.len) || *shown.text == '"')
        reads_as(shown.text, len - cut,
                 (struct slice){word.p, cut ? MAX_SHOWN : word.len});
    sys_free(quoted);
}

/* Reads raw bytes as a line: its words, quoted, must read as the same words. */
DRIVER static void check_line(struct slice raw) {
    static struct slice words[MAX_WORDS];
    struct conn c = {.fd = -1, .argv = words};
    char *line = sys_realloc(NULL, raw.len);
    memcpy(line, raw.p, raw.len);
    const char *wrong = split_line(&c, line, line + raw.len);
    for (size_t i = 0; !wrong && i < c.argc; i++) {
        CLAIM(c.argv[i].p >= line && c.argv[i].p + c.argv[i].len <= line + raw.len);
        check_quoting(c.argv[i]);
    }
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
    const char *next = s < s_end ? glob_item(p, end, (unsigned char)*s) : NULL;
    return next && matches(next, end, s + 1, s_end, fuel);
}

static void check_glob(struct slice both) {
    char *bar = memchr(both.p, '|', both.len);
    if (!bar) return;
    struct slice p = {both.p, (size_t)(bar - both.p)};
    struct slice s = {bar + 1, both.len - p.len - 1};
    int fuel = 2000;
    bool slow = matches(p.p, p.p + p.len, s.p, s.p + s.len, &fuel),
         fast = glob_match(p, s);
    CLAIM(fuel < 0 || slow == fast);
}

DRIVER int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0) return 0;
    opt.max_value = 1 << 20;
    char *p = sys_realloc(NULL, size); /* of this size: no byte behind */
    memcpy(p, data, size);
    struct slice word = {p, size};
    check_quoting(word);
    check_quoting((struct slice){p, 0});
    check_line(word);
    check_number(word);
    check_glob(word);
    sys_free(p);
    CLAIM(block_count == 0);
    return 0;
}
