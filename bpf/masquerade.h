/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Masqueraded flows: two halves with one life. `owners` is keyed by the answers' tuple, and creating an entry there is
 * what allocates a port; `flows` is keyed by the pod's own. If one half is missing, the next packet puts it back.
 */
#pragma once

#include "counters.h"
#include "fragments.h"
#include "icmp_error.h"
#include "inbound.h"
#include "maps.h"
#include "ports.h"
#include "rewrite.h"
#include "transport.h"

#define FLOW_REPLIED 0x01 /* the other side has answered */
#define FLOW_FIN_OUT 0x02
#define FLOW_FIN_IN  0x04
#define FLOW_RESET   0x08

/* BPF_FIB_LOOKUP_*: bcc's own copy of bpf.h ends before Linux 6.7. */
#define FIB_LOOKUP_OUTPUT (1u << 1)
#define FIB_LOOKUP_SRC    (1u << 4)

/* The time in units of 2^30 ns, about a second: as often a busy flow's other half is checked. */
static __u32 this_tick(void)
{
    return bpf_ktime_get_coarse_ns() >> 30;
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

/* Makes both halves of a flow for a packet of the pod's. Returns 0, or the drop outcome. */
static __u64 open_flow(struct __sk_buff *skb, const struct packet *packet, struct tuple *tuple)
{
    __u32 zero = 0;
    struct settings *limits = settings.lookup(&zero);
    struct flow flow = {.checked = this_tick()};

    if (!limits || !choose_address(skb, packet, &flow.address))
        return OUTCOME(drop_masq_no_address);
    int failed = allocate_port(skb, tuple, &flow, limits);
    if (failed)
        return failed == -EEXIST ? OUTCOME(drop_masq_exhausted) : OUTCOME(drop_masq_full);
    failed = flows.insert(tuple, &flow);
    if (!failed) {
        forget_inbound(tuple);
        return 0;
    }

    /* Another CPU was faster with the same flow, or the map is full: give the port back, unless it is that CPU's. */
    struct flow *other = flows.lookup(tuple);
    if (!other || other->port != flow.port)
        release_port(tuple, &flow);
    return failed == -EEXIST ? 0 : OUTCOME(drop_masq_full);
}

/* Has the flow still its port, and the node its address? Puts the answers' half back if it was lost. */
static bool still_holds(struct __sk_buff *skb, const struct packet *packet, const struct tuple *tuple,
                        const struct flow *flow)
{
    struct flow copy = *flow;
    struct addr address;

    if (!node_addresses.lookup(&copy.address) && choose_address(skb, packet, &address) &&
        !same_address(&address, &copy.address))
        return false;
    return take_port(skb, tuple, &copy, copy.port) == 0;
}

/* An echo reply, of which a later fragment shows no more than the ports, opens nothing. */
static bool can_open(const struct transport *transport)
{
    return transport->port_offset[0] || is_portless(transport->tuple.protocol) ||
           (transport->part == PART_LATER && transport->tuple.source_port);
}

/* Sees to it that a pod's packet has a flow, with both halves. Returns 0, or the drop outcome. */
static __u64 ensure_flow(struct __sk_buff *skb, const struct packet *packet, struct transport *transport)
{
    struct tuple *key = &transport->tuple;
    struct flow *flow = flows.lookup(key);
    __u32 tick = this_tick();

    if (flow && flow->checked == tick)
        return 0;
    if (flow && still_holds(skb, packet, key, flow)) {
        flow->checked = tick;
        return 0;
    }
    if (flow) {
        struct flow lost = *flow;
        flows.delete(key);
        release_port(key, &lost);
    }
    return can_open(transport) ? open_flow(skb, packet, key) : OUTCOME(drop_masq_unsupported);
}

static int masqueraded_out(struct __sk_buff *skb, const struct transport *transport)
{
    count_masqueraded(skb, transport->tuple.protocol, __builtin_offsetof(struct masqueraded, tcp_out));
    return punt(skb, OUTCOME(masq_out));
}

/*
 * Lets an error about a packet of a masqueraded flow's pass for the node's: one that the pod sends, or the node itself
 * when it could not give the packet to the pod. It opens no flow. False if it is about anything else.
 */
static bool masquerade_error(struct __sk_buff *skb, struct packet *packet, struct transport *transport)
{
    struct flow *flow = flows.lookup(&transport->tuple);

    if (!flow)
        return false;
    struct addr address = flow->address;
    return rewrite_error(skb, packet, transport, SIDE_SOURCE, &address, flow->port) == 0;
}

/* Lets a packet of a pod's pass for the node's. */
static int masquerade(struct __sk_buff *skb, struct packet *packet, struct transport *transport)
{
    if (transport->quoted)
        return same_address(&transport->tuple.source, &packet->source) && masquerade_error(skb, packet, transport)
                   ? masqueraded_out(skb, transport)
                   : drop(skb, OUTCOME(drop_masq_unsupported));
    __u64 refused = ensure_flow(skb, packet, transport);
    if (refused)
        return drop(skb, refused);
    struct flow *flow = flows.lookup(&transport->tuple);
    if (!flow) /* somebody deletes by hand */
        return drop(skb, OUTCOME(drop_masq_full));
    struct addr address = flow->address; /* read once: when the entry is deleted, another flow may get its memory */
    __be16 port = flow->port;
    follow(flow, transport, true);
    if (rewrite_source(skb, packet, transport, &address, port))
        return drop(skb, OUTCOME(drop_masq_unsupported));
    return masqueraded_out(skb, transport);
}

/* Notes that an answer came to the flow of that key; puts the pod's half back if it was lost. */
static void follow_answer(const struct packet *packet, struct transport *transport, struct tuple *key)
{
    struct flow *flow = flows.lookup(key);

    if (!flow) {
        struct flow lost = {
            .address = packet->destination, .port = transport->tuple.destination_port, .checked = this_tick()};
        flows.insert(key, &lost);
        flow = flows.lookup(key);
    }
    if (flow)
        follow(flow, transport, false);
}

/* Gives an answer back to its pod, or an error about its packets: true if it now is addressed to the pod. */
static bool unmasquerade(struct __sk_buff *skb, struct packet *packet, struct transport *transport)
{
    struct owner *owner = owners.lookup(&transport->tuple);

    if (!owner || same_address(&owner->address, &packet->destination)) { /* nobody's, or the node's own */
        forget_ports(transport);
        return false;
    }
    struct addr pod = owner->address;
    __be16 port = owner->port;
    if (transport->quoted) {
        if (rewrite_error(skb, packet, transport, SIDE_DESTINATION, &pod, port))
            return false;
    } else {
        struct tuple key = reversed(&transport->tuple);
        key.source = pod;
        key.source_port = port;
        follow_answer(packet, transport, &key);
        remember_ports(transport);
        if (rewrite_destination(skb, packet, transport, &pod, port))
            return false;
    }
    packet->destination = transport->tuple.destination = pod;
    transport->tuple.destination_port = port;
    count_masqueraded(skb, transport->tuple.protocol, __builtin_offsetof(struct masqueraded, tcp_in));
    return true;
}

/* OTHER_*: what the configuration says of the flow's protocol. */
static __u32 rule_for(const struct packet *packet, const struct transport *transport)
{
    __u32 zero = 0;
    struct settings *options;

    if (!is_other(transport->tuple.protocol, packet->is_ipv6))
        return OTHER_MASQUERADE;
    options = settings.lookup(&zero);
    return options ? options->other_protocols : OTHER_DROP;
}

/* Does masquerading not apply to this destination? `lanes` are its. */
static bool is_native(const struct packet *packet, const struct lanes *lanes)
{
    struct addr destination = packet->destination;

    return (lanes && lanes->kind & PREFIX_NATIVE) || is_multicast(packet) || node_addresses.lookup(&destination);
}
