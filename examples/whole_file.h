/*
whole_file.h - a file or directory that has its name only when all of it is there

    Until then it is called PATH.part. One process at a time writes a PATH.part: a file is locked, a directory is new.
    Several files get their names together: when one cannot, none has it, and what stood there before stands there
again.
*/
#ifndef WHOLE_FILE_H
#define WHOLE_FILE_H

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../rmig.h"

struct whole_file {
    const char *path; // the caller's, and must stay
    char *part;
    int fd; // of part; -1: nothing is being written
    bool exchanged; // by whole_file_commit_all: path is the new file, part the older one
};

static inline int whole_file_name(struct whole_file *f, const char *path, struct rmig_error *err) {
    f->path = path;
    f->fd = -1;
    f->exchanged = false;
    if (asprintf(&f->part, "%s.part", path) >= 0)
        return RMIG_OK;
    f->part = NULL;
    rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for the name of %s.part", path);
    return RMIG_ERR_NO_MEMORY;
}

/* Is fd, of this name, for this process alone? Whoever had the lock before may have given the file its real name, or
   removed it, since it was opened. */
static inline int whole_file_lock(int fd, const char *part, struct stat *mine, struct rmig_error *err) {
    struct stat named;
    int code = flock(fd, LOCK_EX | LOCK_NB) == 0 ? 0 : errno;
    if (code != 0 && code != EWOULDBLOCK)
        return rmig_fail(err, RMIG_ERR_FILE, code, "cannot lock %s: %s", part, strerror(code));
    if (code != 0 || fstat(fd, mine) < 0 || stat(part, &named) < 0 || mine->st_ino != named.st_ino ||
        mine->st_dev != named.st_dev)
        return rmig_fail(err, RMIG_ERR_FILE, code, "%s is being written by another process", part);
    return S_ISREG(mine->st_mode) ? RMIG_OK : rmig_fail(err, RMIG_ERR_FILE, 0, "%s is not a regular file", part);
}

static inline int whole_file_begin(struct whole_file *f, const char *path, bool take_over, struct rmig_error *err) {
    struct stat mine = {0}, named;
    if (whole_file_name(f, path, err) != RMIG_OK)
        return err->status;
    if (stat(path, &named) == 0 && !S_ISREG(named.st_mode))
        return rmig_fail(err, RMIG_ERR_FILE, 0, "%s is not a regular file, and will not be replaced", path);
    int fd = open(f->part, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
    if (fd < 0)
        return rmig_fail(err, RMIG_ERR_FILE, errno, "cannot create %s: %s", f->part, strerror(errno));
    int status = whole_file_lock(fd, f->part, &mine, err);
    if (status == RMIG_OK && mine.st_size > 0 && !take_over)
        status = rmig_fail(
            err, RMIG_ERR_FILE, EEXIST,
            "%s exists, and may be the only copy: its writer was killed, or kept it (exit status 6); look at it, then "
            "remove it",
            f->part);
    if (status != RMIG_OK) {
        close(fd);
        return status;
    }
    f->fd = fd;
    return mine.st_size == 0 || ftruncate(fd, 0) == 0
               ? RMIG_OK
               : rmig_fail(err, RMIG_ERR_FILE, errno, "cannot empty %s: %s", f->part, strerror(errno));
}

/* A new file, for reading and writing. One that a killed process left is taken over. What is at PATH must be a regular
   file, or nothing. RMIG_OK; RMIG_ERR_FILE, RMIG_ERR_NO_MEMORY. */
static inline int whole_file_open(struct whole_file *f, const char *path, struct rmig_error *err) {
    return whole_file_begin(f, path, true, err);
}

/* The same for what may become the only copy of something: a PATH.part that is not empty is not taken over. */
static inline int whole_file_open_only(struct whole_file *f, const char *path, struct rmig_error *err) {
    return whole_file_begin(f, path, false, err);
}

/* A new, empty directory; PATH must not exist. Errors as whole_file_open. */
static inline int whole_file_open_dir(struct whole_file *f, const char *path, struct rmig_error *err) {
    struct stat st;
    if (whole_file_name(f, path, err) != RMIG_OK)
        return err->status;
    if (lstat(path, &st) == 0)
        return rmig_fail(err, RMIG_ERR_FILE, EEXIST, "%s exists: name a directory that does not", path);
    if (mkdir(f->part, 0700) < 0)
        return rmig_fail(err, RMIG_ERR_FILE, errno, "cannot create %s: %s", f->part, strerror(errno));
    f->fd = open(f->part, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    return f->fd >= 0 ? RMIG_OK : rmig_fail(err, RMIG_ERR_FILE, errno, "cannot open %s: %s", f->part, strerror(errno));
}

static inline int whole_file_sync_parent(const char *path, struct rmig_error *err) {
    char *copy = strdup(path), *slash = copy == NULL ? NULL : strrchr(copy, '/');
    if (copy == NULL)
        return rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for the directory of %s", path);
    if (slash != NULL)
        slash[slash == copy] = '\0';
    int fd = open(slash == NULL ? "." : copy, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int rc = fd < 0 ? -1 : fsync(fd), error = errno;
    if (fd >= 0)
        close(fd);
    free(copy);
    return rc == 0 ? RMIG_OK
                   : rmig_fail(err, RMIG_ERR_FILE, error, "%s is there, but may be lost if the power fails: %s", path,
                               strerror(error));
}

/* Brings what is written to the disk, under the name that it has. May take as long as the disk does. */
static inline int whole_file_sync(const struct whole_file *f, struct rmig_error *err) {
    if (fsync(f->fd) < 0)
        return rmig_fail(err, RMIG_ERR_FILE, errno, "cannot bring %s to the disk: %s", f->part, strerror(errno));
    return whole_file_sync_parent(f->part, err);
}

/* Gives it its name: what is written must be on the disk already. sync: waits until the name is, too. */
static inline int whole_file_commit(struct whole_file *f, bool sync, struct rmig_error *err) {
    if (rename(f->part, f->path) < 0)
        return rmig_fail(err, RMIG_ERR_FILE, errno, "%s cannot become %s: %s", f->part, f->path, strerror(errno));
    close(f->fd);
    f->fd = -1; // nothing to remove any more
    return sync ? whole_file_sync_parent(f->path, err) : RMIG_OK;
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
    if ((errno != EINVAL && errno != ENOSYS) || asprintf(&third, "%s.older", b) < 0)
        return -1;
    int rc = whole_file_exchange_by_three(a, b, third), error = errno;
    free(third);
    errno = error;
    return rc;
}

static inline int whole_file_give_name(struct whole_file *f, bool replace) {
    struct stat st;
    if (whole_file_rename_new(f->part, f->path) == 0)
        return 0;
    if (errno != EEXIST || !replace)
        return -1;
    if (stat(f->path, &st) == 0 && !S_ISREG(st.st_mode)) { // it was something else when f was opened
        errno = S_ISDIR(st.st_mode) ? EISDIR : EEXIST;
        return -1;
    }
    f->exchanged = whole_file_exchange(f->part, f->path) == 0;
    return f->exchanged ? 0 : -1;
}

static inline int whole_file_take_name(struct whole_file *f) {
    int rc = f->exchanged ? whole_file_exchange(f->part, f->path) : whole_file_rename_new(f->path, f->part);
    f->exchanged = f->exchanged && rc < 0;
    return rc;
}

/* The first n have their names, and the next cannot get its own, for the reason in err. */
static inline int whole_file_take_names(struct whole_file *const *files, size_t n, struct rmig_error *err) {
    while (n-- > 0)
        if (whole_file_take_name(files[n]) < 0) {
            struct rmig_error why = *err;
            rmig_fail(err, RMIG_ERR_FILE, errno, "%.250s; and %s, which is there already, cannot become %s again: %s",
                      why.text, files[n]->path, files[n]->part, strerror(errno));
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
            rmig_fail(err, RMIG_ERR_FILE, errno, "%s cannot become %s: %s", files[i]->part, files[i]->path,
                      strerror(errno));
            return whole_file_take_names(files, i, err);
        }
    for (size_t i = 0; i < n; i++) {
        close(files[i]->fd);
        files[i]->fd = -1;
        if (files[i]->exchanged && unlink(files[i]->part) < 0)
            status = rmig_fail(err, RMIG_ERR_FILE, errno,
                               "%s is there, but %s, which it has replaced, cannot be removed: %s", files[i]->path,
                               files[i]->part, strerror(errno));
    }
    for (size_t i = 0; i < n && status == RMIG_OK; i++)
        status = whole_file_sync_parent(files[i]->path, err);
    return status;
}

/* Removes what has not got its name; the content of a directory must be removed before. Of what a handler of signals
   may call. */
static inline void whole_file_remove(struct whole_file *f) {
    struct stat st;
    if (f->fd >= 0 && fstat(f->fd, &st) == 0)
        unlinkat(AT_FDCWD, f->part, S_ISDIR(st.st_mode) ? AT_REMOVEDIR : 0);
}

static inline void whole_file_free(struct whole_file *f) {
    if (f->fd >= 0)
        close(f->fd);
    free(f->part);
    f->part = NULL;
    f->fd = -1;
}

#endif // WHOLE_FILE_H
