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
