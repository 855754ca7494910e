/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * ICMP and ICMPv6 errors (RFC 5508 section 4). An error quotes a packet, belongs to that packet's flow and travels
 * against it: like the flow's packets in the other direction, so its tuple is the quoted packet's, reversed.
 */
#pragma once

#include "fragments.h"
#include "maps.h"
#include "parse.h"
#include "rewrite.h"
#include "transport.h"

#define ICMPV4_UNREACHABLE       3
#define ICMPV4_TIME_EXCEEDED     11
#define ICMPV4_PARAMETER_PROBLEM 12
#define ICMPV6_UNREACHABLE       1
#define ICMPV6_PARAMETER_PROBLEM 4 /* between them: packet too big, time exceeded */

/* Of every error, before what it quotes. */
#define ICMP_HEADER   8
#define ICMP_CHECKSUM 2 /* where it stands in there */

static bool is_error(struct __sk_buff *skb, const struct packet *packet)
{
    __u8 type;

    if (packet->protocol != (packet->is_ipv6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP) ||
        bpf_skb_load_bytes(skb, packet->header_end, &type, sizeof(type)) < 0)
        return false;
    if (packet->is_ipv6)
        return type >= ICMPV6_UNREACHABLE && type <= ICMPV6_PARAMETER_PROBLEM;
    return type == ICMPV4_UNREACHABLE || type == ICMPV4_TIME_EXCEEDED || type == ICMPV4_PARAMETER_PROBLEM;
}

/* Reads the quoted IP header, and returns where its payload begins, or 0. */
static __u32 parse_quoted_ipv4(struct __sk_buff *skb, struct transport *transport, __u32 offset)
{
    struct iphdr ip;

    if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)) < 0 || ip.version != 4 || ip.ihl * 4 < sizeof(ip))
        return 0;
    transport->tuple.source = from_ipv4(ip.saddr);
    transport->tuple.destination = from_ipv4(ip.daddr);
    transport->tuple.protocol = ip.protocol;
    transport->quoted_end = ip.frag_off & IPV4_FRAGMENT ? 0 : offset + bpf_ntohs(ip.tot_len);
    return parse_fragment_fields(skb, transport, offset, offset + ip.ihl * 4);
}

static __u32 parse_quoted_ipv6(struct __sk_buff *skb, struct transport *transport, __u32 offset)
{
    struct ipv6hdr ip;

    if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)) < 0 || ip.version != 6)
        return 0;
    transport->tuple.source = from_ipv6(&ip.saddr);
    transport->tuple.destination = from_ipv6(&ip.daddr);
    transport->tuple.protocol = ip.nexthdr;
    if (ip.nexthdr == IPPROTO_FRAGMENT)
        return parse_fragment_header(skb, transport, offset + sizeof(ip));
    transport->quoted_end = offset + sizeof(ip) + bpf_ntohs(ip.payload_len);
    return offset + sizeof(ip);
}

/* Of an ICMP error, the part of `identify`. Only the quoted packet's sender is told of its errors. */
static bool identify_error(struct __sk_buff *skb, const struct packet *packet, struct transport *transport)
{
    if (!is_error(skb, packet))
        return false;
    transport->quoted = packet->header_end + ICMP_HEADER;
    __u32 payload = packet->is_ipv6 ? parse_quoted_ipv6(skb, transport, transport->quoted)
                                    : parse_quoted_ipv4(skb, transport, transport->quoted);
    bool hides_ports = transport->part == PART_LATER && !is_portless(transport->tuple.protocol);
    bool has_flow = payload && !hides_ports && parse_ports(skb, packet, transport, payload);
    /* These would be of the error itself. */
    transport->part = PART_WHOLE;
    transport->tcp_flags = 0;
    if (!has_flow)
        return false;
    transport->tuple = reversed(&transport->tuple);
    __u32 source_port = transport->port_offset[0];
    transport->port_offset[0] = transport->port_offset[1];
    transport->port_offset[1] = source_port;
    return same_address(&transport->tuple.destination, &packet->destination);
}

/* Changes 16 bits of what an error quotes, and its own checksum with them. */
static int rewrite_quoted(struct __sk_buff *skb, const struct packet *packet, __u32 offset, __be16 old, __be16 new)
{
    return bpf_skb_store_bytes(skb, offset, &new, sizeof(new), 0)
               ?: bpf_l4_csum_replace(skb, packet->header_end + ICMP_CHECKSUM, old, new, sizeof(new));
}

static int rewrite_quoted_address(struct __sk_buff *skb, const struct packet *packet, __u32 quoted, enum side side,
                                  struct addr *new, __s64 difference)
{
    __u32 offset = quoted + address_offset(packet->is_ipv6, side);

    if (packet->is_ipv6)
        return bpf_skb_store_bytes(skb, offset, new, sizeof(*new), 0)
                   ?: bpf_l4_csum_replace(skb, packet->header_end + ICMP_CHECKSUM, 0, difference, 0);
    /* The quoted header's own checksum makes up for the address: the error's stays as it is. */
    return bpf_skb_store_bytes(skb, offset, &new->word[3], sizeof(new->word[3]), 0)
               ?: bpf_l3_csum_replace(skb, quoted + __builtin_offsetof(struct iphdr, check), 0, difference, 0);
}

/* `difference` is what the ports and, if the checksum covers them, the addresses have changed by. */
static int rewrite_quoted_checksum(struct __sk_buff *skb, const struct packet *packet,
                                   const struct transport *transport, __s64 difference)
{
    __be16 old, new;

    if (!transport->checksum_offset)
        return 0; /* beyond what is quoted */
    int failed = bpf_skb_load_bytes(skb, transport->checksum_offset, &old, sizeof(old));
    bool may_be_absent = transport->checksum_flags & BPF_F_MARK_MANGLED_0;
    if (failed || (may_be_absent && !old))
        return failed;
    new = updated_checksum(old, difference);
    if (may_be_absent && !new)
        new = 0xffff;
    return rewrite_quoted(skb, packet, transport->checksum_offset, old, new);
}

/*
 * Changes one side of the flow that an error belongs to: inside, where it is the other side, and outside, unless a
 * router in between has sent the error.
 */
static int rewrite_error(struct __sk_buff *skb, struct packet *packet, struct transport *transport, enum side side,
                         struct addr *address, __be16 port)
{
    struct addr *old = side == SIDE_SOURCE ? &transport->tuple.source : &transport->tuple.destination;
    __be16 old_port = side == SIDE_SOURCE ? transport->tuple.source_port : transport->tuple.destination_port;
    __u32 port_offset = transport->port_offset[side == SIDE_DESTINATION];
    struct transport outside = {.checksum_offset = packet->header_end + ICMP_CHECKSUM,
                                .covers_addresses = packet->is_ipv6};
    __s64 difference = bpf_csum_diff(old->word, sizeof(*old), address->word, sizeof(*address), 0);
    enum side quoted_side = side == SIDE_SOURCE ? SIDE_DESTINATION : SIDE_SOURCE;
    int failed = 0;

    if (!port_offset && !is_portless(transport->tuple.protocol))
        return -EINVAL;
    if (same_address(side == SIDE_SOURCE ? &packet->source : &packet->destination, old))
        failed = rewrite_address(skb, &outside, packet->is_ipv6, side, old, address);
    if (!failed)
        failed = rewrite_quoted_address(skb, packet, transport->quoted, quoted_side, address, difference);
    if (!failed && port_offset)
        failed = rewrite_quoted(skb, packet, port_offset, old_port, port);
    if (failed)
        return failed;
    if (transport->tuple.protocol == IPPROTO_SCTP)
        note_sctp_port(transport, quoted_side, old_port, port);
    __s64 change = (__u16)~old_port + port + (transport->covers_addresses ? difference : 0);
    return rewrite_quoted_checksum(skb, packet, transport, change);
}
