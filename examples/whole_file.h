/*
whole_file.h - a file or directory that has its name only when all of it is there

    Until then it is called PATH.part. One process at a time writes a PATH.part: a file is locked, a directory is new.
    Several files get their names together: when one cannot, none has it, and what stood there before stands there
again.

    A PATH that is a symbolic link is what it leads to, also when nothing is there yet: PATH.part is beside that. A file
    that takes the place of another has its owner, mode and access list.

    In place: a file or block device that is there is written itself. That is for what has a mark of its own of being
    whole, as a snapshot has; who gives up leaves what is there without it.
*/
#ifndef WHOLE_FILE_H
#define WHOLE_FILE_H

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "../rmig.h"

struct whole_file {
    const char *path; // the caller's, and must stay
    char *target; // what it leads to
    char *part; // what is written; in place: target
    int fd; // of part; -1: nothing is being written
    bool in_place;
    bool exchanged; // by whole_file_commit_all: target is the new file, part the older one
};

enum whole_file_flags {
    WHOLE_FILE_ONLY = 1, // it may become the only copy: a PATH.part that is not empty is not taken over
    WHOLE_FILE_IN_PLACE = 2,
    WHOLE_FILE_MAY_BE_IN_PLACE = 4 // the program has an option for that, --in-place, which messages may name
};

/* First in main. A standard descriptor that a shell closed (2>&-) would be the number of a file that is opened: what is
   printed would land in an image. It gets a descriptor by which nothing can be read or written. */
static inline void whole_file_hold_standard(void) {
    int fd;
    do
        fd = open("/", O_PATH);
    while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd >= 0)
        close(fd);
}

/* Beside SIGINT and SIGTERM: signals that would end the program, and leave what it writes. One that is ignored (nohup) or
   handled (by a profiler) stays so. Those that dump core are left alone: what is written stays to be looked at. */
static inline void whole_file_catch_signals(const struct sigaction *cancel) {
    for (int number = 1; number <= SIGRTMAX; number++) {
        static const int those[] = {SIGHUP,  SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM,
                                    SIGPROF, SIGXCPU, SIGPOLL, SIGPWR,  SIGSTKFLT};
        bool ends = number >= SIGRTMIN;
        for (size_t i = 0; i < sizeof those / sizeof those[0]; i++)
            ends = ends || those[i] == number;
        struct sigaction before;
        if (ends && sigaction(number, NULL, &before) == 0 && before.sa_handler == SIG_DFL)
            sigaction(number, cancel, NULL);
    }
}

// >>names

struct whole_file_text {
    char s[200];
};

/* A path as text for an error, whose reason follows it: of a long one the end. */
static inline struct whole_file_text whole_file_show(const char *path) {
    struct whole_file_text text;
    size_t n = strlen(path), cut = n < sizeof text.s ? 0 : n - sizeof text.s + 4;
    while (cut > 0 && ((unsigned char)path[cut] & 0xc0) == 0x80) // no half of a letter
        cut++;
    snprintf(text.s, sizeof text.s, "%s%s", cut > 0 ? "..." : "", path + cut);
    return text;
}

/* A name is at most NAME_MAX bytes long: of one that is cut this tells which it was. */
static inline unsigned long long whole_file_hash(const char *name) { // FNV-1a
    uint64_t hash = 0xcbf29ce484222325u;
    for (; *name != '\0'; name++)
        hash = (hash ^ (uint8_t)*name) * 0x100000001b3u;
    return hash;
}

static inline bool is_plain(unsigned char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' ||
           c == '.';
}

/* A file name, to be freed, made of a name that a peer chose: all that is not plain becomes %XX, and so does a leading
   dot, and with no_part the dot of a final ".part". What is too long then ends in %- and a hash. Different names stay
   different, and none looks like another's unfinished file. NULL: no memory. */
static inline char *safe_name(const char *name, bool no_part) {
    enum { TAIL = 18 };
    size_t n = strlen(name), at = 0, part_dot = no_part && n >= 5 && strcmp(name + n - 5, ".part") == 0 ? n - 5 : 0;
    char *out = (char *)malloc(3 * n + TAIL + 1);
    if (out == NULL)
        return NULL;
    for (size_t i = 0; i < n; i++) {
        if (is_plain((unsigned char)name[i]) && !(name[i] == '.' && (i == 0 || i == part_dot)))
            out[at++] = name[i];
        else
            at += (size_t)snprintf(out + at, 4, "%%%02X", (unsigned char)name[i]);
    }
    out[at] = '\0';
    if (at > NAME_MAX) {
        at = NAME_MAX - TAIL;
        while (out[at - 1] == '%' || out[at - 2] == '%') // no half of a %XX
            at--;
        snprintf(out + at, TAIL + 1, "%%-%016llx", whole_file_hash(name));
    }
    return out;
}

/* How many bytes of a path are its directory, with the slash. */
static inline int whole_file_dir_length(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash == NULL ? 0 : (int)(slash - path) + 1;
}

/* The path of a file beside another, to be freed, with a suffix to its name. NULL: no memory. */
static inline char *whole_file_beside(const char *path, const char *suffix) {
    int dir = whole_file_dir_length(path);
    const char *name = path + dir;
    size_t room = NAME_MAX - strlen(suffix);
    char *out = NULL;
    if (strlen(name) <= room)
        return asprintf(&out, "%s%s", path, suffix) < 0 ? NULL : out;
    room -= 17;
    while (room > 0 && ((unsigned char)name[room] & 0xc0) == 0x80) // no half of a letter
        room--;
    return asprintf(&out, "%.*s%.*s-%016llx%s", dir, path, (int)room, name, whole_file_hash(name), suffix) < 0 ? NULL
                                                                                                               : out;
}

/* Where a path leads, to be freed: nothing need be there. NULL with *err. */
static inline char *whole_file_resolve(const char *path, struct rmig_error *err) {
    char link[PATH_MAX], *at = strdup(path);
    int fd = open(path, O_PATH | O_CLOEXEC), error = errno; // of links of strangers the kernel may have an opinion
    if (fd >= 0)
        close(fd);
    else if (error != ENOENT && error != ENOTDIR) {
        free(at);
        rmig_fail(err, RMIG_ERR_FILE, error, "cannot follow %s: %s", whole_file_show(path).s, strerror(error));
        return NULL;
    }
    ssize_t n;
    for (int i = 0; i < 40 && at != NULL && (n = readlink(at, link, sizeof link - 1)) >= 0; i++) {
        char *from = at;
        link[n] = '\0';
        if (asprintf(&at, "%.*s%s", link[0] == '/' ? 0 : whole_file_dir_length(from), from, link) < 0)
            at = NULL;
        free(from);
    }
    if (at == NULL)
        rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for where %s leads", whole_file_show(path).s);
    return at;
}

/* flags: -1 for a directory, whose path may end in slashes. */
static inline int whole_file_name(struct whole_file *f, const char *path, int flags, struct rmig_error *err) {
    bool in_place = flags > 0 && (flags & WHOLE_FILE_IN_PLACE) != 0;
    *f = (struct whole_file){.path = path, .fd = -1, .in_place = in_place};
    f->target = whole_file_resolve(path, err);
    if (f->target == NULL)
        return err->status;
    for (size_t n = strlen(f->target); flags < 0 && n > 1 && f->target[n - 1] == '/'; n--)
        f->target[n - 1] = '\0';
    if (f->target[whole_file_dir_length(f->target)] == '\0')
        return rmig_fail(err, RMIG_ERR_FILE, 0, "\"%s\": the name of a %s is missing at its end",
                         whole_file_show(path).s, flags < 0 ? "directory" : "file");
    f->part = in_place ? strdup(f->target) : whole_file_beside(f->target, ".part");
    return f->part != NULL ? RMIG_OK
                           : rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for the name of %s.part",
                                       whole_file_show(path).s);
}

/* Do two paths lead to one name in one directory? Nothing need be there. */
static inline bool whole_file_same_name(const char *a, const char *b) {
    int in_a = whole_file_dir_length(a), in_b = whole_file_dir_length(b);
    char dir_a[PATH_MAX], dir_b[PATH_MAX];
    struct stat st_a, st_b;
    if (strcmp(a + in_a, b + in_b) != 0)
        return false;
    snprintf(dir_a, sizeof dir_a, "%.*s.", in_a, a); // "." in the directory, or the one that this process is in
    snprintf(dir_b, sizeof dir_b, "%.*s.", in_b, b);
    return stat(dir_a, &st_a) == 0 && stat(dir_b, &st_b) == 0 && st_a.st_ino == st_b.st_ino &&
           st_a.st_dev == st_b.st_dev;
}

/* Two files are to be written at a time: the name that one of them gets and the other has until it is whole, or NULL. */
static inline const char *whole_file_clash(const struct whole_file *a, const struct whole_file *b) {
    if (whole_file_same_name(a->target, b->part))
        return a->target;
    return whole_file_same_name(b->target, a->part) ? b->target : NULL;
}

// >>opening

/* Is fd, of this name, for this process alone? Whoever had the lock before may have given the file its real name, or
   removed it, since it was opened. */
static inline int whole_file_lock(int fd, const char *part, struct stat *mine, struct rmig_error *err) {
    struct stat named;
    int code = flock(fd, LOCK_EX | LOCK_NB) == 0 ? 0 : errno;
    if (code != 0 && code != EWOULDBLOCK)
        return rmig_fail(err, RMIG_ERR_FILE, code, "cannot lock %s: %s", whole_file_show(part).s, strerror(code));
    if (code != 0 || fstat(fd, mine) < 0 || stat(part, &named) < 0 || mine->st_ino != named.st_ino ||
        mine->st_dev != named.st_dev)
        return rmig_fail(err, RMIG_ERR_FILE, code, "%s is in use by another process", whole_file_show(part).s);
    return RMIG_OK;
}

/* Is what has the part's name still what is written here? Somebody may have removed it, or put another in its place. */
static inline bool whole_file_is_mine(const struct whole_file *f) {
    struct stat mine, named;
    return fstat(f->fd, &mine) == 0 && lstat(f->part, &named) == 0 && mine.st_ino == named.st_ino &&
           mine.st_dev == named.st_dev;
}

/* May the part get its name? Not when that is another's by now (ESTALE), nor when another process writes what is at the
   target, in place or as a part of its own (ETXTBSY). */
static inline bool whole_file_may_commit(const struct whole_file *f) {
    if (!whole_file_is_mine(f)) {
        errno = ESTALE;
        return false;
    }
    int fd = open(f->target, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    bool busy = fd >= 0 && flock(fd, LOCK_SH | LOCK_NB) < 0 && errno == EWOULDBLOCK;
    if (fd >= 0)
        close(fd);
    errno = ETXTBSY;
    return !busy;
}

/* What a program reads is locked against writers: RMIG_ERR_FILE if one is at it. */
static inline int whole_file_lock_to_read(int fd, const char *path, struct rmig_error *err) {
    if (flock(fd, LOCK_SH | LOCK_NB) == 0 || errno != EWOULDBLOCK)
        return RMIG_OK;
    return rmig_fail(err, RMIG_ERR_FILE, EWOULDBLOCK, "%s is being written by another process",
                     whole_file_show(path).s);
}

/* What is at the target: st_mode 0 where nothing is. Refuses what cannot be replaced, or not be written in place. */
static inline int whole_file_look(const struct whole_file *f, int flags, struct stat *older, struct rmig_error *err) {
    struct stat st;
    memset(older, 0, sizeof *older);
    if (stat(f->target, older) < 0 && errno == ENOENT && strcmp(f->target, f->path) != 0 && stat(f->path, &st) == 0 &&
        lstat(f->target, &st) < 0) // another writer may just have given it its name
        return rmig_fail(err, RMIG_ERR_FILE, 0, "%s leads to what has no name: a pipe, or a file that was removed",
                         whole_file_show(f->path).s);
    if (older->st_mode == 0)
        return f->in_place ? rmig_fail(err, RMIG_ERR_FILE, errno, "%s: %s; what is written in place must be there",
                                       whole_file_show(f->path).s, strerror(errno))
                           : RMIG_OK;
    if (S_ISREG(older->st_mode) || (f->in_place && S_ISBLK(older->st_mode)))
        return RMIG_OK;
    if (f->in_place)
        return rmig_fail(err, RMIG_ERR_FILE, 0, "%s is neither a regular file nor a block device",
                         whole_file_show(f->path).s);
    return rmig_fail(
        err, RMIG_ERR_FILE, 0, "%s is not a regular file, and will not be replaced%s", whole_file_show(f->path).s,
        S_ISBLK(older->st_mode) && (flags & WHOLE_FILE_MAY_BE_IN_PLACE) != 0 ? "; --in-place writes into a block device"
                                                                             : "");
}

/* A new part, or *found: one that was there before. */
static inline int whole_file_create_part(const char *part, int how, bool *found) {
    for (int i = 0; i < 100; i++) { // whoever had it may remove it in between
        int fd = open(part, how | O_CREAT | O_EXCL, 0600);
        *found = fd < 0 && errno == EEXIST;
        if (*found)
            fd = open(part, how);
        if (fd >= 0 || !*found || errno != ENOENT)
            return fd;
    }
    return -1;
}

/* A block device that is in use, for instance mounted, is not opened (O_EXCL). */
static inline int whole_file_open_part(struct whole_file *f, int flags, const struct stat *older, bool *found,
                                       struct rmig_error *err) {
    int how = O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;
    if (f->in_place && S_ISBLK(older->st_mode))
        how |= O_EXCL;
    int fd = f->in_place ? open(f->part, how) : whole_file_create_part(f->part, how, found), error = errno;
    bool closed = !f->in_place && !*found && (error == EACCES || error == EPERM);
    if (fd < 0)
        rmig_fail(err, RMIG_ERR_FILE, error, "cannot %s %s%s: %s%s",
                  f->in_place ? "write into"
                  : *found    ? "open"
                              : "create",
                  whole_file_show(f->part).s, *found ? ", which is there already" : "", strerror(error),
                  closed && older->st_mode != 0 && (flags & WHOLE_FILE_MAY_BE_IN_PLACE) != 0
                      ? "; --in-place writes into the file that is there"
                      : "");
    return fd;
}

/* A part that was there before: whoever else it belongs to, or has another name of it, could read what is written, or
   lose what it held. The owner of the file that is replaced may have it, whose part a killed process left. */
static inline int whole_file_may_take_over(const struct whole_file *f, const struct stat *mine,
                                           const struct stat *older, struct rmig_error *err) {
    if (mine->st_uid != geteuid() && (older->st_mode == 0 || mine->st_uid != older->st_uid))
        return rmig_fail(
            err, RMIG_ERR_FILE, EEXIST,
            "%s is there already, and is of user %u, to whom what is written would belong: look at it, then "
            "remove it",
            whole_file_show(f->part).s, (unsigned)mine->st_uid);
    if (mine->st_nlink > 1)
        return rmig_fail(err, RMIG_ERR_FILE, EEXIST,
                         "%s is there already, and has %llu names, all of which what is written would get: look at it, "
                         "then remove it",
                         whole_file_show(f->part).s, (unsigned long long)mine->st_nlink);
    return RMIG_OK;
}

/* The access list of POSIX. Where the older file has none, none that the directory gave stays. */
static inline int whole_file_keep_access_list(const struct whole_file *f, struct rmig_error *err) {
    static const char name[] = "system.posix_acl_access";
    char list[65536]; // the longest that there is
    ssize_t n = getxattr(f->target, name, list, sizeof list);
    int rc = (int)n;
    if (n >= 0)
        rc = fsetxattr(f->fd, name, list, (size_t)n, 0);
    else if (errno == ENODATA || errno == ENOENT) // it may have gone meanwhile
        rc = fremovexattr(f->fd, name);
    if (rc == 0 || errno == ENODATA || errno == EOPNOTSUPP)
        return RMIG_OK;
    return rmig_fail(err, RMIG_ERR_FILE, errno, "cannot give %s the access list of %s: %s", whole_file_show(f->part).s,
                     whole_file_show(f->path).s, strerror(errno));
}

/* The file will be in the place of another, and whoever could read that one shall read it. */
static inline int whole_file_be_like(const struct whole_file *f, const struct stat *mine, const struct stat *older,
                                     struct rmig_error *err) {
    bool same = mine->st_uid == older->st_uid && mine->st_gid == older->st_gid;
    if (!same && fchown(f->fd, older->st_uid, older->st_gid) < 0)
        return rmig_fail(err, RMIG_ERR_FILE, errno,
                         "%s is of user %u and group %u, and what replaces it cannot be: %s; remove it first",
                         whole_file_show(f->path).s, (unsigned)older->st_uid, (unsigned)older->st_gid, strerror(errno));
    if (whole_file_keep_access_list(f, err) != RMIG_OK)
        return err->status;
    if (fchmod(f->fd, older->st_mode & 07777) < 0)
        return rmig_fail(err, RMIG_ERR_FILE, errno, "cannot give %s the mode %o of %s: %s", whole_file_show(f->part).s,
                         (unsigned)(older->st_mode & 07777), whole_file_show(f->path).s, strerror(errno));
    return RMIG_OK;
}

/* A part that a killed process left may have got the mode and the list of a file that has gone since. */
static inline int whole_file_be_new(const struct whole_file *f, struct rmig_error *err) {
    fremovexattr(f->fd, "system.posix_acl_access"); // most have none
    return fchmod(f->fd, 0600) == 0 ? RMIG_OK
                                    : rmig_fail(err, RMIG_ERR_FILE, errno, "cannot give %s the mode 600: %s",
                                                whole_file_show(f->part).s, strerror(errno));
}

/* Of a PATH.part that is locked: what may be in it. */
static inline int whole_file_clear(const struct whole_file *f, int fd, int flags, const struct stat *mine,
                                   struct rmig_error *err) {
    if (!S_ISREG(mine->st_mode))
        return rmig_fail(err, RMIG_ERR_FILE, 0, "%s is not a regular file", whole_file_show(f->part).s);
    if (mine->st_size == 0)
        return RMIG_OK;
    if ((flags & WHOLE_FILE_ONLY) != 0)
        return rmig_fail(
            err, RMIG_ERR_FILE, EEXIST,
            "%s exists, and may be the only copy: its writer was killed, or kept it (exit status 6); look at it, then "
            "remove it",
            whole_file_show(f->part).s);
    return ftruncate(fd, 0) == 0 ? RMIG_OK
                                 : rmig_fail(err, RMIG_ERR_FILE, errno, "cannot empty %s: %s",
                                             whole_file_show(f->part).s, strerror(errno));
}

/* Opens a file for reading and writing: a new PATH.part, or in place what is there, with what it holds. A PATH.part
   that a killed process of the same user left is taken over, unless WHOLE_FILE_ONLY says otherwise. What is at PATH
   must be a regular file, or nothing; in place a regular file or a block device. Free it in any case. RMIG_OK;
   RMIG_ERR_FILE, RMIG_ERR_NO_MEMORY. */
static inline int whole_file_open(struct whole_file *f, const char *path, int flags, struct rmig_error *err) {
    struct stat mine = {0}, older;
    bool found = false;
    int status = whole_file_name(f, path, flags, err);
    if (status == RMIG_OK)
        status = whole_file_look(f, flags, &older, err);
    int fd = status == RMIG_OK ? whole_file_open_part(f, flags, &older, &found, err) : -1;
    if (fd < 0)
        return err->status;
    status = whole_file_lock(fd, f->part, &mine, err);
    if (status == RMIG_OK && found)
        status = whole_file_may_take_over(f, &mine, &older, err);
    if (status == RMIG_OK && !f->in_place)
        status = whole_file_clear(f, fd, flags, &mine, err);
    if (status != RMIG_OK) {
        close(fd);
        return status;
    }
    f->fd = fd;
    if (f->in_place || (older.st_mode == 0 && !found))
        return RMIG_OK;
    return older.st_mode == 0 ? whole_file_be_new(f, err) : whole_file_be_like(f, &mine, &older, err);
}

/* A new, empty directory; PATH must not exist. Errors as whole_file_open. */
static inline int whole_file_open_dir(struct whole_file *f, const char *path, struct rmig_error *err) {
    struct stat st;
    int status = whole_file_name(f, path, -1, err);
    if (status != RMIG_OK)
        return status;
    if (lstat(f->target, &st) == 0)
        return rmig_fail(err, RMIG_ERR_FILE, EEXIST, "%s exists: name a directory that does not",
                         whole_file_show(path).s);
    if (mkdir(f->part, 0700) < 0)
        return errno == EEXIST ? rmig_fail(err, RMIG_ERR_FILE, EEXIST,
                                           "%s exists: another process writes it, or one was killed; then remove it",
                                           whole_file_show(f->part).s)
                               : rmig_fail(err, RMIG_ERR_FILE, errno, "cannot create %s: %s",
                                           whole_file_show(f->part).s, strerror(errno));
    f->fd = open(f->part, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    return f->fd >= 0 ? RMIG_OK
                      : rmig_fail(err, RMIG_ERR_FILE, errno, "cannot open %s: %s", whole_file_show(f->part).s,
                                  strerror(errno));
}

// >>what an older file keeps

/* Bytes from ... to of one file into another, by the file system where it can. */
static inline int whole_file_copy(int from, int to, off_t at, off_t end, bool (*stop)(void *user), void *user) {
    char piece[65536];
    while (at < end) {
        off_t in = at, out = at;
        size_t n = (size_t)(end - at < 16 * (off_t)RMIG_MIB ? end - at : 16 * (off_t)RMIG_MIB);
        if (stop(user)) {
            errno = ECANCELED;
            return -1;
        }
        ssize_t got = copy_file_range(from, &in, to, &out, n, 0);
        if (got < 0 && (errno == EXDEV || errno == EINVAL || errno == ENOSYS || errno == EOPNOTSUPP)) {
            got = pread(from, piece, n < sizeof piece ? n : sizeof piece, at);
            got = got > 0 ? pwrite(to, piece, (size_t)got, at) : got;
        }
        if (got <= 0)
            return (int)got; // 0: it was cut meanwhile
        at += got;
    }
    return 0;
}

/* Copies what the file at PATH holds before an offset: that is not ours, and stays. Holes stay holes. Where stop,
   which is asked now and then, returns true it ends with RMIG_ERR_CANCELLED. In place there is nothing to do. */
static inline int whole_file_keep(struct whole_file *f, uint64_t before, bool (*stop)(void *user), void *user,
                                  struct rmig_error *err) {
    struct stat st = {0};
    int from = f->in_place || before == 0 ? -1 : open(f->target, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (from < 0 && (f->in_place || before == 0 || errno == ENOENT))
        return RMIG_OK;
    int rc = from < 0 ? -1 : fstat(from, &st);
    off_t size = (uint64_t)st.st_size < before ? st.st_size : (off_t)before;
    for (off_t at = 0, end; rc == 0 && at < size; at = end) {
        off_t data = lseek(from, at, SEEK_DATA);
        if (data < 0 && errno == ENXIO) // a hole up to the end
            break;
        end = data < 0 ? -1 : lseek(from, data, SEEK_HOLE);
        end = end < 0 || end > size ? size : end; // some file systems know no holes
        rc = whole_file_copy(from, f->fd, data < 0 ? at : data, end, stop, user);
    }
    int error = errno;
    if (from >= 0)
        close(from);
    if (rc < 0 && error == ECANCELED)
        return rmig_fail(err, RMIG_ERR_CANCELLED, 0, "cancelled");
    return rc == 0 ? RMIG_OK
                   : rmig_fail(err, RMIG_ERR_FILE, error, "cannot copy what %s holds before offset %llu to %s: %s",
                               whole_file_show(f->path).s, (unsigned long long)before, whole_file_show(f->part).s,
                               strerror(error));
}

// >>the disk, and the names

static inline int whole_file_sync_parent(const char *path, struct rmig_error *err) {
    int length = whole_file_dir_length(path);
    char *dir = length == 0 ? strdup(".") : strndup(path, (size_t)length);
    if (dir == NULL)
        return rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for the directory of %s", whole_file_show(path).s);
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int rc = fd < 0 ? -1 : fsync(fd), error = errno;
    if (fd >= 0)
        close(fd);
    free(dir);
    return rc == 0 ? RMIG_OK
                   : rmig_fail(err, RMIG_ERR_FILE, error, "%s is there, but may be lost if the power fails: %s",
                               whole_file_show(path).s, strerror(error));
}

/* Brings what is written to the disk, under the name that it has. May take as long as the disk does. */
static inline int whole_file_sync(const struct whole_file *f, struct rmig_error *err) {
    if (fsync(f->fd) < 0)
        return rmig_fail(err, RMIG_ERR_FILE, errno, "cannot bring %s to the disk: %s", whole_file_show(f->part).s,
                         strerror(errno));
    if (!whole_file_is_mine(f))
        return rmig_fail(err, RMIG_ERR_FILE, ESTALE, "%s was removed or replaced while it was written",
                         whole_file_show(f->part).s);
    return f->in_place ? RMIG_OK : whole_file_sync_parent(f->part, err);
}

/* As rename, but what is at `to` stays: EEXIST. NFS and others know no such call. */
static inline int whole_file_rename_new(const char *from, const char *to) {
    struct stat st;
    if (renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) == 0)
        return 0;
    if (errno != EINVAL && errno != ENOSYS)
        return -1;
    if (lstat(to, &st) < 0)
        return rename(from, to);
    errno = EEXIST;
    return -1;
}

/* Gives it its name: what is written must be on the disk already. A file replaces what is there, a directory does not.
   sync: waits until the name is on the disk, too. */
static inline int whole_file_commit(struct whole_file *f, bool sync, struct rmig_error *err) {
    struct stat st = {0};
    bool is_dir = fstat(f->fd, &st) == 0 && S_ISDIR(st.st_mode);
    if (f->in_place && !whole_file_is_mine(f))
        return rmig_fail(err, RMIG_ERR_FILE, 0,
                         "%s was removed or replaced while it was written in place: what was written has no name",
                         whole_file_show(f->path).s);
    if (!f->in_place && (!whole_file_may_commit(f) ||
                         (is_dir ? whole_file_rename_new(f->part, f->target) : rename(f->part, f->target)) < 0))
        return rmig_fail(err, RMIG_ERR_FILE, errno, "%s cannot become %s: %s", whole_file_show(f->part).s,
                         whole_file_show(f->path).s, strerror(errno));
    close(f->fd);
    f->fd = -1; // nothing is left to remove
    return sync && !f->in_place ? whole_file_sync_parent(f->target, err) : RMIG_OK;
}

/* Exchanges two files by way of a third name; on failure all is as it was. */
static inline int whole_file_exchange_by_three(const char *a, const char *b, const char *third) {
    if (whole_file_rename_new(b, third) < 0)
        return -1;
    int error = rename(a, b) < 0 ? errno : 0;
    if (error == 0 && rename(third, a) == 0)
        return 0;
    if (error == 0) {
        error = errno;
        (void)!rename(b, a);
    }
    (void)!rename(third, b);
    errno = error;
    return -1;
}

static inline int whole_file_exchange(const char *a, const char *b) {
    char *third = NULL;
    if (renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE) == 0)
        return 0;
    if ((errno != EINVAL && errno != ENOSYS) || (third = whole_file_beside(b, ".older")) == NULL)
        return -1;
    int rc = whole_file_exchange_by_three(a, b, third), error = errno;
    free(third);
    errno = error;
    return rc;
}

static inline int whole_file_give_name(struct whole_file *f, bool replace) {
    struct stat st;
    if (!whole_file_may_commit(f))
        return -1;
    if (whole_file_rename_new(f->part, f->target) == 0)
        return 0;
    if (errno != EEXIST || !replace)
        return -1;
    if (stat(f->target, &st) == 0 && !S_ISREG(st.st_mode)) { // it was something else when f was opened
        errno = S_ISDIR(st.st_mode) ? EISDIR : EEXIST;
        return -1;
    }
    f->exchanged = whole_file_exchange(f->part, f->target) == 0;
    return f->exchanged ? 0 : -1;
}

static inline int whole_file_take_name(struct whole_file *f) {
    int rc = f->exchanged ? whole_file_exchange(f->part, f->target) : whole_file_rename_new(f->target, f->part);
    f->exchanged = f->exchanged && rc < 0;
    return rc;
}

/* The older file has the name that another process may begin with at any moment: it is removed only while it is locked,
   as by one. */
static inline int whole_file_remove_older(const char *part) {
    struct stat mine;
    struct rmig_error err;
    int how = O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, rc = 0;
    int fd = open(part, O_RDWR | how); // NFS locks nothing that is open for reading alone
    if (fd < 0 && errno == EACCES)
        fd = open(part, O_RDONLY | how);
    bool locked = fd < 0 || whole_file_lock(fd, part, &mine, &err) == RMIG_OK;
    if (locked)
        rc = unlink(part);
    else if (err.provider_code != 0 && err.provider_code != EWOULDBLOCK) {
        errno = err.provider_code;
        rc = -1;
    }
    int error = errno;
    if (fd >= 0)
        close(fd);
    errno = error;
    return rc;
}

/* The first n have their names, and the next cannot get its own, for the reason in err. */
static inline int whole_file_take_names(struct whole_file *const *files, size_t n, struct rmig_error *err) {
    while (n-- > 0)
        if (whole_file_take_name(files[n]) < 0) {
            struct rmig_error why = *err;
            rmig_fail(err, RMIG_ERR_FILE, errno, "%.250s; and %s, which is there already, cannot become %s again: %s",
                      why.text, whole_file_show(files[n]->path).s, whole_file_show(files[n]->part).s, strerror(errno));
        }
    return RMIG_ERR_FILE;
}

/* Gives n files their names, or none: then each is in its PATH.part still, and what was at PATH is there again. What
   they hold must be on the disk already. replace: files that are at PATH. Waits until the names are on the disk, too;
   when that fails, all have them (fd is -1). */
static inline int whole_file_commit_all(struct whole_file *const *files, size_t n, bool replace,
                                        struct rmig_error *err) {
    int status = RMIG_OK;
    for (size_t i = 0; i < n; i++)
        if (whole_file_give_name(files[i], replace) < 0) {
            rmig_fail(err, RMIG_ERR_FILE, errno, "%s cannot become %s: %s", whole_file_show(files[i]->part).s,
                      whole_file_show(files[i]->path).s, strerror(errno));
            return whole_file_take_names(files, i, err);
        }
    for (size_t i = 0; i < n; i++) {
        close(files[i]->fd);
        files[i]->fd = -1;
        if (files[i]->exchanged && whole_file_remove_older(files[i]->part) < 0)
            status = rmig_fail(err, RMIG_ERR_FILE, errno,
                               "%s is there, but %s, which it has replaced, cannot be removed: %s",
                               whole_file_show(files[i]->path).s, whole_file_show(files[i]->part).s, strerror(errno));
    }
    for (size_t i = 0; i < n && status == RMIG_OK; i++)
        status = whole_file_sync_parent(files[i]->target, err);
    return status;
}

/* Removes what has not got its name; what is written in place stays. The content of a directory must be removed before.
   Of what a handler of signals may call. */
static inline void whole_file_remove(struct whole_file *f) {
    struct stat st;
    if (f->fd >= 0 && !f->in_place && fstat(f->fd, &st) == 0 && whole_file_is_mine(f))
        unlinkat(AT_FDCWD, f->part, S_ISDIR(st.st_mode) ? AT_REMOVEDIR : 0);
}

static inline void whole_file_free(struct whole_file *f) {
    if (f->fd >= 0)
        close(f->fd);
    free(f->part);
    free(f->target);
    f->part = f->target = NULL;
    f->fd = -1;
}

#endif // WHOLE_FILE_H
