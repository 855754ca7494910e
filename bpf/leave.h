/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The way out: from a pod to an uplink, by the host's own routes, without the host stack. */
#pragma once

#include "counters.h"
#include "deliver.h"
#include "identify.h"
#include "inbound.h"
#include "maps.h"
#include "parse.h"
#include "prefix.h"
#include "stack.h"
#include "transport.h"
#include "tunnel.h"
#include "wire.h"

/* bcc declares this helper with three arguments. */
static int (*redirect_neigh)(__u32 ifindex, struct bpf_redir_neigh *params, int size,
                             __u64 flags) = (void *)BPF_FUNC_redirect_neigh;

/* Returns BPF_FIB_LKUP_RET_*. */
static int find_route(struct __sk_buff *skb, const struct packet *packet, struct bpf_fib_lookup *route)
{
    route->family = packet->is_ipv6 ? AF_INET6 : AF_INET;
    route->l4_protocol = packet->protocol;
    route->ifindex = skb->ifindex;
    route->tot_len = wire_size(skb, packet); /* compared with the route's MTU */
    if (packet->is_ipv6) {
        __builtin_memcpy(route->ipv6_src, &packet->source, sizeof(route->ipv6_src));
        __builtin_memcpy(route->ipv6_dst, &packet->destination, sizeof(route->ipv6_dst));
    } else {
        route->ipv4_src = packet->source.word[3];
        route->ipv4_dst = packet->destination.word[3];
    }
    return bpf_fib_lookup(skb, route, sizeof(*route), 0);
}

static int send_out(struct __sk_buff *skb, struct packet *packet, struct bpf_fib_lookup *route)
{
    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct bpf_redir_neigh next = {.nh_family = route->family};

    if (data + ETH_HLEN + (packet->is_ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr)) > end)
        return punt(skb, OUTCOME(punt_malformed));
    decrement_ttl(data + ETH_HLEN, packet->is_ipv6);
    __builtin_memcpy(next.ipv6_nh, route->ipv6_dst, sizeof(next.ipv6_nh));
    skb->mark = FAST_MARK;
    skb->cb[0] = 0; /* not SEEN: the pod may be a node that runs podlane itself */
    count(skb, OUTCOME(fwd_uplink));
    return redirect_neigh(route->ifindex, &next, sizeof(next), 0);
}

/* Does the configuration, or the lack of one, send this through the host stack? */
static bool belongs_to_stack(const struct packet *packet, const struct lanes *lanes)
{
    __u32 zero = 0;
    struct settings *options = settings.lookup(&zero);

    return !options || !options->last_port || options->stack_routes || (lanes && lanes->kind & PREFIX_STACK) ||
           (options->other_protocols == OTHER_STACK && is_other(packet->protocol, packet->is_ipv6));
}

/*
 * Is this an answer from a host port to another node itself? That node has called past the tunnel, as nodes call each
 * other, and hears no answer by it.
 */
static bool answers_node(struct __sk_buff *skb, const struct packet *packet, const struct lanes *lanes)
{
    if (!packet->serves || !(lanes->kind & PREFIX_NODE))
        return false;
    struct transport *transport = new_transport();
    if (!transport || !identify_itself(skb, packet, transport))
        return false;
    struct note *note = reply_note(packet, transport);
    return note && note->port;
}

/* For a destination that is no local pod. What the fast path cannot take, the stack takes by the same routes. */
static int leave(struct __sk_buff *skb, struct packet *packet)
{
    struct bpf_fib_lookup route = {};
    struct lanes *lanes = find_lanes(&packet->destination);

    if (belongs_to_stack(packet, lanes) || node_addresses.lookup(&packet->destination))
        return punt(skb, OUTCOME(punt_host));
    if (lanes && lanes->tunnel && !answers_node(skb, packet, lanes))
        return leave_by_tunnel(skb, packet, lanes);
    int found = find_route(skb, packet, &route);
    if (found == BPF_FIB_LKUP_RET_FRAG_NEEDED)
        return punt(skb, OUTCOME(punt_too_big));
    if (found != BPF_FIB_LKUP_RET_SUCCESS && found != BPF_FIB_LKUP_RET_NO_NEIGH)
        return punt(skb, OUTCOME(punt_no_route));
    __u32 ifindex = route.ifindex;
    if (!uplinks.lookup(&ifindex))
        return punt(skb, OUTCOME(punt_host));
    if (packet->ttl <= 1)
        return punt(skb, OUTCOME(punt_ttl));
    return send_out(skb, packet, &route);
}
