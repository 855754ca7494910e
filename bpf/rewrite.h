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

/* Linux 6.16; without it, the kernel's own sum of an IPv6 packet (CHECKSUM_COMPLETE) comes out wrong. */
#define F_IPV6 (1ull << 7)

/* Where an address stands in an IP header. */
static __u32 address_offset(bool is_ipv6, enum side side)
{
    if (is_ipv6)
        return side == SIDE_SOURCE ? __builtin_offsetof(struct ipv6hdr, saddr)
                                   : __builtin_offsetof(struct ipv6hdr, daddr);
    return side == SIDE_SOURCE ? __builtin_offsetof(struct iphdr, saddr) : __builtin_offsetof(struct iphdr, daddr);
}

/*
 * The kernel may keep a packet's sum (CHECKSUM_COMPLETE). Where a checksum in the packet changes with what is stored,
 * the sum stays; else the kernel has to be told.
 */
static __u64 store_flags(const struct transport *transport)
{
    return transport->unchecked ? BPF_F_RECOMPUTE_CSUM : 0;
}

/* The checksum of data that has changed by `difference` (RFC 1624, eqn. 3). */
static __be16 updated_checksum(__be16 checksum, __s64 difference)
{
    __u64 sum = (__u16)~checksum + (__u64)difference;

    sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return ~sum;
}

/* For the addresses in the pseudo header. Older kernels refuse the flag, and change nothing. */
static int replace_in_pseudo_header(struct __sk_buff *skb, const struct transport *transport, bool is_ipv6,
                                    __s64 difference)
{
    __u32 offset = transport->checksum_offset;
    __u64 flags = BPF_F_PSEUDO_HDR | transport->checksum_flags;

    if (is_ipv6 && bpf_l4_csum_replace(skb, offset, 0, difference, flags | F_IPV6) == 0)
        return 0;
    return bpf_l4_csum_replace(skb, offset, 0, difference, flags);
}

static int rewrite_address(struct __sk_buff *skb, struct transport *transport, bool is_ipv6, enum side side,
                           struct addr *old, struct addr *new)
{
    /* The words that are the same in all v4-mapped addresses cancel out of the difference. */
    __s64 difference = bpf_csum_diff(old->word, sizeof(*old), new->word, sizeof(*new), 0);
    __u32 offset = ETH_HLEN + address_offset(is_ipv6, side);
    int failed;

    if (is_ipv6)
        failed = bpf_skb_store_bytes(skb, offset, new, sizeof(*new), store_flags(transport));
    else
        failed = bpf_skb_store_bytes(skb, offset, &new->word[3], sizeof(new->word[3]), 0)
                     ?: bpf_l3_csum_replace(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, check), 0, difference, 0);
    if (failed || !transport->covers_addresses || !transport->checksum_offset)
        return failed;
    return replace_in_pseudo_header(skb, transport, is_ipv6, difference);
}

/* For `settle_crc`. */
static void note_sctp_port(struct transport *transport, enum side side, __be16 old, __be16 new)
{
    ((__be16 *)&transport->ports_change)[side == SIDE_DESTINATION] ^= old ^ new;
}

static int rewrite_port(struct __sk_buff *skb, struct transport *transport, enum side side, __be16 old, __be16 new)
{
    __u32 offset = transport->port_offset[side == SIDE_DESTINATION];

    if (old == new || !offset)
        return 0; /* later fragments have none */
    if (transport->tuple.protocol == IPPROTO_SCTP) {
        note_sctp_port(transport, side, old, new);
        return bpf_skb_store_bytes(skb, offset, &new, sizeof(new), store_flags(transport));
    }
    return bpf_l4_csum_replace(skb, transport->checksum_offset, old, new, sizeof(new) | transport->checksum_flags)
               ?: bpf_skb_store_bytes(skb, offset, &new, sizeof(new), store_flags(transport));
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
