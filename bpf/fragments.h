/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Fragments. Only a datagram's first one has ports; they are kept for the others, which must come after it. Senders
 * and networks keep that order but for rare cases, which README.md tells.
 */
#pragma once

#include "maps.h"
#include "parse.h"
#include "transport.h"

/* Where the fragment stands in its datagram, without the flags beside it. */
#define IPV4_FRAGMENT_OFFSET bpf_htons(0x1fff)
#define IPV6_FRAGMENT_OFFSET bpf_htons(0xfff8)

/* RFC 8200 section 4.5; UAPI headers do not have it. */
struct fragment_header {
    __u8 next_header;
    __u8 reserved;
    __be16 offset;
    __be32 identification;
};

/* The identification and the fragment offset of an IPv4 header. */
struct fragment_fields {
    __be16 identification;
    __be16 offset;
};

static struct fragment fragment_key(const struct transport *transport)
{
    struct fragment key = {
        .source = transport->tuple.source,
        .destination = transport->tuple.destination,
        .identification = transport->identification,
        .protocol = transport->tuple.protocol,
    };
    return key;
}

/* Reads what makes it a fragment, at `offset` behind an IPv6 header; returns where its payload begins, or 0. */
static __u32 parse_fragment_header(struct __sk_buff *skb, struct transport *transport, __u32 offset)
{
    struct fragment_header header;

    if (bpf_skb_load_bytes(skb, offset, &header, sizeof(header)) < 0)
        return 0;
    transport->tuple.protocol = header.next_header;
    transport->identification = header.identification;
    transport->part = header.offset & IPV6_FRAGMENT_OFFSET ? PART_LATER : PART_FIRST;
    return offset + sizeof(header);
}

/* The same for the IPv4 header that begins at `offset`; its payload begins at `payload`. */
static __u32 parse_fragment_fields(struct __sk_buff *skb, struct transport *transport, __u32 offset, __u32 payload)
{
    struct fragment_fields fields;

    if (bpf_skb_load_bytes(skb, offset + __builtin_offsetof(struct iphdr, id), &fields, sizeof(fields)) < 0)
        return 0;
    transport->identification = fields.identification;
    transport->part = fields.offset & IPV4_FRAGMENT_OFFSET ? PART_LATER : PART_FIRST;
    return payload;
}

static bool recall_ports(struct transport *transport)
{
    struct fragment key = fragment_key(transport);
    struct ports *ports = fragments.lookup(&key);

    if (!ports)
        return false;
    transport->tuple.source_port = ports->source;
    transport->tuple.destination_port = ports->destination;
    return true;
}

/* Of a fragment, the part of `identify`. */
static bool identify_fragment(struct __sk_buff *skb, const struct packet *packet, struct transport *transport)
{
    __u32 payload = packet->is_ipv6 ? parse_fragment_header(skb, transport, packet->header_end)
                                    : parse_fragment_fields(skb, transport, ETH_HLEN, packet->header_end);

    if (!payload)
        return false;
    if (transport->part == PART_LATER && !is_portless(transport->tuple.protocol)) {
        transport->unchecked = 1;
        return recall_ports(transport);
    }
    return parse_ports(skb, packet, transport, payload) && transport->complete;
}

/* Keeps a first fragment's ports for the others. */
static void remember_ports(const struct transport *transport)
{
    if (transport->part != PART_FIRST || is_portless(transport->tuple.protocol))
        return;
    struct fragment key = fragment_key(transport);
    struct ports ports = {transport->tuple.source_port, transport->tuple.destination_port};
    fragments.update(&key, &ports);
}

/* The identification is in use again, and this time the datagram is not ours. */
static void forget_ports(const struct transport *transport)
{
    if (transport->part != PART_FIRST)
        return;
    struct fragment key = fragment_key(transport);
    fragments.delete(&key);
}
