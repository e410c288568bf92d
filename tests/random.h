/* Random numbers for the unit suites: RMIG_SEED=NUMBER in the environment gives other ones, without it every run is the
   same. Define RANDOM_SEED, not 0, before. */
#ifndef RMIG_RANDOM_H
#define RMIG_RANDOM_H

#include <stdint.h>
#include <stdlib.h>

/* How often to repeat: less in the variants, whose machine code is another and whose logic is the same. */
#ifdef TEST_FEW
#define TIMES(n) ((n) / 10)
#else
#define TIMES(n) (n)
#endif

static inline uint64_t rng(void) {
    static uint64_t rng_state;
    if (rng_state == 0) {
        const char *seed = getenv("RMIG_SEED");
        rng_state = seed == NULL ? RANDOM_SEED : strtoull(seed, NULL, 0) * 2 + 1; // never 0
    }
    rng_state ^= rng_state << 13;
    rng_state ^= rng_state >> 7;
    rng_state ^= rng_state << 17;
    return rng_state;
}

static inline uint64_t below(uint64_t n) { return rng() % n; }

#endif
