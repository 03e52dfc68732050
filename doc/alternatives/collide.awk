# Prints 2^n keys whose 64-bit FNV-1a hashes agree in the lower 40 bits: all that kv looks at
# with 256 shards, 32 bits for the table and 8 for the shard. awk -v n=14 -f collide.awk
#
# Modulo 2^40 the prime of FNV is 435, and the lower 40 bits of a product depend on nothing
# above them: small enough for awk. By the birthday paradox some 2^17 blocks of seven letters
# have two that lead to states which differ in their lower 8 bits alone; the next letter,
# which is XORed into these, makes them equal. n such pairs in a row make 2^n keys, each
# block being either of its pair (Joux, "Multicollisions in iterated hash functions", 2004).
function xor(a, b,   x, bit) {
    for (bit = 1; bit < 256; bit *= 2) {
        if (a % 2 != b % 2) x += bit
        a = int(a / 2)
        b = int(b / 2)
    }
    return x + 0
}
function step(h, byte) { return (h - h % 256 + table[h % 256 * 256 + byte]) * 435 % 1099511627776 }
function letter() { return rand() < 0.5 ? 65 + int(rand() * 26) : 97 + int(rand() * 26) }
function is_letter(b) { return sprintf("%c", b) ~ /[A-Za-z]/ }
BEGIN {
    for (a = 0; a < 256; a++) for (b = 64; b < 128; b++) table[a * 256 + b] = xor(a, b)
    state = 981469373221 # where FNV-1a begins, 0xcbf29ce484222325, modulo 2^40
    srand(1)
    for (pair = 0; pair < n; pair++) {
        for (found = 0; !found; ) {
            h = state
            text = ""
            for (i = 0; i < 7; i++) {
                b = letter()
                text = text sprintf("%c", b)
                h = step(h, b)
            }
            id = sprintf("%.0f", (h - h % 256) / 256) # as a number awk would round it
            if (!(id in block)) { block[id] = text; low[id] = h % 256; continue }
            diff = xor(low[id], h % 256)
            for (b = 65; b < 123 && !found; b++)
                found = diff && is_letter(b) && is_letter(c = xor(b, diff)) ? b : 0
        }
        either[pair] = text sprintf("%c", found)
        or[pair] = block[id] sprintf("%c", c)
        state = step(h, found)
        split("", block)
        split("", low)
    }
    for (key = 0; key < 2 ^ n; key++) {
        text = ""
        for (pair = 0; pair < n; pair++)
            text = text (int(key / 2 ^ pair) % 2 ? either[pair] : or[pair])
        print text
    }
}
