/* What the libFuzzer targets share. With -DRMIG_FUZZ_REPLAY a target has a main of its own, for compilers without
   libFuzzer: it runs the files named on its command line, and every beginning of them. */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define REQUIRE(c)                                                                                                     \
    do {                                                                                                               \
        if (!(c)) {                                                                                                    \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #c);                                            \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

#ifdef RMIG_FUZZ_REPLAY
int main(int argc, char **argv) {
    static uint8_t data[1 << 20];
    for (int i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        if (f == NULL) {
            perror(argv[i]);
            return 1;
        }
        size_t n = fread(data, 1, sizeof data, f);
        fclose(f);
        for (size_t cut = 0; cut < n; cut += cut < 4096 ? 1 : 4096)
            LLVMFuzzerTestOneInput(data, cut);
        LLVMFuzzerTestOneInput(data, n);
    }
    printf("%d files\n", argc - 1);
    return argc > 1 ? 0 : 1;
}
#endif

#endif
