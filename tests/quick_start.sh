#!/usr/bin/env bash
# quick_start.sh: the quick starts of rmig.h and README.md, compiled as they stand, move memory, and lose none.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/tap.sh
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

# The code in the header's comment: what is indented by eight between the headings.
header_code() { awk '/^QUICK START/ { on = 1 } /^MACROS TO OVERRIDE/ { on = 0 } on && /^        / { print substr($0, 9) }' rmig.h; }
readme_code() { awk '/^## Quick start/ { on = 1 } /^## Parameters/ { on = 0 } on && /^```c$/ { code = 1; next } /^```$/ { code = 0 } code && on && !/^#/' README.md; }

# A guest of 64 MiB that is moved from parent to child, found whole there, and refused where it does not fit.
cat >"$tmp/main.c" <<'C'
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define RMIG_IMPLEMENTATION
#include "rmig.h"
#include "rmig_fabric_ofi.h"
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include "code.h"
enum { SIZE = 64 << 20 };
static void fill(uint8_t *ram) {
    for (size_t i = 0; i < SIZE / 2; i += 64)
        ram[i] = (uint8_t)(i / 64 + 1);
}
static uint8_t *map(void) {
    void *p = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        exit(9);
    return (uint8_t *)p;
}
/* Says something before it names a block, and leaves. */
static void stranger(const char *address) {
    struct rmig_error err;
    struct rmig_source *src = NULL;
    struct rmig_fabric *fabric = rmig_ofi_open(NULL, &err);
    struct rmig_block_desc ram = {"else", map(), 4096, 0, RMIG_BACKING_UNKNOWN, -1, 0};
    rmig_source_open(fabric, NULL, &src, &err);
    rmig_source_add_block(src, &ram, NULL);
    rmig_source_connect(src, address);
    rmig_source_put(src, "rubbish", 7);
    rmig_source_flush(src);
    rmig_source_close(src);
    rmig_fabric_close(fabric);
}
int main(int argc, char **argv) { /* ADDRESS whole | state | stranger | nobody */
    static uint64_t dirty[SIZE / 4096 / 64];
    static char state[300], big[4096];
    const char *how = argc > 2 ? argv[2] : "";
    if (strcmp(how, "nobody") == 0) { /* no provider, or nobody there: an error, no crash */
        int rc = migrate_out(argv[1], map(), SIZE, dirty, state, sizeof state);
        return rc == -1 ? 0 : 1;
    }
    size_t room = strcmp(how, "state") == 0 ? 100 : sizeof big; /* the state does not fit: refused, and still ours */
    pid_t sink = fork();
    if (sink == 0) {
        uint8_t *ram = map(), *want = map();
        fill(want);
        alarm(60);
        int64_t got = migrate_in(argv[1], ram, SIZE, big, room);
        _exit(room == 100 ? (got == -1 ? 0 : 2) : got == (int64_t)sizeof state && memcmp(ram, want, SIZE) == 0 ? 0 : 3);
    }
    uint8_t *ram = map();
    fill(ram);
    memset(dirty, 0x11, sizeof dirty);
    int rc = -1;
    for (int i = 0; i < 200 && rc == -1; i++) { /* until the sink listens; a refused guest is not tried again */
        int status = 0;
        usleep(100000);
        if (waitpid(sink, &status, WNOHANG) == sink)
            return room == 100 && WIFEXITED(status) ? WEXITSTATUS(status) : 4;
        if (strcmp(how, "stranger") == 0)
            stranger(argv[1]);
        rc = migrate_out(argv[1], ram, SIZE, dirty, state, sizeof state);
    }
    int status = 0;
    waitpid(sink, &status, 0);
    return rc == 0 && WIFEXITED(status) ? WEXITSTATUS(status) : 5;
}
C

build() { # from whose code, compiler and language
    "$1" >"$tmp/code.h"
    [ "$(wc -l <"$tmp/code.h")" -gt 20 ] || { echo "no code"; return 1; }
    # shellcheck disable=SC2086
    $2 -D_GNU_SOURCE -Wall -Wextra -Wconversion -Wshadow -Werror -O1 -g -I. -I"$tmp" "$tmp/main.c" -o "$tmp/run" \
        $(pkg-config --cflags --libs libfabric) -pthread
}
run() { timeout 600 "$tmp/run" "127.0.0.1:$((20000 + RANDOM % 20000))" "$1"; }
without_providers() { FI_PROVIDER=none timeout 600 "$tmp/run" 127.0.0.1:1 nobody; }

same_code() { diff <(header_code) <(readme_code); }

for as in 'gcc -std=c11' 'g++ -std=c++17 -x c++'; do
    check "the quick start of rmig.h compiles with $as" build header_code "$as"
done
check 'it moves a guest whole' run whole
check 'a state that does not fit is refused, and the guest stays' run state
check 'what a stranger sent before is void' run stranger
check 'nobody there: an error' timeout 600 "$tmp/run" 127.0.0.1:1 nobody
check 'no provider there: an error' without_providers
check 'README.md has the same' same_code
done_testing
