/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * The tunnel to nodes that are not on-link: one VXLAN device, which wraps each packet for the node that the program
 * names, and tells who sent what it unwraps (bpf_skb_set_tunnel_key, bpf_skb_get_tunnel_key).
 */
#pragma once

#include "counters.h"
#include "deliver.h"
#include "maps.h"
#include "mark.h"
#include "parse.h"
#include "prefix.h"
#include "transport.h"
#include "wire.h"

/* struct bpf_tunnel_key, as it is since Linux 6.0; bcc's own copy is older. IPv4 addresses are in host byte order. */
struct tunnel_key {
    __u32 vni;
    union {
        __u32 remote_ipv4;
        struct addr remote_ipv6;
    };
    __u8 tos;
    __u8 ttl;
    __u16 flags;
    __u32 label;
    union {
        __u32 local_ipv4;
        struct addr local_ipv6;
    };
};

#define KEY_WITHOUT_LOCAL __builtin_offsetof(struct tunnel_key, local_ipv4) /* all there is before Linux 6.0 */

#define OUTER_TTL 64

static int (*set_tunnel_key)(struct __sk_buff *skb, struct tunnel_key *key, __u32 size,
                             __u64 flags) = (void *)BPF_FUNC_skb_set_tunnel_key;
static int (*get_tunnel_key)(struct __sk_buff *skb, struct tunnel_key *key, __u32 size,
                             __u64 flags) = (void *)BPF_FUNC_skb_get_tunnel_key;

static bool is_nobody(const struct addr *address)
{
    return !address->word[0] && !address->word[1] && !address->word[2] && !address->word[3];
}

/* Into the tunnel, past the host stack. `to_tunnel` does the rest. */
static int enter_tunnel(struct __sk_buff *skb, __u32 ifindex)
{
    skb->mark = FAST_MARK;
    skb->cb[0] = 0; /* not SEEN: it may have passed to_uplink */
    count(skb, OUTCOME(fwd_tunnel));
    return bpf_redirect(ifindex, 0);
}

/* For a pod's packet to a prefix that the tunnel leads to. */
static int leave_by_tunnel(struct __sk_buff *skb, struct packet *packet, const struct lanes *lanes)
{
    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    __u32 ifindex = lanes->tunnel;
    struct tunnel *tunnel = tunnels.lookup(&ifindex);

    if (!tunnel)
        return punt(skb, OUTCOME(punt_host));
    if (wire_size(skb, packet) > (lanes->mtu ?: tunnel->mtu))
        return punt(skb, OUTCOME(punt_too_big));
    if (packet->ttl <= 1)
        return punt(skb, OUTCOME(punt_ttl));
    data = (void *)(long)skb->data, end = (void *)(long)skb->data_end;
    if (data + ETH_HLEN + (packet->is_ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr)) > end)
        return punt(skb, OUTCOME(punt_malformed));
    decrement_ttl(data + ETH_HLEN, packet->is_ipv6);
    return enter_tunnel(skb, ifindex);
}

/*
 * By which of the node's addresses is it called? What goes to the node itself is wrapped for that very address: whoever
 * names another's as its own does not get to see what goes there. Over IPv6 there is less room, for which the MTU is
 * made only where nodes are called by IPv6.
 */
static const struct addr *called_at(const struct packet *packet, const struct tunnel *tunnel, const struct lanes *lanes)
{
    bool is_ipv4 = is_v4_mapped(&packet->destination);

    if (!(lanes->kind & PREFIX_NODE) || is_nobody(is_ipv4 ? &tunnel->ipv4 : &tunnel->ipv6))
        return &lanes->peer;
    return is_ipv4 || !is_v4_mapped(&lanes->peer) ? &packet->destination : &lanes->peer;
}

/*
 * Has it wrapped for the node that has the destination. All nodes' devices have one MAC address, to which it is sent;
 * the kernel drops what comes from its own (vxlan_set_mac), so the source is one that nobody has.
 */
static int wrap(struct __sk_buff *skb, const struct tunnel *tunnel, const struct addr *peer)
{
    struct tunnel_key key = {.vni = tunnel->vni, .ttl = OUTER_TTL};
    __u64 flags = BPF_F_ZERO_CSUM_TX; /* what is inside has its own; IPv6 demands one (RFC 8200 section 8.1) */
    __u8 macs[2 * ETH_ALEN];

    if (is_v4_mapped(peer)) {
        key.remote_ipv4 = bpf_ntohl(peer->word[3]);
        key.local_ipv4 = bpf_ntohl(tunnel->ipv4.word[3]);
    } else {
        key.remote_ipv6 = *peer;
        key.local_ipv6 = tunnel->ipv6;
        flags = BPF_F_TUNINFO_IPV6;
    }
    __builtin_memcpy(macs, tunnel->mac, ETH_ALEN);
    __builtin_memcpy(macs + ETH_ALEN, tunnel->mac, ETH_ALEN);
    macs[2 * ETH_ALEN - 1] ^= 1;
    int failed = bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0);
    if (failed)
        return failed;
    return set_tunnel_key(skb, &key, sizeof(key), flags) ? set_tunnel_key(skb, &key, KEY_WITHOUT_LOCAL, flags) : 0;
}

/* Who sent what was just unwrapped; false if it is not of our network, or nobody knows. */
static bool unwrapped_from(struct __sk_buff *skb, __u32 vni, struct addr *sender)
{
    struct tunnel_key key = {};

    if (get_tunnel_key(skb, &key, KEY_WITHOUT_LOCAL, 0) == 0)
        *sender = from_ipv4(bpf_htonl(key.remote_ipv4));
    else if (get_tunnel_key(skb, &key, KEY_WITHOUT_LOCAL, BPF_F_TUNINFO_IPV6) == 0)
        *sender = key.remote_ipv6;
    else
        return false;
    return key.vni == vni;
}

/* Does it not come from the node that has the source, among its pods' addresses or its own? */
static bool is_forged(struct __sk_buff *skb, const struct packet *packet)
{
    __u32 ifindex = skb->ifindex;
    struct tunnel *tunnel = tunnels.lookup(&ifindex);
    struct addr sender;

    if (!tunnel || !unwrapped_from(skb, tunnel->vni, &sender))
        return true;
    struct lanes *claimed = find_lanes(&packet->source), *known = find_lanes(&sender);
    return !claimed || !known || !(known->kind & PREFIX_NODE) || is_nobody(&known->peer) ||
           !same_address(&claimed->peer, &known->peer);
}

/* The UDP port of all nodes' tunnels, in host byte order; 0: there are none. */
static __u16 tunnel_port(void)
{
    __u32 zero = 0;
    struct settings *options = settings.lookup(&zero);

    return options ? options->tunnel_port : 0;
}

/* Would this, masqueraded, seem to come out of the node's own tunnel? */
static bool seems_wrapped(const struct transport *transport)
{
    __u16 port = tunnel_port();

    return port && transport->tuple.protocol == IPPROTO_UDP && !transport->quoted &&
           transport->tuple.destination_port == bpf_htons(port);
}

/*
 * Does the node forward, under its own name, what would seem to come out of its tunnel? The rules of a service make it
 * do that. What the node has wrapped, or sends itself, has come in by no device (skb_scrub_packet). Behind IPv6
 * extension headers there may be UDP, where nobody has looked.
 */
static bool is_passed_on(struct __sk_buff *skb, const struct packet *packet, const struct transport *transport,
                         bool known)
{
    if (!skb->ingress_ifindex)
        return false;
    if (known)
        return seems_wrapped(transport);
    return transport->part != PART_LATER && packet->is_ipv6 && is_extension(packet->protocol) && tunnel_port();
}
