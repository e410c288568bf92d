#!/usr/bin/env bash
# make install puts headers and rmig.pc where a foreign program finds them; make uninstall leaves nothing.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/tap.sh
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

installs() {
    make --no-print-directory install DESTDIR="$root" PREFIX=/opt/rmig || return 1
    local header
    for header in rmig*.h; do
        cmp "$header" "$root/opt/rmig/include/$header" || return 1
    done
}

is_found() {
    printf '%s\n' '#define RMIG_IMPLEMENTATION' '#include <rmig.h>' '#include <stdio.h>' \
        'int main(void) { printf("%d.%d.%d\n", RMIG_VERSION_MAJOR, RMIG_VERSION_MINOR, RMIG_VERSION_PATCH);' \
        'return rmig_status_text(RMIG_OK) == NULL; }' >"$root/user.c"
    export PKG_CONFIG_PATH=$root/opt/rmig/lib/pkgconfig PKG_CONFIG_SYSROOT_DIR=$root
    # shellcheck disable=SC2046 # a list of flags
    gcc -std=c11 $(pkg-config --cflags rmig) "$root/user.c" -o "$root/user" || return 1
    [ "$("$root/user")" = "$(pkg-config --modversion rmig)" ] || { echo "rmig.pc has another version than rmig.h"; return 1; }
}

uninstalls() {
    make --no-print-directory uninstall DESTDIR="$root" PREFIX=/opt/rmig || return 1
    [ -z "$(find "$root/opt" -type f)" ] || { find "$root/opt" -type f; return 1; }
}

check 'make install installs all headers' installs
check 'a program finds rmig by pkg-config' is_found
check 'make uninstall leaves no file' uninstalls
done_testing
