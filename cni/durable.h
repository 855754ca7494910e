// SPDX-License-Identifier: Apache-2.0
//
// Files that are there whole or not at all, also after a power failure: where a DEL waits for the agent.
#ifndef PODLANE_DURABLE_H
#define PODLANE_DURABLE_H

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io.h"

// Opens a directory, and first makes what is missing of its path, durably. Cuts path up.
static int open_directory(char *path)
{
    int directory = open(*path == '/' ? "/" : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    char *rest = NULL;
    for (char *name = strtok_r(path, "/", &rest); name && directory >= 0; name = strtok_r(NULL, "/", &rest)) {
        int made = mkdirat(directory, name, 0700) == 0, error = errno;
        int next = -1;
        if ((made && fsync(directory) == 0) || (!made && error == EEXIST))
            next = openat(directory, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        error = !made && error != EEXIST ? error : errno;
        close(directory);
        directory = next;
        errno = error;
    }
    return directory;
}

// Under its final name the file is always whole, and stays so through a power failure.
static int store(int directory, const char *name, const void *data, size_t size)
{
    char temporary[NAME_MAX + 1];
    snprintf(temporary, sizeof(temporary), ".%s.tmp", name);
    int fd = openat(directory, temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return -1;
    if (write_all(fd, data, size) == 0 && fsync(fd) == 0 && close(fd) == 0 &&
        renameat(directory, temporary, directory, name) == 0)
        return fsync(directory);
    int error = errno;
    unlinkat(directory, temporary, 0);
    errno = error;
    return -1;
}

#endif
