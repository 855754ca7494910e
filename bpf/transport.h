/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Ports, checksum and flags of what can be masqueraded: TCP, UDP, SCTP, and ICMP echo, whose identifier plays the port.
 * What encapsulates other packets has no ports, and no checksum over addresses: it is told apart by addresses alone.
 */
#pragma once

#include "maps.h"
#include "parse.h"

enum part {
    PART_WHOLE,
    PART_FIRST, /* fragment, with the ports */
    PART_LATER, /* fragment, without them */
};

/* Which flow a packet belongs to, and what of it has to change with the flow's addresses. Offsets are of the frame. */
struct transport {
    struct tuple tuple;
    __u32 port_offset[2];  /* of the source and of the destination port; 0: it is not there */
    __u32 checksum_offset; /* 0: it is not there */
    __u32 checksum_flags;  /* for bpf_l4_csum_replace, beside the size */
    __u32 crc_offset;      /* of SCTP's checksum; 0: it is not there, or nobody knows what it covers */
    __u32 crc_bytes;       /* that it covers, from the ports on */
    __be32 ports_change;   /* by which bits SCTP's ports have changed, both: the CRC does not know of it yet */
    __u32 quoted;          /* of an ICMP error: where the packet begins that it quotes. Offsets and tuple are of that */
    __u32 quoted_end;      /* where that one would end if all of it were quoted; 0 if it is a fragment */
    __be32 identification; /* of a fragment */
    __u8 part;             /* PART_* */
    __u8 complete;         /* all of the transport header is there */
    __u8 covers_addresses; /* the checksum includes the pseudo header */
    __u8 unchecked;        /* no checksum changes with the rest: of a later fragment, UDP without one, or SCTP */
    __u8 tcp_flags;        /* of the TCP header, else 0 */
};

/* One entry, for the same reason as `packets`. */
BPF_TABLE("percpu_array", __u32, struct transport, transports, 1);

/* The same as `new_packet`. */
static struct transport *new_transport(void)
{
    __u32 zero = 0;
    struct transport *transport = transports.lookup(&zero);

    if (transport)
        __builtin_memset(transport, 0, sizeof(*transport));
    return transport;
}

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define ICMPV4_ECHO_REPLY   0
#define ICMPV4_ECHO_REQUEST 8
#define ICMPV6_ECHO_REQUEST 128
#define ICMPV6_ECHO_REPLY   129

#define SCTP_HEADER   12 /* RFC 9260 section 3.1 */
#define SCTP_CHECKSUM 8  /* where it stands in there */

/* How much of a transport header every ICMP error quotes (RFC 792), and an echo message has at least. */
#define TRANSPORT_START 8

/* What encapsulates other packets (RFC 2784, 4303, 2003, 4213 and 3931). */
static bool is_portless(__u8 protocol)
{
    switch (protocol) {
    case IPPROTO_GRE:
    case IPPROTO_ESP:
    case IPPROTO_IPIP:
    case IPPROTO_IPV6:
    case IPPROTO_L2TP:
        return true;
    default:
        return false;
    }
}

/* For which the configuration says what to do (OTHER_*). */
static bool is_other(__u8 protocol, bool is_ipv6)
{
    return protocol != IPPROTO_TCP && protocol != IPPROTO_UDP && protocol != (is_ipv6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP);
}

static void take_ports(struct transport *transport, __u32 offset, const __be16 *start)
{
    transport->tuple.source_port = start[0];
    transport->tuple.destination_port = start[1];
    transport->port_offset[0] = offset;
    transport->port_offset[1] = offset + sizeof(__be16);
    transport->covers_addresses = 1;
}

static bool parse_tcp(struct __sk_buff *skb, const struct packet *packet, struct transport *transport, __u32 offset,
                      const __be16 *start)
{
    __u32 checksum = offset + __builtin_offsetof(struct tcphdr, check);

    take_ports(transport, offset, start);
    if (checksum + sizeof(__be16) <= packet->size)
        transport->checksum_offset = checksum;
    transport->complete = offset + sizeof(struct tcphdr) <= packet->size;
    if (!transport->complete)
        return true;
    return bpf_skb_load_bytes(skb, offset + 13, &transport->tcp_flags, sizeof(transport->tcp_flags)) == 0;
}

static bool parse_udp(struct transport *transport, __u32 offset, const __be16 *start)
{
    take_ports(transport, offset, start);
    transport->checksum_offset = offset + __builtin_offsetof(struct udphdr, check);
    transport->complete = 1;
    transport->unchecked = !start[3];
    transport->checksum_flags = BPF_F_MARK_MANGLED_0; /* none (0) stays none, and none comes to be */
    return true;
}

/* Its CRC32c covers ports, but no addresses. In a fragment it covers more than anybody knows the length of. */
static bool parse_sctp(const struct packet *packet, struct transport *transport, __u32 offset, const __be16 *start)
{
    take_ports(transport, offset, start);
    transport->covers_addresses = 0;
    transport->unchecked = 1;
    transport->complete = offset + SCTP_HEADER <= packet->size;
    __u32 end = transport->quoted ? transport->quoted_end : packet->is_fragment ? 0 : packet->size;
    if (!transport->complete || !end)
        return true;
    transport->crc_offset = offset + SCTP_CHECKSUM;
    transport->crc_bytes = end - offset;
    return true;
}

/* A request comes from the port that is its identifier, and a reply goes there. */
static bool parse_echo(const struct packet *packet, struct transport *transport, __u32 offset, const __be16 *start)
{
    __u8 type = *(const __u8 *)start;
    bool is_reply = type == (packet->is_ipv6 ? ICMPV6_ECHO_REPLY : ICMPV4_ECHO_REPLY);

    if (!is_reply && type != (packet->is_ipv6 ? ICMPV6_ECHO_REQUEST : ICMPV4_ECHO_REQUEST))
        return false;
    if (is_reply) {
        transport->tuple.destination_port = start[2];
        transport->port_offset[1] = offset + 4;
    } else {
        transport->tuple.source_port = start[2];
        transport->port_offset[0] = offset + 4;
    }
    transport->complete = 1;
    transport->checksum_offset = offset + 2;
    transport->covers_addresses = packet->is_ipv6; /* RFC 4443 section 2.3, unlike RFC 792 */
    return true;
}

/*
 * Reads a transport header, of the tuple's protocol, at `offset`. Of TCP, what is beyond the first eight bytes may be
 * missing, and with it the checksum. False if ports cannot be had.
 */
static bool parse_ports(struct __sk_buff *skb, const struct packet *packet, struct transport *transport, __u32 offset)
{
    __be16 start[TRANSPORT_START / sizeof(__be16)];

    if (is_portless(transport->tuple.protocol)) {
        transport->unchecked = transport->complete = 1;
        return offset <= packet->size; /* what is beyond is padding, though it may look like more of a quoted header */
    }
    if (offset + sizeof(start) > packet->size || bpf_skb_load_bytes(skb, offset, start, sizeof(start)) < 0)
        return false;
    switch (transport->tuple.protocol) {
    case IPPROTO_TCP:
        return parse_tcp(skb, packet, transport, offset, start);
    case IPPROTO_UDP:
        return parse_udp(transport, offset, start);
    case IPPROTO_SCTP:
        return parse_sctp(packet, transport, offset, start);
    case IPPROTO_ICMP:
        return !packet->is_ipv6 && parse_echo(packet, transport, offset, start);
    case IPPROTO_ICMPV6:
        return packet->is_ipv6 && parse_echo(packet, transport, offset, start);
    default:
        return false;
    }
}

static bool opens_connection(const struct transport *transport)
{
    return (transport->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
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
