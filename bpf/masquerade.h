/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Masqueraded flows: two halves with one life. `owners` is keyed by the answers' tuple, and creating an entry there is
 * what allocates a port; `flows` is keyed by the pod's own. If one half is missing, the next packet puts it back.
 */
#pragma once

#include "counters.h"
#include "maps.h"
#include "rewrite.h"
#include "transport.h"

#define FLOW_REPLIED 0x01 /* the other side has answered */
#define FLOW_FIN_OUT 0x02
#define FLOW_FIN_IN  0x04
#define FLOW_RESET   0x08

/* Random probes for a port. Never the next one up: runs of used ports would grow, and probes die in them. */
#define PORT_PROBES 32

/* A flow that was quiet for so long has its other half checked; busy ones need not pay for that. */
#define RECHECK_NS 1000000000ull

/* BPF_FIB_LOOKUP_*: bcc's own copy of bpf.h ends before Linux 6.7. */
#define FIB_LOOKUP_OUTPUT (1u << 1)
#define FIB_LOOKUP_SRC    (1u << 4)

static struct tuple answers(const struct tuple *tuple, const struct addr *address, __be16 port)
{
    struct tuple answer = reversed(tuple);
    answer.destination = *address;
    answer.destination_port = port;
    if (tuple->protocol == IPPROTO_ICMP || tuple->protocol == IPPROTO_ICMP6)
        answer.source_port = port; /* an echo has one identifier */
    return answer;
}

/* Follows TCP's opening and closing. A new SYN opens a closed flow again, under the same port. */
static void follow(struct flow *flow, struct transport *transport, bool outgoing)
{
    __u8 state = flow->state, flags = transport->tcp_flags;

    if (outgoing && (flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
        state = 0;
    if (!outgoing)
        state |= FLOW_REPLIED;
    if (flags & TCP_FIN)
        state |= outgoing ? FLOW_FIN_OUT : FLOW_FIN_IN;
    if (flags & TCP_RST)
        state |= FLOW_RESET;
    if (state != flow->state)
        flow->state = state;
    flow->seen = bpf_ktime_get_coarse_ns();
}

/* A port that a socket of the host has for this very tuple, or listens on, is not ours to use (bpf_sk_lookup). */
static bool is_host_port(struct __sk_buff *skb, const struct tuple *answer)
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
    if (answer->protocol == IPPROTO_TCP)
        socket = bpf_skc_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
    else if (answer->protocol == IPPROTO_UDP)
        socket = bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
    else
        return false;
    if (!socket)
        return false;
    bpf_sk_release(socket);
    return true;
}

static bool same_address(const struct addr *a, const struct addr *b)
{
    return a->word[0] == b->word[0] && a->word[1] == b->word[1] && a->word[2] == b->word[2] && a->word[3] == b->word[3];
}

/* Takes the port for the flow, unless somebody has it: then -EEXIST, or another error if the map is full. */
static int take_port(struct __sk_buff *skb, const struct tuple *tuple, struct flow *flow, __be16 port)
{
    struct tuple answer = answers(tuple, &flow->address, port);
    struct owner owner = {.address = tuple->source, .port = tuple->source_port};
    struct owner *taken = owners.lookup(&answer);

    if (taken) {
        /* Our own, if the other half was lost. */
        if (taken->port == owner.port && same_address(&taken->address, &owner.address)) {
            flow->port = port;
            return 0;
        }
        return -EEXIST;
    }
    if (is_host_port(skb, &answer))
        return -EEXIST;
    flow->port = port;
    return owners.insert(&answer, &owner);
}

/* Finds a free port, the pod's own for choice; 0, -EEXIST if none was found, or another error if the map is full. */
static int allocate_port(struct __sk_buff *skb, const struct tuple *tuple, struct flow *flow, struct settings *limits)
{
    __u32 wanted = bpf_ntohs(tuple->source_port), range = limits->last_port - limits->first_port + 1;
    int failed = -EEXIST;

    if (wanted >= limits->first_port && wanted <= limits->last_port)
        failed = take_port(skb, tuple, flow, tuple->source_port);
    for (int probe = 0; probe < PORT_PROBES && failed == -EEXIST; probe++) {
        /* Multiply and shift: uniform over the range without a division. */
        __u32 port = limits->first_port + (__u32)(((__u64)bpf_get_prandom_u32() * range) >> 32);
        failed = take_port(skb, tuple, flow, bpf_htons(port));
    }
    return failed;
}

/* Makes both halves of a flow for a packet of the pod's. Returns 0, or the drop outcome. */
static __u64 open_flow(struct __sk_buff *skb, const struct tuple *tuple, struct flow *flow)
{
    __u32 zero = 0;
    struct settings *limits = settings.lookup(&zero);

    if (!limits)
        return OUTCOME(drop_masq_full);
    int failed = allocate_port(skb, tuple, flow, limits);
    if (failed)
        return failed == -EEXIST ? OUTCOME(drop_masq_exhausted) : OUTCOME(drop_masq_full);
    struct tuple key = *tuple;
    failed = flows.insert(&key, flow);
    if (!failed)
        return 0;

    /* Another CPU was faster with the same flow, or the map is full: give the port back. */
    struct tuple answer = answers(tuple, &flow->address, flow->port);
    owners.delete(&answer);
    return failed == -EEXIST ? 0 : OUTCOME(drop_masq_full);
}

/* Whom a packet passes for: the address that the node itself would use on this device for this destination. */
static bool choose_address(struct __sk_buff *skb, const struct packet *packet, struct addr *address)
{
    struct bpf_fib_lookup route = {.family = packet->is_ipv6 ? AF_INET6 : AF_INET, .ifindex = skb->ifindex};
    __u32 ifindex = skb->ifindex;
    struct uplink *uplink;

    if (packet->is_ipv6)
        __builtin_memcpy(route.ipv6_dst, &packet->destination, sizeof(route.ipv6_dst));
    else
        route.ipv4_dst = packet->destination.word[3];
    int result = bpf_fib_lookup(skb, &route, sizeof(route), FIB_LOOKUP_OUTPUT | FIB_LOOKUP_SRC);
    if (result == BPF_FIB_LKUP_RET_SUCCESS || result == BPF_FIB_LKUP_RET_NO_NEIGH) {
        *address = packet->is_ipv6 ? from_ipv6((void *)route.ipv6_src) : from_ipv4(route.ipv4_src);
        return true;
    }
    uplink = uplinks.lookup(&ifindex);
    if (!uplink)
        return false;
    *address = packet->is_ipv6 ? uplink->ipv6 : uplink->ipv4;
    return address->word[3] != 0;
}

/* Puts the answers' half of a flow back if it was lost. */
static void mend_owner(const struct tuple *tuple, const struct flow *flow)
{
    struct tuple answer = answers(tuple, &flow->address, flow->port);
    struct owner owner = {.address = tuple->source, .port = tuple->source_port};

    owners.insert(&answer, &owner);
}

/* Lets a packet of a pod's pass for the node's. */
static int masquerade(struct __sk_buff *skb, struct packet *packet, struct transport *transport)
{
    struct flow new = {};
    struct flow *flow = flows.lookup(&transport->tuple);

    if (!flow) {
        if (!choose_address(skb, packet, &new.address))
            return drop(skb, OUTCOME(drop_masq_no_address));
        __u64 refused = open_flow(skb, &transport->tuple, &new);
        if (refused)
            return drop(skb, refused);
        flow = flows.lookup(&transport->tuple);
        if (!flow) /* somebody deletes by hand */
            return drop(skb, OUTCOME(drop_masq_full));
    } else if (bpf_ktime_get_coarse_ns() - flow->seen > RECHECK_NS) {
        mend_owner(&transport->tuple, flow);
    }
    follow(flow, transport, true);
    struct addr address = flow->address;
    __be16 port = flow->port;
    if (rewrite_source(skb, packet, transport, &address, port))
        return drop(skb, OUTCOME(drop_masq_unsupported));
    count(skb, OUTCOME(masq_out));
    return TC_ACT_UNSPEC;
}

/* Gives an answer back to its pod: true if it was one, and now is addressed to the pod. */
static bool unmasquerade(struct __sk_buff *skb, struct packet *packet, struct transport *transport)
{
    struct flow lost = {};
    struct owner *owner = owners.lookup(&transport->tuple);

    if (!owner)
        return false;
    struct addr pod = owner->address;
    __be16 port = owner->port;
    struct tuple key = reversed(&transport->tuple);
    key.source = pod;
    key.source_port = port;
    if (packet->protocol == IPPROTO_ICMP || packet->protocol == IPPROTO_ICMP6)
        key.destination_port = port;
    struct flow *flow = flows.lookup(&key);
    if (!flow) { /* the other half was lost: put it back */
        lost.address = packet->destination;
        lost.port = transport->tuple.destination_port;
        flows.insert(&key, &lost);
        flow = flows.lookup(&key);
    }
    if (flow)
        follow(flow, transport, false);
    if (rewrite_destination(skb, packet, transport, &pod, port))
        return false;
    packet->destination = transport->tuple.destination = pod;
    transport->tuple.destination_port = port;
    return true;
}

/* Does masquerading not apply to this destination? */
static bool is_native(const struct packet *packet)
{
    struct prefix prefix = {.length = 128, .address = packet->destination};
    __u8 *kind = prefixes.lookup(&prefix);

    return (kind && *kind == PREFIX_NATIVE) || is_multicast(packet) || node_addresses.lookup(&prefix.address);
}

static bool opens_connection(const struct transport *transport)
{
    return (transport->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* Notes that an outsider opened this flow, so that the pod's answers keep the pod's address. */
static void note_inbound(struct transport *transport)
{
    struct tuple answer = reversed(&transport->tuple);
    __u64 now = bpf_ktime_get_coarse_ns();

    if (!inbound.lookup(&answer) && !flows.lookup(&answer))
        inbound.update(&answer, &now);
}

/*
 * Does this packet of a pod's answer a flow that an outsider opened? Only if the pod has not opened it itself: a stale
 * or forged note must never let a masqueraded flow out under the pod's own address.
 */
static bool is_reply(struct transport *transport)
{
    return inbound.lookup(&transport->tuple) && !opens_connection(transport) && !flows.lookup(&transport->tuple);
}
