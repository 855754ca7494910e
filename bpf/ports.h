/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The ports of the node's that masqueraded flows have: who creates the entry in `owners` has the port. */
#pragma once

#include "counters.h"
#include "maps.h"
#include "transport.h"

/* Random probes for a port. Never the next one up: runs of used ports would grow, and probes die in them. */
#define PORT_PROBES 32

static struct tuple answers(const struct tuple *tuple, const struct addr *address, __be16 port)
{
    struct tuple answer = reversed(tuple);
    answer.destination = *address;
    answer.destination_port = port;
    return answer;
}

/*
 * Is there a socket of the host's for this very tuple, or else one that listens on that port (bpf_sk_lookup)? With
 * `connected`, only the former.
 */
static bool has_socket(struct __sk_buff *skb, const struct tuple *answer, bool connected)
{
    struct bpf_sock_tuple tuple = {};
    bool is_ipv6 = !is_v4_mapped(&answer->source);
    __u32 size = is_ipv6 ? sizeof(tuple.ipv6) : sizeof(tuple.ipv4);
    struct bpf_sock *socket;

    if (is_ipv6) {
        __builtin_memcpy(tuple.ipv6.saddr, &answer->source, sizeof(answer->source));
        __builtin_memcpy(tuple.ipv6.daddr, &answer->destination, sizeof(answer->destination));
        tuple.ipv6.sport = answer->source_port;
        tuple.ipv6.dport = answer->destination_port;
    } else {
        tuple.ipv4.saddr = answer->source.word[3];
        tuple.ipv4.daddr = answer->destination.word[3];
        tuple.ipv4.sport = answer->source_port;
        tuple.ipv4.dport = answer->destination_port;
    }
    if (answer->protocol == IPPROTO_TCP && connected) /* the kind of socket that the one for UDP is, to the verifier */
        socket = bpf_sk_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
    else if (answer->protocol == IPPROTO_TCP)
        socket = bpf_skc_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
    else if (answer->protocol == IPPROTO_UDP)
        socket = bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
    else
        return false;
    if (!socket)
        return false;
    bool has = !connected || socket->dst_port;
    bpf_sk_release(socket);
    return has;
}

static bool same_owner(const struct owner *a, const struct owner *b)
{
    return a->port == b->port && same_address(&a->address, &b->address);
}

/* Takes the port for the flow, unless somebody else has it: then -EEXIST, or another error if the map is full. */
static int take_port(struct __sk_buff *skb, const struct tuple *tuple, struct flow *flow, __be16 port)
{
    struct tuple answer = answers(tuple, &flow->address, port);
    struct owner owner = {.address = tuple->source, .port = tuple->source_port};
    struct owner *taken = owners.lookup(&answer);

    if (taken && !same_owner(taken, &owner))
        return -EEXIST;
    flow->port = port;
    if (taken) /* our own, and the other half was lost */
        return 0;
    if (has_socket(skb, &answer, false)) /* the port is not ours to use */
        return -EEXIST;
    return owners.insert(&answer, &owner);
}

static bool is_in_range(__be16 port, const struct settings *limits)
{
    __u32 number = bpf_ntohs(port);

    return number >= limits->first_port && number <= limits->last_port;
}

/* Where a port of the node's leads: one of the very address before one of any. */
static struct pod_port *leads_to(const struct host_port *meant)
{
    struct host_port key = *meant;
    struct pod_port *found = host_ports.lookup(&key);

    if (found)
        return found;
    if (!is_v4_mapped(&meant->address))
        key.address.word[0] = key.address.word[1] = key.address.word[2] = 0;
    key.address.word[3] = 0;
    return host_ports.lookup(&key);
}

/*
 * Which flows have the pod's own port even if it is not in the range: those that have none, and of SCTP all that can.
 * Many of its peers expect a certain port, and the CRC of fragments cannot follow a change.
 */
static bool keeps_port(__u8 protocol)
{
    return is_portless(protocol) || protocol == IPPROTO_SCTP;
}

/* May this flow have its own port outside? Not another pod's host port, since peers may call that from there. */
static bool may_keep_port(const struct tuple *tuple, const struct addr *address, const struct settings *limits)
{
    struct host_port key = {.address = *address, .port = tuple->source_port, .protocol = tuple->protocol};

    if (!keeps_port(tuple->protocol))
        return is_in_range(tuple->source_port, limits);
    if (tuple->protocol != IPPROTO_SCTP)
        return true;
    struct pod_port *served = leads_to(&key);
    return !served || (served->port == tuple->source_port && same_address(&served->address, &tuple->source));
}

/* Finds a free port, the pod's own for choice; 0, -EEXIST if none was found, or another error if the map is full. */
static int allocate_port(struct __sk_buff *skb, const struct tuple *tuple, struct flow *flow, struct settings *limits)
{
    __u32 range = limits->last_port - limits->first_port + 1;
    bool own = may_keep_port(tuple, &flow->address, limits), has_others = !is_portless(tuple->protocol);
    int failed = own ? take_port(skb, tuple, flow, tuple->source_port) : -EEXIST, probe = 0;

    for (; has_others && probe < PORT_PROBES && failed == -EEXIST; probe++) {
        /* Multiply and shift: uniform over the range without a division. */
        __u32 port = limits->first_port + (__u32)(((__u64)bpf_get_prandom_u32() * range) >> 32);
        failed = take_port(skb, tuple, flow, bpf_htons(port));
    }
    if (!failed)
        count_allocation(own ? probe : probe - 1);
    return failed;
}

/* Gives the flow's port back, if the flow has it. */
static void release_port(const struct tuple *tuple, const struct flow *flow)
{
    struct tuple answer = answers(tuple, &flow->address, flow->port);
    struct owner owner = {.address = tuple->source, .port = tuple->source_port};
    struct owner *taken = owners.lookup(&answer);

    if (taken && same_owner(taken, &owner))
        owners.delete(&answer);
}

/* Ends the flow that has the port from which the node sends; else it would go on until it is checked again. */
static void end_flow(const struct tuple *sent, const struct owner *owner)
{
    struct tuple key = *sent;
    struct flow *flow;

    key.source = owner->address;
    key.source_port = owner->port;
    flow = flows.lookup(&key);
    if (flow && flow->port == sent->source_port && same_address(&flow->address, &sent->source))
        flows.delete(&key);
}

/*
 * What the node itself sends is the node's: a pod that has the port for that destination loses it, and takes another.
 * Sockets are seen when a port is taken (has_socket); this is for those that come later, and for what has no sockets
 * to be seen: echo requests, tunnels, and connections by the kernel's own NAT are noted before a pod is there.
 * Answers to outsiders never make an entry, so that no flood from outside can fill the map.
 */
static void reclaim_port(const struct transport *transport)
{
    __u32 zero = 0;
    struct settings *limits = settings.lookup(&zero);
    const struct tuple *tuple = &transport->tuple;
    bool is_echo = transport->port_offset[0] && (tuple->protocol == IPPROTO_ICMP || tuple->protocol == IPPROTO_ICMPV6);
    bool asks = is_echo || is_portless(tuple->protocol) || opens_connection(transport);

    if (!limits || transport->quoted || !(keeps_port(tuple->protocol) || is_in_range(tuple->source_port, limits)))
        return;
    struct tuple answer = reversed(tuple);
    struct owner node = {.address = tuple->source, .port = tuple->source_port};
    struct owner *owner = owners.lookup(&answer);
    if (owner && !same_owner(owner, &node)) {
        end_flow(tuple, owner);
        asks = true;
    }
    if (asks)
        owners.update(&answer, &node);
}
