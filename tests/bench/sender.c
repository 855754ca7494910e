// SPDX-License-Identifier: Apache-2.0
// sender ADDRESS COUNT: sends COUNT small UDP datagrams to port 9 and prints the thread's CPU time per datagram, in
// nanoseconds. On veth the receiving half of the path runs inside send(), so this is the cost of the whole path; it
// is steady where wall-clock figures on a shared machine are not.
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

static double cpu_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec * 1e9 + now.tv_nsec;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    struct sockaddr_in to4 = {.sin_family = AF_INET, .sin_port = htons(9)};
    struct sockaddr_in6 to6 = {.sin6_family = AF_INET6, .sin6_port = htons(9)};
    int family = strchr(argv[1], ':') ? AF_INET6 : AF_INET, count = atoi(argv[2]);
    struct sockaddr *to = family == AF_INET ? (void *)&to4 : (void *)&to6;
    socklen_t size = family == AF_INET ? sizeof(to4) : sizeof(to6);
    int fd = socket(family, SOCK_DGRAM, 0);
    if (inet_pton(family, argv[1], family == AF_INET ? (void *)&to4.sin_addr : (void *)&to6.sin6_addr) != 1 ||
        connect(fd, to, size) != 0)
        return perror("connect"), 1;

    char payload[18] = {0}; // the least that fills an Ethernet frame
    for (int i = 0; i < count / 10; i++)
        send(fd, payload, sizeof(payload), 0);
    double start = cpu_ns();
    for (int i = 0; i < count; i++)
        if (send(fd, payload, sizeof(payload), 0) < 0)
            return perror("send"), 1;
    printf("%.1f\n", (cpu_ns() - start) / count);
    return 0;
}
