// SPDX-License-Identifier: Apache-2.0
//
// The executable that the container runtime calls as CNI plugin "podlane". It hands its environment, its
// stdin and the open network namespace to the agent, and prints the agent's answer. Alone it can answer
// VERSION, fail with a CNI error, and keep a DEL in the spool directory until the agent is back. cni/wire.py
// describes the bytes of both directions and is their other end.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <locale.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "answer.h"
#include "durable.h"
#include "io.h"

enum {
    ENV_LIMIT = 4 << 20, // bytes; these three are those of cni/wire.py
    STDIN_LIMIT = 16 << 20,
    STDOUT_LIMIT = 16 << 20,
    TIMEOUT_LIMIT_MS = 24 * 3600 * 1000,
    RETRY_MS = 5, // between two tries at a socket whose backlog is full
};

struct request {
    struct {
        char magic[4];
        uint32_t env_size;
        uint32_t stdin_size;
        int32_t netns_errno;
    } header;
    char body[ENV_LIMIT + STDIN_LIMIT + 1]; // env, then stdin; one more to notice that stdin is too long
};

struct reply {
    struct {
        uint32_t exit_code;
        uint32_t stdout_size;
    } header;
    char body[STDOUT_LIMIT + 1];
};

// An empty variable counts as a missing one, as everywhere in CNI.
static const char *variable(const char *name, const char *otherwise)
{
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

// Milliseconds, each less than what runtimes wait: STATUS is asked every few seconds, a DEL that takes longer is
// spooled, CRI-O gives CHECK what is left of the pod's start, and GC half a minute.
static int64_t default_timeout_ms(const char *command)
{
    static const struct {
        const char *command;
        int ms;
    } timeouts[] = {{"STATUS", 2000}, {"DEL", 10000}, {"CHECK", 20000}, {"GC", 25000}};
    for (size_t i = 0; i < sizeof(timeouts) / sizeof(timeouts[0]); i++)
        if (strcmp(command, timeouts[i].command) == 0)
            return timeouts[i].ms;
    return 60000;
}

static int64_t timeout_ms(const char *command)
{
    const char *text = variable("PODLANE_TIMEOUT_MS", NULL);
    if (!text)
        return default_timeout_ms(command);
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (*end || errno || value < 1 || value > TIMEOUT_LIMIT_MS)
        fail(INVALID_ENVIRONMENT, "set it in the container runtime's environment, or leave it out",
             "PODLANE_TIMEOUT_MS must be 1 to %d milliseconds, not '%.64s'", TIMEOUT_LIMIT_MS, text);
    return value;
}

static void begin_request(struct request *request)
{
    extern char **environ;
    size_t used = 0;
    memcpy(request->header.magic, "PLN1", sizeof(request->header.magic));
    for (char **entry = environ; *entry; entry++) {
        size_t size = strlen(*entry) + 1;
        if (**entry == '=' || !strchr(*entry, '='))
            continue; // execve takes any string, but this is no variable
        if (size > ENV_LIMIT - used)
            fail(INVALID_ENVIRONMENT, "the container runtime's environment is passed on whole",
                 "the environment is larger than %d bytes", ENV_LIMIT);
        memcpy(request->body + used, *entry, size);
        used += size;
    }
    request->header.env_size = (uint32_t)used;
}

static void collect_stdin(struct request *request, int64_t deadline)
{
    const char *details = "stdin must hold the network configuration, and end";
    size_t size;
    if (read_to_end(STDIN_FILENO, request->body + request->header.env_size, STDIN_LIMIT + 1, &size, deadline) < 0)
        fail(IO_FAILURE, details, "cannot read stdin after %zu bytes: %s", size, reason(errno));
    if (size > STDIN_LIMIT)
        fail(IO_FAILURE, details, "stdin is larger than %d bytes", STDIN_LIMIT);
    request->header.stdin_size = (uint32_t)size;
}

static int open_netns(struct request *request)
{
    const char *path = variable("CNI_NETNS", NULL);
    if (!path)
        return -1;
    int netns = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // not to be held up by a FIFO
    request->header.netns_errno = netns < 0 ? errno : 0;
    return netns;
}

static size_t request_size(const struct request *request)
{
    return sizeof(request->header) + request->header.env_size + request->header.stdin_size;
}

static int connect_agent(const char *path, int64_t deadline)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(address.sun_path)) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    while (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
        int error = now_ms() < deadline ? errno : ETIMEDOUT;
        if (error != EAGAIN && error != EINTR) {
            close(fd);
            errno = error;
            return -1;
        }
        poll(NULL, 0, RETRY_MS); // the backlog is full, and the kernel has no event for room in it
    }
    return fd;
}

static int send_request(int agent, const struct request *request, int netns, int64_t deadline)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr header;
    } control = {.header = {.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    memcpy(CMSG_DATA(&control.header), &netns, sizeof(netns));
    for (size_t sent = 0, size = request_size(request); sent < size;) {
        struct iovec rest = {.iov_base = (char *)request + sent, .iov_len = size - sent};
        struct msghdr message = {.msg_iov = &rest, .msg_iovlen = 1};
        if (sent == 0 && netns >= 0) {
            message.msg_control = &control;
            message.msg_controllen = sizeof(control);
        }
        ssize_t count = sendmsg(agent, &message, 0);
        if (count >= 0)
            sent += (size_t)count;
        else if (errno == EAGAIN && await(agent, POLLOUT, deadline) == 0)
            continue;
        else if (errno != EINTR)
            return -1;
    }
    return shutdown(agent, SHUT_WR);
}

// What is wrong with a reply of this many bytes whose connection ended so; NULL if it is complete.
static const char *complaint(const struct reply *reply, size_t size, int error)
{
    size_t body = size - sizeof(reply->header);
    if (size >= sizeof(reply->header)) {
        if (reply->header.exit_code > 255 || reply->header.stdout_size > STDOUT_LIMIT ||
            body > reply->header.stdout_size)
            return "its answer is malformed";
        if (body == reply->header.stdout_size)
            return NULL;
    }
    return error ? reason(error) : size ? "its answer is cut short" : "it hung up without an answer";
}

// One request and its reply; returns why there is none, or NULL.
static const char *ask_agent(const char *path, const struct request *request, int netns, struct reply *reply,
                             int64_t deadline)
{
    int agent = connect_agent(path, deadline);
    if (agent < 0)
        return reason(errno);
    const char *why;
    if (send_request(agent, request, netns, deadline) < 0 && errno != EPIPE && errno != ECONNRESET) {
        why = reason(errno);
    } else { // an agent that hung up early may have answered before
        size_t size, capacity = sizeof(reply->header) + sizeof(reply->body);
        int error = read_to_end(agent, (char *)reply, capacity, &size, deadline) < 0 ? errno : 0;
        why = complaint(reply, size, error);
    }
    close(agent);
    return why;
}

// What the agent would refuse when it is back is refused now: nobody would hear of it then.
static void require_attachment(void)
{
    static const char *const names[] = {"CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"};
    char missing[64] = "";
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        if (variable(names[i], NULL))
            continue;
        strcat(missing, *missing ? "," : "");
        strcat(missing, names[i]);
    }
    if (*missing)
        fail(INVALID_ENVIRONMENT, "the podlane agent is away, and without them it could not finish this DEL later",
             "required env variables [%s] missing", missing);
}

static int spool(const struct request *request, const char *why)
{
    require_attachment();
    const char *path = variable("PODLANE_SPOOL", "/var/lib/podlane/spool");
    char scratch[PATH_MAX], name[64];
    if (snprintf(scratch, sizeof(scratch), "%s", path) >= (int)sizeof(scratch))
        fail(IO_FAILURE, why, "cannot spool the DEL: PODLANE_SPOOL is longer than %d bytes", PATH_MAX - 1);
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    snprintf(name, sizeof(name), "%020lld-%d.del", now.tv_sec * 1000000000LL + now.tv_nsec, getpid());
    int directory = open_directory(scratch);
    if (directory < 0 || store(directory, name, request, request_size(request)) < 0)
        fail(IO_FAILURE, why, "cannot spool the DEL in %.512s: %s", path, reason(errno));
    fprintf(stderr, "podlane: no answer from the agent (%s); the DEL waits for it as %s/%s\n", why, path, name);
    return EXIT_SUCCESS;
}

static int print_reply(const struct reply *reply)
{
    if (write_all(STDOUT_FILENO, reply->body, reply->header.stdout_size) < 0)
        return EXIT_FAILURE;
    return (int)reply->header.exit_code;
}

int main(void)
{
    static struct request request; // static: no allocation that can fail, no page used before it is written
    static struct reply reply;
    signal(SIGPIPE, SIG_IGN);
    setlocale(LC_CTYPE, "C.UTF-8"); // for mbrtowc

    const char *command = variable("CNI_COMMAND", NULL);
    if (!command)
        return print_about();
    if (strcmp(command, "VERSION") == 0)
        return print_version();

    int64_t deadline = now_ms() + timeout_ms(command);
    begin_request(&request);
    collect_stdin(&request, deadline);
    int netns = open_netns(&request);
    const char *path = variable("PODLANE_SOCKET", "/run/podlane/cni.sock");
    const char *why = ask_agent(path, &request, netns, &reply, deadline);
    if (!why)
        return print_reply(&reply);
    if (strcmp(command, "DEL") == 0)
        return spool(&request, why);
    fail(strcmp(command, "STATUS") == 0 ? PLUGIN_NOT_AVAILABLE : TRY_AGAIN_LATER,
         "is the podlane agent running on this node? try again later",
         "no answer to %.64s from the podlane agent at %.256s: %s", command, path, why);
}
