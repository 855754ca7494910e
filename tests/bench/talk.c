// SPDX-License-Identifier: Apache-2.0
// talk serve ADDRESS: echoes on TCP port 7, one connection after the other, until killed.
// talk rr ADDRESS COUNT: sends one byte and waits for it, COUNT times on one connection; prints microseconds a round.
// talk crr ADDRESS COUNT: connects, sends one byte, waits for it, closes, COUNT times; prints connections a second.
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static struct sockaddr_in peer = {.sin_family = AF_INET};

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

static int open_socket(void)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    return fd;
}

static int serve(void)
{
    int listener = open_socket();
    if (bind(listener, (void *)&peer, sizeof(peer)) != 0 || listen(listener, 128) != 0)
        return perror("listen"), 1;
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        char byte;
        while (read(fd, &byte, 1) == 1)
            if (write(fd, &byte, 1) != 1)
                break;
        close(fd);
    }
}

static int exchange(int fd)
{
    char byte = 1;
    return write(fd, &byte, 1) == 1 && read(fd, &byte, 1) == 1;
}

static int talk(int count, int reconnect)
{
    int fd = -1;
    double start = seconds();
    for (int i = 0; i < count; i++) {
        if (fd < 0) {
            fd = open_socket();
            if (connect(fd, (void *)&peer, sizeof(peer)) != 0)
                return perror("connect"), 1;
        }
        if (!exchange(fd))
            return perror("exchange"), 1;
        if (reconnect) {
            // A reset, so that neither the client's nor the plugin's ports run out in TIME-WAIT.
            struct linger hard = {.l_onoff = 1};
            setsockopt(fd, SOL_SOCKET, SO_LINGER, &hard, sizeof(hard));
            close(fd);
            fd = -1;
        }
    }
    double took = seconds() - start;
    printf("%.2f\n", reconnect ? count / took : took / count * 1e6);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc < 3 || inet_pton(AF_INET, argv[2], &peer.sin_addr) != 1)
        return 2;
    peer.sin_port = htons(7);
    if (strcmp(argv[1], "serve") == 0)
        return serve();
    return argc == 4 ? talk(atoi(argv[3]), strcmp(argv[1], "crr") == 0) : 2;
}
