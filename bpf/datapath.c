/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * The entry points: a packet's whole path through podlane. README.md in this folder explains every outcome.
 *
 * Unknown means punt: what a program does not understand goes to the host stack, which routes, answers or
 * discards it as a router should. Only what would let a pod pass for somebody else is dropped.
 */
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>

#include "counters.h"
#include "deliver.h"
#include "maps.h"
#include "parse.h"
#include "spoofing.h"

/* An IP packet from a pod: is it the pod's, and who carries it on? */
static int route_from_pod(struct __sk_buff *skb, struct packet *packet)
{
    /* IPv6 headers may not hold v4-mapped addresses; the maps do, so such a packet could pass for an IPv4 one. */
    if (packet->is_ipv6 && (is_v4_mapped(&packet->source) || is_v4_mapped(&packet->destination)))
        return drop(skb, OUTCOME(drop_mapped_address));

    __u64 spoofed = spoofed_source(skb, packet);
    if (spoofed)
        return drop(skb, spoofed);
    if (is_spoofed_neighbour(skb, packet))
        return drop(skb, OUTCOME(drop_spoofed_neighbour));

    if (packet->has_options)
        return punt(skb, OUTCOME(punt_options));
    if (is_multicast(packet))
        return punt(skb, OUTCOME(punt_multicast));
    if (skb->pkt_type != PACKET_HOST)
        return punt(skb, OUTCOME(punt_other_mac));
    if (is_link_local(&packet->source) || is_link_local(&packet->destination))
        return punt(skb, OUTCOME(punt_link_local));

    struct endpoint *endpoint = endpoints.lookup(&packet->destination);
    if (!endpoint)
        return punt(skb, OUTCOME(punt_host));
    if (packet->ttl <= 1)
        return punt(skb, OUTCOME(punt_ttl));
    return deliver(skb, packet, endpoint);
}

/* What a pod sends: ingress of the host end of its veth pair. */
int from_pod(struct __sk_buff *skb)
{
    struct packet packet = {};

    switch (parse(skb, &packet)) {
    case KIND_IP:
        return route_from_pod(skb, &packet);
    case KIND_ARP:
        if (is_spoofed_arp(skb, &packet))
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

/* What the host stack sends to a pod: egress of the host end of its veth pair. */
int to_pod(struct __sk_buff *skb)
{
    return punt(skb, OUTCOME(fwd_from_stack));
}
