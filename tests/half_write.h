/*
half_write.h - a TCP proxy that stops a client half-way through what it sends, until it is told to go on

    struct half_write h;
    half_write_open(&h, "127.0.0.1:4444");      // where the target listens; a thread begins to forward
    ... a client connects to h.address, both ends work as without a proxy ...
    half_write_hold(&h, 0, 300000);             // the first connection's client: 300000 more bytes, then no more
    ... the client posts a write of 1 MiB, both ends are polled until half_write_held(&h, 0) ...
    ... what must end all writing happens at the target ...
    half_write_release(&h);                     // the rest goes on to the target
    half_write_wait_over(&h, 0, 1 << 20, 20);   // until 1 MiB more has passed since the hold, or the target hung up
    half_write_close(&h);

Connections are numbered in the order of their coming, from 0, at most HALF_WRITE_MAX. A hold may be set before its
connection comes. While a connection is held the client does not hear that the target hung up: a real one, with its
bytes under way, would not have heard it in time either. All of it works from any one thread; needs -pthread.
*/
#ifndef HALF_WRITE_H
#define HALF_WRITE_H

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define HALF_WRITE_MAX 16
#define HALF_WRITE_FREE UINT64_MAX // as many bytes as come

struct half_write_pipe { // one direction
    char bytes[65536];
    size_t at, end; // read from one side, not yet written to the other
    bool eof; // no more comes
    bool shut; // said so to the other side
};

struct half_write_conn {
    int client, target; // -1: not open
    struct half_write_pipe up, down; // to the target, to the client
};

struct half_write {
    char address[64]; // for clients
    struct sockaddr_in to;
    int listener, wake[2];
    pthread_t thread;
    pthread_mutex_t lock; // of what follows
    uint64_t room[HALF_WRITE_MAX]; // what the client may still send; HALF_WRITE_FREE: not held
    uint64_t passed[HALF_WRITE_MAX]; // taken by the target since the hold was set
    bool over[HALF_WRITE_MAX]; // has ended
    bool stop;
    unsigned count; // of connections that have come; the thread's, as all below
    struct half_write_conn conn[HALF_WRITE_MAX];
};

static inline void half_write_die(const char *what) {
    fprintf(stderr, "half_write: %s: %s\n", what, strerror(errno));
    abort();
}

static inline void half_write_drop(struct half_write *h, unsigned i) {
    struct half_write_conn *c = &h->conn[i];
    close(c->client);
    close(c->target);
    c->client = c->target = -1;
    pthread_mutex_lock(&h->lock);
    h->over[i] = true;
    pthread_mutex_unlock(&h->lock);
}

static inline void half_write_accept(struct half_write *h) {
    int client = accept(h->listener, NULL, NULL);
    if (client < 0 || h->count == HALF_WRITE_MAX) {
        close(client);
        return;
    }
    struct half_write_conn *c = &h->conn[h->count];
    c->client = client;
    c->target = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool reached = connect(c->target, (struct sockaddr *)&h->to, sizeof h->to) == 0;
    fcntl(c->client, F_SETFL, O_NONBLOCK);
    fcntl(c->target, F_SETFL, O_NONBLOCK);
    h->count++;
    if (!reached)
        half_write_drop(h, h->count - 1);
}

/* Moves what can be moved from one side to the other, at most *room of it; returns false when the connection broke. */
static inline bool half_write_move(struct half_write_pipe *p, int from, int to, uint64_t *room, uint64_t *passed) {
    size_t want = *room < sizeof p->bytes ? (size_t)*room : sizeof p->bytes;
    if (p->at == p->end && !p->eof && want > 0) {
        ssize_t n = read(from, p->bytes, want);
        if (n < 0 && errno != EAGAIN)
            return false;
        p->eof = n == 0;
        p->at = 0;
        p->end = n > 0 ? (size_t)n : 0;
        if (*room != HALF_WRITE_FREE)
            *room -= p->end;
    }
    if (p->at < p->end) {
        ssize_t n = send(to, p->bytes + p->at, p->end - p->at, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN)
            return false;
        p->at += n > 0 ? (size_t)n : 0;
        *passed += n > 0 ? (uint64_t)n : 0;
    }
    if (p->eof && p->at == p->end && !p->shut) {
        p->shut = true;
        shutdown(to, SHUT_WR);
    }
    return true;
}

static inline void half_write_serve(struct half_write *h, unsigned i) {
    struct half_write_conn *c = &h->conn[i];
    uint64_t all = HALF_WRITE_FREE, ignored = 0;
    pthread_mutex_lock(&h->lock);
    bool held = h->room[i] != HALF_WRITE_FREE;
    bool up = half_write_move(&c->up, c->client, c->target, &h->room[i], &h->passed[i]);
    if (held && !up)
        c->up.at = c->up.end; // for nobody; the client learns it at the release
    pthread_mutex_unlock(&h->lock);
    if (held && !up)
        return;
    bool down = (held && c->down.eof) || half_write_move(&c->down, c->target, c->client, &all, &ignored);
    if (!up || (!down && !held) || (c->up.shut && c->down.shut))
        half_write_drop(h, i);
}

static inline void *half_write_run(void *argument) {
    struct half_write *h = (struct half_write *)argument;
    for (;;) {
        struct pollfd p[2 + 2 * HALF_WRITE_MAX];
        p[0] = (struct pollfd){h->listener, POLLIN, 0};
        p[1] = (struct pollfd){h->wake[0], POLLIN, 0};
        pthread_mutex_lock(&h->lock);
        bool stop = h->stop;
        for (unsigned i = 0; i < h->count; i++) {
            struct half_write_conn *c = &h->conn[i];
            bool in = !c->up.eof && c->up.at == c->up.end && h->room[i] > 0;
            bool back = !c->down.eof && c->down.at == c->down.end;
            short client = (short)((in ? POLLIN : 0) | (c->down.at < c->down.end ? POLLOUT : 0));
            short target = (short)((back ? POLLIN : 0) | (c->up.at < c->up.end ? POLLOUT : 0));
            p[2 + 2 * i] = (struct pollfd){client == 0 ? -1 : c->client, client, 0};
            p[3 + 2 * i] = (struct pollfd){target == 0 ? -1 : c->target, target, 0};
        }
        pthread_mutex_unlock(&h->lock);
        if (stop)
            return NULL;
        unsigned count = h->count;
        if (poll(p, 2 + 2 * count, 20) < 0 && errno != EINTR)
            half_write_die("poll");
        char x[16];
        if (p[1].revents != 0 && read(h->wake[0], x, sizeof x) < 0)
            half_write_die("read");
        for (unsigned i = 0; i < count; i++)
            if (h->conn[i].client >= 0)
                half_write_serve(h, i);
        if (p[0].revents != 0)
            half_write_accept(h);
    }
}

/* Begins to forward to the IPv4 address "host:port". */
static inline void half_write_open(struct half_write *h, const char *target) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t n = sizeof a;
    char host[64];
    const char *colon = strrchr(target, ':');
    memset(h, 0, sizeof *h);
    for (unsigned i = 0; i < HALF_WRITE_MAX; i++)
        h->room[i] = HALF_WRITE_FREE;
    snprintf(host, sizeof host, "%.*s", (int)(colon - target), target);
    h->to.sin_family = AF_INET;
    h->to.sin_port = htons((uint16_t)atoi(colon + 1));
    if (inet_pton(AF_INET, host, &h->to.sin_addr) != 1)
        half_write_die(target);
    h->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(h->listener, (struct sockaddr *)&a, sizeof a) != 0 || listen(h->listener, HALF_WRITE_MAX) != 0 ||
        getsockname(h->listener, (struct sockaddr *)&a, &n) != 0 || pipe(h->wake) != 0)
        half_write_die("listen");
    snprintf(h->address, sizeof h->address, "127.0.0.1:%d", ntohs(a.sin_port));
    pthread_mutex_init(&h->lock, NULL);
    if (pthread_create(&h->thread, NULL, half_write_run, h) != 0)
        half_write_die("pthread_create");
}

static inline void half_write_wake(struct half_write *h) {
    if (write(h->wake[1], "x", 1) != 1)
        half_write_die("write");
}

/* From now on the client of a connection gets at most `more` bytes through. Set it while the client sends nothing. */
static inline void half_write_hold(struct half_write *h, unsigned connection, uint64_t more) {
    pthread_mutex_lock(&h->lock);
    h->room[connection] = more;
    h->passed[connection] = 0;
    pthread_mutex_unlock(&h->lock);
    half_write_wake(h);
}

/* Whether all that the hold lets through is with the target's kernel. Never waits. */
static inline bool half_write_held(struct half_write *h, unsigned connection) {
    pthread_mutex_lock(&h->lock);
    const struct half_write_pipe *up = &h->conn[connection].up;
    bool held = h->room[connection] == 0 && up->at == up->end;
    pthread_mutex_unlock(&h->lock);
    return held;
}

static inline void half_write_release(struct half_write *h) {
    pthread_mutex_lock(&h->lock);
    for (unsigned i = 0; i < HALF_WRITE_MAX; i++)
        h->room[i] = HALF_WRITE_FREE;
    pthread_mutex_unlock(&h->lock);
    half_write_wake(h);
}

/* Never waits: whether the target's kernel has taken so many bytes since the hold, or the connection has ended. */
static inline bool half_write_over(struct half_write *h, unsigned connection, uint64_t bytes) {
    pthread_mutex_lock(&h->lock);
    bool over = h->over[connection] || h->passed[connection] >= bytes;
    pthread_mutex_unlock(&h->lock);
    return over;
}

/* Sleeps until half_write_over; false: not within so many seconds. Only where nobody need poll meanwhile. */
static inline bool half_write_wait_over(struct half_write *h, unsigned connection, uint64_t bytes, unsigned seconds) {
    for (unsigned i = 0; i < seconds * 1000; i++) {
        if (half_write_over(h, connection, bytes))
            return true;
        poll(NULL, 0, 1);
    }
    return half_write_over(h, connection, bytes);
}

/* Ends the thread and all connections. */
static inline void half_write_close(struct half_write *h) {
    pthread_mutex_lock(&h->lock);
    h->stop = true;
    pthread_mutex_unlock(&h->lock);
    half_write_wake(h);
    pthread_join(h->thread, NULL);
    for (unsigned i = 0; i < h->count; i++)
        if (h->conn[i].client >= 0)
            half_write_drop(h, i);
    close(h->listener);
    close(h->wake[0]);
    close(h->wake[1]);
    pthread_mutex_destroy(&h->lock);
}

#endif // HALF_WRITE_H
