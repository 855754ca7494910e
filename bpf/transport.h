/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Ports and flags of what can be masqueraded: TCP, UDP, and ICMP echo, whose identifier plays the port. */
#pragma once

#include "maps.h"
#include "parse.h"

struct transport {
    struct tuple tuple;
    __u32 port_offset[2];    /* of the source and of the destination port, from the start of the frame */
    __u32 checksum_offset;   /* 0 where there is none */
    __u32 checksum_flags;    /* for bpf_l4_csum_replace, beside the size */
    __u8 covers_addresses;   /* the checksum includes the pseudo header */
    __u8 tcp_flags;          /* of the TCP header, else 0 */
};

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define ICMPV4_ECHO_REPLY   0
#define ICMPV4_ECHO_REQUEST 8
#define ICMPV6_ECHO_REQUEST 128
#define ICMPV6_ECHO_REPLY   129

#define IPPROTO_ICMP6 58

static __u32 transport_offset(const struct packet *packet)
{
    return ETH_HLEN + (packet->is_ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr));
}

static bool parse_tcp(struct __sk_buff *skb, struct transport *transport, __u32 offset)
{
    struct tcphdr header;

    if (bpf_skb_load_bytes(skb, offset, &header, sizeof(header)) < 0)
        return false;
    transport->tuple.source_port = header.source;
    transport->tuple.destination_port = header.dest;
    transport->port_offset[0] = offset + __builtin_offsetof(struct tcphdr, source);
    transport->port_offset[1] = offset + __builtin_offsetof(struct tcphdr, dest);
    transport->checksum_offset = offset + __builtin_offsetof(struct tcphdr, check);
    transport->covers_addresses = 1;
    transport->tcp_flags = ((__u8 *)&header)[13];
    return true;
}

static bool parse_udp(struct __sk_buff *skb, struct transport *transport, __u32 offset)
{
    struct udphdr header;

    if (bpf_skb_load_bytes(skb, offset, &header, sizeof(header)) < 0)
        return false;
    transport->tuple.source_port = header.source;
    transport->tuple.destination_port = header.dest;
    transport->port_offset[0] = offset + __builtin_offsetof(struct udphdr, source);
    transport->port_offset[1] = offset + __builtin_offsetof(struct udphdr, dest);
    transport->checksum_offset = offset + __builtin_offsetof(struct udphdr, check);
    transport->checksum_flags = BPF_F_MARK_MANGLED_0; /* none (0) stays none, and none comes to be */
    transport->covers_addresses = 1;
    return true;
}

static bool parse_echo(struct __sk_buff *skb, struct transport *transport, __u32 offset, bool is_ipv6)
{
    struct {
        __u8 type;
        __u8 code;
        __be16 checksum;
        __be16 identifier;
    } header;

    if (bpf_skb_load_bytes(skb, offset, &header, sizeof(header)) < 0)
        return false;
    if (header.type != (is_ipv6 ? ICMPV6_ECHO_REQUEST : ICMPV4_ECHO_REQUEST) &&
        header.type != (is_ipv6 ? ICMPV6_ECHO_REPLY : ICMPV4_ECHO_REPLY))
        return false;
    transport->tuple.source_port = header.identifier;
    transport->tuple.destination_port = header.identifier;
    transport->port_offset[0] = transport->port_offset[1] = offset + 4;
    transport->checksum_offset = offset + 2;
    transport->covers_addresses = is_ipv6; /* RFC 4443 section 2.3, unlike RFC 792 */
    return true;
}

/* Fills in the transport part; false if the packet's kind cannot be told apart by ports. */
static bool parse_transport(struct __sk_buff *skb, const struct packet *packet, struct transport *transport)
{
    __u32 offset = transport_offset(packet);

    transport->tuple.source = packet->source;
    transport->tuple.destination = packet->destination;
    transport->tuple.protocol = packet->protocol;
    if (packet->is_fragment || packet->has_options)
        return false;
    switch (packet->protocol) {
    case IPPROTO_TCP:
        return parse_tcp(skb, transport, offset);
    case IPPROTO_UDP:
        return parse_udp(skb, transport, offset);
    case IPPROTO_ICMP:
        return !packet->is_ipv6 && parse_echo(skb, transport, offset, false);
    case IPPROTO_ICMP6:
        return packet->is_ipv6 && parse_echo(skb, transport, offset, true);
    default:
        return false;
    }
}

static struct tuple reversed(const struct tuple *tuple)
{
    struct tuple other = {
        .source = tuple->destination,
        .destination = tuple->source,
        .source_port = tuple->destination_port,
        .destination_port = tuple->source_port,
        .protocol = tuple->protocol,
    };
    return other;
}
