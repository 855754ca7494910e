/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Every struct and map that the datapath shares with the agent: the ABI, in this one place. The agent derives
 * all layouts from what the compiler reports of these declarations. Maps are declared with one entry; the
 * agent sets their real sizes from its configuration when it creates them.
 */
#pragma once

/* An IPv6 address, or an IPv4 one v4-mapped (::ffff:a.b.c.d, RFC 4291 section 2.5.5.2), in network byte
 * order. */
struct addr {
    __be32 word[4];
};

/* A local pod: the host end of its veth pair, and the MAC address of its own end. */
struct endpoint {
    __u32 ifindex;
    __u8 mac[ETH_ALEN];
    __u16 reserved; /* zero; keeps the padding explicit */
};

/* Packets and bytes as the device counts them: a GSO packet is one packet with all its bytes. */
struct counter {
    __u64 packets;
    __u64 bytes;
};

/*
 * What became of a packet. Each program run counts exactly one of these; the names are the values of the
 * metrics' `outcome` label, and README.md in this folder says what each means to an operator.
 */
struct outcomes {
    struct counter fwd_local;      /* from_pod: handed to another local pod, past the host stack */
    struct counter fwd_from_stack; /* to_pod: the host stack sent it to a pod */

    struct counter punt_arp;
    struct counter punt_host;
    struct counter punt_link_local;
    struct counter punt_malformed;
    struct counter punt_multicast;
    struct counter punt_options;
    struct counter punt_other_mac;
    struct counter punt_ttl;
    struct counter punt_unknown_protocol;

    struct counter drop_mapped_address;
    struct counter drop_spoofed_address;
    struct counter drop_spoofed_arp;
    struct counter drop_spoofed_mac;
    struct counter drop_spoofed_neighbour;
    struct counter drop_vlan;
};

/* The addresses of the local pods. Written by the agent, read by every program. */
BPF_TABLE("hash", struct addr, struct endpoint, endpoints, 1);

/* One entry: the counters of this CPU. */
BPF_TABLE("percpu_array", __u32, struct outcomes, outcomes, 1);
