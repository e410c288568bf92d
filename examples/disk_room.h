/*
disk_room.h - room on the disk for memory that is a mapped file, taken with the keys that a source asks for

    Where the file has holes the data would meet the full disk inside the provider or the adapter, which can only break
the connection off, or as SIGBUS. This way registering fails, and the source is told.
*/
#ifndef DISK_ROOM_H
#define DISK_ROOM_H

#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "../rmig.h"

/* Takes room for memory that a source will write: disk_room_in, for the file that has it. Not RMIG_OK: there is none.
 */
typedef int (*disk_room_fn)(void *user, uint64_t address, uint64_t length, struct rmig_error *err);

/* The operations of a fabric have no argument for their embedder: one session in a process. */
static struct {
    struct rmig_fabric_ops ops; // the fabric's own, but for reg
    const struct rmig_fabric_ops *below;
    disk_room_fn take;
    void *user;
} disk_room;

static inline int disk_room_reg(struct rmig_ep *ep, void *address, uint64_t length, unsigned access, struct rmig_mr *mr,
                                struct rmig_error *err) {
    int status = (access & RMIG_ACCESS_REMOTE_WRITE) == 0
                     ? RMIG_OK
                     : disk_room.take(disk_room.user, (uint64_t)(uintptr_t)address, length, err);
    return status == RMIG_OK ? disk_room.below->reg(ep, address, length, access, mr, err) : status;
}

/* Before a session is opened on the fabric. */
static inline void disk_room_by_chunk(struct rmig_fabric *fabric, disk_room_fn take, void *user) {
    disk_room.below = fabric->ops;
    disk_room.ops = *fabric->ops;
    disk_room.ops.reg = disk_room_reg;
    disk_room.take = take;
    disk_room.user = user;
    fabric->ops = &disk_room.ops;
}

/* Takes it where the memory lies in the mapping of fd; name, for the error, is the file's. */
static inline int disk_room_in(int fd, const void *map, uint64_t size, uint64_t address, uint64_t length,
                               const char *name, struct rmig_error *err) {
    uint64_t from = (uint64_t)(uintptr_t)map;
    if (address < from || address - from >= size)
        return RMIG_OK;
    uint64_t at = address - from, n = length < size - at ? length : size - at;
    int rc;
    do
        rc = fallocate(fd, 0, (off_t)at, (off_t)n);
    while (rc < 0 && errno == EINTR);
    if (rc == 0 || errno == EOPNOTSUPP)
        return RMIG_OK;
    return rmig_fail(err, RMIG_ERR_REGISTRATION, errno, "%s: no room for %llu more bytes: %s", name,
                     (unsigned long long)n, strerror(errno));
}

#endif // DISK_ROOM_H
