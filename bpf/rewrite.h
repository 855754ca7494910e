/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Changes one side of a packet, address and port, and every checksum that knows of it, incrementally (RFC 1624). */
#pragma once

#include "maps.h"
#include "parse.h"
#include "transport.h"

enum side {
    SIDE_SOURCE,
    SIDE_DESTINATION,
};

/* Where an address stands in the frame, and its size. */
static __u32 address_offset(bool is_ipv6, enum side side)
{
    if (is_ipv6)
        return ETH_HLEN + (side == SIDE_SOURCE ? __builtin_offsetof(struct ipv6hdr, saddr)
                                               : __builtin_offsetof(struct ipv6hdr, daddr));
    return ETH_HLEN +
           (side == SIDE_SOURCE ? __builtin_offsetof(struct iphdr, saddr) : __builtin_offsetof(struct iphdr, daddr));
}

static int rewrite_address(struct __sk_buff *skb, struct transport *transport, bool is_ipv6, enum side side,
                           struct addr *old, struct addr *new)
{
    /* The words that are the same in all v4-mapped addresses cancel out of the difference. */
    __s64 difference = bpf_csum_diff(old->word, sizeof(*old), new->word, sizeof(*new), 0);
    __u32 offset = address_offset(is_ipv6, side);
    int failed;

    if (is_ipv6)
        failed = bpf_skb_store_bytes(skb, offset, new, sizeof(*new), 0);
    else
        failed = bpf_skb_store_bytes(skb, offset, &new->word[3], sizeof(new->word[3]), 0) ?:
                 bpf_l3_csum_replace(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, check), 0, difference, 0);
    if (failed || !transport->covers_addresses)
        return failed;
    return bpf_l4_csum_replace(skb, transport->checksum_offset, 0, difference,
                               BPF_F_PSEUDO_HDR | transport->checksum_flags);
}

static int rewrite_port(struct __sk_buff *skb, struct transport *transport, enum side side, __be16 old, __be16 new)
{
    if (old == new)
        return 0;
    return bpf_l4_csum_replace(skb, transport->checksum_offset, old, new,
                               sizeof(new) | transport->checksum_flags)
               ?: bpf_skb_store_bytes(skb, transport->port_offset[side == SIDE_DESTINATION], &new, sizeof(new), 0);
}

static int rewrite_source(struct __sk_buff *skb, struct packet *packet, struct transport *transport,
                          struct addr *address, __be16 port)
{
    return rewrite_address(skb, transport, packet->is_ipv6, SIDE_SOURCE, &packet->source, address)
               ?: rewrite_port(skb, transport, SIDE_SOURCE, transport->tuple.source_port, port);
}

static int rewrite_destination(struct __sk_buff *skb, struct packet *packet, struct transport *transport,
                               struct addr *address, __be16 port)
{
    return rewrite_address(skb, transport, packet->is_ipv6, SIDE_DESTINATION, &packet->destination, address)
               ?: rewrite_port(skb, transport, SIDE_DESTINATION, transport->tuple.destination_port, port);
}
