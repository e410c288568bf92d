// Sockets that say to a provider over TCP what no libfabric would, and what a real one says when it asks to connect.
#ifndef RAW_TCP_H
#define RAW_TCP_H

#include "../rmig.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define RAW_REQUEST_MAX 512

static inline void raw_die(const char *what) {
    fprintf(stderr, "raw_tcp: %s: %s\n", what, strerror(errno));
    abort();
}

/* Listens on a free port of 127.0.0.1. */
static inline int raw_listen(uint16_t *port) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t n = sizeof a;
    int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (s < 0 || bind(s, (struct sockaddr *)&a, sizeof a) != 0 || listen(s, 128) != 0 ||
        getsockname(s, (struct sockaddr *)&a, &n) != 0)
        raw_die("listen");
    *port = ntohs(a.sin_port);
    return s;
}

/* -1: refused, or no descriptor. */
static inline int raw_connect(uint16_t port) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons(port)};
    int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    if (s >= 0 && connect(s, (struct sockaddr *)&a, sizeof a) != 0) {
        close(s);
        return -1;
    }
    if (s >= 0)
        setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return s;
}

/* Whatever comes within so many ms, up to n bytes; 0: nothing, or the end. */
static inline size_t raw_read(int s, void *buf, size_t n, int ms) {
    struct pollfd p = {s, POLLIN, 0};
    if (poll(&p, 1, ms) <= 0)
        return 0;
    ssize_t got = recv(s, buf, n, 0);
    return got > 0 ? (size_t)got : 0;
}

static inline bool raw_write(int s, const void *buf, size_t n) {
    for (size_t at = 0; at < n;) {
        ssize_t sent = send(s, (const char *)buf + at, n - at, MSG_NOSIGNAL);
        if (sent <= 0)
            return false;
        at += (size_t)sent;
    }
    return true;
}

/* Closes it with a reset instead of an end. */
static inline void raw_reset(int s) {
    struct linger now = {1, 0};
    setsockopt(s, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(s);
}

/* The bytes with which a fabric asks to connect: returns how many. */
static inline size_t raw_capture_request(struct rmig_fabric *f, const uint8_t *private_data, size_t n, uint8_t *out) {
    const struct rmig_fabric_ops *ops = f->ops;
    struct rmig_ep_config cfg = {
        .write_depth = 4, .send_depth = 4, .recv_depth = 4, .connect_timeout_ns = 20000000000u};
    struct rmig_fabric_event e;
    struct rmig_error err = {0};
    struct rmig_ep *ep;
    uint16_t port;
    char address[64];
    size_t got = 0;
    int s = raw_listen(&port), c = -1;
    snprintf(address, sizeof address, "127.0.0.1:%d", port);
    if (ops->open(f, address, &cfg, &ep, &err) != RMIG_OK)
        raw_die(err.text);
    uint64_t deadline = ops->now(f) + cfg.connect_timeout_ns;
    while (got == 0 && ops->now(f) < deadline) {
        if (ops->poll(ep, &e, 1, &err) == 1 && e.type == RMIG_FEV_RESOLVED)
            ops->connect(ep, private_data, n, &err);
        struct pollfd p = {s, POLLIN, 0};
        if (c < 0 && poll(&p, 1, 1) == 1)
            c = accept(s, NULL, NULL);
        if (c >= 0)
            got = raw_read(c, out, RAW_REQUEST_MAX, 1);
    }
    if (got < n)
        raw_die("no request came");
    ops->close(ep);
    close(c);
    close(s);
    return got;
}

#endif // RAW_TCP_H
