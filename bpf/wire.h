/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* How large packets are on the wire. */
#pragma once

#include "parse.h"

/* In place of the size of segments: each of SCTP's has a size of its own. No UAPI header has it. */
#define GSO_BY_FRAGS 0xffff

/*
 * The largest IP packet that this one is on the wire: of a GSO packet, that is a segment. Where no program can see how
 * large those are, it is the whole: what does not fit is then the stack's, which looks at each.
 */
static __u32 wire_size(struct __sk_buff *skb, const struct packet *packet)
{
    __u32 header = sizeof(struct udphdr);
    __u8 words;

    if (!skb->gso_size || skb->gso_size == GSO_BY_FRAGS)
        return packet->size - ETH_HLEN;
    if (packet->protocol == IPPROTO_TCP && bpf_skb_load_bytes(skb, packet->header_end + 12, &words, sizeof(words)) == 0)
        header = (words >> 4) * 4;
    return packet->header_end - ETH_HLEN + header + skb->gso_size;
}
