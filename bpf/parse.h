/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* From bytes to what the programs decide on. Bounds are checked here; nothing is judged but whether it can be read. */
#pragma once

#include "maps.h"

/* ARP for IPv4 over Ethernet (RFC 826). */
struct arp {
    __be16 hardware;
    __be16 protocol;
    __u8 hardware_size;
    __u8 protocol_size;
    __be16 operation;
    __u8 sender_mac[ETH_ALEN];
    __be32 sender;
    __u8 target_mac[ETH_ALEN];
    __be32 target;
} __attribute__((packed));

/* The start of a neighbour discovery message (RFC 4861); only advertisements and solicitations have the target. */
struct neighbour_message {
    __u8 type;
    __u8 code;
    __be16 checksum;
    __be32 flags;
    struct addr target;
};

enum kind {
    KIND_UNKNOWN,   /* an EtherType that podlane does not handle */
    KIND_MALFORMED, /* shorter than its headers say, or headers that contradict themselves */
    KIND_VLAN,
    KIND_ARP,
    KIND_IP,
};

/* The facts about one packet, of either family. For ARP, the source is the sender's protocol address. */
struct packet {
    struct addr source;
    struct addr destination;
    __u8 source_mac[ETH_ALEN];
    __u8 claimed_mac[ETH_ALEN]; /* the MAC inside an ARP message */
    __u32 size;                 /* of the Ethernet header and the IP packet: what is beyond is padding */
    __u32 header_end;           /* where the IP header ends, in the frame */
    __u8 ttl;
    __u8 protocol;    /* of what follows the IP header, or the first extension header of IPv6 */
    __u8 is_fragment; /* any but a whole packet */
    __u8 has_options; /* IPv4 options or an IPv6 hop-by-hop header: every router must look */
    __u8 via_stack;   /* this and the next three are of the source's endpoint; see maps.h */
    __u8 native;
    __u32 network;
    __u32 shaper;
    __u8 serves;           /* likewise */
    __u8 is_ipv6;          /* the header's family, not the addresses' looks */
    __u8 neighbour_type;   /* the ICMPv6 type if this is neighbour discovery, else 0 */
    struct addr neighbour; /* its target, if it has one */
};

/*
 * One entry: what this CPU's program finds out about its packet. With softirqs off, as hooks run, no other packet comes
 * before it is done (but with PREEMPT_RT, where the agent does not start). It is in a map rather than on the stack
 * since of values in a map the verifier remembers nothing: it follows each path once, not once for each combination of
 * what was found out before, a fifteenth of the work.
 */
BPF_TABLE("percpu_array", __u32, struct packet, packets, 1);

/* A packet of which nothing is known yet. Never 0, though the verifier wants to be told. */
static struct packet *new_packet(void)
{
    __u32 zero = 0;
    struct packet *packet = packets.lookup(&zero);

    if (packet)
        __builtin_memset(packet, 0, sizeof(*packet));
    return packet;
}

/* Of an IPv4 header's fragment field: more fragments, or an offset. */
#define IPV4_FRAGMENT bpf_htons(0x3fff)

#define IPV6_PREFIX_MAPPED bpf_htonl(0x0000ffff)

/* ICMPv6 types of neighbour discovery (RFC 4861 section 4); UAPI headers do not have them. */
#define ND_ROUTER_SOLICITATION     133
#define ND_ROUTER_ADVERTISEMENT    134
#define ND_NEIGHBOUR_ADVERTISEMENT 136
#define ND_REDIRECT                137

static struct addr from_ipv4(__be32 address)
{
    struct addr mapped = {.word = {0, 0, IPV6_PREFIX_MAPPED, address}};
    return mapped;
}

static struct addr from_ipv6(const struct in6_addr *address)
{
    struct addr copy;
    __builtin_memcpy(&copy, address, sizeof(copy));
    return copy;
}

static bool is_v4_mapped(const struct addr *address)
{
    return !address->word[0] && !address->word[1] && address->word[2] == IPV6_PREFIX_MAPPED;
}

static bool same_address(const struct addr *a, const struct addr *b)
{
    return a->word[0] == b->word[0] && a->word[1] == b->word[1] && a->word[2] == b->word[2] && a->word[3] == b->word[3];
}

/*
 * IPv6 headers may not hold v4-mapped addresses (draft-itojun-v6ops-v4mapped-harmful); the maps do, so such a packet
 * could pass for an IPv4 one.
 */
static bool has_mapped_address(const struct packet *packet)
{
    return packet->is_ipv6 && (is_v4_mapped(&packet->source) || is_v4_mapped(&packet->destination));
}

/* 224.0.0.0/4, 255.255.255.255 or ff00::/8. Subnet broadcasts do not exist here: pods have /32 addresses. */
static bool is_multicast(const struct packet *packet)
{
    const struct addr *address = &packet->destination;

    if (packet->is_ipv6)
        return (address->word[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000);
    return (address->word[3] & bpf_htonl(0xf0000000)) == bpf_htonl(0xe0000000) || address->word[3] == ~0u;
}

/* fe80::/10: never leaves its link (RFC 4291 section 2.5.6), and each pod is a link of its own. */
static bool is_link_local(const struct addr *address)
{
    return (address->word[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* The headers of IPv6 that others may follow (IANA's list of them), but those that nobody uses. */
static bool is_extension(__u8 protocol)
{
    return protocol == IPPROTO_HOPOPTS || protocol == IPPROTO_ROUTING || protocol == IPPROTO_FRAGMENT ||
           protocol == IPPROTO_AH || protocol == IPPROTO_DSTOPTS || protocol == IPPROTO_MH;
}

static enum kind parse_arp(struct __sk_buff *skb, struct packet *packet)
{
    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct arp *arp = data + ETH_HLEN;

    if ((void *)(arp + 1) > end)
        return KIND_MALFORMED;
    if (arp->protocol != bpf_htons(ETH_P_IP) || arp->hardware_size != ETH_ALEN || arp->protocol_size != 4)
        return KIND_UNKNOWN;
    __builtin_memcpy(packet->claimed_mac, arp->sender_mac, ETH_ALEN);
    /* A probe (RFC 5227) has no sender yet: it speaks for the address that it asks about. */
    packet->source = from_ipv4(arp->sender ? arp->sender : arp->target);
    return KIND_ARP;
}

static enum kind parse_ipv4(struct __sk_buff *skb, struct packet *packet)
{
    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct iphdr *ip = data + ETH_HLEN;

    if ((void *)(ip + 1) > end)
        return KIND_MALFORMED;
    __u32 size = bpf_ntohs(ip->tot_len), header = ip->ihl * 4;
    if (!size && skb->gso_segs) /* BIG TCP: too big for the field (kernel 6.3) */
        size = skb->len - ETH_HLEN;
    if (ip->version != 4 || header < sizeof(*ip) || size < header || size > skb->len - ETH_HLEN)
        return KIND_MALFORMED;
    packet->source = from_ipv4(ip->saddr);
    packet->destination = from_ipv4(ip->daddr);
    packet->size = ETH_HLEN + size;
    packet->header_end = ETH_HLEN + header;
    packet->ttl = ip->ttl;
    packet->protocol = ip->protocol;
    packet->is_fragment = (ip->frag_off & IPV4_FRAGMENT) != 0;
    packet->has_options = header > sizeof(*ip);
    return KIND_IP;
}

static void parse_neighbour_message(struct __sk_buff *skb, struct packet *packet)
{
    struct neighbour_message message = {};
    __u32 offset = ETH_HLEN + sizeof(struct ipv6hdr);

    if (bpf_skb_load_bytes(skb, offset, &message, sizeof(message)) < 0 &&
        bpf_skb_load_bytes(skb, offset, &message, __builtin_offsetof(struct neighbour_message, target)) < 0)
        return;
    if (message.type < ND_ROUTER_SOLICITATION || message.type > ND_REDIRECT)
        return;
    packet->neighbour_type = message.type;
    packet->neighbour = message.target;
}

static enum kind parse_ipv6(struct __sk_buff *skb, struct packet *packet)
{
    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct ipv6hdr *ip = data + ETH_HLEN;

    if ((void *)(ip + 1) > end)
        return KIND_MALFORMED;
    __u32 size = bpf_ntohs(ip->payload_len);
    if (ip->version != 6 || size > skb->len - ETH_HLEN - sizeof(*ip))
        return KIND_MALFORMED;
    packet->is_ipv6 = 1;
    packet->header_end = ETH_HLEN + sizeof(*ip);
    packet->size = size || !skb->gso_segs ? packet->header_end + size : skb->len; /* 0: BIG TCP, as with IPv4 */
    packet->source = from_ipv6(&ip->saddr);
    packet->destination = from_ipv6(&ip->daddr);
    packet->ttl = ip->hop_limit;
    packet->protocol = ip->nexthdr;
    packet->is_fragment = ip->nexthdr == IPPROTO_FRAGMENT;
    packet->has_options = ip->nexthdr == IPPROTO_HOPOPTS;
    if (ip->nexthdr == IPPROTO_ICMPV6)
        parse_neighbour_message(skb, packet);
    return KIND_IP;
}

/* Makes the headers directly readable. They nearly always are; packets from packet sockets may not be. */
static bool pull_headers(struct __sk_buff *skb)
{
    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    __u32 wanted = ETH_HLEN + sizeof(struct ipv6hdr);

    if (skb->len < wanted)
        wanted = skb->len;
    if (data + wanted <= end)
        return true;
    return bpf_skb_pull_data(skb, wanted) == 0;
}

static enum kind parse(struct __sk_buff *skb, struct packet *packet)
{
    if (!pull_headers(skb))
        return KIND_MALFORMED;

    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct ethhdr *ethernet = data;

    if ((void *)(ethernet + 1) > end)
        return KIND_MALFORMED;
    __builtin_memcpy(packet->source_mac, ethernet->h_source, ETH_ALEN);

    if (skb->vlan_present)
        return KIND_VLAN;
    switch (bpf_ntohs(ethernet->h_proto)) {
    case ETH_P_IP:
        return parse_ipv4(skb, packet);
    case ETH_P_IPV6:
        return parse_ipv6(skb, packet);
    case ETH_P_ARP:
        return parse_arp(skb, packet);
    case ETH_P_8021Q:
    case ETH_P_8021AD:
        return KIND_VLAN;
    default:
        return KIND_UNKNOWN;
    }
}
