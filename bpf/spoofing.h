/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* A pod speaks only for itself: its addresses and its MAC, in IP, ARP and neighbour discovery. */
#pragma once

#include "maps.h"
#include "parse.h"

static bool same_mac(const __u8 *a, const __u8 *b)
{
    return *(__u16 *)a == *(__u16 *)b && *(__u16 *)(a + 2) == *(__u16 *)(b + 2) &&
           *(__u16 *)(a + 4) == *(__u16 *)(b + 4);
}

/* Is this the address of the pod behind the device that the packet came in on? */
static bool is_own_address(struct __sk_buff *skb, struct addr *address)
{
    struct endpoint *owner = endpoints.lookup(address);

    return owner && owner->ifindex == skb->ifindex;
}

/* Returns the drop outcome that an IP packet or ARP message deserves for its source, or 0. */
static __u64 spoofed_source(struct __sk_buff *skb, struct packet *packet)
{
    struct endpoint *owner = endpoints.lookup(&packet->source);

    if (!owner || owner->ifindex != skb->ifindex)
        return OUTCOME(drop_spoofed_address);
    if (!same_mac(owner->mac, packet->source_mac))
        return OUTCOME(drop_spoofed_mac);
    packet->via_stack = owner->via_stack;
    packet->network = owner->network;
    packet->shaper = owner->shaper;
    packet->serves = owner->serves;
    return 0;
}

static bool is_spoofed_arp(struct __sk_buff *skb, struct packet *packet)
{
    return spoofed_source(skb, packet) || !same_mac(packet->source_mac, packet->claimed_mac);
}

/* A pod is no router, and advertises none but its own addresses (RFC 4861 sections 4.2, 4.4 and 4.5). */
static bool is_spoofed_neighbour(struct __sk_buff *skb, struct packet *packet)
{
    switch (packet->neighbour_type) {
    case ND_ROUTER_ADVERTISEMENT:
    case ND_REDIRECT:
        return true;
    case ND_NEIGHBOUR_ADVERTISEMENT:
        return is_v4_mapped(&packet->neighbour) || !is_own_address(skb, &packet->neighbour);
    default:
        return false;
    }
}
