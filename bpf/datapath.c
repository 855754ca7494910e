/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * The entry points: a packet's whole path through podlane. README.md in this folder explains every outcome.
 *
 * Unknown means punt: what a program does not understand goes to the host stack, which routes, answers or
 * discards it as a router should. Only what would let a pod pass for somebody else is dropped.
 */
#include <asm-generic/errno-base.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#include "counters.h"
#include "crc.h"
#include "deliver.h"
#include "fragments.h"
#include "host_ports.h"
#include "icmp_error.h"
#include "identify.h"
#include "inbound.h"
#include "leave.h"
#include "maps.h"
#include "masquerade.h"
#include "parse.h"
#include "ports.h"
#include "prefix.h"
#include "rewrite.h"
#include "shaping.h"
#include "sockets.h"
#include "spoofing.h"
#include "stack.h"
#include "transport.h"
#include "tunnel.h"

/* An IP packet from a pod: is it the pod's, and who carries it on? */
static int route_from_pod(struct __sk_buff *skb, struct packet *packet)
{
    if (has_mapped_address(packet))
        return drop(skb, OUTCOME(drop_mapped_address));

    __u64 spoofed = spoofed_source(skb, packet);
    if (spoofed)
        return drop(skb, spoofed);
    if (is_spoofed_neighbour(skb, packet))
        return drop(skb, OUTCOME(drop_spoofed_neighbour));

    /* Before anything is left to the stack, which has routes to all pods. Whose request it brought gets the answer. */
    __u32 of_stack = packet->via_stack ? is_stack_flow(skb, packet) : 0;
    struct endpoint *endpoint = endpoints.lookup(&packet->destination);
    if (endpoint && endpoint->network != packet->network && (of_stack != STACK_ANSWER || packet->is_fragment))
        return drop(skb, OUTCOME(drop_other_network));
    __u32 by_host_port =
        !of_stack && may_be_served(skb, packet, endpoint) ? translate_locally(skb, packet, endpoint) : 0;
    if (packet->shaper)
        return shape(skb, packet, by_host_port);

    if (packet->has_options)
        return punt(skb, OUTCOME(punt_options));
    if (is_multicast(packet))
        return punt(skb, OUTCOME(punt_multicast));
    if (skb->pkt_type != PACKET_HOST)
        return punt(skb, OUTCOME(punt_other_mac));
    if (is_link_local(&packet->source) || is_link_local(&packet->destination))
        return punt(skb, OUTCOME(punt_link_local));

    if (of_stack)
        return punt(skb, OUTCOME(punt_reply));
    if (by_host_port)
        endpoint = endpoints.lookup(&packet->destination);
    if (!endpoint)
        return leave(skb, packet);
    if (packet->ttl <= 1)
        return punt(skb, OUTCOME(punt_ttl));
    if (endpoint->shaper)
        return leave_to_stack(skb, by_host_port);
    return deliver(skb, packet, endpoint, by_host_port ? OUTCOME(port_local) : OUTCOME(fwd_local));
}

/* What a pod sends: ingress of the host end of its veth pair. */
int from_pod(struct __sk_buff *skb)
{
    struct packet *packet = new_packet();

    if (!packet)
        return TC_ACT_SHOT;
    switch (parse(skb, packet)) {
    case KIND_IP:
        return route_from_pod(skb, packet);
    case KIND_ARP:
        if (is_spoofed_arp(skb, packet))
            return drop(skb, OUTCOME(drop_spoofed_arp));
        return punt(skb, OUTCOME(punt_arp));
    case KIND_VLAN:
        /* The stack strips nested priority tags after this hook: what is inside would never have been checked. */
        return drop(skb, OUTCOME(drop_vlan));
    case KIND_MALFORMED:
        return punt(skb, OUTCOME(punt_malformed));
    default:
        return punt(skb, OUTCOME(punt_unknown_protocol));
    }
}

/* What the host stack sends to a pod, and all that a limited pod receives: egress of the host end of its veth pair. */
int to_pod(struct __sk_buff *skb)
{
    if (skb->mark == FAST_MARK) {
        skb->mark = 0;
        return punt(skb, OUTCOME(fwd_queued));
    }
    if (skb->mark == CALL_MARK || skb->mark == ANSWER_MARK)
        return punt(skb, complete_locally(skb) ? OUTCOME(port_shaped) : OUTCOME(fwd_from_stack));
    struct packet *packet = new_packet();
    struct transport *transport = new_transport();
    if (!packet || !transport)
        return TC_ACT_SHOT;
    if (parse(skb, packet) != KIND_IP)
        return punt(skb, OUTCOME(fwd_from_stack));
    struct endpoint *pod = endpoints.lookup(&packet->destination);
    bool is_nodes = node_addresses.lookup(&packet->source);
    if (pod && (pod->serves || !is_nodes) && identify(skb, packet, transport)) {
        if (is_nodes)
            forget_own_call(transport);
        else
            keep_in_stack(transport, pod);
    }
    return punt(skb, OUTCOME(fwd_from_stack));
}

/* What a pod sends out of the node. `known` is what `identify` said; `fast`: it did not come through the stack. */
static int leave_from_pod(struct __sk_buff *skb, struct packet *packet, struct transport *transport, bool known,
                          bool fast)
{
    struct note *note = known ? reply_note(packet, transport) : 0;
    if (note && note->port)
        return answer_as_noted(skb, packet, transport, note) ? punt(skb, OUTCOME(port_out))
                                                             : drop(skb, OUTCOME(drop_masq_unsupported));
    if (note)
        return punt(skb, OUTCOME(fwd_reply));
    __u32 rule = rule_for(packet, transport);
    struct lanes *lanes = find_lanes(&packet->destination);
    if (lanes && lanes->tunnel) /* by the stack's routes it has come here, to one of a node's own addresses */
        return enter_tunnel(skb, lanes->tunnel);
    if (packet->native || is_native(packet, lanes) || (rule == OTHER_STACK && !fast))
        return punt(skb, OUTCOME(fwd_native));
    if (known && seems_wrapped(transport))
        return drop(skb, OUTCOME(drop_forged_peer));
    if (known && rule == OTHER_MASQUERADE)
        return masquerade(skb, packet, transport);
    if (transport->part == PART_LATER && rule == OTHER_MASQUERADE)
        return drop(skb, OUTCOME(drop_masq_fragment));
    return drop(skb, OUTCOME(drop_masq_unsupported));
}

/*
 * What the node itself sends, and forwards for others. Of its own, errors about what it could not give to a pod are as
 * if they were the pod's.
 */
static int leave_from_node(struct __sk_buff *skb, struct packet *packet, struct transport *transport, bool known)
{
    bool is_nodes = node_addresses.lookup(&packet->source);

    if (is_nodes && is_passed_on(skb, packet, transport, known))
        return drop(skb, OUTCOME(drop_forged_peer));
    if (known && is_nodes) {
        if (transport->quoted && masquerade_error(skb, packet, transport))
            return masqueraded_out(skb, transport);
        struct note *note = transport->quoted ? find_note(&transport->tuple) : 0;
        if (note && answer_as_noted(skb, packet, transport, note))
            return punt(skb, OUTCOME(port_out));
        reclaim_port(transport);
    }
    return punt(skb, OUTCOME(fwd_host_out));
}

/* What leaves the node: egress of an uplink. The only place where masquerading happens. */
int to_uplink(struct __sk_buff *skb)
{
    struct packet *packet = new_packet();
    struct transport *transport = new_transport();
    bool fast = skb->mark == FAST_MARK;

    if (!packet || !transport)
        return TC_ACT_SHOT;
    if (skb->cb[0] == SEEN)
        return punt(skb, OUTCOME(fwd_host_out));
    skb->cb[0] = SEEN;
    if (fast)
        skb->mark = 0;
    if (parse(skb, packet) != KIND_IP || has_mapped_address(packet))
        return punt(skb, OUTCOME(fwd_host_out));
    bool known = identify(skb, packet, transport);
    struct endpoint *pod = endpoints.lookup(&packet->source);
    if (pod) {
        packet->native = pod->native;
        if (known)
            remember_ports(transport);
        if (known && !fast)
            keep_in_stack(transport, pod);
    }
    int verdict =
        pod ? leave_from_pod(skb, packet, transport, known, fast) : leave_from_node(skb, packet, transport, known);
    settle_crc(skb, packet, transport);
    return verdict;
}

/* Must the stack have what comes for a pod: to look at options, to answer, or to give it back to one of its flows? */
static bool needs_stack(const struct packet *packet, const struct transport *transport, bool known,
                        const struct endpoint *pod)
{
    if (packet->has_options || packet->ttl <= 1)
        return true;
    return pod->via_stack && (packet->is_fragment || (known && way_by_stack(&transport->tuple)));
}

/* What comes from outside: ingress of an uplink. */
int from_uplink(struct __sk_buff *skb)
{
    struct packet *packet = new_packet();
    struct transport *transport = new_transport();
    __u64 outcome = OUTCOME(fwd_inbound);

    if (!packet || !transport)
        return TC_ACT_SHOT;
    if (parse(skb, packet) != KIND_IP || has_mapped_address(packet) || skb->pkt_type != PACKET_HOST)
        return punt(skb, OUTCOME(fwd_host_in));
    bool known = identify(skb, packet, transport);
    if (known && unmasquerade(skb, packet, transport))
        outcome = OUTCOME(masq_in);
    else if (known && to_host_port(skb, packet, transport))
        outcome = OUTCOME(port_in);
    if (outcome != OUTCOME(fwd_inbound))
        settle_crc(skb, packet, transport);

    struct endpoint *pod = endpoints.lookup(&packet->destination);
    if (!pod || is_link_local(&packet->destination))
        return punt(skb, transport->part == PART_LATER ? OUTCOME(punt_fragment) : OUTCOME(fwd_host_in));
    if (needs_stack(packet, transport, known, pod))
        return punt(skb, outcome);
    if (known && outcome == OUTCOME(fwd_inbound))
        note_direct(transport);
    if (pod->shaper) /* see leave_to_stack */
        return punt(skb, outcome);
    return deliver_from_outside(skb, packet, pod, outcome);
}

/* What a pod sends into the tunnel, in a flow that came by a host port: 0 if it is no such packet. */
static __u64 answer_by_tunnel(struct __sk_buff *skb, struct packet *packet, struct transport *transport)
{
    struct note *note = reply_note(packet, transport);

    if (!note || !note->port)
        return 0;
    remember_ports(transport);
    return answer_as_noted(skb, packet, transport, note) ? OUTCOME(port_out) : OUTCOME(drop_masq_unsupported);
}

/* What goes to nodes that are not on-link: egress of the tunnel. The only place where the node is chosen. */
int to_tunnel(struct __sk_buff *skb)
{
    struct packet *packet = new_packet();
    struct transport *transport = new_transport();
    bool fast = skb->mark == FAST_MARK;
    __u32 ifindex = skb->ifindex;
    __u64 answered = 0;

    if (!packet || !transport)
        return TC_ACT_SHOT;
    if (skb->cb[0] == SEEN)
        return punt(skb, OUTCOME(fwd_to_peer));
    skb->cb[0] = SEEN;
    if (fast)
        skb->mark = 0;
    if (parse(skb, packet) != KIND_IP || has_mapped_address(packet))
        return drop(skb, OUTCOME(drop_no_peer));
    if (is_multicast(packet)) /* news of the kernel's own on every new device; nobody is there to hear it */
        return punt(skb, OUTCOME(punt_multicast));
    struct tunnel *tunnel = tunnels.lookup(&ifindex);
    struct lanes *lanes = find_lanes(&packet->destination);
    if (!tunnel || !lanes || is_nobody(&lanes->peer))
        return drop(skb, OUTCOME(drop_no_peer));
    struct endpoint *pod = endpoints.lookup(&packet->source);
    if (pod && (!fast || pod->serves) && identify(skb, packet, transport)) {
        if (!fast)
            keep_in_stack(transport, pod);
        if (pod->serves)
            answered = answer_by_tunnel(skb, packet, transport);
    }
    if (answered == OUTCOME(drop_masq_unsupported))
        return drop(skb, answered);
    if (wrap(skb, tunnel, called_at(packet, tunnel, lanes)))
        return drop(skb, OUTCOME(drop_no_peer));
    if (answered)
        settle_crc(skb, packet, transport);
    return punt(skb, answered ?: OUTCOME(fwd_to_peer));
}

/* What comes from nodes that are not on-link: ingress of the tunnel. Nothing here is believed but by who sent it. */
int from_tunnel(struct __sk_buff *skb)
{
    struct packet *packet = new_packet();
    struct transport *transport = new_transport();
    __u64 outcome = OUTCOME(fwd_from_peer);

    if (!packet || !transport)
        return TC_ACT_SHOT;
    if (parse(skb, packet) != KIND_IP || has_mapped_address(packet) || is_forged(skb, packet))
        return drop(skb, OUTCOME(drop_forged_peer));
    if (skb->pkt_type != PACKET_HOST)
        return punt(skb, OUTCOME(fwd_peer_host));
    bool known = identify(skb, packet, transport);
    struct endpoint *pod = endpoints.lookup(&packet->destination);
    if (pod && known && pod->serves)
        forget_host_port(transport);
    if (!pod && known && to_host_port(skb, packet, transport)) {
        outcome = OUTCOME(port_in);
        settle_crc(skb, packet, transport);
        pod = endpoints.lookup(&packet->destination);
    }
    if (!pod || is_link_local(&packet->destination))
        return punt(skb, OUTCOME(fwd_peer_host));
    if (needs_stack(packet, transport, known, pod) || pod->shaper)
        return punt(skb, outcome);
    return deliver_from_outside(skb, packet, pod, outcome);
}

/* What the node's own processes connect to, and what datagrams of unconnected sockets are for. */
int connect4(struct bpf_sock_addr *ctx)
{
    return call_ipv4(ctx);
}

int connect6(struct bpf_sock_addr *ctx)
{
    return call_ipv6(ctx);
}

int sendmsg4(struct bpf_sock_addr *ctx)
{
    return call_ipv4(ctx);
}

int sendmsg6(struct bpf_sock_addr *ctx)
{
    return call_ipv6(ctx);
}

/* From whom they are told that a datagram comes, and to whom that they are connected. */
int recvmsg4(struct bpf_sock_addr *ctx)
{
    return name_ipv4(ctx);
}

int recvmsg6(struct bpf_sock_addr *ctx)
{
    return name_ipv6(ctx);
}

int getpeername4(struct bpf_sock_addr *ctx)
{
    return name_ipv4(ctx);
}

int getpeername6(struct bpf_sock_addr *ctx)
{
    return name_ipv6(ctx);
}
