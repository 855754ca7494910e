// SPDX-License-Identifier: Apache-2.0
//
// Reading and writing to the end, until a deadline: a moment of the monotonic clock, in milliseconds.
#ifndef PODLANE_IO_H
#define PODLANE_IO_H

#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

// Waits until fd is ready; ETIMEDOUT at the deadline.
static int await(int fd, short events, int64_t deadline)
{
    for (;;) {
        int64_t left = deadline - now_ms();
        if (left <= 0) {
            errno = ETIMEDOUT;
            return -1;
        }
        struct pollfd waited = {.fd = fd, .events = events};
        int ready = poll(&waited, 1, (int)left);
        if (ready > 0)
            return 0;
        if (ready < 0 && errno != EINTR)
            return -1;
    }
}

// Reads until the end or until the buffer is full; *size is right also on failure.
static int read_to_end(int fd, char *buffer, size_t capacity, size_t *size, int64_t deadline)
{
    *size = 0;
    while (*size < capacity) {
        if (await(fd, POLLIN, deadline) < 0)
            return -1;
        ssize_t count = read(fd, buffer + *size, capacity - *size);
        if (count == 0)
            return 0;
        if (count > 0)
            *size += (size_t)count;
        else if (errno != EINTR && errno != EAGAIN)
            return -1;
    }
    return 0;
}

static int write_all(int fd, const char *data, size_t size)
{
    while (size > 0) {
        ssize_t count = write(fd, data, size);
        if (count < 0 && errno == EAGAIN)
            poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, -1);
        else if (count < 0 && errno != EINTR)
            return -1;
        data += count > 0 ? count : 0;
        size -= count > 0 ? (size_t)count : 0;
    }
    return 0;
}

#endif
