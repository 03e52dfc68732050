/* N: prints 2^N keys whose 64-bit FNV-1a hashes agree in their lower 40 bits. That is all
   that kv looks at with 256 shards: 32 bits for the bucket and 8 for the shard.

   The lower 40 bits of a product depend only on the lower 40 bits of its factors. So we
   may forget all bits above them. Among some 2^17 blocks of seven letters, two lead to
   states that differ only in their lowest 8 bits (the birthday paradox). The next letter
   is XORed into these 8 bits, so two suitable letters make the states equal. N such pairs
   in a row make 2^N keys, for each block can be either of its pair (Joux, "Multicollisions
   in Iterated Hash Functions", 2004). */
#include <ctype.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX = 20, SLOTS = 1 << 20 };
static const uint64_t mask = (1ULL << 40) - 1;

static uint64_t step(uint64_t h, int byte) {
    return (h ^ (uint64_t)byte) * 0x100000001b3 & mask;
}

int main(int argc, char **argv) {
    static struct { uint64_t state; char text[8]; int pair; } seen[SLOTS]; /* by state */
    char either[MAX + 1][9] = {""}, or[MAX + 1][9] = {""};
    int n = argc > 1 ? atoi(argv[1]) : 0;
    uint64_t state = 0xcbf29ce484222325 & mask; /* where FNV-1a begins */
    if (n < 1 || n > MAX) return 2;
    for (int pair = 1; pair <= n; pair++) {
        while (!either[pair][0]) {
            char text[8] = "";
            uint64_t h = state;
            for (int i = 0; i < 7; i++) h = step(h, text[i] = (char)('a' + rand() % 26));
            int at = (int)((h >> 8) % SLOTS);
            int differ = (int)((h ^ seen[at].state) & 255);
            int same = seen[at].pair == pair && seen[at].state >> 8 == h >> 8 && differ;
            for (int b = 'A'; same && b <= 'z'; b++) {
                if (!isalpha(b) || !isalpha(b ^ differ)) continue;
                sprintf(either[pair], "%s%c", text, b);
                sprintf(or[pair], "%s%c", seen[at].text, b ^ differ);
                state = step(h, b);
                break;
            }
            seen[at].state = h;
            seen[at].pair = pair;
            memcpy(seen[at].text, text, 8);
        }
    }
    for (long key = 0; key < 1L << n; key++) {
        for (int pair = 1; pair <= n; pair++)
            fputs(key >> (pair - 1) & 1 ? either[pair] : or[pair], stdout);
        puts("");
    }
}
