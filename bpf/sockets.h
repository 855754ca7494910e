/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Host ports for the node's own processes, at their sockets: who connects, or sends, to a host port is led to the pod,
 * and told that it is the host port that answers. The packets themselves are those of any flow from the node to a pod.
 */
#pragma once

#include "host_ports.h"
#include "maps.h"

/* The value that lets a socket call go on; these programs never refuse one. */
#define PROCEED 1

/* bcc's declarations of these helpers know other kinds of programs only. */
static __u64 (*get_netns_cookie)(void *ctx) = (void *)BPF_FUNC_get_netns_cookie;
static __u64 (*get_socket_cookie)(void *ctx) = (void *)BPF_FUNC_get_socket_cookie;

/* Programs run for the sockets of all network namespaces: is this one the node's? */
static bool is_nodes_socket(struct bpf_sock_addr *ctx)
{
    __u32 zero = 0;
    struct settings *known = settings.lookup(&zero);

    return known && known->netns && get_netns_cookie(ctx) == known->netns;
}

static bool is_loopback(const struct addr *address)
{
    if (is_v4_mapped(address))
        return (address->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
    return !address->word[0] && !address->word[1] && !address->word[2] && address->word[3] == bpf_htonl(1);
}

static struct addr ipv4_address(__be32 word)
{
    struct addr address = {{0, 0, bpf_htonl(0xffff), word}};

    return address;
}

static struct addr ipv6_address(struct bpf_sock_addr *ctx)
{
    struct addr address = {{ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]}};

    return address;
}

/* Where a call to this address leads: the pod's port if it is for a host port. The socket remembers whom it meant. */
static struct pod_port *lead(struct bpf_sock_addr *ctx, const struct addr *address)
{
    struct host_port meant = {.address = *address, .port = ctx->user_port, .protocol = ctx->protocol};

    if (!is_nodes_socket(ctx) || (!is_loopback(address) && !node_addresses.lookup(&meant.address)))
        return 0;
    struct pod_port *found = leads_to(&meant);
    if (!found)
        return 0;
    struct peer peer = {.socket = get_socket_cookie(ctx), .address = found->address, .port = found->port};
    peers.update(&peer, &meant);
    return found;
}

/* What this address, from which a socket has heard or to which it is connected, is known as to its owner. */
static struct host_port *known_as(struct bpf_sock_addr *ctx, const struct addr *address)
{
    struct peer peer = {.address = *address, .port = ctx->user_port};

    if (!is_nodes_socket(ctx))
        return 0;
    peer.socket = get_socket_cookie(ctx);
    return peers.lookup(&peer);
}

static int put_ipv4(struct bpf_sock_addr *ctx, const struct addr *address, __be16 port)
{
    ctx->user_ip4 = address->word[3];
    ctx->user_port = port;
    return PROCEED;
}

static int put_ipv6(struct bpf_sock_addr *ctx, const struct addr *address, __be16 port)
{
    ctx->user_ip6[0] = address->word[0];
    ctx->user_ip6[1] = address->word[1];
    ctx->user_ip6[2] = address->word[2];
    ctx->user_ip6[3] = address->word[3];
    ctx->user_port = port;
    return PROCEED;
}

static int call_ipv4(struct bpf_sock_addr *ctx)
{
    struct addr address = ipv4_address(ctx->user_ip4);
    struct pod_port *found = lead(ctx, &address);

    return found ? put_ipv4(ctx, &found->address, found->port) : PROCEED;
}

static int call_ipv6(struct bpf_sock_addr *ctx)
{
    struct addr address = ipv6_address(ctx);
    struct pod_port *found = lead(ctx, &address);

    return found ? put_ipv6(ctx, &found->address, found->port) : PROCEED;
}

static int name_ipv4(struct bpf_sock_addr *ctx)
{
    struct addr address = ipv4_address(ctx->user_ip4);
    struct host_port *known = known_as(ctx, &address);

    return known ? put_ipv4(ctx, &known->address, known->port) : PROCEED;
}

static int name_ipv6(struct bpf_sock_addr *ctx)
{
    struct addr address = ipv6_address(ctx);
    struct host_port *known = known_as(ctx, &address);

    return known ? put_ipv6(ctx, &known->address, known->port) : PROCEED;
}
