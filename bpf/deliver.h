/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The last hop: into a local pod, as a router would, without the host stack. */
#pragma once

#include "counters.h"
#include "maps.h"
#include "mark.h"
#include "parse.h"

/*
 * By how much a hop changes the sum of an IPv6 header. Nothing in the packet makes up for that, so if the kernel keeps
 * the packet's sum (CHECKSUM_COMPLETE, of some network cards) that must be told.
 */
#define HOP_LIMIT_DIFFERENCE bpf_htons(0xfffe)

/* Takes one from the TTL or hop limit; the IPv4 checksum is updated, not recomputed (RFC 1624, eqn. 3). */
static void decrement_ttl(void *ip, bool is_ipv6)
{
    if (is_ipv6) {
        ((struct ipv6hdr *)ip)->hop_limit--;
        return;
    }
    struct iphdr *header = ip;
    __u32 checksum = header->check + bpf_htons(0x0100);
    header->check = checksum + (checksum >= 0xffff);
    header->ttl--;
}

/* Counts `outcome` if it is delivered. */
static int deliver(struct __sk_buff *skb, struct packet *packet, struct endpoint *endpoint, __u64 outcome)
{
    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct ethhdr *ethernet = data;

    /* The parser has seen this much; the verifier wants to see it too. */
    if (data + ETH_HLEN + (packet->is_ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr)) > end)
        return punt(skb, OUTCOME(punt_malformed));
    decrement_ttl(data + ETH_HLEN, packet->is_ipv6);
    /* It was sent to the host end's MAC, and every host end has the same: to the receiver we are its gateway. */
    __builtin_memcpy(ethernet->h_source, ethernet->h_dest, ETH_ALEN);
    __builtin_memcpy(ethernet->h_dest, endpoint->mac, ETH_ALEN);
    count(skb, outcome);
    if (endpoint->queued) {
        skb->mark = FAST_MARK;
        return bpf_redirect(endpoint->ifindex, 0);
    }
    return bpf_redirect_peer(endpoint->ifindex, 0);
}

/* For what has come in by a device that leads out. */
static int deliver_from_outside(struct __sk_buff *skb, struct packet *packet, struct endpoint *endpoint, __u64 outcome)
{
    if (packet->is_ipv6)
        bpf_csum_update(skb, HOP_LIMIT_DIFFERENCE);
    return deliver(skb, packet, endpoint, outcome);
}
