/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Every struct and map that the datapath shares with the agent: the ABI, in this one place. The agent derives
 * all layouts from what the compiler reports of these declarations. Maps are declared with one entry; the
 * agent sets their real sizes from its configuration when it creates them.
 */
#pragma once

/* Address families; no UAPI header has them. */
#define AF_INET  2
#define AF_INET6 10

/* An IPv6 address, or an IPv4 one v4-mapped (::ffff:a.b.c.d, RFC 4291 section 2.5.5.2), in network byte
 * order. */
struct addr {
    __be32 word[4];
};

/* A local pod: the host end of its veth pair, and the MAC address of its own end. */
struct endpoint {
    __u32 ifindex;
    __u8 mac[ETH_ALEN];
    __u8 via_stack; /* written by the datapath: some flow of this pod's is in `stack_flows` */
    __u8 native;    /* 1: never masqueraded, as its network's configuration says */
    __u32 network;  /* 0: the flat network of all pods; else one of its own, to which no other is routed */
    __u32 shaper;   /* the device through whose queue all goes that it sends; 0: it sends without a limit */
    __u8 queued;    /* 1: what it receives passes the queue of its host end, which is limited */
    __u8 reserved[3];
};

/*
 * A flow as one of its packets shows it. For ICMP echo, the port of the side that asks is the identifier and the other
 * one is 0, so that a request and its reply are each other's reverse, and no reply can be taken for a request.
 */
struct tuple {
    struct addr source;
    struct addr destination;
    __be16 source_port;
    __be16 destination_port;
    __u8 protocol; /* of the IP header; reserved is zero */
    __u8 reserved[3];
};

/* A masqueraded flow, under the tuple of the pod's packets: whom it passes for, and how far it has come. */
struct flow {
    struct addr address; /* the node's */
    __be16 port;
    __u8 state; /* FLOW_* */
    __u8 reserved;
    __u32 checked; /* when the other half was last known to be there, in units of 2^30 ns */
    __u64 seen;    /* of the last packet in either direction: bpf_ktime_get_coarse_ns */
};

/* The other half, under the tuple of the answers: who is meant. Its creation is what allocates the port. */
struct owner {
    struct addr address; /* the pod's */
    __be16 port;
    __u8 reserved[2];
};

/* A datagram that comes in fragments (RFC 791; IPv6: RFC 8200 section 4.5), and the ports that only the first has. */
struct fragment {
    struct addr source;
    struct addr destination;
    __be32 identification;
    __u8 protocol;
    __u8 reserved[3];
};

struct ports {
    __be16 source;
    __be16 destination;
};

/* An outsider's first packets to a pod's own address. Times are bpf_ktime_get_coarse_ns. */
struct note {
    __u64 seen;
    __u8 answered; /* the pod has sent something back */
    __u8 reserved[7];
};

/* A device that leads out, and whom its packets pass for where the kernel cannot say (before Linux 6.7). */
struct uplink {
    struct addr ipv4;
    struct addr ipv6;
};

/* The device that leads to nodes that are not on-link, and what the node itself is to them. */
struct tunnel {
    struct addr ipv4; /* the node's addresses, of the families that it has; else 0 */
    struct addr ipv6;
    __u32 vni;
    __u32 mtu; /* of the packets inside */
    __u8 mac[ETH_ALEN];
    __u8 reserved[2];
};

/* How packets to a prefix are treated. */
struct lanes {
    struct addr peer; /* the node that has it, as the others call it; else 0 */
    __u32 tunnel;     /* the device that leads there, in `tunnels`; else 0 */
    __u32 mtu;        /* of the way through the tunnel, where it is less than the tunnel's own; else 0 */
    __u8 kind;        /* PREFIX_* */
    __u8 reserved[7];
};

/*
 * What the agent's configuration sets. Time-outs are in seconds. Until it is written (last_port is 0), all that is not
 * for a local pod goes through the host stack.
 */
struct settings {
    __u32 first_port;
    __u32 last_port;
    __u32 tcp_open;        /* after SYN, before the answer (RFC 5382 REQ-5: transitory) */
    __u32 tcp_established; /* RFC 5382 REQ-5 */
    __u32 tcp_closed;      /* after RST, or FIN from both sides */
    __u32 udp;             /* RFC 4787 REQ-5 */
    __u32 icmp;            /* RFC 5508 REQ-2 */
    __u32 other;           /* of other protocols */
    __u32 other_protocols; /* OTHER_* */
    __u32 stack_routes;    /* 1: what leaves the node goes through the host stack */
    __u32 tunnel_port;     /* UDP port of all nodes' tunnels; 0: there are none */
};

/* What becomes of pods' packets to the world that are neither TCP, UDP nor ICMP. */
#define OTHER_DROP       0
#define OTHER_MASQUERADE 1 /* those that can be; see transport.h */
#define OTHER_STACK      2 /* left to the host stack, and not changed after it */

/* A prefix for the longest-prefix-match maps; IPv4 lengths count the 96 bits of the mapping. */
struct prefix {
    __u32 length;
    struct addr address;
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
    struct counter fwd_uplink;     /* from_pod: sent out by an uplink, past the host stack */
    struct counter fwd_tunnel;     /* from_pod, to_uplink: into the tunnel, past the host stack */
    struct counter fwd_shaped;     /* from_pod: to the queue of a limited pod, and from there to the host stack */
    struct counter fwd_from_stack; /* to_pod: the host stack sent it to a pod */
    struct counter fwd_queued;     /* to_pod: what another program sent to a limited pod, at its queue */
    struct counter fwd_inbound;    /* from_uplink: for a pod's own address */
    struct counter fwd_host_in;    /* from_uplink: not for a pod */
    struct counter fwd_host_out;   /* to_uplink: not from a pod */
    struct counter fwd_native;     /* to_uplink: to where masquerading does not apply */
    struct counter fwd_reply;      /* to_uplink: answers a flow that the other side opened */
    struct counter fwd_to_peer;    /* to_tunnel: on its way to the node that has the destination */
    struct counter fwd_from_peer;  /* from_tunnel: for a pod's own address */
    struct counter fwd_peer_host;  /* from_tunnel: not for a pod */

    struct counter masq_in;  /* from_uplink: an answer, given back to its pod */
    struct counter masq_out; /* to_uplink: now the node's */

    struct counter punt_arp;
    struct counter punt_fragment; /* from_uplink: a later one, and its first was for no pod */
    struct counter punt_host;
    struct counter punt_link_local;
    struct counter punt_malformed;
    struct counter punt_multicast;
    struct counter punt_no_route;
    struct counter punt_options;
    struct counter punt_other_mac;
    struct counter punt_reply;
    struct counter punt_too_big;
    struct counter punt_ttl;
    struct counter punt_unknown_protocol;

    struct counter drop_forged_peer; /* from_tunnel: not from the node that has the source; to_uplink: seems so */
    struct counter drop_mapped_address;
    struct counter drop_masq_exhausted;
    struct counter drop_masq_fragment;
    struct counter drop_masq_full;
    struct counter drop_masq_no_address;
    struct counter drop_masq_unsupported;
    struct counter drop_no_peer;       /* to_tunnel: no node has the destination */
    struct counter drop_other_network; /* from_pod: for a pod of a network to which its own is not routed */
    struct counter drop_spoofed_address;
    struct counter drop_spoofed_arp;
    struct counter drop_spoofed_mac;
    struct counter drop_spoofed_neighbour;
    struct counter drop_vlan;
};

/* What masquerading has done, beside its outcomes: by the protocol of the flow, and how hard ports were to find. */
struct masqueraded {
    struct counter tcp_out;
    struct counter udp_out;
    struct counter icmp_out;
    struct counter other_out;
    struct counter tcp_in;
    struct counter udp_in;
    struct counter icmp_in;
    struct counter other_in;
    __u64 allocations; /* flows that got a port */
    __u64 retries;     /* probes of ports beyond the first of each */
};

/* The addresses of the local pods. Written by the agent, read by every program. */
BPF_TABLE("hash", struct addr, struct endpoint, endpoints, 1);

/* One entry: the counters of this CPU. */
BPF_TABLE("percpu_array", __u32, struct outcomes, outcomes, 1);

/* Likewise. */
BPF_TABLE("percpu_array", __u32, struct masqueraded, masqueraded, 1);

/* The devices that lead out, by interface index. Written by the agent. */
BPF_TABLE("hash", __u32, struct uplink, uplinks, 1);

/* The node's own addresses; the values are unused. Written by the agent. */
BPF_TABLE("hash", struct addr, __u8, node_addresses, 1);

/* The tunnel's device, by interface index. Written by the agent. */
BPF_TABLE("hash", __u32, struct tunnel, tunnels, 1);

/* Destinations with lanes of their own, and with those of shorter prefixes. Written by the agent. */
#define PREFIX_NATIVE 1 /* never masqueraded: the cluster, nonMasqueradeCIDRs, link-local */
#define PREFIX_STACK  2 /* for the host stack: service addresses */
#define PREFIX_NODE   4 /* the peer's own address, not its pods' */
BPF_F_TABLE("lpm_trie", struct prefix, struct lanes, prefixes, 1, BPF_F_NO_PREALLOC);

/* One entry. Written by the agent. */
BPF_TABLE("array", __u32, struct settings, settings, 1);

/* The two halves of masqueraded flows: not LRU, so that no flood of others can evict one. */
BPF_TABLE("hash", struct tuple, struct flow, flows, 1);
BPF_TABLE("hash", struct tuple, struct owner, owners, 1);

/* Ports for later fragments: of pods' datagrams, and of answers to pods before they are given back. */
BPF_TABLE("lru_hash", struct fragment, struct ports, fragments, 1);

/*
 * Flows that outsiders opened to a pod's own address, by the tuple of the pod's answers: those are not masqueraded.
 * What was answered and went on after it has a map of its own, so that a flood of first packets evicts none. The value
 * there is when one was last seen.
 */
BPF_TABLE("lru_hash", struct tuple, struct note, inbound, 1);
BPF_TABLE("lru_hash", struct tuple, __u64, conversations, 1);

/*
 * Packets that must take the host stack, because earlier ones of their flow did: the kernel's conntrack may have
 * changed those (a service address, a host port), and only it can change these back.
 */
BPF_TABLE("lru_hash", struct tuple, __u64, stack_flows, 1);
