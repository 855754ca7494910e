/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * A limit on what a pod sends. A packet waits in the queue of a device of the pod's own (ifb), which hands it back at
 * the host end behind this hook: from there on it is the host stack's.
 */
#pragma once

#include "counters.h"
#include "maps.h"
#include "parse.h"

/*
 * For an honest packet: all that the pod sends passes the queue, so that no kind of packet goes past the limit. `mark`
 * is for to_pod, if not 0 (mark.h).
 */
static int shape(struct __sk_buff *skb, struct packet *packet, __u32 mark)
{
    if (mark)
        skb->mark = mark;
    count(skb, OUTCOME(fwd_shaped));
    return bpf_redirect(packet->shaper, 0);
}

/*
 * For what a limited pod is to get from another: what it answers takes the stack, whose conntrack must have seen what
 * it answers to, or else calls it invalid, which many nodes' firewalls (kube-proxy's rules) drop.
 */
static int leave_to_stack(struct __sk_buff *skb, __u32 mark)
{
    if (!mark)
        return punt(skb, OUTCOME(punt_limited));
    skb->mark = mark;
    return punt(skb, OUTCOME(port_local));
}
